"""BaseConv: gating and a short convolution, the simplest mixer without attention.

Zoology (Arora et al. 2023, arXiv 2312.04927) brought it up, Based (Arora et al. 2024, arXiv 2402.18668) uses a variant
for most layers of its stack.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from regard.errors import UnknownNameError, require
from regard.layers.checks import sizes
from regard.layers.long_convolution import LongConvolution
from regard.layers.recurrent import Read, RecurrentLayer, RecurrentState
from regard.layers.short_convolution import ShortConvolution
from regard.registry import Paper, mechanism

PAPER = Paper(
    "Zoology: Measuring and Improving Recall in Efficient Language Models", "Arora et al.", 2023, "2312.04927"
)
Preset = Literal["based", "zoology"]


class Nothing(NamedTuple):
    """The state of a layer that has windows only."""


class Gated(NamedTuple):
    """Tokens that are mixed already: y (B, 1, N, channels)."""

    y: Tensor

    @property
    def length(self) -> int:
        return self.y.shape[2]

    def tokens(self, start: int, stop: int) -> Gated:
        """Tokens [start, stop)."""
        return self._replace(y=self.y[:, :, start:stop])


class PassedOn:
    """The recurrence of a layer whose convolutions are all there is: it hands on what was read."""

    def init(self, inputs: Gated) -> Nothing:
        """Nothing."""
        return Nothing()

    def step(self, state: Nothing, inputs: Gated) -> tuple[Nothing, Tensor]:
        """One token."""
        return state, inputs.y

    def scan(self, inputs: Gated, state: Nothing | None = None) -> tuple[Tensor, Nothing]:
        """All tokens."""
        return inputs.y, Nothing()


@mechanism(
    "base-conv",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·dim²) time, O(N·dim) memory; a state of (K − 1)·channels",
    causal=True,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
)
class BaseConv(RecurrentLayer):
    """A gate times a causal depthwise convolution of kernel_size K; the two sources' forms are two presets.

    "based": [u₁, u₂] = x W_in, y = (SiLU(h ∗ u₁) ⊙ u₂) W_out, u₁ and u₂ of width expand·dim/2, no bias.
    "zoology": y = (x W + b₁) ⊙ (h ∗ x + b₂) + x, of width dim; the last x is part of it. `expand` is not used.
    kernel_size=None: a filter as long as the sequence (`LongConvolution`, through an FFT: causal to 1e-5 in float32),
    max_length its scale of distances; the window is then all inputs so far. Zoology alternates layers of 3 and of None.

    heads is taken as every layer takes it, and changes nothing. Positions count real tokens only. It mixes K tokens a
    layer, by weights that do not depend on them: to look something up, width or depth has to grow with the length.
    """

    inner_state: ClassVar[type] = Nothing
    windows: ClassVar[int] = 1

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        preset: Preset = "based",
        kernel_size: int | None = 3,
        max_length: int = 2048,
        expand: int = 4,
    ) -> None:
        super().__init__(dim, heads)
        if preset not in get_args(Preset):
            raise UnknownNameError("preset", str(preset), get_args(Preset))
        sizes(expand=expand, max_length=max_length)
        require(expand * dim % 2 == 0, "expand", expand, f"an int ≥ 1 with expand·dim even (dim={dim})")
        self.preset = preset
        self.mixer: PassedOn = PassedOn()
        self.in_proj: nn.Module
        self.out_proj: nn.Module
        width, bias = (expand * dim // 2, False) if preset == "based" else (dim, True)
        if preset == "based":
            self.in_proj, self.out_proj = nn.Linear(dim, 2 * width, bias=False), nn.Linear(width, dim, bias=False)
        else:
            self.in_proj, self.out_proj = nn.Linear(dim, dim), nn.Identity()
        self.convolution: nn.Module
        if kernel_size is None:
            self.convolution = LongConvolution(width, bias=bias, max_length=max_length)
        else:
            self.convolution = ShortConvolution(width, kernel_size, bias=bias, activation=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """The convolution, gated."""
        window = None if state is None else state.windows[0]
        u, gate = self.in_proj(x).chunk(2, -1) if self.preset == "based" else (x, self.in_proj(x))
        mixed, following = self.convolution(u, key_padding, window)
        mixed = silu(mixed) if self.preset == "based" else mixed
        return Read(Gated((mixed * gate)[:, None]), (following,))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The output projection, or the residual."""
        return self.out_proj(mixed[:, 0]) if self.preset == "based" else mixed[:, 0] + x

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """Each token is a gated sum over itself and the two before it."""
        layer = cls(8, 2).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        u, gate = layer.in_proj(x).split(16, -1)
        assert isinstance(layer.convolution, ShortConvolution)
        back = [pad(u, (0, 0, i, 0))[:, :11] * layer.convolution.weight[:, 2 - i] for i in range(3)]
        return layer(x).out, (silu(sum(back[1:], back[0])) * gate) @ layer.out_proj.weight.T  # type: ignore[operator]

    def extra_repr(self) -> str:
        """What is not a parameter."""
        known: dict[str, Any] = {"preset": self.preset}
        return ", ".join(f"{name}={value}" for name, value in known.items())
