"""The contract of a layer: one call signature for every mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.errors import UnsupportedError, require
from regard.layers.checks import sizes
from regard.patterns import Pattern, causal
from regard.registry import entries

Tokens = Float[Tensor, "b n c"]
Context = Float[Tensor, "b m c"]
Padding = Bool[Tensor, "b k"]


class Output(NamedTuple):
    """What every layer returns.

    out (B, N, C): zeros where `key_padding` says padding (in self-attention).
    state: a NamedTuple to hand to the next call, or None where there is nothing to carry on (cross-attention).
    aux: a NamedTuple of what else there is to know (a loss to add, what was selected), or None.
    """

    out: Tensor
    state: Any = None
    aux: Any = None


@dataclass(frozen=True)
class Example:
    """The smallest instance worth testing: what the conformance suite gives to `create`, and how long inputs may be.

    A mechanism with fixed layouts names its legal lengths; the others keep these, chosen to be awkward.
    """

    dim: int = 16
    heads: int = 4
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 7, 63, 130)


class Layer(nn.Module):
    """A mechanism as a layer, `(B, N, C) → (B, N, C)`. Made by `regard.create(key, dim=C, heads=H, ...)`.

    A subclass takes `dim` and `heads` and keyword settings, registers itself with `@mechanism(key, ...)`, and says
    there what it can: `causal` (with `pattern=causal()` or by nature), `bidirectional` (without), `cross` (takes a
    context), `patterns` (takes any pattern), `gqa` (has a setting `kv_heads`, and `k_proj` / `v_proj` whose rows are
    those heads), `steps` (takes and returns a state), `compiles`. All take `key_padding`. What is declared is what the
    conformance suite tests; what is declared False must be refused with an UnsupportedError (a setting that does not
    exist is refused by `create`). Where the defaults do not do, `example=` gives a function that makes an Example.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        sizes(dim=dim, heads=heads)
        self.dim, self.heads = dim, heads

    def forward(
        self,
        x: Tokens,
        context: Context | None = None,
        *,
        pattern: Pattern | None = None,
        key_padding: Padding | None = None,
        state: Any = None,
    ) -> Output:
        """Mix the tokens.

        x (B, N, C). context (B, M, C): keys and values come from it instead of from x (cross-attention).
        pattern: who may attend to whom; None = the mechanism's own: everyone to everyone unless it is causal by nature.
        key_padding (B, N), or (B, M) with a context: bool, True = real token.
        state: what the call before returned; x are then the tokens that follow, and key_padding is theirs.
        Raises ArgumentError for a wrong shape or dtype, UnsupportedError for what the mechanism does not do.
        """
        raise NotImplementedError

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """The identity the paper implies (full budget = dense; chunks = recurrence; …), as two float64 tensors.

        The conformance suite holds them equal to 1e-10. They must come from two different computations.
        """
        raise NotImplementedError(f"{cls.__name__} declares no identity")

    def check_tokens(self, x: Tensor, context: Tensor | None, key_padding: Tensor | None) -> None:
        """Raise ArgumentError unless these are tensors, of the shapes of `forward` and, outside autocast, in a dtype of
        the parameters."""
        self._check_tensor("x", x)
        require(x.ndim == 3 and x.shape[-1] == self.dim, "x", tuple(x.shape), f"(B, N, {self.dim})")
        if context is not None:
            self._check_tensor("context", context)
        source, name = (x, "N") if context is None else (context, "M")
        fits = source.ndim == 3 and source.shape[0] == x.shape[0] and source.shape[2] == self.dim
        require(fits, "context", tuple(source.shape), f"({x.shape[0]}, M, {self.dim})")
        if key_padding is not None:
            require(isinstance(key_padding, Tensor), "key_padding", type(key_padding).__name__, "a bool tensor")
            shape, wanted = tuple(key_padding.shape), tuple(source.shape[:2])
            require(shape == wanted, "key_padding", shape, f"{wanted}: (B, {name})")
            require(key_padding.dtype == torch.bool, "key_padding", key_padding.dtype, "torch.bool, True = real")

    def _check_tensor(self, name: str, x: Tensor) -> None:
        require(isinstance(x, Tensor), name, type(x).__name__, "a floating-point tensor")
        require(x.is_floating_point(), name, x.dtype, "a floating-point dtype")
        first = next((m for m in self._modules.values() if type(m) is nn.Linear), None)
        if first is None or first.weight.dtype == x.dtype or autocasting(x):
            return
        plain = (m for m in self.modules() if type(m) is nn.Linear and not m._forward_pre_hooks)  # others may cast
        known = dict.fromkeys(m.weight.dtype for m in plain)
        require(not known or x.dtype in known, name, x.dtype, f"the layer's: {', '.join(map(str, known))}")

    def check_causal(self, context: Tensor | None, pattern: Pattern | None) -> None:
        """For a mechanism that is causal by nature: refuse a context and any pattern but `causal()`."""
        if context is not None:
            raise self.refuse("context: it mixes one sequence")
        if pattern is not None and pattern != causal():
            raise self.refuse(f"pattern {pattern!r}: it is causal by nature")

    def check_state(self, state: Any, kind: type) -> None:
        """Raise ArgumentError unless the state is None or of the kind that this layer returns."""
        require(state is None or isinstance(state, kind), "state", type(state).__name__, f"a {kind.__name__} or None")

    def refuse(self, what: str) -> UnsupportedError:
        """The error for something this mechanism does not do, with its registered name in it; to be raised."""
        name = next((e.key for e in entries("layer") if e.factory is type(self)), type(self).__name__)
        return UnsupportedError(f"{name} takes no {what}")


def autocasting(x: Tensor) -> bool:
    """Is autocast on where x lies?"""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_padding(out: Tensor, key_padding: Tensor | None) -> Tensor:
    """(B, N, C) with zeros at padding."""
    return out if key_padding is None else out.masked_fill(~key_padding[..., None], 0.0)
