"""Tile answers at true positions, and the block lists FlexAttention is given (its uncompiled form ignores them)."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import qkv

from regard import patterns as P
from regard.kernels import tiles
from regard.kernels.flex import block_mask_of
from regard.kernels.request import Request

PATTERNS = {
    "none": lambda: None,
    "causal": P.causal,
    "window and sinks": lambda: P.causal() & (P.sliding_window(5) | P.attention_sink(3)),
    "dilated": lambda: P.dilated_window(3, 4),
    "documents": lambda: P.documents(torch.tensor([[0] * 20 + [1] * 20, [3] * 8 + [2] * 32])),
    "per head": lambda: P.per_head([P.causal(), P.full(), P.sliding_window(3), P.causal()]),
}


def requests(name: str) -> list[Request]:
    """Plain, scattered by lane with missing slots, and padded."""
    q, k, v = qkv(n=21, m=37)
    plain = {"q": q, "k": k, "v": v, "scale": 1.0, "pattern": PATTERNS[name]()}
    j = torch.stack([torch.randperm(40)[:37].sort().values for _ in range(4)]).view(2, 2, 37)
    exists = torch.arange(37) < torch.tensor([[37, 9], [16, 0]])[:, :, None]
    padding = (torch.arange(37) >= torch.tensor([[5], [0]]))[:, None]
    i = torch.stack([torch.randperm(40)[:21] for _ in range(2)])
    straight = torch.arange(37)[None, None]
    return [
        Request(**plain, q_positions=straight[0, :, 16:], kv_positions=straight, aligned=True),
        Request(**plain, q_positions=i, kv_positions=j, exists=exists),
        Request(**plain, q_positions=i, kv_positions=(padding.long().cumsum(-1) - 1).clamp(min=0), exists=padding),
    ]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_answers_are_true_of_every_entry(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_AT_ONCE", at_once)
    for request in requests(name):
        visible = request.visible()
        dense = torch.ones(1, 1, 21, 37, dtype=torch.bool) if visible is None else visible
        kinds = tiles.tile_kinds(request, 4, 8).expand(2, 4, 6, 5)
        dense = dense.expand(2, 4, 21, 37)
        for r in range(6):
            for c in range(5):
                tile = dense[:, :, 4 * r : 4 * r + 4, 8 * c : 8 * c + 8].flatten(2)
                assert tile.all(-1)[kinds[:, :, r, c] == tiles.FULL].all()
                assert not tile.any(-1)[kinds[:, :, r, c] == tiles.EMPTY].any()


def test_answers_are_not_merely_partial() -> None:
    request = requests("causal")[0]
    kinds = tiles.tile_kinds(request, 4, 8)[0, 0].tolist()
    assert kinds[0] == [2, 2, 1, 0, 0] and kinds[5] == [2, 2, 2, 2, 2]


def test_a_block_without_an_existing_key_is_empty_and_one_with_a_gap_is_partial() -> None:
    kinds = tiles.tile_kinds(requests("none")[1], 21, 8)
    assert kinds[:, ::2, 0].tolist() == [[[2, 2, 2, 2, 2], [2, 1, 0, 0, 0]], [[2, 2, 0, 0, 0], [0, 0, 0, 0, 0]]]


@pytest.mark.parametrize("name", [name for name in PATTERNS if name != "none"])
def test_block_lists_hold_each_tile_once(name: str) -> None:
    for request in requests(name):
        kinds = tiles.tile_kinds(request, 8, 8)
        mask = block_mask_of(request, 8)
        for count, index, kind in (
            (mask.kv_num_blocks, mask.kv_indices, tiles.PARTIAL),
            (mask.full_kv_num_blocks, mask.full_kv_indices, tiles.FULL),
        ):
            listed = torch.zeros_like(kinds, dtype=torch.int)
            taken = torch.arange(index.shape[-1]) < count[..., None]
            listed.scatter_add_(-1, index.long(), taken.int())
            assert torch.equal(listed, (kinds == kind).int())
        assert mask.seq_lengths == (21, 37) and mask.kv_indices.dtype == torch.int32


def test_a_block_map_is_remembered_by_structure_and_lengths_only_where_it_may_be() -> None:
    plain, other, _ = requests("window and sinks")
    assert block_mask_of(plain, 8) is block_mask_of(requests("window and sinks")[0], 8)
    assert block_mask_of(plain, 8) is not block_mask_of(plain, 4)
    assert block_mask_of(other, 8) is not block_mask_of(other, 8)
    documents = requests("documents")[0]
    assert block_mask_of(documents, 8) is not block_mask_of(documents, 8)
