"""Copying: say again what was read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regard.registry import register
from regard.tasks.sample import whole
from regard.tasks.training.contract import IGNORE, Batch, Split, TrainingTask


@register("copying", kind="training-task", families=("recall",), metric="accuracy")
@dataclass(frozen=True)
class Copying(TrainingTask):
    """x₁ … x_m, a separator, then x₁ … x_{m−1} given as it is said: the labels from the separator on are x₁ … x_m.

    length: N = 2m, even. vocab: the separator is token 0, the others are drawn evenly from 1 … vocab − 1.
    """

    length: int = 64
    vocab: int = 64
    key = "copying"

    def __post_init__(self) -> None:
        whole(self.length, "copying.length", 2, 2**24)
        whole(self.length % 2, "copying.length modulo 2", 0, 0)
        whole(self.vocab, "copying.vocab", 2, 2**24)

    @property
    def vocabulary(self) -> int:
        """With the separator."""
        return self.vocab

    @property
    def width(self) -> int:
        """N."""
        return self.length

    def batch(self, generator: torch.Generator, size: int, split: Split = "train") -> Batch:
        """See TrainingTask.batch."""
        text = torch.randint(1, self.vocab, (size, self.length // 2), generator=generator)
        separator = torch.zeros(size, 1, dtype=torch.long)
        tokens = torch.cat([text, separator, text[:, :-1]], 1)
        return Batch(tokens, torch.cat([torch.full_like(text, IGNORE), text], 1))
