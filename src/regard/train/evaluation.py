"""Loss and accuracy at the positions that a task scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regard.models.causal_lm import CausalLM
from regard.tasks.training import IGNORE, Batch, TrainingTask

HELD_OUT_SEED = 1_000_003
"""Added to a run's seed for the held-out rows."""

AT_A_TIME = 128


@dataclass(frozen=True)
class Score:
    """loss: the mean of −ln p(label) over scored positions, in nats. accuracy: the share said exactly."""

    loss: float
    accuracy: float

    @property
    def bits(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)


def scored_logits(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor, tuple[object, ...]]:
    """Logits (n, V) in float32 and labels (n,) of the scored positions only, and what the layers said besides."""
    mixed = model.hidden(batch.tokens)
    scored = batch.labels != IGNORE
    return model.read(mixed.out[scored]).float(), batch.labels[scored], mixed.aux


@torch.no_grad()
def evaluate(model: CausalLM, task: TrainingTask, *, rows: int, seed: int, bf16: bool = False) -> Score:
    """The model in `eval()` on `rows` held-out rows, the same ones for the same seed."""
    device, training = next(model.parameters()).device, model.training
    generator = torch.Generator().manual_seed(seed + HELD_OUT_SEED)
    loss, right, count = 0.0, 0, 0
    model.eval()
    try:
        for start in range(0, rows, AT_A_TIME):
            drawn = task.batch(generator, min(AT_A_TIME, rows - start), "held-out")
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, labels, _ = scored_logits(model, Batch(*(t.to(device) for t in drawn)))
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    finally:
        model.train(training)
    return Score(loss / count, right / count)
