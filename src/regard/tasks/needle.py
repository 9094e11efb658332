"""Needle in a haystack: one sentence that matters, somewhere in a long text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regard.registry import Paper, register
from regard.tasks.frame import chat_frame
from regard.tasks.sample import Sample, Task, TooShortError, depth_of, whole
from regard.tasks.text import Text, encode, filler

PLACES = (
    "lighthouse orchard bakery harbor castle garden library museum bridge market tower forest valley island temple "
    "stable cottage mill chapel fountain meadow palace station theater vineyard"
).split()
INTRODUCTION = "Remember the secret numbers in the following text.\n\n"
SENTENCE = "\nThe secret number of the {place} is {number}.\n"
QUESTION = "\n\nWhat is the secret number of the {place}?"
ANSWER = "The secret number of the {place} is"

NEEDLE = Paper("Needle in a Haystack: pressure testing LLMs", "Kamradt", 2023)


@register("needle", kind="task", paper=NEEDLE, families=("retrieval",), measure="match")
@dataclass(frozen=True)
class Needle(Task):
    """One secret number hidden at a chosen depth of a long text; the question asks for it.

    digits: of the secret number. Tokenisers that split digits make a token of each, and a policy that keeps a key's
    neighbours (SnapKV, ±3) can keep only so many: four stay comparable to the seven that larger vocabularies pack in
    three.
    """

    digits: int = 4
    key = "needle"

    def __post_init__(self) -> None:
        whole(self.digits, "needle.digits", 2, 12)

    def sample(self, tokenizer: Any, text: Text, length: int, index: int, seed: int) -> Sample:
        """See Task.sample."""
        return hide(self, tokenizer, text, length, index, seed, keys=1, digits=self.digits)


def hide(
    task: Task, tokenizer: Any, text: Text, length: int, index: int, seed: int, *, keys: int, digits: int
) -> Sample:
    """A text with `keys` secret numbers in it, the one asked for at this prompt's depth and the others anywhere."""
    rng = task.rng(seed, index, length)
    places = rng.sample(PLACES, keys)
    numbers = [str(rng.randrange(10 ** (digits - 1), 10**digits)) for _ in places]
    frame = chat_frame(tokenizer)
    head = [*frame.head, *encode(tokenizer, INTRODUCTION)]
    question = [
        *encode(tokenizer, QUESTION.format(place=places[0])),
        *frame.tail,
        *encode(tokenizer, ANSWER.format(place=places[0])),
    ]
    needles = [encode(tokenizer, SENTENCE.format(place=p, number=n)) for p, n in zip(places, numbers, strict=True)]
    room = length - len(head) - len(question) - sum(map(len, needles))
    if room < 8 * keys:
        raise TooShortError("context", length, f"at least {length - room + 8 * keys} tokens for {task}")
    hay = filler(text, tokenizer, room, rng)
    depth = depth_of(index)
    wanted = [round(depth * room), *(rng.randrange(room + 1) for _ in needles[1:])]
    context = [*head, *scatter(tokenizer, hay, needles, wanted, rng)]
    return Sample(
        task=str(task),
        index=index,
        context=tuple(context),
        question=tuple(question),
        answer=tuple(encode(tokenizer, f" {numbers[0]}")),
        expected=numbers[0],
        depth=depth,
        measure="match",
    )


def scatter(
    tokenizer: Any, hay: Sequence[int], needles: Sequence[Sequence[int]], wanted: Sequence[int], rng: random.Random
) -> list[int]:
    """`hay` with each needle at its wanted place, moved to the nearest line end so that no word is cut in two."""
    ends = [0, *(i + 1 for i, token in enumerate(hay) if "\n" in tokenizer.decode([token])), len(hay)]
    places = [min(ends, key=lambda end: (abs(end - want), end)) for want in wanted]
    order = sorted(range(len(needles)), key=lambda i: (places[i], rng.random()))
    out: list[int] = []
    start = 0
    for i in order:
        out += [*hay[start : places[i]], *needles[i]]
        start = places[i]
    return [*out, *hay[start:]]
