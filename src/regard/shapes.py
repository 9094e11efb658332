"""The shapes of attention, as jaxtyping aliases and as checks that name what is wrong.

Letters: b batch, hq query heads, hkv key/value heads (hq a multiple of hkv), n queries, m keys, d width of queries and
keys, dv width of values. Keys are never repeated in memory: query head h reads key/value head h // (hq // hkv).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.errors import ArgumentError, NotFiniteError, require

Queries = Float[Tensor, "b hq n d"]
Keys = Float[Tensor, "b hkv m d"]
Values = Float[Tensor, "b hkv m dv"]
Heads = Float[Tensor, "b hq n dv"]
LogSumExp = Float[Tensor, "b hq n"]
Sinks = Float[Tensor, "hq"]
KeyPadding = Bool[Tensor, "b m"]
QueryPositions = Int[Tensor, "b n"]
KeyPositions = Int[Tensor, "b m"] | Int[Tensor, "b hkv m"]
KeyLengths = Int[Tensor, "b hkv"]


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ArgumentError unless q (B, Hq, N, D), k (B, Hkv, M, D) and v (B, Hkv, M, Dv) belong together.

    It runs at every call, so a message is only put together when it is raised.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ArgumentError(name, type(x).__name__, "a tensor")
        if x.ndim != 4:
            raise ArgumentError(name, shape(x), "four dimensions (batch, heads, length, width)")
        if not x.is_floating_point() or x.element_size() < 2:  # a float8 has no arithmetic of its own
            raise ArgumentError(name, x.dtype, "a floating-point dtype: float16, bfloat16, float32 or float64")
        if x.shape[1] == 0 or x.shape[3] == 0:
            raise ArgumentError(name, shape(x), "at least one head of width at least 1")
        if x.dtype != q.dtype:
            raise ArgumentError(name, x.dtype, f"the dtype of q, {q.dtype}")
        if x.device != q.device:
            raise ArgumentError(name, x.device, f"the device of q, {q.device}")
        if x.shape[0] != q.shape[0]:
            raise ArgumentError(name, shape(x), f"the batch size of q, {q.shape[0]}")
    if k.shape[3] != q.shape[3]:
        raise ArgumentError("k", shape(k), f"the head width of q, {q.shape[3]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ArgumentError("v", shape(v), f"the heads and length of k, {tuple(k.shape[1:3])}")
    if q.shape[1] % k.shape[1]:
        raise ArgumentError("q", f"{q.shape[1]} query heads", f"a multiple of the {k.shape[1]} key/value heads")


def check_tensor(name: str, x: Tensor, allowed: tuple[tuple[int, ...], ...], kind: str, like: Tensor) -> None:
    """Raise ArgumentError unless x has an allowed shape, is of `kind` (bool, int, float) and lies beside `like`."""
    require(isinstance(x, Tensor), name, type(x).__name__, "a tensor")
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    of_kind = {"bool": x.dtype == torch.bool, "int": whole, "float": x.is_floating_point()}[kind]
    require(of_kind, name, x.dtype, f"a dtype of kind {kind}")
    require(tuple(x.shape) in allowed, name, shape(x), "shape " + " or ".join(str(s) for s in allowed))
    require(x.device == like.device, name, x.device, f"the device of q, {like.device}")


def check_range(name: str, x: Tensor, low: int, high: int | None = None, where: Tensor | None = None) -> None:
    """Raise ArgumentError unless low ≤ x (≤ high) where `where` holds. Reads values: it waits for a GPU."""
    bad = (x < low) if high is None else (x < low) | (x > high)
    if where is not None:
        bad = bad & where
    if bool(bad.any()):
        raise ArgumentError(name, int(x[bad][0]), f"at least {low}" if high is None else f"{low} to {high}")


def check_finite(name: str, x: Tensor, where: Tensor | None = None) -> None:
    """Raise NotFiniteError when x (…, D) holds NaN or infinity where `where` (…) holds."""
    bad = ~x.isfinite().all(-1)
    if where is not None:
        bad = bad & where
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        what = "NaN" if bool(x[first].isnan().any()) else "infinity"
        raise NotFiniteError(f"{name}: got {what} at (batch, head, position) {first}; allowed: finite numbers")


def shape(x: Tensor) -> str:
    """The shape as an error shows it."""
    return f"shape {tuple(x.shape)}"
