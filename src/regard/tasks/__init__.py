"""Generated tasks that need a long context: each one file, registered under its name; seeded and exact in tokens."""

from regard.registry import import_all
from regard.tasks.sample import Sample, Task, TooShortError, parse

__all__ = ["Sample", "Task", "TooShortError", "parse"]

import_all(__name__, __path__)
