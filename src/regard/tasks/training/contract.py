"""What a model is trained on: batches of tokens, and of what it must say at which position."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from regard.tasks.sample import made_from, text_form

IGNORE = -100
"""The label of a position that is not scored."""

Split = Literal["train", "held-out"]


class Batch(NamedTuple):
    """tokens (B, N) long, from 0 to vocab − 1. labels (B, N) long: what to say at each position, or IGNORE.

    A label belongs to the position where it is said, not to the one after: labels[:, i] is held against logits[:, i].
    """

    tokens: Tensor
    labels: Tensor


class TrainingTask:
    """Base of all training tasks; subclasses are frozen dataclasses whose fields are their settings.

    `key`: the registered name. `metric`: what a result is compared by — the share of labels said exactly ("accuracy"),
    or the mean of −log₂ p(label) ("bits").
    """

    key: ClassVar[str]
    metric: ClassVar[Literal["accuracy", "bits"]] = "accuracy"

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """N, the length of a batch's rows."""
        raise NotImplementedError

    def batch(self, generator: torch.Generator, size: int, split: Split = "train") -> Batch:
        """`size` rows drawn with `generator` (on the CPU): the same state of it gives the same rows.

        split: a generated task draws both from the same distribution, with other seeds; a corpus keeps files apart.
        """
        raise NotImplementedError

    def at(self, progress: float) -> TrainingTask:
        """The task to train on after this share of all steps, 0 to 1: itself, unless it has a curriculum."""
        return self

    def __str__(self) -> str:
        return text_form(self)


def parse_training(text: str) -> TrainingTask:
    """A training task from `name` or `name(key=value, …)`. Raises UnknownNameError or ArgumentError."""
    made = made_from(text, "training-task", "task")
    assert isinstance(made, TrainingTask)
    return made
