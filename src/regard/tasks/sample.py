"""What a task makes, and how a task is named."""

from __future__ import annotations

import ast
import random
import re
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, ClassVar, Literal

from regard.errors import ArgumentError, UnknownNameError
from regard.registry import Kind, lookup
from regard.tasks.text import Text


class TooShortError(ArgumentError):
    """The context asked for has no room for what the task must put into it."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer, in token ids.

    context + question is exactly the length asked for. They are kept apart so that a cache can be sealed between them.
    answer: the tokens that a right answer is made of, for `likelihood` the continuation to be predicted, whose first
    token is given and not scored. expected: the text that an answer must begin with ("" for `likelihood`).
    depth: where in the context lies what is asked for, 0 = at its start, 1 = just before the question; None = nowhere.
    """

    task: str
    index: int
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    expected: str
    depth: float | None
    measure: Literal["match", "likelihood"]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.context) + len(self.question)


class Task:
    """Base of all tasks; subclasses are frozen dataclasses whose fields are their settings, and define `sample`."""

    key: ClassVar[str]
    measure: ClassVar[Literal["match", "likelihood"]] = "match"

    def sample(self, tokenizer: Any, text: Text, length: int, index: int, seed: int) -> Sample:
        """Prompt number `index` of `length` tokens: the same arguments give the same prompt, whatever else is made.

        Raises TooShortError when `length` has no room for the task, ArgumentError when `text` is too short.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return text_form(self)

    def rng(self, seed: int, index: int, length: int) -> random.Random:
        """Random numbers of this prompt alone."""
        return random.Random(f"{self}/{length}/{index}/{seed}")


def depth_of(index: int) -> float:
    """Depth of prompt `index`: 1/2, 1/4, 3/4, 1/8, 5/8, … (van der Corput), so that any first n are spread evenly."""
    depth, unit, index = 0.0, 0.5, index + 1
    while index:
        depth += unit * (index & 1)
        unit, index = unit / 2, index >> 1
    return depth


def parse(text: str) -> Task:
    """A task from `name` or `name(key=value, …)`. Raises UnknownNameError or ArgumentError."""
    made = made_from(text, "task", "tasks")
    assert isinstance(made, Task)
    return made


def made_from(text: str, kind: Kind, argument: str) -> Any:
    """What is registered under `kind`, made from `name` or `name(key=value, …)`; `argument` is for the error."""
    name, settings = named(text, argument)
    factory = lookup(kind, name).factory
    for key in settings:
        if key not in signature(factory).parameters:
            raise UnknownNameError(f"setting of {name}", key, signature(factory).parameters)
    return factory(**settings)


def named(text: str, argument: str) -> tuple[str, dict[str, Any]]:
    """`name(key=value, …)` in its parts; values are Python's literals. Raises ArgumentError."""
    found = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise ArgumentError(argument, repr(text), "NAME or NAME(key=value, …)")
    settings: dict[str, Any] = {}
    for item in items_of(found[2] or ""):
        key, _, value = (part.strip() for part in item.partition("="))
        setting = f"{found[1]}.{key}"
        if key in settings:
            raise ArgumentError(setting, f"{settings[key]!r}, then {value}", "one value")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError) as error:
            allowed = "a number, True, False, None, a text in quotes, or a list or tuple of these"
            raise ArgumentError(setting, repr(value), allowed) from error
    return found[1], settings


def items_of(text: str) -> tuple[str, ...]:
    """Split at commas that stand in no bracket; items are stripped, and empty ones left out."""
    items, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append(text[start:at])
            start = at + 1
    return tuple(item.strip() for item in [*items, text[start:]] if item.strip())


def text_form(task: Any) -> str:
    """`name(key=value,…)` of a dataclass with a `key`: the settings that are not the default."""
    given = [f"{f.name}={getattr(task, f.name)!r}" for f in fields(task) if getattr(task, f.name) != f.default]
    return task.key + (f"({','.join(given)})" if given else "")


def whole(value: object, name: str, least: int, most: int) -> None:
    """Raise ArgumentError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ArgumentError(name, repr(value), f"an integer from {least} to {most}")
