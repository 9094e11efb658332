"""In which order the blocks of a pattern are worked on, so that all multiprocessors finish together.

Programs are persistent: the r-th of P takes works r, r + P, r + 2P, … Works come heaviest first, every other round
backwards. Where all are equally heavy they keep their order, neighbours side by side.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from regard.kernels.triton.tile_lists import Tiles

SHORTEST = 64
"""Tiles of a piece at least: shorter ones cost more to add than they save."""


WHOLE = 1 << 30
"""The end of a work that is no piece: beyond all tiles."""


class KeyWorks(NamedTuple):
    """works (W, 6) int32 and cuts (C, 3) int32 as `backward_keys` and `add_pieces` take them; how many pieces."""

    works: Tensor
    cuts: Tensor
    pieces: int


_queries: WeakKeyDictionary[Tiles, Tensor] = WeakKeyDictionary()
_keys: WeakKeyDictionary[Tiles, dict[int, KeyWorks]] = WeakKeyDictionary()


def query_works(tiles: Tiles, programs: int) -> Tensor:
    """(B·H·blocks,) int32: head · blocks + block."""
    if tiles not in _queries:
        weight = tiles.by_query.visits[tiles.mask_of.long()].flatten()
        _queries[tiles] = _dealt(weight.argsort(descending=True, stable=True), programs).int()
    return _queries[tiles]


def key_works(tiles: Tiles, kv_heads: int, batch: int, programs: int) -> KeyWorks:
    """Every block of every key head, cut into pieces where its tiles are more than half of a program's share."""
    made = _keys.setdefault(tiles, {})
    if kv_heads not in made:
        visits = tiles.by_key.visits[tiles.mask_of.long()]
        visits = visits.view(batch * kv_heads, -1, visits.shape[-1]).transpose(1, 2).flatten(0, 1).contiguous()
        limit = max(SHORTEST, -(-int(visits.sum()) // (2 * programs)))
        made[kv_heads] = _cut(visits, limit, programs)
    return made[kv_heads]


def _cut(visits: Tensor, limit: int, programs: int) -> KeyWorks:
    """visits (places, group) long: tiles of each place, by the heads that share its keys. No piece spans two heads."""
    group, device = visits.shape[1], visits.device
    whole = (visits.sum(1) <= limit).nonzero()[:, 0]
    works = torch.tensor([0, 0, group, 0, WHOLE, -1], device=device).expand(len(whole), -1).clone()
    works[:, 0] = whole
    cut = (visits.sum(1) > limit).nonzero()[:, 0]
    many = visits[cut]
    parts = -(-many // limit)  # (cuts, group)
    place, head = (parts > 0).nonzero(as_tuple=True)
    parts, many = parts[place, head], many[place, head]
    row = torch.arange(len(parts), device=device).repeat_interleave(parts)
    nth = torch.arange(len(row), device=device) - (parts.cumsum(0) - parts)[row]
    first = nth * (-(-many // parts))[row]
    end = torch.minimum(first + (-(-many // parts))[row], many[row])
    piece = torch.arange(len(row), device=device)
    pieces = torch.stack([cut[place[row]], head[row], head[row] + 1, first, end, piece], 1)
    size = torch.cat([visits[whole].sum(1), end - first])
    works = torch.cat([works, pieces])[_dealt(size.argsort(descending=True, stable=True), programs)]
    of_cut = torch.bincount(place[row], minlength=len(cut))
    ends = of_cut.cumsum(0)
    cuts = torch.stack([cut, ends - of_cut, ends], 1)
    return KeyWorks(works.int().contiguous(), cuts.int().contiguous(), len(row))


def _dealt(order: Tensor, programs: int) -> Tensor:
    """Every other whole round of `programs` works backwards."""
    whole = len(order) // programs * programs
    rounds = order[:whole].view(-1, programs).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return torch.cat([rounds.flatten(), order[whole:]])
