"""What the claims about language models share: SmolLM2, real text, answers and likelihoods under plans."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regard.inference.seam import attach
from regard.inference.store import KVStore
from regard.models.pretrained import Loaded, load
from regard.tasks import Sample, parse
from regard.tasks.text import Text, encode, long_text


@cache
def smollm2() -> Loaded:
    """SmolLM2-135M-Instruct, loaded once."""
    return load("smollm2")


@cache
def text() -> Text:
    """The long text that needles are hidden in and likelihoods are taken of."""
    return long_text()


@cache
def passages(count: int, length: int) -> tuple[Tensor, ...]:
    """`count` passages of `length` token ids (length,), spread evenly over the text."""
    body, tokenizer = text().body, smollm2().tokenizer
    found = []
    for i in range(count):
        start = body.find("\n", len(body) * i // count) + 1
        ids = encode(tokenizer, body[start : start + 12 * length])[:length]
        found.append(torch.tensor(ids, device=smollm2().model.device))
    return tuple(found)


def samples(task: str, *, count: int, length: int, seed: int) -> list[Sample]:
    """`count` prompts of `length` tokens."""
    maker = parse(task)
    return [maker.sample(smollm2().tokenizer, text(), length, index, seed) for index in range(count)]


@torch.no_grad()
def right_answers(prompts: list[Sample], plans: Mapping[str, str]) -> dict[str, list[bool]]:
    """Per plan and prompt: is the greedy answer right? The question belongs to the prompt; the prefill is dense.

    One prefill serves all plans. As in `generate()`, the answer's first token comes from it.
    """
    model, tokenizer = smollm2().model, smollm2().tokenizer
    right: dict[str, list[bool]] = {name: [] for name in plans}
    with attach(model, "full", observe=list(plans.values())) as attached:
        for prompt in prompts:
            ids = torch.tensor([prompt.context + prompt.question], device=model.device)
            store = attached.new_store()
            first = model(ids, past_key_values=store, logits_to_keep=1).logits.argmax(-1)
            for name, plan in plans.items():
                own = store.fork(plan)
                own.seal()
                said = _greedy(own, first, len(prompt.answer) + 4)
                right[name].append(tokenizer.decode(said).strip().startswith(prompt.expected))
    return right


def _greedy(store: KVStore, token: Tensor, count: int) -> list[int]:
    """`count` token ids, the first of them `token` (1, 1)."""
    said = [int(token)]
    while len(said) < count:
        token = smollm2().model(token, past_key_values=store).logits[:, -1:].argmax(-1)
        said.append(int(token))
    return said


@torch.no_grad()
def decoded_nll(store: KVStore, ids: Tensor) -> Tensor:
    """(n − 1,) negative log-likelihoods of ids[1:], fed one by one to a sealed store as generated tokens would be."""
    model = smollm2().model
    steps = [model(ids[None, i : i + 1], past_key_values=store).logits[0] for i in range(len(ids) - 1)]
    return cross_entropy(torch.cat(steps).float(), ids[1:], reduction="none")


@torch.no_grad()
def dense_nll(ids: Tensor) -> Tensor:
    """(n − 1,) negative log-likelihoods of ids[1:] under the model as it is."""
    return cross_entropy(smollm2().model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")


def perplexity(nll: Tensor) -> float:
    """e to the mean."""
    return float(nll.mean().exp())


def per_cent(values: list[bool]) -> float:
    """Share of True, in per cent."""
    return 100 * sum(values) / len(values)
