"""The Hopper kernels as far as a machine without such a GPU can tell: they compile, and all blocks are worked on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from regard.attend import attend
from regard.errors import UnsupportedError
from regard.kernels.triton.tile_lists import tiles_of
from regard.patterns import Pattern, attention_sink, causal, full, per_head, sliding_window

triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")
PATTERNS = {
    "sinks": causal() & (sliding_window(40) | attention_sink(3)),
    "by head": per_head([causal(), sliding_window(7), ~full(), causal()]),
    "nothing": ~full(),
}


@triton
def test_they_compile_for_an_h100() -> None:
    command = [sys.executable, "-m", "tests.kernels.compile_for_hopper"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.strip().splitlines()[-1])
    for name, kernel in made.items():
        assert kernel["products"] and kernel["copies"], name  # tensor cores and tensor memory copies are used
        assert kernel["shared"] <= 232448, name
        assert not kernel["serialized"], f"{name}: each product waits for the one before"
        assert not kernel["dropped"], f"{name}: loops do not carry what they should"  # Triton 3.6 did that


@pytest.mark.parametrize("name", PATTERNS)
def test_transposed_bits_are_the_bits(name: str) -> None:
    tiles = tiles_of(PATTERNS[name], 100, 100, batch=1, heads=4, block=(16, 8), device=CPU)
    eight = torch.arange(8)
    entries = ((tiles.bits.long()[..., None] >> eight) & 1).flatten(2)  # (P, BM, BN)
    turned = ((tiles.bits_by_key.long()[..., None] >> eight) & 1).flatten(2)  # (P, BN, BM)
    assert torch.equal(turned, entries[tiles.by_key.slot.long()].mT)
    assert torch.equal(tiles.by_query.slot, torch.arange(len(tiles.bits), dtype=torch.int32))


@triton
@pytest.mark.parametrize("columns", [64, 128])
def test_words_hold_the_columns_that_a_lane_holds(columns: int) -> None:
    from regard.kernels.hopper.words import lane_words

    entries = torch.rand(3, 5, columns) < 0.5
    bits = (entries.view(3, 5, -1, 8).int() << torch.arange(8)).sum(-1).to(torch.uint8)
    words = lane_words(bits)
    assert words.element_size() * 8 == columns // 4
    for lane in range(4):
        held = [c for c in range(columns) if c % 8 // 2 == lane]
        found = [(words[..., lane].int() >> place) & 1 for place in range(len(held))]
        assert torch.equal(torch.stack(found, -1).bool(), entries[..., held])
    assert lane_words(bits[:0]).numel() > 0


@triton
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("programs", [1, 5, 132])
def test_every_tile_is_worked_on_once(name: str, programs: int) -> None:
    from regard.kernels.hopper.schedule import _cut, key_works, query_works

    batch, heads, kv_heads = 2, 4, 2
    tiles = tiles_of(PATTERNS[name], 300, 300, batch=batch, heads=heads, block=(16, 8), device=CPU)
    works = query_works(tiles, programs)
    assert torch.equal(works.sort().values, torch.arange(len(works), dtype=torch.int32))

    visits = tiles.by_key.visits[tiles.mask_of.long()].view(batch * kv_heads, 2, -1).mT.flatten(0, 1)  # (places, group)
    for told in (key_works(tiles, kv_heads, batch, programs), _cut(visits, 7, programs)):
        met = torch.zeros(int(visits.max()) + 1, *visits.shape, dtype=torch.long)
        places: dict[int, int] = {}
        for place, head, head_end, first, end, piece in told.works.tolist():
            met[first:end, place, head:head_end] += 1
            if piece < 0:
                assert (head, head_end, first) == (0, 2, 0) and end > int(visits.max())
            else:
                places[piece] = place
                assert first < end and int(visits[place, head:head_end].sum()) > 0
                assert head_end == head + 1 or (first == 0 and end > int(visits.max()))
        beyond = torch.arange(len(met))[:, None, None] >= visits
        assert bool(((met == 1) | beyond).all())
        assert sorted(places) == list(range(told.pieces))
        assert {p for place, a, b in told.cuts.tolist() for p in range(a, b) if places[p] == place} == set(places)


@triton
def test_heavy_blocks_are_cut_and_come_first() -> None:
    from regard.kernels.hopper.schedule import SHORTEST, _cut

    visits = torch.tensor([[1, 2], [40 * SHORTEST, 0], [3, 0], [0, 3]])
    told = _cut(visits, SHORTEST, 4)
    sizes = (told.works[:, 4] - told.works[:, 3])[:40]
    assert told.pieces == 40 and sizes.unique().tolist() == [SHORTEST] and told.works[:40, 5].min() >= 0
    assert told.cuts.tolist() == [[1, 0, 40]]

    shared = _cut(torch.full((3, 64), 6), 192, 4)  # 64 heads of 6 tiles: two pieces of 32 heads
    assert shared.pieces == 6 and set((shared.works[:, 2] - shared.works[:, 1]).tolist()) == {32}


@triton
@pytest.mark.parametrize(
    ("window", "n", "heads", "kv_heads"),
    [(1024, 8192, 32, 8), (1024, 32768, 32, 8), (1024, 4096, 32, 8), (256, 8192, 64, 1)],
)
def test_programs_have_like_shares(window: int, n: int, heads: int, kv_heads: int) -> None:
    """No program has a tenth more to do than the mean."""
    from regard.kernels.hopper.schedule import key_works

    pattern = causal() & (sliding_window(window) | attention_sink(4))
    tiles = tiles_of(pattern, n, n, batch=1, heads=heads, block=(64, 128), device=CPU)
    told = key_works(tiles, kv_heads, 1, 132)
    works, visits = told.works.long(), tiles.by_key.visits[0].repeat(kv_heads)
    each = visits[works[:, 0]].minimum(works[:, 4]) - works[:, 3]
    load = torch.zeros(132, dtype=torch.long)
    load.index_add_(0, torch.arange(len(works)) % 132, each * (works[:, 2] - works[:, 1]))
    assert int(load.sum()) == int(visits.sum()) * (heads // kv_heads)
    assert load.max() < 1.1 * load.float().mean() and told.pieces <= 4 * 132


@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_ahead_of_each_run(name: str) -> None:
    lists = tiles_of(PATTERNS[name], 300, 300, batch=2, heads=4, block=(16, 8), device=CPU).by_key
    found = iter(lists.ahead.tolist())
    for run, run_end, part, part_end in lists.start.view(-1, 4).tolist():
        met = part_end - part
        for r in range(run, run_end):
            assert next(found) == met
            met += int(lists.count[r])
    assert next(found, None) is None


TERMS = """
import torch
from regard.kernels.hopper.backward_keys import add_pieces
from regard.kernels.hopper.block_sparse import row_terms
batch, heads, n, padded, dim = 2, 3, 100, 128, 64
out, dout = torch.randn(batch, heads, n, dim), torch.randn(batch, n, heads, dim).transpose(1, 2)
lse, dlse = torch.randn(batch, heads, n), torch.randn(batch, heads, n)
lse[0, 1, 5] = -torch.inf
base, delta = (torch.full((batch * heads, padded), torch.nan) for _ in range(2))
row_terms[(padded // 64 * batch * heads,)](
    out, dout, dlse, lse, base, delta, *out.stride()[:3], *dout.stride()[:3], n, padded, heads, ROWS=64, DV=dim,
    HAS_DLSE=True,
)
blind = lse.isneginf()
torch.testing.assert_close(delta[:, :n], (dlse - (out * dout).sum(-1)).flatten(0, 1), rtol=1e-5, atol=1e-5)
torch.testing.assert_close(base[:, :n], (-lse * 1.4426950408889634).masked_fill(blind, -torch.inf).flatten(0, 1))
assert base[:, n:].isneginf().all() and (delta[:, n:] == 0).all()
pieces, m, kv_heads, blocks = torch.randn(5, 128, dim + 32), 150, 2, 2
dk, dv = torch.full((batch, kv_heads, m, dim), torch.nan), torch.full((batch, kv_heads, m, 32), torch.nan)
cuts = torch.tensor([[1, 0, 2], [2 * 3 + 0, 2, 5]], dtype=torch.int32)  # of key head 0 block 1; of key head 3 block 0
add_pieces[(2, 4)](
    pieces, cuts, dk, dv, *dk.stride()[:3], *dv.stride()[:3], m, kv_heads, blocks, BN=128, ROWS=32, D=dim, DV=32
)
for (b, h, rows), parts in (((0, 0, slice(128, 150)), pieces[:2]), ((1, 1, slice(0, 128)), pieces[2:])):
    want = parts.sum(0)[: rows.stop - rows.start]
    torch.testing.assert_close(dk[b, h, rows], want[:, :dim])
    torch.testing.assert_close(dv[b, h, rows], want[:, dim:])
assert dk.isnan().all(-1).sum() == batch * kv_heads * m - 22 - 128
print("agree")
"""


@triton
def test_row_terms_and_sums_of_pieces() -> None:
    """The parts that are plain Triton, in its interpreter."""
    environment = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, "-c", TERMS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "agree", done.stderr[-2000:]


def test_it_says_why_it_does_not_serve() -> None:
    q = torch.zeros(1, 1, 8, 64)
    with pytest.raises(UnsupportedError, match="Hopper"):
        attend(q, q, q, pattern=_window(), backend="hopper")


def _window() -> Pattern:
    return PATTERNS["sinks"]
