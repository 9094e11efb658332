"""What the tests of training share: models and tasks that take milliseconds."""

from __future__ import annotations

import torch

from regard.models.causal_lm import CausalLM
from regard.models.config import CausalLMConfig
from regard.models.stack import Mixer, hybrid
from regard.tasks.training import parse_training
from regard.train.settings import TrainSettings

TASK = parse_training("mqar(length=8,pairs=2,vocab=10,curriculum=False)")


def small(ratio: str = "1:1", mixer: str = "moh") -> CausalLM:
    """Two blocks of width 8, the same weights each time."""
    torch.manual_seed(5)
    return CausalLM(CausalLMConfig(10, 8, hybrid(Mixer(mixer, 4), ratio, 2)))


def quick(**change: object) -> TrainSettings:
    """Twelve steps of four rows."""
    known: dict[str, object] = {"steps": 12, "batch": 4, "warmup": 3, "evaluate_every": 5, "held_out": 10}
    return TrainSettings(**{**known, "save_every": 4, **change})  # type: ignore[arg-type]
