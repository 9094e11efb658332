"""Going over queries a strip at a time, so that no N × M map is ever held, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regard.kernels.request import Keys, Request
from regard.kernels.tiles import EMPTY, FULL, tile_kinds

STRIP_ELEMENTS = 1 << 24  # logits (or mask entries) of one strip, over all rows and heads: 64 MiB in float32
_KEY_BLOCK = 128
_TALLEST = 256  # queries of a strip on a CPU, where a pattern may leave most keys out: a taller strip sees more of them
_WORTH_CROPPING = 2048  # keys below which looking for the visible range costs more than it saves


class Strip(NamedTuple):
    """Some queries and the keys, a range or long indices, outside of which they see nothing."""

    rows: slice
    keys: Keys
    masked: bool
    """False when they see all of these keys."""
    blind: bool
    """False when each of them is known to see a key."""


StripFunction = Callable[[Strip], tuple[Tensor, Tensor]]


def over_strips(request: Request, height: int, strip: StripFunction, crop: bool = True) -> tuple[Tensor, Tensor]:
    """Concatenate strip(Strip) -> (out, lse) over strips of `height` queries.

    With several strips and a backward to come, each strip is computed again in the backward instead of keeping its
    weights.
    """
    n, m = request.q.shape[2], request.k.shape[2]
    masked = request.pattern is not None or request.exists is not None
    on_host = _known_on_host(request)
    waits = request.q.is_cuda and not on_host  # asking the device what is visible is not worth it for one small strip
    if masked and crop and m >= _WORTH_CROPPING and not (waits and height >= n):
        plans = _cropped(_on_host(request) if on_host else request, height)
    else:
        plans = [Strip(slice(s, min(s + height, n)), slice(0, m), masked, True) for s in range(0, n, height)]
    again = len(plans) > 1 and torch.is_grad_enabled()
    parts = [
        checkpoint(strip, plan, use_reentrant=False, preserve_rng_state=False) if again else strip(plan)
        for plan in plans
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def take(x: Tensor, keys: Keys) -> Tensor:
    """x[:, :, keys]; index_select copies whole rows, three times as fast as indexing does."""
    return x[:, :, keys] if isinstance(keys, slice) else x.index_select(2, keys)


def height_for(request: Request, lanes: int) -> int:
    """Queries per strip, when each holds `lanes` entries per key."""
    n = request.q.shape[2]
    m = request.k.shape[2]
    height = max(1, STRIP_ELEMENTS // max(1, lanes * m))
    if m >= _WORTH_CROPPING and request.pattern is not None and not request.q.is_cuda:
        height = min(height, _TALLEST)
    return min(n, height if height < 64 else height - height % 64) or 1


def _cropped(request: Request, height: int) -> list[Strip]:
    n, m = request.q.shape[2], request.k.shape[2]
    kinds = tile_kinds(request, height, _KEY_BLOCK)
    some = (kinds != EMPTY).any(0).any(0).tolist()
    filled = kinds == FULL
    every, sure = filled.all(0).all(0).tolist(), filled.any(-1).all(0).all(0).tolist()
    plans: list[Strip] = []
    for s, (seen, full) in enumerate(zip(some, every, strict=True)):
        columns = [c for c, yes in enumerate(seen) if yes] or [0]
        keys = _keys(columns, m, request.q.device)
        blocks = columns if isinstance(keys, Tensor) else range(columns[0], columns[-1] + 1)
        rows = slice(s * height, min((s + 1) * height, n))
        plans.append(Strip(rows, keys, masked=not all(full[c] for c in blocks), blind=not sure[s]))
    return plans


def _keys(columns: list[int], m: int, device: torch.device) -> Keys:
    """The keys of these blocks: a range, unless most of it would be blocks nobody sees (sinks and a far window)."""
    first, last = columns[0], columns[-1]
    if last + 1 - first <= 2 * len(columns):
        return slice(first * _KEY_BLOCK, min((last + 1) * _KEY_BLOCK, m))
    index = torch.tensor(columns)[:, None] * _KEY_BLOCK + torch.arange(_KEY_BLOCK)
    return index[index < m].to(device)


def _known_on_host(request: Request) -> bool:
    pattern = request.pattern
    return request.aligned and request.exists is None and not (pattern is not None and pattern.tensors())


def _on_host(request: Request) -> Request:
    """The same request for tile questions: aligned positions are known without asking the device."""
    n, m = request.q.shape[2], request.k.shape[2]
    i, j = torch.arange(m - n, m)[None], torch.arange(m)[None, None]
    return replace(request, q_positions=i, kv_positions=j)
