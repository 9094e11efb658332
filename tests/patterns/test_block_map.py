"""Block maps and costs against the dense rule; lists, sizes, speed and memory."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.strategies import POSITIONS, Case, by_hand, composition, pooled
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from regard.patterns import (
    EMPTY,
    FULL,
    PARTIAL,
    Pattern,
    attention_sink,
    causal,
    documents,
    full,
    per_head,
    segments,
    sliding_window,
)

streaming = causal() & (sliding_window(1024) | attention_sink(4))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, int]]:
    """n, m, q_offset and block sizes, the positions staying within the ids."""
    n, m = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    offset = draw(st.integers(0, POSITIONS - 24))
    return n, m, offset, (draw(st.integers(1, 9)), draw(st.integers(1, 9)))


@settings(max_examples=60, deadline=None)
@given(case=composition, layout=layouts())
def test_map_and_cost_against_dense(case: Case, layout: tuple[int, int, int, tuple[int, int]]) -> None:
    p, (n, m, offset, block) = case[0], layout
    dense = by_hand(case, n, m, offset)
    assert torch.equal(p.dense(n, m, q_offset=offset), dense)
    exact = pooled(dense, block)

    sound = p.block_map(n, m, block=block, q_offset=offset)
    told = sound.expand()
    assert told.shape == exact.shape and (sound.n, sound.m, sound.block, sound.q_offset) == (n, m, block, offset)
    assert torch.equal(told[told != PARTIAL], exact[told != PARTIAL])
    assert not p.exact or torch.equal(told, exact)

    refined = p.block_map(n, m, block=block, q_offset=offset, refine=True)
    assert torch.equal(refined.expand(), exact)
    assert refined.density == pytest.approx(float((exact != EMPTY).double().mean()))

    cost = p.cost(n, m, block=block, q_offset=offset, head_dim=16)
    assert (cost.entries, cost.all_entries) == (int(dense.sum()), dense.numel())
    assert (cost.full, cost.partial) == (int((exact == FULL).sum()), int((exact == PARTIAL).sum()))
    assert (cost.touched, cost.tiles) == (cost.full + cost.partial, exact.numel())
    assert cost.flops == 4 * 16 * int(dense.sum())
    touched = (exact != EMPTY).repeat_interleave(block[0], 2)[:, :, :n].repeat_interleave(block[1], 3)[..., :m]
    assert cost.tile_flops == 4 * 16 * int(touched.sum())
    assert cost.density == pytest.approx(float(dense.double().mean()))


def test_cost_of_heads_rows_and_nothing() -> None:
    assert causal().cost(4, heads=3, batch=2, block=2).entries == 6 * 10
    assert causal().cost(4, block=2).speedup_bound == pytest.approx(16 / 12)
    assert per_head([causal(), full()]).cost(4, block=2).entries == 10 + 16
    assert (~full()).cost(4, block=2).speedup_bound == float("inf")
    assert str(causal().cost(4, block=2)).startswith("10 of 16 entries (62.50%), 3 of 4 tiles (1 full)")


def test_queries_are_the_last_positions() -> None:
    p = causal() & sliding_window(3)
    assert torch.equal(p.dense(4, 20), p.dense(20)[:, :, -4:])
    assert torch.equal(p.dense(1, 20, q_offset=7)[0, 0, 0], p.dense(20)[0, 0, 7])
    assert torch.equal(p.block_map(4, 20, block=(4, 5)).expand(), p.block_map(20, block=(4, 5)).expand()[:, :, -1:])


def test_heads_are_mapped_once() -> None:
    a, b = causal() & sliding_window(3), causal()
    p = per_head([a, b, a, a])
    mapped = p.block_map(20, block=4)
    assert mapped.kinds.shape[1] == 2 and mapped.head_index.tolist() == [0, 1, 0, 0]
    assert torch.equal(mapped.expand(), pooled(p.dense(20), (4, 4)))
    assert causal().block_map(20, block=4, heads=6).expand().shape[1] == 6


def test_heads_that_differ_in_ids_alone_are_kept_apart() -> None:
    """They are equal as structures, so equality must not decide here."""
    one, other = segments([10, 10]), segments([4, 16])
    assert one == other
    p = per_head([one, other, one])
    mapped = p.block_map(20, block=4)
    assert mapped.head_index.tolist() == [0, 1, 0]
    assert torch.equal(mapped.expand(), pooled(p.dense(20), (4, 4)))
    assert torch.equal(p.dense(20)[0, 1], other.dense(20)[0, 0])


@pytest.mark.parametrize(
    "p", [streaming, per_head([causal(), sliding_window(9, right=4)]), segments([30, 60, 10])], ids=repr
)
def test_key_block_lists(p: Pattern) -> None:
    mapped = p.block_map(100, block=(16, 8))
    lists, kinds = mapped.key_blocks(), mapped.expand()
    assert lists.kv_indices.shape[-1] == 13 and lists.kv_indices.dtype == lists.kv_num_blocks.dtype == torch.int32
    for count, indices, kind in (
        (lists.kv_num_blocks, lists.kv_indices, PARTIAL),
        (lists.full_kv_num_blocks, lists.full_kv_indices, FULL),
    ):
        for h in range(kinds.shape[1]):
            for q in range(kinds.shape[2]):
                named = indices[0, h, q, : count[0, h, q]].tolist()
                assert named == [k for k in range(13) if kinds[0, h, q, k] == kind]
    flex = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(16, 8), mask_mod=p.rule, seq_lengths=(100, 100))
    assert torch.equal(flex.to_dense().bool(), kinds != EMPTY)


@pytest.mark.parametrize(
    "p", [streaming, ~documents(torch.arange(80).view(2, 40) // 7) & per_head([causal(), full()])], ids=repr
)
def test_rule_serves_as_a_flex_mask(p: Pattern) -> None:
    """Scalars under vmap, as FlexAttention calls it, which takes no bound method: it counts `self`."""
    drawn = create_mask(lambda b, h, i, j: p.rule(b, h, i, j), p.rows or 1, p.heads or 1, 40, 40, device="cpu")
    assert torch.equal(drawn, p.dense(40))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def test_long_map_takes_time_and_memory_of_blocks() -> None:
    """131,072²: measured 10–20 ms and a few MiB; guarded loosely, since the machine may be busy."""
    with Largest() as largest:
        mapped = streaming.block_map(131_072)
    assert mapped.kinds.numel() == 1024 * 1024
    assert largest.bytes == mapped.kinds.numel()  # uint8: nothing larger than the map itself
    times = []
    for _ in range(3):
        start = time.perf_counter()
        streaming.block_map(131_072)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
    # per query block: 8 window blocks, the diagonal, and the block of the sinks where the window has left it
    assert int((mapped.kinds != EMPTY).sum()) == sum(min(q + 1, 9) + (q >= 9) for q in range(1024))


ROWS = torch.arange(2048).view(2, 1024) // 100


@pytest.mark.gpu
@pytest.mark.parametrize("p", [streaming, ~documents(ROWS) & per_head([causal(), full()])], ids=repr)
def test_cuda_gives_the_same(p: Pattern) -> None:
    there, here = p.block_map(1024, block=64, refine=True, device="cuda"), p.block_map(1024, block=64, refine=True)
    assert there.kinds.is_cuda and torch.equal(there.expand().cpu(), here.expand())
    assert torch.equal(p.dense(1024, device="cuda").cpu(), p.dense(1024))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(there.key_blocks(), here.key_blocks(), strict=True))
    assert p.cost(1024, device="cuda") == p.cost(1024)
