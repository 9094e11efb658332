"""A run that is killed from within, by the signal that nothing can catch, after some step. Started by a test."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from tests.train.small import TASK, quick, small

from regard.train.trainer import Step, train


def kill(step: Step) -> None:
    if step.done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(small(), TASK, quick(), save_to=Path(sys.argv[1]), report=kill)
