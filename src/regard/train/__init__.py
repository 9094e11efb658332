"""A small trainer, and the run behind `regard train`."""

from regard.train.evaluation import Score, evaluate
from regard.train.settings import TrainSettings
from regard.train.trainer import Step, Trained, train

__all__ = ["Score", "Step", "TrainSettings", "Trained", "evaluate", "train"]
