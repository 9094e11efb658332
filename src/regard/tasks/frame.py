"""The wrapping of a prompt: a chat template's two ends where the tokenizer has one, its first token otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.tasks.text import encode

_MARK = "@@@"


@dataclass(frozen=True)
class Frame:
    """Token ids before the user's words, and between them and the model's own."""

    head: tuple[int, ...]
    tail: tuple[int, ...]


def chat_frame(tokenizer: Any) -> Frame:
    """From the tokenizer's chat template; without one, `plain_frame` and a line break."""
    if not getattr(tokenizer, "chat_template", None):
        return Frame(plain_frame(tokenizer).head, tuple(encode(tokenizer, "\n")))
    turn = [{"role": "user", "content": _MARK}]
    said = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    head, _, tail = said.partition(_MARK)
    return Frame(tuple(encode(tokenizer, head)), tuple(encode(tokenizer, tail)))


def plain_frame(tokenizer: Any) -> Frame:
    """The token that begins a text, where the tokenizer adds one by itself; no chat."""
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None or list(tokenizer("a")["input_ids"])[:1] != [first]:
        return Frame((), ())
    return Frame((int(first),), ())
