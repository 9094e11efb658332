"""How a model is trained: numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.errors import require


@dataclass(frozen=True)
class TrainSettings:
    """AdamW on `batch` rows a step for `steps` steps; the rate rises over `warmup` steps, then falls as a cosine to 0.

    decay: weight decay, of matrices only (norms, biases, gates' offsets and the embedding have none). beta2: of Adam.
    clip: the gradient's norm is at most this. bf16: the forward pass under autocast to bfloat16. auxiliary: weight of
    the sum of what layers call `load_balance` (MoH's 0.01); what they call `loss` is weighted already and added as
    is. evaluate_every: steps between evaluations on `held_out` rows, always the same. save_every: steps between
    checkpoints. seed: of the batches and of dropout; a model's initial weights are its maker's business.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 50
    decay: float = 0.1
    beta2: float = 0.98
    clip: float = 1.0
    bf16: bool = False
    auxiliary: float = 0.01
    evaluate_every: int = 100
    held_out: int = 512
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every", "held_out", "save_every"):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= 1, name, value, "an int ≥ 1")
        require(isinstance(self.warmup, int) and self.warmup >= 0, "warmup", self.warmup, "an int ≥ 0")
        seeds = isinstance(self.seed, int) and 0 <= self.seed < 2**63
        require(seeds, "seed", self.seed, "an int from 0 to 2**63 - 1")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, name, value, "a number above 0")
        for name in ("decay", "auxiliary"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "a number ≥ 0")
        require(0 < self.beta2 < 1, "beta2", self.beta2, "a number between 0 and 1")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, …, steps − 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 + math.cos(math.pi * done)) / 2
