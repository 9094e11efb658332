"""Block selection: the index, exact attention over it, and block top-k by pooled keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.attend import attend
from regard.errors import ArgumentError
from regard.patterns import causal, per_head, sliding_window
from regard.selection import BlockIndex, BlockTopK, attend_selected, mean_keys

B, HQ, HKV, D, DV, BLOCK = 2, 4, 2, 8, 6, 4
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (B, HQ, n, D), (B, HKV, m, D), (B, HKV, m, DV)
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def random_index(heads: int, n: int, m: int, query_block: int = 1) -> BlockIndex:
    keep = torch.rand(B, heads, -(-n // query_block), -(-m // BLOCK), generator=torch.Generator().manual_seed(4)) < 0.5
    keep[0, 0, 0] = False  # a query that selected nothing
    return BlockIndex.from_mask(keep, key_block=BLOCK, query_block=query_block)


def by_mask(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, visible: Tensor, scale: float = D**-0.5) -> Tensor:
    """softmax over selected ∩ visible (N, M), written out with a full map; zeros where nothing is left."""
    n, m = q.shape[2], k.shape[2]
    seen = torch.zeros(B, HQ, n, m, dtype=torch.bool)
    heads = index.blocks.shape[1]
    for b in range(B):
        for h in range(HQ):
            for i in range(n):
                own = index.blocks[b, h * heads // HQ, i // index.query_block]
                for block in own[: index.count[b, h * heads // HQ, i // index.query_block]].tolist():
                    seen[b, h, i, block * BLOCK : (block + 1) * BLOCK] = True
    logits = q @ k.repeat_interleave(HQ // HKV, 1).mT * scale
    weights = logits.masked_fill(~(seen & visible), -torch.inf).softmax(-1).nan_to_num()
    return weights @ v.repeat_interleave(HQ // HKV, 1)


@pytest.mark.parametrize("heads", [HKV, HQ])
@pytest.mark.parametrize("query_block", [1, 3])
@pytest.mark.parametrize("pattern", [None, causal()])
def test_it_is_attention_over_what_was_selected(heads: int, query_block: int, pattern, monkeypatch) -> None:
    q, k, v = make(10, 18)
    index = random_index(heads, 10, 18, query_block)
    visible = torch.ones(10, 18, dtype=torch.bool) if pattern is None else pattern.dense(10, 18)[0, 0]
    want = by_mask(q, k, v, index, visible)
    torch.testing.assert_close(attend_selected(q, k, v, index, pattern=pattern), want, **EXACT)
    monkeypatch.setattr("regard.selection.executor._STRIP", 3000)  # several strips
    torch.testing.assert_close(attend_selected(q, k, v, index, pattern=pattern), want, **EXACT)


def test_a_pattern_for_each_head_and_the_other_arguments_reach_attention() -> None:
    q, k, v = make(9, 9)
    pattern = per_head([causal(), causal() & sliding_window(3), causal() & sliding_window(5), causal()])
    everything = BlockIndex.from_mask(torch.ones(B, HKV, 9, 3, dtype=torch.bool), key_block=BLOCK)
    options = {"pattern": pattern, "scale": 0.3, "softcap": 2.0, "sinks": torch.randn(HQ, dtype=torch.float64)}
    torch.testing.assert_close(attend_selected(q, k, v, everything, **options), attend(q, k, v, **options), **EXACT)


def test_gradients_are_those_of_the_masked_map() -> None:
    leaves = [x.requires_grad_() for x in make(7, 11)]
    index = random_index(HKV, 7, 11)
    grads = []
    for out in (attend_selected(*leaves, index), by_mask(*leaves, index, torch.ones(7, 11, dtype=torch.bool))):
        grads.append(torch.autograd.grad(out.sin().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want.nan_to_num(), **EXACT)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_removed_before_blocks_are_counted(left: bool) -> None:
    q, k, v = make(14, 14)
    real = torch.ones(B, 14, dtype=torch.bool)
    real[1, slice(0, 3) if left else slice(11, 14)] = False
    select = BlockTopK(1, block=BLOCK, sinks=1, local=2)
    index = select.select(q, k, key_padding=real)
    out = attend_selected(q, k, v, index, pattern=causal(), key_padding=real)
    for b in range(B):
        row = [x[b : b + 1, :, real[b]] for x in (q, k, v)]
        alone = attend_selected(*row, select.select(*row[:2]), pattern=causal())
        torch.testing.assert_close(out[b : b + 1, :, real[b]], alone, **EXACT)


def test_index_and_mask_are_each_others_inverse() -> None:
    keep = torch.rand(B, HKV, 5, 7) < 0.4
    index = BlockIndex.from_mask(keep, key_block=BLOCK)
    assert torch.equal(index.mask(7), keep) and torch.equal(index.count, keep.sum(-1))
    assert (index.blocks.diff(dim=-1)[index.blocks[..., 1:] >= 0] > 0).all()


# ---- block top-k by pooled keys -------------------------------------------------------------------------------------


def test_the_mean_logit_of_a_block_is_the_mean_query_times_the_mean_key() -> None:
    q, k, _ = make(5, 12)
    logits = q @ k.repeat_interleave(HQ // HKV, 1).mT  # (B, Hq, N, M)
    mean_logit = logits.unflatten(3, (-1, BLOCK)).mean(-1).unflatten(1, (HKV, -1)).mean(2)
    torch.testing.assert_close(q.unflatten(1, (HKV, -1)).mean(2) @ mean_keys(k, BLOCK).mT, mean_logit, **EXACT)


def test_all_blocks_are_dense_attention() -> None:
    q, k, v = make(18, 18)
    index = BlockTopK(100, block=BLOCK, sinks=0, local=1).select(q, k)
    torch.testing.assert_close(
        attend_selected(q, k, v, index, pattern=causal()), attend(q, k, v, pattern=causal()), **EXACT
    )


@pytest.mark.parametrize(("sinks", "local", "top"), [(0, 1, 1), (4, 5, 2), (5, 4, 0), (1, 9, 3)])
def test_each_query_keeps_sinks_window_and_its_best_blocks(sinks: int, local: int, top: int) -> None:
    n = m = 30
    q, k, _ = make(n, m, seed=2)
    index = BlockTopK(top, block=BLOCK, sinks=sinks, local=local).select(q, k)
    got = index.mask(8)
    for b in range(B):
        for h in range(HKV):
            for p in range(n):
                tokens_kept = {t for t in range(p + 1) if t < sinks or t > p - local}
                want = {t // BLOCK for t in tokens_kept}
                free = [j for j in range((p + 1) // BLOCK) if j not in want]
                scores = {
                    j: sum((q[b, h * 2 + g, p] @ k[b, h, t]).item() for g in range(2) for t in range(j * 4, j * 4 + 4))
                    for j in free
                }
                want |= set(sorted(free, key=lambda j: -scores[j])[:top])
                assert set(got[b, h, p].nonzero().flatten().tolist()) == want, (b, h, p)


def test_decoding_with_kept_mean_keys_chooses_as_the_whole_prompt_does() -> None:
    q, k, _ = make(25, 25)
    rule = BlockTopK(2, block=BLOCK, sinks=4, local=5)
    whole = rule.select(q, k).mask(7)
    for p in (0, 3, 4, 17, 24):
        one = rule.select(q[:, :, p : p + 1], k[:, :, : p + 1], block_keys=mean_keys(k[:, :, : p + 1], BLOCK))
        assert torch.equal(one.mask(7)[:, :, 0], whole[:, :, p])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("top_blocks", lambda q, k, v: BlockTopK(-1)),
        ("local", lambda q, k, v: BlockTopK(1, local=0)),
        ("k", lambda q, k, v: BlockTopK(1).select(q, k[..., :3])),
        ("q_positions", lambda q, k, v: BlockTopK(1).select(q, k[:, :, :3])),
        ("block_keys", lambda q, k, v: BlockTopK(1, block=4).select(q, k, block_keys=mean_keys(k, 2))),
        ("index", lambda q, k, v: attend_selected(q, k, v, random_index(HKV, 3, 9))),
        ("index", lambda q, k, v: attend_selected(q, k[:, :, :5], v[:, :, :5], random_index(HKV, 5, 50))),
        ("blocks", lambda q, k, v: BlockIndex(torch.zeros(1, 1, 1, 1).long(), torch.zeros(1).long(), 4)),
        ("key_block", lambda q, k, v: BlockIndex(torch.zeros(1, 1, 1, 1).long(), torch.zeros(1, 1, 1).long(), 0)),
    ],
)
def test_bad_input_is_named(argument: str, call) -> None:
    with pytest.raises(ArgumentError, match=rf"^{argument}: got"):
        call(*make(5, 9))


def test_blocks_out_of_order_are_refused() -> None:
    q, k, v = make(1, 9)
    index = BlockIndex(torch.tensor([2, 0]).expand(B, HKV, 1, 2), torch.full((B, HKV, 1), 2), BLOCK)
    with pytest.raises(ArgumentError, match="ascend"):
        attend_selected(q, k, v, index)
