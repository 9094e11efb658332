"""The Hopper block-sparse kernels as an executor: exact attention under any pattern, with gradients, on an H100."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from regard.kernels import block_sparse
from regard.kernels.request import Request

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def refuses(request: Request) -> str | None:
    """Why these kernels cannot serve the request; None when they can."""
    q, v = request.q, request.v
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "its kernels run on Hopper GPUs (compute capability 9)"
    if not _gluon():
        return "this Triton has no Gluon for Hopper; 3.6 has"
    for name, size in (("q", q.shape[3]), ("v", v.shape[3])):
        if size not in HEAD_DIMS:
            return f"{name}'s head dim is {size}; it takes {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in DTYPES:
        return f"it computes in {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}, not {q.dtype}"
    return block_sparse.unserved(request)


@torch.compiler.disable  # its launches are Python's; torch.compile goes on around it
def run(request: Request) -> tuple[Tensor, Tensor | None]:
    """out (B, Hq, N, Dv) and lse (B, Hq, N) float32."""
    from regard.kernels.hopper.block_sparse import HopperBlockSparse

    tiles = block_sparse.tiles_for(request)
    with torch.cuda.device_of(request.q):  # kernels are launched on the current device, wherever their tensors lie
        out, lse = HopperBlockSparse.apply(request.q, request.k, request.v, tiles, request.scale)
    return block_sparse.with_sinks(out, lse, request.sinks)


@cache
def _gluon() -> bool:
    try:
        return find_spec("triton.experimental.gluon.nvidia.hopper") is not None
    except ModuleNotFoundError:
        return False
