"""In-context recall of key-value pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.registry import Paper, register
from regard.tasks.frame import chat_frame
from regard.tasks.needle import scatter
from regard.tasks.sample import Sample, Task, TooShortError, depth_of, whole
from regard.tasks.text import Text, encode, filler

KEYS = (
    "apple bridge candle desert engine feather guitar hammer island jacket kettle ladder mirror needle orange pencil "
    "quartz rabbit saddle tunnel umbrella violin walnut yogurt zipper anchor basket castle dragon eagle falcon garden "
    "helmet iceberg jungle kingdom lantern marble napkin oyster"
).split()
INTRODUCTION = "Remember the list in the following text.\n\n"
QUESTION = "\n\nWhich number follows {key}?"

ZOOLOGY = Paper(
    "Zoology: Measuring and Improving Recall in Efficient Language Models", "Arora et al.", 2023, "2312.04927"
)


@register("recall", kind="task", paper=ZOOLOGY, families=("retrieval",), measure="match")
@dataclass(frozen=True)
class Recall(Task):
    """A list of pairs, word and number, stands somewhere in a long text; the question names a word.

    A number follows its word with nothing between, so that copying what came after the last occurrence is enough: a
    model of 135 million parameters can, and what is left to fail is the cache. pairs: how many. digits: of each
    number.
    """

    pairs: int = 8
    digits: int = 4
    key = "recall"

    def __post_init__(self) -> None:
        whole(self.pairs, "recall.pairs", 2, len(KEYS))
        whole(self.digits, "recall.digits", 2, 12)

    def sample(self, tokenizer: Any, text: Text, length: int, index: int, seed: int) -> Sample:
        """See Task.sample."""
        rng = self.rng(seed, index, length)
        keys = rng.sample(KEYS, self.pairs)
        numbers = rng.sample(range(10 ** (self.digits - 1), 10**self.digits), self.pairs)
        asked = rng.randrange(self.pairs)
        frame = chat_frame(tokenizer)
        head = [*frame.head, *encode(tokenizer, INTRODUCTION)]
        question = [*encode(tokenizer, QUESTION.format(key=keys[asked])), *frame.tail, *encode(tokenizer, keys[asked])]
        lines = [f"{key}{number}" for key, number in zip(keys, numbers, strict=True)]
        pairs = encode(tokenizer, "\n".join(["", *lines, "", ""]))
        room = length - len(head) - len(question) - len(pairs)
        if room < 16:
            raise TooShortError("context", length, f"at least {length - room + 16} tokens for {self}")
        hay = filler(text, tokenizer, room, rng)
        depth = depth_of(index)
        context = [*head, *scatter(tokenizer, hay, [pairs], [round(depth * room)], rng)]
        expected = str(numbers[asked])
        return Sample(
            task=str(self),
            index=index,
            context=tuple(context),
            question=tuple(question),
            answer=tuple(encode(tokenizer, expected)),
            expected=expected,
            depth=depth,
            measure="match",
        )
