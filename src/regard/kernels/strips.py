"""Going over queries a strip at a time, so that no N × M map is ever held, forward or backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels.request import Request
from regard.kernels.tiles import EMPTY, FULL, tile_kinds

STRIP_ELEMENTS = 1 << 24  # logits (or mask entries) of one strip, over all rows and heads: 64 MiB in float32
_KEY_BLOCK = 256
_WORTH_CROPPING = 2048  # keys below which looking for the visible range costs more than it saves

StripFunction = Callable[[slice, slice, bool], tuple[Tensor, Tensor]]


def over_strips(request: Request, height: int, strip: StripFunction, crop: bool = True) -> tuple[Tensor, Tensor]:
    """Concatenate strip(rows, keys, masked) -> (out, lse) over strips of `height` queries.

    keys is the range outside of which these queries see nothing; masked is False when they see all of it. With several
    strips and a backward to come, each strip is computed again in the backward instead of keeping its weights.
    """
    n, m = request.q.shape[2], request.k.shape[2]
    single = height >= n
    plans: list[tuple[slice, slice, bool]]
    if request.pattern is None and request.exists is None:
        plans = [(slice(s, min(s + height, n)), slice(0, m), False) for s in range(0, n, height)]
    elif crop and m >= _WORTH_CROPPING and not (single and request.q.is_cuda):
        plans = _cropped(request, height)
    else:
        plans = [(slice(s, min(s + height, n)), slice(0, m), True) for s in range(0, n, height)]
    again = len(plans) > 1 and torch.is_grad_enabled()
    parts = [
        checkpoint(strip, *plan, use_reentrant=False, preserve_rng_state=False) if again else strip(*plan)
        for plan in plans
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def height_for(request: Request) -> int:
    """Queries per strip."""
    batch, heads, n, _ = request.q.shape
    height = max(1, STRIP_ELEMENTS // max(1, batch * heads * request.k.shape[2]))
    return min(n, height if height < 64 else height - height % 64) or 1


def _cropped(request: Request, height: int) -> list[tuple[slice, slice, bool]]:
    n, m = request.q.shape[2], request.k.shape[2]
    kinds = tile_kinds(request, height, _KEY_BLOCK)
    some = (kinds != EMPTY).any(0).any(0).tolist()
    every = (kinds == FULL).all(0).all(0).tolist()
    plans = []
    for s, (seen, full) in enumerate(zip(some, every, strict=True)):
        columns = [c for c, yes in enumerate(seen) if yes] or [0]
        first, last = columns[0], columns[-1]
        keys = slice(first * _KEY_BLOCK, min((last + 1) * _KEY_BLOCK, m))
        plans.append((slice(s * height, min((s + 1) * height, n)), keys, not all(full[first : last + 1])))
    return plans
