"""The Triton block-sparse kernels as an executor: exact attention under any pattern, forward and backward, on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard.kernels.request import Request
from regard.patterns import full

if TYPE_CHECKING:
    from regard.kernels.triton.tile_lists import Tiles

HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refuses(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None when they can."""
    q, v = request.q, request.v
    if find_spec("triton") is None:
        return "triton is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels run on CUDA (or anywhere, slowly, under TRITON_INTERPRET=1)"
    for name, size in (("q", q.shape[3]), ("v", v.shape[3])):
        if size not in HEAD_DIMS:
            return f"{name}'s head dim is {size}; it takes {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES:
        return f"it computes in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {q.dtype}"
    return unserved(request)


def unserved(request: Request) -> str | None:
    """What no block-sparse kernel of ours takes, whatever the machine; None for a request without it."""
    q = request.q
    for name in ("score", "normalizer", "softcap", "exists"):
        if getattr(request, name) is not None:
            return f"it takes no {'key padding or missing keys' if name == 'exists' else name}"
    if not request.aligned:
        return "it takes no positions of their own"
    if q.shape[2] > request.k.shape[2]:
        return f"{q.shape[2]} queries are more than {request.k.shape[2]} keys"
    if request.scale <= 0:
        return f"scale is {request.scale}; it takes a positive one"
    return None


def tiles_for(request: Request) -> Callable[[tuple[int, int]], Tiles]:
    """From a block to the lists of the request's pattern."""
    from regard.kernels.triton.tile_lists import tiles_of

    q, m = request.q, request.k.shape[2]
    pattern = request.pattern if request.pattern is not None else full()

    def tiles(block: tuple[int, int]) -> Tiles:
        return tiles_of(pattern, q.shape[2], m, batch=q.shape[0], heads=q.shape[1], block=block, device=q.device)

    return tiles


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with one more logit per head, sinks (Hq,), whose value is zero."""
    if sinks is None:
        return out, lse
    sinks = sinks.to(lse.dtype)[None, :, None]
    nothing = torch.isneginf(lse) & torch.isneginf(sinks)  # neither a key nor a sink: −inf − (−inf) is no number
    held = lse.masked_fill(nothing, 0.0)
    share = torch.sigmoid(held - sinks)[..., None]
    return (out * share).to(out.dtype), torch.logaddexp(held, sinks).masked_fill(nothing, -torch.inf)


@torch.compiler.disable  # its launches are Python's; torch.compile goes on around it
def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) float32."""
    from regard.kernels.triton.block_sparse import LONG, LONG_ROW, SHORT, BlockSparse, launches

    q, k, v = request.q, request.k, request.v
    tiles = tiles_for(request)
    how = launches(max(q.shape[3], v.shape[3]), q.dtype)
    if how.forward == SHORT and tiles(SHORT.block).touched * k.shape[2] >= LONG_ROW:
        how = replace(how, forward=LONG)
    with torch.cuda.device_of(q):  # kernels are launched on the current device, wherever their tensors lie
        out, lse = BlockSparse.apply(q, k, v, tiles, request.scale, how)
    return with_sinks(out, lse, request.sinks)
