"""Tensors as the kernels' wide loads need them. Loads of single elements go another way through Triton's compiler,
one that is slower and on Hopper (Triton 3.6) has given wrong numbers."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES, CHANNELS = 16, 16


def missing(channels: int) -> int:
    """How many channels of zeros make it a multiple of CHANNELS."""
    return -channels % CHANNELS


def aligned(x: Tensor) -> Tensor:
    """The same values (…, D), D a multiple of CHANNELS by zeros at the end, rows side by side and starting at multiples
    of BYTES; `x` itself where it is so already."""
    if missing(x.shape[-1]):
        x = torch.nn.functional.pad(x, (0, missing(x.shape[-1])))
    *steps, last = x.stride()
    if last != 1 or x.data_ptr() % BYTES:
        return x.contiguous()
    width = x.element_size()
    for step, size in zip(steps, x.shape, strict=False):
        if size > 1 and step * width % BYTES:
            return x.contiguous()
    return x


def widened(state: Tensor, rows: int, columns: int) -> Tensor:
    """A state (…, Dk, Dv) for keys with `rows` more channels and values with `columns` more."""
    return torch.nn.functional.pad(state, (0, columns, 0, rows)) if rows or columns else state
