"""Forget gates with a lower bound that rises with depth: HGRN's and HGRN-2's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from regard.errors import require
from regard.layers.checks import from_zero, sizes
from regard.patterns.checks import at_least
from regard.recurrence.diagonal import accumulation_dtype


def lower_bounds(gamma: Tensor) -> Tensor:
    """Γ (L, D) → (L, D): l^{(k)} = Σ_{1 ≤ m ≤ k} P^{(m)} for layers k = 0 … L−1, P = softmax of Γ over the layers.

    l^{(0)} = 0, and each layer's bound is above that of the layer before: deep layers forget slower, in every channel.
    """
    share = gamma.softmax(0)
    return share.cumsum(0) - share[:1]


class ForgetGate(nn.Module):
    """f = l + (1 − l) ⊙ σ(z), in logarithms and without cancellation: forward(z) → (log f, 1 − f).

    lower_bound l in [0, 1), the same for all channels; None = layer/layers, which is `lower_bounds` of Γ = 0, the
    papers' initial value (that it stays there is our default: a layer by itself has no Γ to share).
    `share_lower_bounds` makes it the papers' learned one.
    """

    def __init__(self, layer: int, layers: int, lower_bound: float | None) -> None:
        super().__init__()
        sizes(layers=layers)
        at_least("layer", layer, 0)
        require(layer < layers, "layer", layer, f"0 … {layers - 1} (layers={layers})")
        lower_bound = layer / layers if lower_bound is None else lower_bound
        from_zero("lower_bound", lower_bound, below=1.0)
        self.layer, self.layers, self.lower_bound = layer, layers, lower_bound
        self.gamma: nn.Parameter | None = None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (…, D) → log f and 1 − f, both like z and in at least float32."""
        z = z.to(accumulation_dtype(z))
        bound = self.bound(z)
        # log 0 for the first layer: its gradient would be NaN, so it is never taken.
        log_bound = torch.where(bound > 0, bound, 1.0).log().masked_fill(bound <= 0, -torch.inf)
        log_f = torch.logaddexp(log_bound, torch.log1p(-bound) + logsigmoid(z))
        return log_f, (1 - bound) * torch.sigmoid(-z)

    def bound(self, z: Tensor) -> Tensor:
        """l, dtype and device those of z: a number, or (D,) where it is learned."""
        if self.gamma is None:
            return z.new_full((), self.lower_bound)
        width = self.gamma.shape[1]
        require(
            width == z.shape[-1], "width", f"{width}, of the shared lower bounds", f"{z.shape[-1]}, the gate's channels"
        )
        return lower_bounds(self.gamma.to(z.dtype))[self.layer]

    def extra_repr(self) -> str:
        """The bound."""
        return (
            f"layer={self.layer}, layers={self.layers}, lower_bound={self.lower_bound if self.gamma is None else 'Γ'}"
        )


def share_lower_bounds(gates: Iterable[ForgetGate], width: int) -> nn.Parameter:
    """Give all gates of a model one learned Γ (layers, width), 0 at first, and return it: the papers' lower bounds.

    width: how many channels a gate has; another is refused when the gate is used. Each gate reads its own row's bound,
    so `layer` and `layers` have to be set."""
    gates = list(gates)
    require(len(gates) >= 1, "gates", "none", "one ForgetGate or more")
    for gate in gates:
        require(isinstance(gate, ForgetGate), "gates", type(gate).__name__, "ForgetGates")
    sizes(width=width)
    require(len({gate.layers for gate in gates}) == 1, "layers", [g.layers for g in gates], "the same for all gates")
    gamma = nn.Parameter(torch.zeros(gates[0].layers, width))
    for gate in gates:
        gate.gamma = gamma
    return gamma
