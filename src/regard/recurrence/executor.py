"""Which executor runs a recurrence: plain torch, or the Triton kernels."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.errors import UnknownNameError, UnsupportedError

Executor = Literal["auto", "torch", "triton"]
MAX_DIM = 256  # channels of a key that the kernels take
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_announced: set[str] = set()


def without_triton(q: Tensor) -> str | None:
    """Why no Triton kernel can run on the device of `q`; None when it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels run on CUDA (or anywhere, slowly, under TRITON_INTERPRET=1)"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels of matrix states cannot serve these shapes and dtypes; None when they can."""
    if q.shape[-1] > MAX_DIM:
        return f"q's head dim is {q.shape[-1]}; they take at most {MAX_DIM}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        return f"they take q, k and v in one of float16, bfloat16, float32, not {q.dtype}, {k.dtype}, {v.dtype}"
    return None


def fused(executor: Executor, q: Tensor, refusal: str | None) -> bool:
    """Whether the kernels are to run, given why they refuse (None: they do not).

    "auto" takes them on CUDA and says once when it cannot; "triton" insists and raises UnsupportedError; "torch" never.
    """
    if executor not in get_args(Executor):
        raise UnknownNameError("executor", str(executor), get_args(Executor))
    if executor == "triton":
        if refusal is not None:
            raise UnsupportedError(f"executor='triton' refuses: {refusal}; executor='torch' serves it")
        return True
    if executor == "torch" or not q.is_cuda:
        return False
    # float64 is asked for on purpose
    if refusal is not None and q.dtype != torch.float64 and refusal not in _announced:
        _announced.add(refusal)
        warnings.warn(
            f"this recurrence runs in plain torch on a GPU because its kernels refuse: {refusal}", stacklevel=4
        )
    return refusal is None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
