"""The contract of a recurrence: a state instead of a cache.

A paper's mixer is described by what it reads at each token (`Inputs`) and by what it carries (`State`), both
NamedTuples, so that a mixer without a query (HGRN), with a tensor state (ConvS5), or whose state holds an open chunk
(Titans) fits the same three functions. Non-causal mixers have `mix` only.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar

from torch import Tensor

from regard.errors import ArgumentError


class TokenInputs(Protocol):
    """What a recurrence reads. A NamedTuple of tensors that knows its own time axis.

    `length`: how many tokens. `tokens(start, stop)`: the same inputs, of these tokens only, the time axis kept; what
    does not vary in time (a fixed decay) is passed on unchanged.
    """

    @property
    def length(self) -> int: ...

    def tokens(self, start: int, stop: int) -> Self: ...


Inputs = TypeVar("Inputs", bound=TokenInputs, contravariant=True)
State = TypeVar("State", bound=tuple[Any, ...])


class Recurrence(Protocol[Inputs, State]):
    """A causal mixer. `step` repeated over the tokens is the definition; `scan` is the same function, made fast.

    Where the chunk is part of the model, not only of the algorithm, the open chunk lives in the state, so that
    step = scan holds all the same. States are held in at least float32. The time axis of one token is kept (length 1),
    in what `step` takes and in what it returns. Outputs come back in the dtype of the values, so it is a floating-point
    one. What does not fit is an ArgumentError.
    """

    def init(self, inputs: Inputs) -> State:
        """The state before the first token: batch, sizes, device and dtype are read off `inputs`, no token is."""
        ...

    def step(self, state: State, inputs: Inputs) -> tuple[State, Tensor]:
        """One token: inputs of length 1 → (next state, output of length 1)."""
        ...

    def scan(self, inputs: Inputs, state: State | None = None) -> tuple[Tensor, State]:
        """Any number of tokens, from `state` (None = `init`) → (outputs, final state)."""
        ...


class Mixer(Protocol[Inputs]):
    """A mixer without one direction of time (bidirectional or 2-D scans, global convolutions): all tokens at once."""

    def mix(self, inputs: Inputs) -> Tensor:
        """All tokens → all outputs."""
        ...


def check_one_token(inputs: TokenInputs) -> None:
    """Raise ArgumentError unless the inputs hold one token, as `step` takes them. Their shapes have been checked."""
    if inputs.length != 1:
        raise ArgumentError("inputs", f"{inputs.length} tokens", "one token in a step; `scan` takes any number")


def check_state(state: Any, kind: type) -> None:
    """Raise ArgumentError unless the state is of the kind that the recurrence returns."""
    if not isinstance(state, kind):
        raise ArgumentError("state", type(state).__name__, f"a {kind.__name__}, as `init` makes it")


def check_floating(**tensors: Tensor) -> None:
    """Raise ArgumentError naming the first that is not of a floating-point dtype."""
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise ArgumentError(name, x.dtype, "a floating-point dtype")
