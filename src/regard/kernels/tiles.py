"""What a request's pattern says of whole tiles of queries × keys, at the positions that are really there."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.kernels.request import Request

EMPTY, PARTIAL, FULL = 0, 1, 2  # as the pattern algebra has them: `and` is min
_AT_ONCE = 1 << 22  # tile answers computed in one go; the int64 intermediates of a larger map would not be small


def tile_kinds(request: Request, q_block: int, k_block: int) -> Tensor:
    """uint8 (B or 1, Hq or 1, ⌈N/q_block⌉, ⌈M/k_block⌉): EMPTY, PARTIAL or FULL, never wrong, PARTIAL where in doubt.

    A tile's positions need not be neighbours: the pattern is asked about the closed range from the least to the
    largest, which holds all of them, so EMPTY and FULL remain true. A tile with a missing key is never FULL; one
    without any existing key is EMPTY. Costs time in tiles, never in N·M.
    """
    i = _blocks(request.q_positions[:, None], q_block)  # (B or 1, 1, nq, q_block)
    i0, i1 = i.amin(-1)[..., None], i.amax(-1)[..., None]
    j = _blocks(request.per_query_head(request.kv_positions), k_block)
    some = every = None
    if request.exists is None:
        j0, j1 = j.amin(-1), j.amax(-1)
    else:
        there = _blocks(request.per_query_head(request.exists), k_block)
        some, every = there.any(-1)[:, :, None, :], there.all(-1)[:, :, None, :]
        largest = torch.iinfo(j.dtype).max
        j0 = j.masked_fill(~there, largest).amin(-1)
        j1 = j.masked_fill(~there, -1).amax(-1)
        j0 = torch.minimum(j0, j1).clamp(min=0)  # a block without a key: any legal range, its answer is not used
        j1 = j1.clamp(min=0)
    j0, j1 = j0[:, :, None, :], j1[:, :, None, :]
    across = j0.shape[0] * j0.shape[1] * j0.shape[3]
    pattern = request.pattern
    if pattern is not None:
        across *= (pattern.rows or 1) * (pattern.heads or 1)
    step = max(1, _AT_ONCE // max(across, 1))
    strips = []
    for start in range(0, i0.shape[2], step):
        lo, hi = i0[:, :, start : start + step], i1[:, :, start : start + step]
        kinds = _ask(request, lo, hi, j0, j1)
        if some is not None and every is not None:
            kinds = torch.where(every, kinds, kinds.clamp(max=PARTIAL))
            kinds = torch.where(some, kinds, torch.zeros_like(kinds))
        strips.append(kinds)
    return torch.cat(strips, dim=2)


def _ask(request: Request, i0: Tensor, i1: Tensor, j0: Tensor, j1: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(i0.shape, j0.shape)
    pattern, device = request.pattern, i0.device
    if pattern is None:
        return torch.full(shape, FULL, dtype=torch.uint8, device=device)
    b = torch.arange(request.q.shape[0] if pattern.batched else 1, device=device)[:, None, None, None]
    h = torch.arange(request.q.shape[1] if pattern.heads is not None else 1, device=device)[None, :, None, None]
    kinds = pattern.tiles(b, h, i0, i1, j0, j1)
    return kinds.expand(torch.broadcast_shapes(kinds.shape, shape))


def _blocks(x: Tensor, block: int) -> Tensor:
    """(…, L) → (…, ⌈L/block⌉, block); the last block is filled up with its last entry, which changes no range."""
    count = -(-x.shape[-1] // block)
    index = torch.arange(count * block, device=x.device).clamp(max=x.shape[-1] - 1)
    return x[..., index].unflatten(-1, (count, block))
