"""How the prompt's queries attend: the `prefill` part of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from regard.inference.settings import whole
from regard.registry import Paper, register

if TYPE_CHECKING:
    from regard.patterns.algebra import Pattern

_STREAMING = Paper("Efficient Streaming Language Models with Attention Sinks", "Xiao et al.", 2023, "2309.17453")


class Prefill:
    """Base of all prefill parts; subclasses are frozen dataclasses whose fields are their settings."""

    def pattern(self, layer: int) -> Pattern | None:
        """Who may attend to whom in that layer, beside the model's own mask; None = whatever the model does."""
        raise NotImplementedError


@register("full", kind="prefill", families=("sparse-inference",), cost="O(n²)")
@dataclass(frozen=True)
class FullPrefill(Prefill):
    """Attend as the model does, exactly."""

    def pattern(self, layer: int) -> Pattern | None:
        return None


@register("streaming", kind="prefill", paper=_STREAMING, families=("sparse-inference",), cost="O(n·(sinks + window))")
@dataclass(frozen=True)
class StreamingPrefill(Prefill):
    """The Λ pattern: each query sees the first `sinks` tokens and the last `window`, itself included."""

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        whole(self, "sinks", 0)
        whole(self, "window", 1)

    def pattern(self, layer: int) -> Pattern | None:
        from regard.patterns import attention_sink, causal, sliding_window

        seen = sliding_window(self.window)
        return causal() & (seen | attention_sink(self.sinks) if self.sinks else seen)
