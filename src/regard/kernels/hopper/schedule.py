"""In which order the blocks of a pattern are worked on, so that all multiprocessors finish together.

Programs are persistent: the r-th of P takes works r, r + P, r + 2P, … Works come heaviest first, those of a round to
the programs with least so far. Where all are equally heavy they keep their order, neighbours side by side.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
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
        _queries[tiles] = _dealt(weight, programs).int()
    return _queries[tiles]


def key_works(tiles: Tiles, kv_heads: int, batch: int, programs: int) -> KeyWorks:
    """Every block of every key head, cut into pieces where its tiles are many: more than half of a program's share, or
    than two other blocks have, since one long work among many short ones cannot be made up for."""
    made = _keys.setdefault(tiles, {})
    if kv_heads not in made:
        visits = tiles.by_key.visits[tiles.mask_of.long()]
        visits = visits.view(batch * kv_heads, -1, visits.shape[-1]).transpose(1, 2).flatten(0, 1).contiguous()
        each = visits.sum(1)
        usual = int(each[each > 0].median()) if bool(each.any()) else 0
        limit = max(SHORTEST, min(-(-int(each.sum()) // (2 * programs)), 2 * usual))
        made[kv_heads] = _cut(visits, limit, programs)
    return made[kv_heads]


def _cut(visits: Tensor, limit: int, programs: int) -> KeyWorks:
    """visits (places, group) long: tiles of each place, by the heads that share its keys.

    A piece is some neighbouring heads, or a part of one head that has more than `limit` by itself."""
    group, device = visits.shape[1], visits.device
    each = visits.sum(1)
    whole, cut = (each <= limit).nonzero()[:, 0], (each > limit).nonzero()[:, 0]
    works = torch.tensor([0, 0, group, 0, WHOLE, -1], device=device).expand(len(whole), -1).clone()
    works[:, 0] = whole

    many, total = visits[cut], each[cut, None]
    alone = many > limit
    wanted = -(-total // limit)  # pieces of each place; a head goes to the one in which its middle lies
    bucket = ((2 * (many.cumsum(1) - many) + many) * wanted).div(2 * total, rounding_mode="floor")
    begins = alone.clone()
    begins[:, 1:] |= alone[:, :-1] | (bucket[:, 1:] != bucket[:, :-1])
    begins[:, 0] = True
    span = begins.flatten().cumsum(0) - 1  # of each head, its span of neighbours
    tiles = torch.zeros(int(begins.sum()), dtype=torch.long, device=device).index_add_(0, span, many.flatten())
    place, head = begins.nonzero(as_tuple=True)
    size = torch.zeros_like(tiles).index_add_(0, span, torch.ones_like(span))

    lone = alone[place, head]
    parts = torch.where(lone, -(-tiles // limit), (tiles > 0).long())  # pieces of each span
    row = torch.arange(len(tiles), device=device).repeat_interleave(parts)
    split = lone[row]
    nth = torch.arange(len(row), device=device) - torch.searchsorted(row, row)
    step = -(-tiles[row] // parts[row])
    first = torch.where(split, nth * step, 0)
    end = torch.where(split, torch.minimum(first + step, tiles[row]), WHOLE)
    piece = torch.arange(len(row), device=device)
    pieces = torch.stack([cut[place[row]], head[row], head[row] + size[row], first, end, piece], 1)
    weight = torch.cat([each[whole], torch.where(split, end - first, tiles[row])])
    works = torch.cat([works, pieces])[_dealt(weight, programs)]
    of_cut = torch.bincount(place[row], minlength=len(cut))
    ends = of_cut.cumsum(0)
    cuts = torch.stack([cut, ends - of_cut, ends], 1)
    return KeyWorks(works.int().contiguous(), cuts.int().contiguous(), len(row))


def _dealt(weight: Tensor, programs: int) -> Tensor:
    """The order of works of these weights: of every round, the heaviest goes to the program that has least so far."""
    heavy = weight.cpu().numpy()
    order = np.argsort(-heavy, kind="stable")
    whole = len(order) // programs * programs
    rounds = order[:whole].reshape(-1, programs)
    dealt, load = np.empty_like(rounds), np.zeros(programs, dtype=heavy.dtype)
    for works, row in zip(rounds, dealt, strict=True):
        least_first = np.argsort(load, kind="stable")
        row[least_first] = works
        load[least_first] += heavy[works]
    dealt = dealt[:, np.argsort(load, kind="stable")]  # what is left goes to the first programs
    return torch.from_numpy(np.concatenate([dealt.ravel(), order[whole:]])).to(weight.device)
