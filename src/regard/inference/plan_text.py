"""The text form of plans, read and written. A small recursive-descent parser; nothing is ever evaluated.

plan   = part (";" part)*  |  chain                  a bare chain is a preset or a cache part
part   = ("prefill" | "cache" | "decode") "=" chain
chain  = call ("+" call)*                            acts in order
call   = NAME ["(" [key "=" value ("," key "=" value)*] ")"] ["@" scope]
scope  = ranges ["." ranges]                         layers, then KV heads: 0-3,7   4-   2-.0,1
value  = number | True | False | None | quoted | bare word | "[" [value ("," value)*] "]"
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from regard.errors import ArgumentError
from regard.inference.compose import SCOPE, SCOPE_ALLOWED, Scope

PARTS = ("prefill", "cache", "decode")

_NAME = re.compile(r"[A-Za-z_][\w-]*")
_KEY = re.compile(r"[A-Za-z_]\w*")
_WORD = re.compile(r"""[^\s,;()\[\]='"]+""")
_QUOTED = re.compile(r""" "(?:[^"\\]|\\.)*" | '[^']*' """, re.VERBOSE | re.DOTALL)
_INT = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # strings that are written without quotes
_SCOPE = re.compile(SCOPE)
_CONSTANTS: dict[str, Any] = {"True": True, "False": False, "None": None}
_DEPTH = 8


@dataclass(frozen=True)
class Call:
    """`name(key=value, …)@scope` as written, and where in the text."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    scope: Scope | None = None
    at: int = 0


def read(text: str) -> dict[str, list[Call]]:
    """The parts of a plan by name; a bare chain stands under "". Raises ArgumentError with the place of a mistake."""
    return _Reader(text).plan()


def write(call: Call) -> str:
    """The text of one call. `read` gives it back."""
    inside = ",".join(f"{key}={value_text(value)}" for key, value in call.settings.items())
    return call.name + (f"({inside})" if inside else "") + ("" if call.scope is None else f"@{call.scope}")


def value_text(value: Any) -> str:
    """The text of a value: a number, a truth value, None, a string, or a list of these."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value not in _CONSTANTS and not _FLOAT.fullmatch(value)
        return value if plain else json.dumps(value)
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(value_text, value)) + "]"
    raise ArgumentError("setting", repr(value), "a number, True, False, None, a string, or a list of these")


class _Reader:
    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise ArgumentError("plan", repr(text), "the text of a plan, such as 'snapkv(budget=512)'")
        self.text, self.at = text, 0

    def fail(self, wanted: str) -> NoReturn:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        raise ArgumentError("plan", repr(self.text), f"at character {self.at + 1}, instead of {found}: {wanted}")

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, literal: str) -> bool:
        self.skip()
        if not self.text.startswith(literal, self.at):
            return False
        self.at += len(literal)
        return True

    def match(self, pattern: re.Pattern[str], wanted: str) -> str:
        self.skip()
        found = pattern.match(self.text, self.at)
        if found is None:
            self.fail(wanted)
        self.at = found.end()
        return found[0]

    def done(self) -> bool:
        self.skip()
        return self.at == len(self.text)

    def plan(self) -> dict[str, list[Call]]:
        head = re.match(r"\s*([A-Za-z_]\w*)\s*=", self.text)
        if head is None:
            chain = self.chain()
            if not self.done():
                self.fail("'+', or the end of the plan (more than one part is written prefill=…;cache=…;decode=…)")
            return {"": chain}
        parts: dict[str, list[Call]] = {}
        while not self.done():
            self.skip()
            start = self.at
            name = self.match(_KEY, " or ".join(PARTS))
            if name not in PARTS or name in parts:
                self.at = start
                self.fail(f"one of {', '.join(PARTS)}, each at most once; got {name!r}")
            if not self.take("="):
                self.fail("'='")
            parts[name] = self.chain()
            if not self.take(";") and not self.done():
                self.fail("';', '+', or the end of the plan")
        return parts

    def chain(self) -> list[Call]:
        calls = [self.call()]
        while self.take("+"):
            calls.append(self.call())
        return calls

    def call(self) -> Call:
        self.skip()
        start = self.at
        name = self.match(_NAME, "a name")
        settings = self.settings() if self.take("(") else {}
        scope = None
        if self.take("@"):
            place = self.at
            try:
                scope = Scope.parse(self.match(_SCOPE, SCOPE_ALLOWED))
            except ArgumentError:
                self.at = place
                self.fail(SCOPE_ALLOWED)
        return Call(name, settings, scope, start)

    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        while not self.take(")"):
            self.skip()
            start = self.at
            key = self.match(_KEY, "a setting's name or ')'")
            if key in settings:
                self.at = start
                self.fail(f"each setting at most once; {key!r} is given twice")
            if not self.take("="):
                self.fail("'='")
            settings[key] = self.value(0)
            if not self.take(",") and not self.text.startswith(")", self.at):
                self.fail("',' or ')'")
        return settings

    def value(self, depth: int) -> Any:
        if self.take("["):
            if depth == _DEPTH:
                self.fail(f"lists at most {_DEPTH} deep")
            items: list[Any] = []
            while not self.take("]"):
                items.append(self.value(depth + 1))
                if not self.take(",") and not self.text.startswith("]", self.at):
                    self.fail("',' or ']'")
            return tuple(items)
        self.skip()
        start = self.at
        if self.text[start : start + 1] in ("'", '"'):
            quoted = self.match(_QUOTED, "a closed quotation")
            if quoted[0] == "'":
                return quoted[1:-1]
            try:
                return json.loads(quoted, strict=False)
            except json.JSONDecodeError:
                self.at = start
                self.fail("a string with the escapes of JSON, or one in single quotes")
        return _word(self.match(_WORD, "a value: a number, True, False, None, a string or a list"))


def _word(word: str) -> Any:
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if _INT.fullmatch(word) and len(word) < 400:
        return int(word)
    if _FLOAT.fullmatch(word):
        return float(word)
    return word
