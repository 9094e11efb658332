"""Multi-query associative recall (Arora et al. 2024, arXiv 2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from regard.errors import ArgumentError, require
from regard.registry import register
from regard.tasks.recall import ZOOLOGY
from regard.tasks.sample import whole
from regard.tasks.training.contract import IGNORE, Batch, Split, TrainingTask


@register("mqar", kind="training-task", paper=ZOOLOGY, families=("recall",), metric="accuracy")
@dataclass(frozen=True)
class MQAR(TrainingTask):
    """Key-value pairs k₁ v₁ k₂ v₂ …, then each key once more: there its value is to be said.

    Keys are `pairs` distinct tokens of [1, V/2 − 1], values as many of [V/2, V − 1], drawn anew in each row. What
    follows the pairs falls into (N − 2·pairs)/2 slots of two tokens; the keys take distinct slots, drawn one after the
    other with probability ∝ x^{power−1} for slot x = 1, 2, … (power 0.01: early ones far likelier; 1: all alike), and
    stand at the first token of theirs. The label there is the value; the value itself is not written. All other tokens
    are 0, or with `random_non_queries` uniform from the whole vocabulary; all other labels are IGNORE.

    length: N, even, at least 4·pairs. vocab: V, even, above N. curriculum: while training, a quarter of the pairs for
    the first half of the steps, half of them up to 60 %, then all; held-out rows always have all. Ours, not the
    paper's: attention finds out within hundreds of steps what binds two pairs, and within thousands what binds eight.

    The defaults are ours too, for minutes on two CPU cores. To compare mixers take the paper's: V = 8192 (below a
    thousand tokens gated convolutions look better than they are) at (length, pairs) = (64, 4), (128, 8), (256, 16),
    (512, 64), and for each mixer the best of several learning rates.
    """

    length: int = 64
    pairs: int = 8
    vocab: int = 128
    power: float = 0.01
    random_non_queries: bool = False
    curriculum: bool = True
    key = "mqar"

    def __post_init__(self) -> None:
        whole(self.pairs, "mqar.pairs", 1, 2**20)
        whole(self.length, "mqar.length", 4, 2**24)
        whole(self.vocab, "mqar.vocab", 4, 2**24)
        least = 4 * self.pairs
        require(self.length % 2 == 0 and self.length >= least, "mqar.length", self.length, f"even, ≥ {least}: 4·pairs")
        fits = self.vocab % 2 == 0 and self.vocab > self.length
        require(fits, "mqar.vocab", self.vocab, f"even, above length={self.length}")
        if isinstance(self.power, bool) or not isinstance(self.power, (int, float)) or not 0 < self.power <= 10:
            raise ArgumentError("mqar.power", repr(self.power), "a number above 0, at most 10")
        for name in ("random_non_queries", "curriculum"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"mqar.{name}", repr(value), "True or False")

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.vocab

    @property
    def width(self) -> int:
        """N."""
        return self.length

    def batch(self, generator: torch.Generator, size: int, split: Split = "train") -> Batch:
        """See TrainingTask.batch."""
        half, written, rows = self.vocab // 2, 2 * self.pairs, torch.arange(size)[:, None]
        keys = self._distinct(size, torch.ones(half - 1), generator) + 1
        values = self._distinct(size, torch.ones(self.vocab - half), generator) + half
        slots = self._distinct(size, self.slot_weights(), generator)
        tokens = torch.zeros(size, self.length, dtype=torch.long)
        if self.random_non_queries:
            tokens = torch.randint(self.vocab, tokens.shape, generator=generator)
        tokens[:, 0:written:2], tokens[:, 1:written:2] = keys, values
        labels = torch.full_like(tokens, IGNORE)
        tokens[rows, written + 2 * slots] = keys
        labels[rows, written + 2 * slots] = values
        return Batch(tokens, labels)

    def at(self, progress: float) -> MQAR:
        """See TrainingTask.at."""
        if not self.curriculum or progress >= 0.6:
            return self
        return replace(self, pairs=max(1, self.pairs // (4 if progress < 0.5 else 2)))

    def slot_weights(self) -> torch.Tensor:
        """(slots,) float64: power · x^{power−1}, x = 1, 2, …; to be normalised."""
        x = torch.arange(1, (self.length - 2 * self.pairs) // 2 + 1, dtype=torch.float64)
        return self.power * x ** (self.power - 1)

    def _distinct(self, size: int, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(size, pairs): indices drawn one after the other without replacement, with these weights."""
        return torch.multinomial(weights.expand(size, -1), self.pairs, replacement=False, generator=generator)
