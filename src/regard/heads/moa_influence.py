"""MoA's profiling (Fu et al. 2024, arXiv 2406.14909): what the loss would be if a head did not see a key.

For weights A and their gradient G = ∂L/∂A, removing key j from row i and renormalising the row changes the loss to
first order by

    E_ij = A_ij / (1 − A_ij) · (Σ_n G_in A_in − G_ij)

exactly so where L is linear in A. A window forbids keys by their distance in blocks alone, so E is only ever held
summed over that distance, never as an N × N map: G_ij = ∂L/∂o_i · v_j needs nothing but the gradient at each layer's
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import UnsupportedError, require
from regard.inference import observe
from regard.inference.call import AttentionCall
from regard.inference.plan import Plan
from regard.inference.seam import Attached
from regard.patterns.checks import at_least

ELEMENTS = 1 << 22
"""Weights held at a time."""


@dataclass(frozen=True)
class Sample:
    """A text to calibrate on: tokens (N,) long, of which those from `answer_from` on are the answer."""

    tokens: Tensor
    answer_from: int

    def __post_init__(self) -> None:
        tokens = self.tokens
        require(isinstance(tokens, Tensor), "tokens", type(tokens).__name__, "a tensor of token ids (N,)")
        fits = tokens.ndim == 1 and tokens.dtype in (torch.int32, torch.int64)
        require(fits, "tokens", f"{tokens.dtype}, shape {tuple(tokens.shape)}", "token ids (N,)")
        at_least("answer_from", self.answer_from, 1)
        last = len(tokens) - 1
        require(self.answer_from <= last, "answer_from", self.answer_from, f"1 to {last}, the last token")


@dataclass(frozen=True)
class Influence:
    """Loss added by what a head does not see, by distance.

    by_distance[length][layer] is (Hkv, blocks) float64: the sum of E over all keys that many blocks back, outside the
    first block, for prompts of `length` tokens, averaged over samples and summed over the query heads of a group.
    """

    by_distance: dict[int, list[Tensor]]
    block: int

    @property
    def lengths(self) -> list[int]:
        """The lengths that were profiled, ascending."""
        return sorted(self.by_distance)

    @property
    def heads(self) -> list[int]:
        """KV heads of each layer."""
        return [len(x) for x in self.by_distance[self.lengths[0]]]

    def loss(self, length: int, window: int) -> list[Tensor]:
        """Per layer (Hkv,) float64: what a window of so many blocks (and the first block) adds to the loss."""
        return [x[:, window:].sum(-1) for x in self.by_distance[length]]


def influence(weights: Tensor, gradient: Tensor) -> Tensor:
    """E (..., n, m) from the weights A of softmax rows and ∂L/∂A, both (..., n, m). 1 − A is held at 1e-6 or more."""
    mean = (weights * gradient).sum(-1, keepdim=True)
    return weights / (1 - weights).clamp(min=1e-6) * (mean - gradient)


@torch.no_grad()
def own_answers(attached: Attached, prompts: Sequence[Tensor], new_tokens: int) -> list[Sample]:
    """The dense model's own greedy answers, of `new_tokens` tokens, to prompts (N,): what it should go on saying."""
    _check_dense(attached)
    at_least("new_tokens", new_tokens, 1)
    model: Any = attached.model
    out = []
    for prompt in prompts:
        tokens = model.generate(
            prompt[None].to(attached.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=attached.device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        out.append(Sample(tokens[0].cpu(), len(prompt)))
    return out


def profile(
    attached: Attached,
    samples: Sequence[Sample],
    *,
    block: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Influence:
    """One forward and backward per sample under the dense model; samples of one length are averaged.

    Use answers of the model itself (`own_answers`) and texts in which far tokens matter, or every window looks free.
    progress is told (done, of) after each. Raises ArgumentError without samples or when the model is attached to
    another plan than `full`, UnsupportedError when a layer's output is changed before it leaves the attention module.
    """
    _check_dense(attached)
    require(len(samples) > 0, "samples", 0, "at least one")
    strange = [type(s).__name__ for s in samples if not isinstance(s, Sample)]
    require(not strange, "samples", strange, "Samples: tokens and where the answer begins")
    at_least("block", block, 1)
    found: dict[int, list[list[Tensor]]] = {}
    for number, sample in enumerate(samples):
        found.setdefault(len(sample.tokens), []).append(_one(attached, sample, block))
        if progress is not None:
            progress(number + 1, len(samples))
    mean = {n: [torch.stack(layer).mean(0) for layer in zip(*each, strict=True)] for n, each in found.items()}
    return Influence(mean, block)


def _one(attached: Attached, sample: Sample, block: int) -> list[Tensor]:
    """Per layer (Hkv, blocks): E of one sample, summed by distance."""
    tokens = sample.tokens[None].to(attached.device)
    model: Any = attached.model
    with torch.enable_grad(), _captured(attached) as (calls, outs):
        logits = model(input_ids=tokens, use_cache=True).logits[0, sample.answer_from - 1 : -1]
        loss = nn.functional.cross_entropy(logits.float(), tokens[0, sample.answer_from :])
        layers = sorted(calls)
        missing = [layer for layer in layers if layer not in outs]
        if missing:
            raise UnsupportedError(f"profile: the outputs of layers {missing} reach no module that could be watched")
        gradients = torch.autograd.grad(loss, [outs[layer] for layer in layers])
    with torch.no_grad():
        return [_by_distance(calls[n], outs[n], g, block) for n, g in zip(layers, gradients, strict=True)]


@contextmanager
def _captured(attached: Attached) -> Iterator[tuple[dict[int, AttentionCall], dict[int, Tensor]]]:
    """Every layer's call, and its output (…, Hq · Dv) as the next module is given it, with a gradient."""
    calls: dict[int, AttentionCall] = {}
    outs: dict[int, Tensor] = {}
    awaited: list[AttentionCall] = []

    def listen(call: AttentionCall) -> None:
        calls[call.layer] = call
        awaited[:] = [call]

    def watch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not awaited or not args or not isinstance(args[0], Tensor):
            return None
        (call,), x = awaited, args[0]
        if x.numel() != call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.v.shape[3]:
            return None
        awaited.clear()
        if not x.requires_grad:  # below the first trained parameter
            x = x.detach().requires_grad_()
        outs[call.layer] = x
        return (x, *args[1:])

    hooks = [module.register_forward_pre_hook(watch) for module in attached.model.modules()]
    attached.listeners.append(listen)
    try:
        yield calls, outs
    finally:
        attached.listeners.remove(listen)
        for hook in hooks:
            hook.remove()


def _by_distance(call: AttentionCall, out: Tensor, gradient: Tensor, block: int) -> Tensor:
    """(Hkv, blocks) float64. Checks that what was watched is this call's output."""
    kv_heads, m = call.k.shape[1:3]
    hq, n, dv = call.q.shape[1], call.q.shape[2], call.v.shape[3]
    shape = (n, kv_heads, hq // kv_heads, dv)
    gradient, out = (x.reshape(shape).permute(1, 2, 0, 3).float() for x in (gradient, out))  # (Hkv, G, n, Dv)
    values = call.v[0].float()[:, None]
    j = torch.arange(m, device=values.device)
    total = torch.zeros(kv_heads, -(-m // block), dtype=torch.float64, device=values.device)
    strip = max(1, ELEMENTS // (hq * m))
    for start in range(0, n, strip):
        rows = slice(start, min(start + strip, n))
        weights = observe.weights(call, rows)[0]  # (Hkv, G, rows, M)
        again = weights @ values
        if not torch.allclose(again, out[:, :, rows], rtol=1e-2, atol=1e-2 * float(again.abs().max())):
            raise UnsupportedError(
                f"profile: layer {call.layer} changes its attention's output (a gate, a norm) before it can be watched"
            )
        e = influence(weights, gradient[:, :, rows] @ values.mT).sum(1).double()
        i = torch.arange(start, rows.stop, device=values.device)[:, None]
        back = (i // block - j // block).clamp(min=0)  # a key after its query has no weight, and E is 0
        e = e.masked_fill(j < block, 0.0)
        total.index_add_(1, back.flatten(), e.flatten(1))
    return total.cpu()


def _check_dense(attached: Attached) -> None:
    require(isinstance(attached, Attached), "attached", type(attached).__name__, "what regard.attach(model) gives")
    require(attached.plan == Plan(), "attached", attached.plan, "a model attached to the plan `full`")
