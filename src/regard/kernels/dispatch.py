"""Which executor runs a request. Each says for itself what it refuses; here is only the order of asking."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from regard.errors import UnknownNameError, UnsupportedError
from regard.kernels import block_sparse, flex, hopper_sparse, sdpa
from regard.kernels.reference import attention as reference
from regard.kernels.request import Request


class Executor(Protocol):
    """A module that computes attention."""

    def refuses(self, request: Request) -> str | None:
        """Why it cannot serve this request exactly; None when it can."""

    def run(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """out (B, Hq, N, Dv) in the input dtype, and lse (B, Hq, N) where it has one."""


# A new executor is one more entry here and a place in `preference`.
EXECUTORS: MappingProxyType[str, Executor] = MappingProxyType(
    {"reference": reference, "sdpa": sdpa, "flex": flex, "triton": block_sparse, "hopper": hopper_sparse}
)

_SPARSE = ("hopper", "triton")
_EXPENSIVE = 1 << 24  # logits per head from which the reference on a GPU is announced
_TINY = 1 << 16  # logits per head up to which no kernel is worth being compiled, even once
_FEW = 64  # queries below which a kernel's block is mostly empty, and a cache's every length is a list of tiles anew
_SMALL = 1 << 22  # up to which a drawn mask beats flex, which compiles for every pattern
_LONG = 1 << 24  # from which a kernel's own speed counts more than its launch
_announced: set[str] = set()


@dataclass(frozen=True)
class Explanation:
    """Which executor ran, why it, and why those before it in the order did not."""

    executor: str
    reason: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.executor}: {self.reason}"] + [f"not {name}: {why}" for name, why in self.refused]
        return "\n".join(lines)


def preference(request: Request) -> tuple[tuple[str, ...], str]:
    """The order in which executors are asked under backend="auto", and the reason for it."""
    if not request.q.is_cuda:
        return ("sdpa", "reference", "flex"), "off the GPU torch's fused attention leads, and flex is not fused"
    n, m = request.q.shape[2], request.k.shape[2]
    compiling = torch.compiler.is_compiling()  # only sdpa and flex are traced: anything else breaks the graph
    rest = ("flex", *_SPARSE) if compiling else (*_SPARSE, "flex")
    if sdpa.fused(request):
        if request.pattern is not None and 1 < n < m and n * m > _LONG and not compiling:
            why = "for the last queries of a long row torch has FlashAttention-2 alone, which Hopper's kernels outrun"
            return ("hopper", "sdpa", "triton", "flex", "reference"), why
        return ("sdpa", *rest, "reference"), "no mask has to be drawn, so torch's fused attention leads"
    if n * m <= _TINY or n < _FEW:
        return ("sdpa", *rest, "reference"), "so small a mask is drawn before a kernel knows its tiles"
    if compiling:
        return (*rest, "sdpa", "reference"), "torch compiles flex together with what is around it"
    last = ("sdpa", "flex") if n * m <= _SMALL else ("flex", "sdpa")
    return (*_SPARSE, *last, "reference"), "it skips empty tiles and compiles nothing per pattern"


def choose(request: Request, backend: str) -> Explanation:
    """The executor for this request.

    Raises UnknownNameError for a name nobody has and UnsupportedError when the one asked for (or, under "auto", every
    one) refuses, with its reason and the executors that would serve.
    """
    if backend == "auto":
        order, why = preference(request)
        refused: list[tuple[str, str]] = []
        for name in order:
            reason = EXECUTORS[name].refuses(request)
            if reason is None:
                _announce_expensive(request, name, refused)
                return Explanation(
                    name, why if not refused else "the first in the order that serves this", tuple(refused)
                )
            refused.append((name, reason))
        raise UnsupportedError("no executor serves this: " + "; ".join(f"{name}: {reason}" for name, reason in refused))
    if backend not in EXECUTORS:
        raise UnknownNameError("backend", backend, (*EXECUTORS, "auto"))
    reason = EXECUTORS[backend].refuses(request)
    if reason is not None:
        others = [name for name, executor in EXECUTORS.items() if executor.refuses(request) is None]
        serving = f"served by: {', '.join(others)}" if others else "no executor serves this"
        raise UnsupportedError(f"backend={backend!r} refuses: {reason}; {serving}")
    return Explanation(backend, "asked for by name")


def dispatch(request: Request, backend: str) -> tuple[Tensor, Tensor | None, Explanation]:
    """Choose and run."""
    if request.q.numel() == 0 or request.k.numel() == 0:
        return *_nothing(request), Explanation("none", "there are no queries or no keys")
    explanation = choose(request, backend)
    out, lse = EXECUTORS[explanation.executor].run(request)
    return out, lse, explanation


def _announce_expensive(request: Request, name: str, refused: list[tuple[str, str]]) -> None:
    size = request.q.shape[2] * request.k.shape[2]
    if name != "reference" or not request.q.is_cuda or size < _EXPENSIVE:
        return
    reasons = "; ".join(f"{other}: {reason}" for other, reason in refused)
    if reasons not in _announced:
        _announced.add(reasons)
        warnings.warn(
            f"attend runs the plain torch reference on a GPU because no faster executor serves it ({reasons})",
            stacklevel=4,
        )


def _nothing(request: Request) -> tuple[Tensor, Tensor]:
    q, sinks = request.q, request.sinks
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=request.statistics)
    if sinks is not None:
        lse = sinks.to(lse.dtype)[None, :, None].expand(lse.shape)
    return q.new_zeros((*q.shape[:3], request.v.shape[3])), lse
