"""What decoding costs by Kinetics' count (Sadhukhan et al. 2025, arXiv 2506.05333): FLOP, bytes, and the two as one.

A task is a prompt of L_in tokens and n trials of L_out tokens that share it. Two FLOP per multiply-add; keys and values
in bf16, 2 bytes; reading the parameters is left out, which is right for large batches only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from regard.errors import require

INTENSITY = 562.5
"""FLOP per byte of the paper's device, 4.5e15/8e12: a peak with structured sparsity. H100, dense bf16: about 295."""


@dataclass(frozen=True)
class DecodedModel:
    """parameters: those active per token. query_heads, kv_heads: per layer. width: head_dim × layers."""

    parameters: float
    query_heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class DecodeCost:
    """flop: of parameters and attention. bytes: of keys and values read."""

    flop: float
    bytes: float

    def eflops(self, intensity: float = INTENSITY) -> float:
        """flop + intensity · bytes, intensity in FLOP per byte."""
        return self.flop + intensity * self.bytes


def dense(model: DecodedModel, prompt: int, generated: int, *, trials: int = 1) -> DecodeCost:
    """Full attention: n(2P·L_out + 2Hd(2L_in + L_out)L_out) FLOP, 2·H_kv·d(2L_in + n·L_out)L_out bytes.

    The prompt's keys and values are read once for all trials."""
    _check(prompt, generated, trials)
    attention = 2 * model.query_heads * model.width * (2 * prompt + generated) * generated
    read = 2 * model.kv_heads * model.width * (2 * prompt + trials * generated) * generated
    return DecodeCost(trials * (2 * model.parameters * generated + attention), read)


def top_k(model: DecodedModel, prompt: int, generated: int, budget: int, *, trials: int = 1) -> DecodeCost:
    """Attention to at most `budget` tokens, found for nothing: S = Σ_t min(B, L_in + t) in place of the full sum.

    Trials do not share the prompt: each chooses other tokens of it."""
    _check(prompt, generated, trials)
    require(budget >= 1, "budget", budget, "an int ≥ 1")
    read = tokens_read(prompt, generated, budget)
    attention = 4 * model.query_heads * model.width * read
    flop = trials * (2 * model.parameters * generated + attention)
    return DecodeCost(flop, trials * 4 * model.kv_heads * model.width * read)


def block_top_k(
    model: DecodedModel, prompt: int, generated: int, budget: int, *, block: int = 16, trials: int = 1
) -> DecodeCost:
    """`top_k` of budget = local + block·k_b tokens, and the search over one mean key per block."""
    require(block >= 1, "block", block, "an int ≥ 1")
    found = top_k(model, prompt, generated, budget, trials=trials)
    search = (2 * prompt + generated) // block * generated * model.query_heads * model.width
    read = (2 * prompt + trials * generated) // block * generated * model.kv_heads * model.width
    return DecodeCost(found.flop + trials * search, found.bytes + read)


def tokens_read(prompt: int, generated: int, budget: int) -> float:
    """Σ_{t ≤ L_out} min(B, L_in + t), as the integral B·L_out − ½·max(0, B − L_in)²: short of the sum by O(L_out).

    The paper's public top-k code adds the half square; the sum takes it away."""
    budget = min(budget, prompt + generated)
    return budget * generated - max(0, budget - prompt) ** 2 / 2


def coverage(tried: int, correct: int, n: int) -> float:
    """pass@n from `correct` of `tried` samples: 1 − C(tried − correct, n) / C(tried, n)."""
    require(0 <= correct <= tried, "correct", correct, f"0 … tried={tried}")
    require(1 <= n <= tried, "n", n, f"1 … tried={tried}")
    return 1 - comb(tried - correct, n) / comb(tried, n)


def _check(prompt: int, generated: int, trials: int) -> None:
    for name, value, least in (("prompt", prompt, 0), ("generated", generated, 1), ("trials", trials, 1)):
        require(value >= least, name, value, f"an int ≥ {least}")
