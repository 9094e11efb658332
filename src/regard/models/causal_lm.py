"""A causal language model from any registered mixers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from regard.errors import ArgumentError, UnsupportedError, require
from regard.layers.base import Output
from regard.models.config import CausalLMConfig
from regard.patterns.checks import is_number
from regard.shapes import check_range


class LMState(NamedTuple):
    """What a model hands on to its next call: the layers' states, and whose they are."""

    layers: tuple[Any, ...]
    model: str


class LMOutput(NamedTuple):
    """logits (B, N, V); state: for the next tokens; aux: what the layers have to say besides, one each, or None."""

    logits: Tensor
    state: LMState
    aux: tuple[Any, ...]


class SwiGLU(nn.Module):
    """W_down (SiLU(W_gate x) ⊙ W_up x), without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → (B, N, C)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(silu(gate) * up)


class Block(nn.Module):
    """x + mixer(norm x), then x + MLP(norm x): pre-norm, RMSNorm with gain."""

    def __init__(self, config: CausalLMConfig, layer: int) -> None:
        super().__init__()
        chosen = config.mixers[layer]
        self.pattern = chosen.pattern
        self.mixer_norm = nn.RMSNorm(config.dim, config.eps)
        self.mixer = chosen.make(config.dim, layer, len(config.mixers))
        self.mlp_norm: nn.Module | None = nn.RMSNorm(config.dim, config.eps) if config.inner else None
        self.mlp: nn.Module | None = SwiGLU(config.dim, config.inner) if config.inner else None

    def forward(self, x: Tensor, key_padding: Tensor | None, state: Any) -> Output:
        """The mixer's Output, with x (B, N, C) after the whole block as `out`."""
        mixed = self.mixer(self.mixer_norm(x), pattern=self.pattern, key_padding=key_padding, state=state)
        x = x + mixed.out
        if self.mlp_norm is not None and self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return Output(x, mixed.state, mixed.aux)


class CausalLM(nn.Module):
    """Embedding, blocks, a last RMSNorm, and the logits: by the embedding's own weights where the head is tied.

    Embedding and head begin as N(0, 1/C), and what enters the blocks is √C times the embedding (Vaswani et al. 2017,
    3.4): of the size of what the mixers add, so that a token is not drowned by it, while tied logits stay near 1.
    Mixers and MLPs begin as their own modules do. There is no position embedding: mixers know the order by themselves,
    as recurrences or by rotary positions.

    >>> from regard.models.stack import Mixer, hybrid
    >>> mixers = hybrid(Mixer("lightning-attention-2", heads=2), ratio="3:1", layers=4)
    >>> model = CausalLM(CausalLMConfig(vocab=100, dim=16, mixers=mixers))
    >>> model.generate(torch.tensor([[1, 2, 3]]), 5).shape
    torch.Size([1, 5])
    """

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config, self.fingerprint = config, config.fingerprint
        self.embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(len(config.mixers)))
        self.norm = nn.RMSNorm(config.dim, config.eps)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab, bias=False)
        for table in (self.embedding, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=config.dim**-0.5)

    def forward(self, tokens: Tensor, state: LMState | None = None, *, key_padding: Tensor | None = None) -> LMOutput:
        """Predict: logits[:, i] are for the token after tokens[:, i].

        tokens (B, N) long, below vocab. state: what the call before returned; tokens are then those that follow.
        key_padding (B, N) bool, True = real token, on either side; logits at padding mean nothing.
        Raises ArgumentError for a wrong shape or type, or another model's state; on a CPU for a token out of range.
        """
        mixed = self.hidden(tokens, state, key_padding=key_padding)
        return LMOutput(self.read(mixed.out), mixed.state, mixed.aux)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        new_tokens: int,
        choose: Callable[[Tensor], Tensor] | None = None,
        *,
        key_padding: Tensor | None = None,
    ) -> Tensor:
        """(B, new_tokens): what follows the prompt (B, N), token by token through the layers' states.

        choose: (B, V) logits → (B,) tokens; None = `greedy`, or a `Sampler`. key_padding (B, N): prompts of different
        lengths, padded on either side. Dropout, if any, is as `train()` or `eval()` left it.
        Raises UnsupportedError when a layer cannot step, ArgumentError for a wrong shape.
        """
        require(isinstance(new_tokens, int) and new_tokens >= 1, "new_tokens", new_tokens, "an int ≥ 1")
        stuck = sorted({m.key for m in self.config.mixers if not m.steps})
        if stuck:
            raise UnsupportedError(f"generate: {', '.join(stuck)} takes no state, so tokens cannot follow one by one")
        choose = greedy if choose is None else choose
        mixed = self.hidden(prompt, key_padding=key_padding)
        last = prompt.new_full((len(prompt),), prompt.shape[1] - 1)
        if key_padding is not None:
            require(bool(key_padding.any(-1).all()), "key_padding", "a row without tokens", "one real token or more")
            last = torch.where(key_padding, torch.arange(prompt.shape[1], device=prompt.device), -1).amax(-1)
        rows = mixed.out[torch.arange(len(prompt), device=prompt.device), last]
        said = [choose(self.read(rows))]
        state = mixed.state
        while len(said) < new_tokens:
            step = self(said[-1][:, None], state)
            said.append(choose(step.logits[:, -1]))
            state = step.state
        return torch.stack(said, 1)

    def hidden(self, tokens: Tensor, state: LMState | None = None, *, key_padding: Tensor | None = None) -> Output:
        """`forward` without the head: out (B, N, C) of the last block. `read` makes logits of those rows one wants."""
        if not isinstance(tokens, Tensor):
            raise ArgumentError("tokens", type(tokens).__name__, "a tensor (B, N) of integers, N ≥ 1")
        whole = tokens.dtype in (torch.long, torch.int) and tokens.ndim == 2 and tokens.shape[1] >= 1
        require(whole, "tokens", f"{tuple(tokens.shape)} {tokens.dtype}", "(B, N) integers, N ≥ 1")
        try:
            x = self.embedding(tokens) * self.config.dim**0.5
        except IndexError:  # on a CPU; looking at the tokens of a GPU would wait for it
            check_range("tokens", tokens, 0, self.config.vocab - 1)
            raise
        states, aux = [], []
        for block, before in zip(self.blocks, self._states(state), strict=True):
            x, after, more = block(x, key_padding, before)
            states.append(after)
            aux.append(more)
        return Output(x, LMState(tuple(states), self.fingerprint), tuple(aux))

    def _states(self, state: LMState | None) -> Sequence[Any]:
        if state is None:
            return [None] * len(self.blocks)
        if not isinstance(state, LMState):
            raise ArgumentError("state", type(state).__name__, "an LMState that this model returned, or None")
        own = state.model == self.fingerprint and len(state.layers) == len(self.blocks)
        require(own, "state", f"that of model {state.model}", f"one of this model, {self.fingerprint}, or None")
        return state.layers

    def read(self, x: Tensor) -> Tensor:
        """Logits (…, V) of the last block's out (…, C): all of B·N·V is the largest thing a small model computes."""
        return linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)


def greedy(logits: Tensor) -> Tensor:
    """(B, V) → (B,): the likeliest token."""
    return logits.argmax(-1)


class Sampler:
    """(B, V) → (B,): drawn from softmax(logits / temperature), of the `top_k` likeliest tokens only (None = all).

    Where tokens tie for the last of the `top_k` places, which of them it is for is not specified.
    generator: on the device of the logits; the same state of it draws the same tokens.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        above = is_number(temperature) and 0 < temperature < math.inf
        require(above, "temperature", repr(temperature), "a number above 0; `greedy` is its limit")
        require(
            top_k is None or (isinstance(top_k, Integral) and top_k >= 1), "top_k", repr(top_k), "an int ≥ 1, or None"
        )
        known = generator is None or isinstance(generator, torch.Generator)
        require(known, "generator", repr(generator), "a torch.Generator, or None")
        self.temperature, self.top_k, self.generator = temperature, top_k, generator

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw one token a row."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, -1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
        logits = logits.float()
        # From the largest one down nothing overflows; nor does one over the smallest normal number.
        below = logits - logits.amax(-1, keepdim=True)
        shares = torch.softmax(below / max(self.temperature, torch.finfo(torch.float32).tiny), -1)
        return torch.multinomial(shares, 1, generator=self.generator)[:, 0]


def held_bytes(state: Any) -> int:
    """Bytes of all tensors in a state, of a layer or of a model: what is kept between two tokens.

    Full attention holds 2·B·M·Hkv·D elements a layer for M tokens, a recurrence the same at every M.
    """
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, (tuple, list)):
        return sum(held_bytes(each) for each in state)
    return sum(held_bytes(each) for each in state.values()) if isinstance(state, dict) else 0
