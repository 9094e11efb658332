"""What the layers around a recurrence have in common: checks, padding, positions, scan or step, and the state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from regard.errors import require
from regard.layers.base import Context, Layer, Output, Padding, Tokens, autocasting, without_padding
from regard.layers.checks import sizes
from regard.patterns import Pattern
from regard.recurrence import DiagonalState, Recurrence

RECURRENT: dict[str, Any] = {
    "families": ("recurrent",),
    "causal": True,
    "bidirectional": False,
    "cross": False,
    "patterns": False,
    "gqa": False,
    "steps": True,
}
"""What every layer on this base declares: `@mechanism(key, paper=..., cost=..., compiles=..., **RECURRENT)`."""


class RecurrentState(NamedTuple):
    """What a recurrent layer carries from call to call. Its size does not depend on how many tokens there were.

    inner: the recurrence's own state. windows: of each short convolution, its last inputs (B, K − 1, channels).
    seen (B,) long: how many real tokens each row has had.
    """

    inner: Any
    windows: tuple[Tensor, ...]
    seen: Tensor


class Read(NamedTuple):
    """What a layer makes of its tokens. inputs: for its recurrence. windows: its convolutions' next windows."""

    inputs: Any
    windows: tuple[Tensor, ...] = ()


class RecurrentLayer(Layer):
    """A layer around a recurrence: causal by nature, one sequence, decoding from a state of constant size.

    A subclass sets `mixer` (a `regard.recurrence.Recurrence`) and writes two functions:

    - `read(x, key_padding, state)`: projections, short convolutions, gates → `Read`. Padding has to be neutral in the
      inputs: decay 1, nothing written (`at_real_tokens` puts the zeros). x is 0 at padding already.
    - `write(mixed, x)`: the recurrence's output (B, H, N, Dv) → norm, gate, output projection → (B, N, C).

    inner_state: the type of the recurrence's state. windows: how many short convolutions have one.
    What all of them declare to `@mechanism` is RECURRENT.
    """

    inner_state: ClassVar[type] = DiagonalState
    windows: ClassVar[int] = 0
    mixer: Recurrence[Any, Any]

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Tokens (B, N, C) → inputs of the recurrence. state: None at the start of a sequence."""
        raise NotImplementedError

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The recurrence's output (B, H, N, Dv), and the tokens again for a gate → (B, N, C)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: RecurrentState | None = None,
    ) -> Output:
        """See `Layer.forward`. Causal by nature: pattern is None or `causal()`. The state is a RecurrentState."""
        self.check_causal(context, pattern)
        self.check_tokens(x, context, key_padding)
        self.check_state(state, RecurrentState)
        if state is not None:
            self._check_fits(state, len(x))
        x = without_padding(x, key_padding)
        inputs, windows = self.read(x, key_padding, state)
        with own_precision(x):
            if x.shape[1] == 1 and state is not None:
                inner, mixed = self.mixer.step(state.inner, inputs)
            else:
                mixed, inner = self.mixer.scan(inputs, None if state is None else state.inner)
        out = without_padding(self.write(mixed, x), key_padding)
        return Output(out, RecurrentState(inner, windows, seen(x, key_padding, state)))

    def _check_fits(self, state: RecurrentState, batch: int) -> None:
        kind = type(state.inner).__name__
        require(isinstance(state.inner, self.inner_state), "state", f"a {kind}", f"a {self.inner_state.__name__}")
        require(len(state.windows) == self.windows, "state", f"{len(state.windows)} windows", str(self.windows))
        require(state.seen.shape == (batch,), "state", f"{len(state.seen)} rows", f"{batch}, as many as x has")


def own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast out of the recurrence: its products are those of states, held in at least float32."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()


def seen(x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Tensor:
    """(B,) long: how many real tokens each row has had, those of x (B, N, C) included."""
    if key_padding is None:
        now = torch.full(x.shape[:1], x.shape[1], dtype=torch.long, device=x.device)
    else:
        now = key_padding.sum(-1)
    return now if state is None else now + state.seen


def positions(x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Tensor:
    """(B, N) long: the number of each token among all real tokens of its row, from 0. At padding it means nothing."""
    if key_padding is None:
        counted = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    else:
        counted = (key_padding.long().cumsum(-1) - 1).clamp(min=0)
    return counted if state is None else counted + state.seen[:, None]


def share_of(dim: int, numerator: int, denominator: int, heads: int, name: str) -> int:
    """Channels of one head where all heads together have dim·numerator/denominator; ArgumentError if uneven."""
    sizes(dim=dim, heads=heads)
    width, rest = divmod(dim * numerator, denominator * heads)
    allowed = f"a divisor of {numerator}/{denominator} of dim={dim}, or give {name}"
    require(rest == 0 and width >= 1, "heads", heads, allowed)
    return width


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H·D) → (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) → (B, N, H·D)."""
    return x.transpose(1, 2).flatten(2)


def at_real_tokens(x: Tensor, key_padding: Tensor | None) -> Tensor:
    """(B, H, N) or (B, H, N, D), zeros where (B, N) `key_padding` says padding: no key, no value, no log decay."""
    if key_padding is None:
        return x
    real = key_padding[:, None] if x.ndim == 3 else key_padding[:, None, :, None]
    return x.masked_fill(~real, 0.0)
