"""torch's FlexAttention, told by tile answers which blocks to visit: compiled on a GPU, unfused off it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from regard.kernels.merge import apply_sinks
from regard.kernels.request import Request
from regard.kernels.tiles import FULL, PARTIAL, tile_kinds

_ATTENTION = cast(Callable[..., Any], flex_attention)  # its overloads know no result with log-sum-exp
BLOCK = 128
_DECODED = 16  # queries beyond which torch's kernel for decoding, its choice up to 127, may fail to compile
_KERNELS = 1024  # compiled kernels before torch refuses
_REMEMBERED = 8  # block maps: four int32 lists of (heads that differ) × (N/128) × (M/128) entries each
_remembered: dict[Hashable, BlockMask] = {}


def refuses(request: Request) -> str | None:
    """Why FlexAttention cannot serve this, or None."""
    q, width = request.q, request.v.shape[3]
    if request.normalizer is not None:
        return "FlexAttention has no normalizer but softmax"
    if q.device.type not in ("cpu", "cuda"):
        return f"FlexAttention is not used here on device {q.device.type}"
    if not q.is_cuda:
        return "FlexAttention has no backward off the GPU" if request.needs_grad else None
    if q.dtype == torch.float64:
        return "compiled FlexAttention has no float64"
    if q.shape[3] < 16 or width < 16:
        return f"compiled FlexAttention needs head widths of at least 16, got {q.shape[3]} and {width}"
    return None


def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N), natural logarithm; lse is None when nothing needs it."""
    q = request.q
    k, v = request.clean_kv()
    if not q.is_cuda:  # off the GPU it refuses whatever could have a gradient, even where none is being recorded
        q, k, v = q.detach(), k.detach(), v.detach()
    block_mask = None if request.pattern is None and request.exists is None else block_mask_of(request)
    wants_lse = request.return_lse or request.sinks is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # asked for, on a CPU
        result = (_run_compiled if q.is_cuda else _ATTENTION)(
            q,
            k,
            v,
            score_mod=_score_mod(request),
            block_mask=block_mask,
            scale=request.scale,
            enable_gqa=request.group > 1,
            return_aux=AuxRequest(lse=True) if wants_lse else None,
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if q.is_cuda and q.shape[2] > _DECODED else None,
        )
    if not wants_lse:
        return result, None
    out, lse = result[0], result[1].lse
    return (out, lse) if request.sinks is None else apply_sinks(out, lse, request.sinks)


@cache
def _compiled() -> Callable[..., Any]:
    # A kernel for each length and each pattern, its numbers fixed: with free shapes torch's compiler fails on grids.
    # fullgraph: where compilation is given up, torch would else fall back to the unfused form without a word, which
    # holds the whole map.
    return torch.compile(_ATTENTION, fullgraph=True, dynamic=False)


def _run_compiled(*tensors: Tensor, **given: Any) -> Any:
    # torch's limit of eight kernels is meant for functions that should never need more; patterns may be many
    with torch._dynamo.config.patch(recompile_limit=_KERNELS, accumulated_recompile_limit=_KERNELS):
        return _compiled()(*tensors, **given)


def block_mask_of(request: Request, block: int = BLOCK) -> BlockMask:
    """FlexAttention's BlockMask from tile answers: time in tiles, never N·M.

    Remembered where it depends on the pattern's structure and the lengths alone.
    """
    pattern = request.pattern
    if not request.aligned or request.exists is not None or pattern is None or pattern.tensors():
        return _build(request, block)
    key = (pattern, request.q.shape[1:3], request.k.shape[2], request.q.device, block)
    mask = _remembered.get(key)
    if mask is None:
        while len(_remembered) >= _REMEMBERED:
            _remembered.pop(next(iter(_remembered)), None)
        with torch.inference_mode(False):  # what is made under inference mode could never serve a backward
            mask = _remembered[key] = _build(request, block)
    return mask


def _build(request: Request, block: int) -> BlockMask:
    kinds = tile_kinds(request, block, block)
    partial, full = (_lists(kinds == kind) for kind in (PARTIAL, FULL))
    return BlockMask.from_kv_blocks(
        *partial,
        *full,
        BLOCK_SIZE=(block, block),
        mask_mod=_mask_mod(request),
        seq_lengths=(request.q.shape[2], request.k.shape[2]),
    )


def _lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, nq, nk) bool → how many (B, H, nq), and which, first (B, H, nq, nk): int32."""
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _mask_mod(request: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The exact rule inside PARTIAL tiles, at the true positions of slots."""
    pattern, exists, group = request.pattern, request.exists, request.group
    at = _looker_up(request)

    def mask(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if exists is None:
            assert pattern is not None
            return pattern.rule(b, h, *at(b, h, row, column))
        there = exists[b if exists.shape[0] > 1 else 0, h // group if exists.shape[1] > 1 else 0, column]
        return there if pattern is None else there & pattern.rule(b, h, *at(b, h, row, column))

    return mask


def _score_mod(request: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """Soft cap, then score, as the reference has them."""
    softcap, score = request.softcap, request.score
    if softcap is None and score is None:
        return None
    at = _looker_up(request)

    def modify(logit: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if softcap is not None:
            logit = softcap * torch.tanh(logit / softcap)
        return logit if score is None else score(logit, b, h, *at(b, h, row, column))

    return modify


def _looker_up(request: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(b, h, row, column) → (query position, key position)."""
    if request.aligned:
        offset = request.k.shape[2] - request.q.shape[2]
        return lambda b, h, row, column: (row + offset, column)
    i, j, group = request.q_positions, request.kv_positions, request.group

    def at(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        query = i[b if i.shape[0] > 1 else 0, row]
        return query, j[b if j.shape[0] > 1 else 0, h // group if j.shape[1] > 1 else 0, column]

    return at
