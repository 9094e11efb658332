"""Video in chunks with a sparse memory of frames: EnerVerse (Huang et al. 2025, arXiv 2501.01895)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError, require
from regard.patterns.algebra import Pattern, at_least
from regard.patterns.axes import Axis, Same
from regard.patterns.grid import OnGrid
from regard.patterns.order import Box, Coordinates
from regard.patterns.per_token import counted
from regard.registry import Paper, register

ENERVERSE = Paper(
    "EnerVerse: Envisioning Embodied Future Space for Robotics Manipulation", "Huang et al.", 2025, "2501.01895"
)
Layer = Literal["joint", "temporal", "spatial", "cross-view"]


@dataclass(frozen=True, eq=False)
class Remembering(Axis):
    """Frames of one chunk see each other, and the memory frames of earlier chunks.

    remembered (frames,) bool; before (frames + 1,) int32: memory frames before each.
    """

    chunk: int
    remembered: Tensor
    before: Tensor

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        of_q, of_k = q // self.chunk, k // self.chunk
        return (of_q == of_k) | (self.remembered[k] & (of_k < of_q))

    def answers(self, q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        """The last query sees the most memory. All is allowed if no key is later, and all keys it has behind it are
        memory; where it has any behind it, so has every key that is in an earlier chunk than some query."""
        a, z, c, e = (x // self.chunk for x in (q0, q1, k0, k1))
        behind = torch.minimum(k1 + 1, z * self.chunk)  # keys k0..behind−1 are in chunks before the last query's
        memory = self.before[behind] - self.before[torch.minimum(k0, behind)]
        some = ((c <= z) & (a <= e)) | (memory > 0)
        return some, (e <= a) & (memory == (behind - k0).clamp(min=0))


@dataclass(frozen=True)
class ChunkedFrames(OnGrid):
    """Layout (views, frames, tokens of a frame); which of them see each other is said by `layer`."""

    chunk: int
    layer: str
    memory: Tensor = field(compare=False, repr=False)
    counts: Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("chunk", self.chunk, 1)
        if self.layer not in get_args(Layer):
            raise UnknownNameError("layer", str(self.layer), get_args(Layer))
        object.__setattr__(self, "counts", counted(self.memory))
        self._reads(self.memory)

    def _axes(self) -> tuple[Axis, Axis, Axis]:
        views, frames, tokens = self.layout
        time = Remembering(frames, self.chunk, self.memory, self.counts)
        if self.layer == "joint":
            return Axis(views), time, Axis(tokens)
        if self.layer == "temporal":
            return Same(views), time, Same(tokens)
        across = Axis(views) if self.layer == "cross-view" else Same(views)
        return across, Same(frames), Axis(tokens)

    def grid_rule(self, q: Coordinates, k: Coordinates) -> Tensor:
        view, time, place = (axis.rule(x, y) for axis, x, y in zip(self._axes(), q, k, strict=True))
        return view & time & place

    def box_answers(self, q: Box, k: Box) -> tuple[Tensor, Tensor]:
        some = every = torch.ones((), dtype=torch.bool, device=q.there.device)
        for axis, *ranges in zip(self._axes(), q.first, q.last, k.first, k.last, strict=True):
            axis_some, axis_every = axis.answers(*ranges)
            some, every = some & axis_some, every & axis_every
        return some, every


@register(
    "enerverse",
    kind="pattern",
    families=("static-pattern",),
    paper=ENERVERSE,
    cost="per chunk (chunk + memory)·chunk pairs of frames, whatever the length",
    example=lambda: ChunkedFrames((1, 12, 2), 0, 0, 4, "joint", torch.arange(12) % 5 == 0),
    causal=False,
)
def enerverse(
    frames: int,
    chunk: int = 8,
    memory: Tensor | Iterable[int] = (),
    *,
    tokens: int = 1,
    views: int = 1,
    layer: Layer = "joint",
) -> Pattern:
    """Frames of a chunk see each other, and of earlier chunks only the memory frames.

    Tokens are views × frames × tokens of a frame, row-major. memory: numbers of the frames that are kept, or a bool
    tensor (frames,). layer: "joint" = the rule over frames for all tokens; "temporal" = the same, but only within one
    view and place; "spatial" = within one frame of one view; "cross-view" = within one frame, over all views.
    A memory frame sees what its own chunk sees. All frames in memory: block-causal; none: chunks apart; a chunk as long
    as the video: bidirectional. The last chunk may be shorter (ours). Raises ArgumentError.

    >>> enerverse(6, 2, memory=[0]).dense(6).int()[0, 0].tolist()[3:5]
    [[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]]
    """
    for name, value in (("frames", frames), ("tokens", tokens), ("views", views)):
        at_least(name, value, 1)
    return ChunkedFrames((views, frames, tokens), 0, 0, chunk, layer, _flags(memory, frames))


def _flags(memory: Tensor | Iterable[int], frames: int) -> Tensor:
    if isinstance(memory, Tensor):
        given = f"{memory.dtype}, shape {tuple(memory.shape)}"
        fits = memory.dtype == torch.bool and tuple(memory.shape) == (frames,)
        require(fits, "memory", given, f"torch.bool of shape ({frames},), or numbers of frames")
        return memory
    require(isinstance(memory, Iterable), "memory", repr(memory), "numbers of frames, or a bool tensor")
    out = torch.zeros(frames, dtype=torch.bool)
    for frame in memory:
        if not isinstance(frame, int) or isinstance(frame, bool) or not 0 <= frame < frames:
            raise ArgumentError("memory", frame, f"numbers of frames from 0 to {frames - 1}")
        out[frame] = True
    return out
