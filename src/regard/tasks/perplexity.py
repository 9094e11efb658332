"""How well the next words of a long text are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.registry import register
from regard.tasks.frame import plain_frame
from regard.tasks.sample import Sample, Task, TooShortError, whole
from regard.tasks.text import Text, filler


@register("perplexity", kind="task", families=("language-modelling",), measure="likelihood")
@dataclass(frozen=True)
class Perplexity(Task):
    """The continuation of a long text, token by token, each true token given before the next is predicted.

    tokens: how many are scored. tail: the last tokens of the prompt, which stand where other tasks have their question.
    """

    tokens: int = 16
    tail: int = 16
    key = "perplexity"
    measure = "likelihood"

    def __post_init__(self) -> None:
        whole(self.tokens, "perplexity.tokens", 1, 4096)
        whole(self.tail, "perplexity.tail", 1, 1024)

    def sample(self, tokenizer: Any, text: Text, length: int, index: int, seed: int) -> Sample:
        """See Task.sample. The first token of the answer is predicted before anything is dropped, so it is not
        scored."""
        head = plain_frame(tokenizer).head
        if length < len(head) + self.tail + 1:
            raise TooShortError("context", length, f"at least {len(head) + self.tail + 1} tokens for {self}")
        rng = self.rng(seed, index, length)
        run = filler(text, tokenizer, length - len(head) + self.tokens + 1, rng)
        prompt = [*head, *run[: length - len(head)]]
        return Sample(
            task=str(self),
            index=index,
            context=tuple(prompt[: -self.tail]),
            question=tuple(prompt[-self.tail :]),
            answer=tuple(run[length - len(head) :]),
            expected="",
            depth=None,
            measure="likelihood",
        )
