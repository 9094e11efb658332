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


class KeyWorks(NamedTuple):
    """works (W, 4) int32 and cuts (C, 3) int32 as `backward_keys` and `add_pieces` take them; how many pieces."""

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
        visits = visits.view(batch, kv_heads, -1, visits.shape[-1]).sum(2).flatten()
        limit = max(SHORTEST, -(-int(visits.sum()) // (2 * programs)))
        made[kv_heads] = _cut(visits, limit, programs)
    return made[kv_heads]


def _cut(visits: Tensor, limit: int, programs: int) -> KeyWorks:
    """visits (places,) long: tiles of each place."""
    parts = (-(-visits // limit)).clamp_min(1)
    place = torch.arange(len(parts), device=parts.device).repeat_interleave(parts)
    nth = torch.arange(len(place), device=parts.device) - (parts.cumsum(0) - parts)[place]
    size = (-(-visits // parts))[place]
    first = nth * size
    end = torch.minimum(first + size, visits[place])
    many = parts > 1
    in_pieces = many[place]
    piece = torch.where(in_pieces, in_pieces.cumsum(0) - 1, -1)
    works = torch.stack([place, first, end, piece], 1)
    works = works[_dealt((end - first).argsort(descending=True, stable=True), programs)]
    ends = parts[many].cumsum(0)
    cuts = torch.stack([many.nonzero()[:, 0], ends - parts[many], ends], 1)
    return KeyWorks(works.int().contiguous(), cuts.int().contiguous(), int(in_pieces.sum()))


def _dealt(order: Tensor, programs: int) -> Tensor:
    """Every other whole round of `programs` works backwards."""
    whole = len(order) // programs * programs
    rounds = order[:whole].view(-1, programs).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return torch.cat([rounds.flatten(), order[whole:]])
