"""Tasks to train on: endless batches of tokens and labels from a seed. Each one file, registered under its name."""

from regard.registry import import_all
from regard.tasks.training.contract import IGNORE, Batch, TrainingTask, parse_training

__all__ = ["IGNORE", "Batch", "TrainingTask", "parse_training"]

import_all(__name__, __path__)
