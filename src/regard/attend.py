"""Exact attention: one function for every pattern, score, position and ragged cache; and the exact merge of parts."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

from torch import Tensor

from regard.errors import ArgumentError, UnsupportedError, require
from regard.kernels.dispatch import Explanation, dispatch
from regard.kernels.merge import apply_sinks, merge
from regard.kernels.positions import check_extent, existing, positions
from regard.kernels.request import Normalizer, Request, ScoreFunction
from regard.patterns.checks import is_number
from regard.shapes import (
    Heads,
    KeyLengths,
    KeyPadding,
    KeyPositions,
    Keys,
    LogSumExp,
    Queries,
    QueryPositions,
    Sinks,
    Values,
    check_finite,
    check_qkv,
    check_tensor,
)

if TYPE_CHECKING:
    from regard.patterns import Pattern

__all__ = ["Explanation", "apply_sinks", "attend", "merge"]


class AttendOptions(TypedDict, total=False):
    """The keyword arguments of `attend` that do not change what it returns."""

    pattern: Pattern | None
    score: ScoreFunction | None
    normalizer: Normalizer | Literal["softmax"] | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    key_padding: Tensor | None
    q_positions: Tensor | None
    kv_positions: Tensor | None
    kv_lengths: Tensor | None
    backend: str
    validate: bool


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[AttendOptions]) -> Tensor: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[AttendOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, explain: Literal[True], **options: Unpack[AttendOptions]
) -> tuple[Tensor, Explanation]: ...
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, explain: bool = False, **options: Unpack[AttendOptions]
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Explanation] | tuple[Tensor, Tensor, Explanation]: ...
def attend(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    pattern: Pattern | None = None,
    score: ScoreFunction | None = None,
    normalizer: Normalizer | Literal["softmax"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Sinks | None = None,
    key_padding: KeyPadding | None = None,
    q_positions: QueryPositions | None = None,
    kv_positions: KeyPositions | None = None,
    kv_lengths: KeyLengths | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    explain: bool = False,
    validate: bool = False,
) -> Heads | tuple[Heads, LogSumExp] | tuple[Heads, Explanation] | tuple[Heads, LogSumExp, Explanation]:
    """softmax(mask(score(c·tanh(scale·q·kᵀ / c)))) · v, exactly, and never a whole map where it would not fit.

    Shapes: q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), Hq a multiple of Hkv; returns (B, Hq, N, Dv) in the
    dtype of q. Softmax statistics are held in float32, or float64 for float64 inputs.

    pattern: who may attend to whom, over positions (`regard.patterns`); None = every query sees every key.
    score(logits, b, h, i, j): an elementwise map on the soft-capped logits; b, h, i, j are the batch row, query head,
        query position and key position, long tensors that broadcast to the logits (scalars in the flex executor).
    normalizer(logits, visible) -> weights, both (B, Hq, n, M), in place of softmax; reference executor only.
    scale: multiplies q·k, 1/√D by default. softcap: the c above, > 0.
    sinks (Hq,): a learned logit per head whose share of the softmax is dropped (GPT-OSS, OpenAI 2025).
    key_padding (B, M) bool, True = a real token.
    q_positions (B, N), kv_positions (B, M) or (B, Hkv, M) integers ≥ 0: the number of each token among its row's real
        tokens. By default keys count the real tokens of their row, and the queries are the last N columns.
        Queries need positions of their own where a pattern or score is given and N > M, or kv_lengths, or per-head
        kv_positions are given.
    kv_lengths (B, Hkv): slots from there on do not exist; their memory may hold anything, NaN included.
    return_lse: also the log-sum-exp (B, Hq, N) of the logits over visible keys, for `merge`. With sinks it counts the
        sink: it is always the logarithm of what the weights were divided by. Give sinks to one part of a merge only.
    backend: "auto" or the name of an executor. explain: also an Explanation of who ran and why.
    validate: raise NotFiniteError for NaN or infinity in q, or in k or v where a key exists, and check the values of
        positions and lengths on a GPU too (this waits for the device; off the GPU they are always checked).

    A query that may attend to nothing gets zeros and −inf (with sinks: the sink), and zero gradients. What padding
    queries get is finite and otherwise unspecified.

    Returns out, or a tuple of out, then lse, then the Explanation, as asked for.
    Raises ArgumentError, UnknownNameError (backend), UnsupportedError, NotFiniteError.
    """
    check_qkv(q, k, v)
    batch, heads = q.shape[:2]
    if isinstance(normalizer, str):
        require(normalizer == "softmax", "normalizer", repr(normalizer), "'softmax' or a callable")
        normalizer = None
    require(normalizer is None or callable(normalizer), "normalizer", repr(normalizer), "'softmax' or a callable")
    require(score is None or callable(score), "score", repr(score), "a callable")
    for name, value in (("scale", scale), ("softcap", softcap)):
        require(value is None or _is_finite(value), name, repr(value), "a finite number")
    require(softcap is None or softcap > 0, "softcap", softcap, "a finite number > 0")
    if sinks is not None:
        check_tensor("sinks", sinks, ((heads,),), "float", q)
    if pattern is not None:
        if isinstance(pattern, type) or not hasattr(pattern, "facts"):
            raise ArgumentError("pattern", repr(pattern), "a pattern, such as regard.patterns.causal()")
        pattern = pattern.to(q.device)
        facts = pattern.facts
        for what, own, asked in (("heads", facts.heads, heads), ("rows", facts.rows, batch)):
            require(own in (None, asked), "pattern", f"one for {own} {what}", f"one for the {asked} {what} of q")
    look = validate or not q.is_cuda
    exists = existing(q, k, key_padding, kv_lengths, look)
    ordered = pattern is not None or score is not None
    i, j, aligned = positions(q, k, key_padding, q_positions, kv_positions, kv_lengths, exists, ordered, look)
    if pattern is not None and pattern.facts.extent is not None:
        check_extent(pattern, i, j, exists, aligned)
    if validate:
        check_finite("q", q)
        for name, x in (("k", k), ("v", v)):
            check_finite(name, x, None if exists is None else exists.expand(x.shape[:3]))
    request = Request(
        q=q,
        k=k,
        v=v,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        q_positions=i,
        kv_positions=j,
        pattern=None if _is_full(pattern) else pattern,
        score=score,
        normalizer=normalizer,
        softcap=None if softcap is None else float(softcap),
        sinks=sinks,
        exists=exists,
        aligned=aligned,
        return_lse=return_lse,
    )
    out, lse, explanation = dispatch(request, backend)
    if return_lse and lse is None:
        raise UnsupportedError(f"backend={explanation.executor!r} returned no log-sum-exp")
    if return_lse and explain:
        assert lse is not None
        return out, lse, explanation
    if return_lse:
        assert lse is not None
        return out, lse
    return (out, explanation) if explain else out


def _is_finite(x: object) -> bool:
    if isinstance(x, Tensor):
        return x.numel() == 1 and not x.is_complex() and math.isfinite(x)
    return is_number(x) and math.isfinite(x)


def _is_full(pattern: Pattern | None) -> bool:
    return pattern is None or pattern == _full()


@cache
def _full() -> Pattern:
    from regard.patterns import full

    return full()
