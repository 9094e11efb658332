"""Needle in a haystack with several needles, of which one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.registry import Paper, register
from regard.tasks.needle import PLACES, hide
from regard.tasks.sample import Sample, Task, whole
from regard.tasks.text import Text

RULER = Paper(
    "RULER: What's the Real Context Size of Your Long-Context Language Models?", "Hsieh et al.", 2024, "2404.06654"
)


@register("multi-needle", kind="task", paper=RULER, families=("retrieval",), measure="match")
@dataclass(frozen=True)
class MultiNeedle(Task):
    """Several secret numbers, each of another place, hidden in a long text; the question asks for one of them.

    keys: how many. digits: of each number.
    """

    keys: int = 2
    digits: int = 4
    key = "multi-needle"

    def __post_init__(self) -> None:
        whole(self.keys, "multi-needle.keys", 2, len(PLACES))
        whole(self.digits, "multi-needle.digits", 2, 12)

    def sample(self, tokenizer: Any, text: Text, length: int, index: int, seed: int) -> Sample:
        """See Task.sample."""
        return hide(self, tokenizer, text, length, index, seed, keys=self.keys, digits=self.digits)
