"""Measure plans on one prompt. The only place of this floor that runs a model.

Plans that prefill densely share one prefill: the prompt goes through the model once, under a plan that keeps everything
and observes what all of them need; each plan then takes a fork of that store, seals it and decodes with it. A plan
whose prefill is sparse prefills by itself. The first token of an answer comes out of the prompt's own forward, as in
real use; all others are read from the compressed store.

Watching the prompt can cost time (H2O wants every query's weights), and a shared prefill watches for all. So the time
to the first token is noted only for plans that need all that was watched, and the first prompt of each task is
prefilled anew for each group of plans that watch alike, so that every plan has some.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from regard.choose.records import Record
from regard.inference.plan import Plan
from regard.inference.prefill import FullPrefill
from regard.inference.seam import attach
from regard.inference.store import KVStore
from regard.tasks.sample import Sample

Mode = Literal["aware", "agnostic"]
MODES: tuple[Mode, ...] = ("aware", "agnostic")
SLACK = 2
"""Tokens that an answer may take beyond the tokeniser's own spelling of it."""
WARM_UP = 1
"""Decoding steps whose time is not kept: the first also pages in what sealing moved."""


TIMED = 1
"""Prompts of each task on which plans that watch the prompt differently are prefilled apart."""


class Runner(Protocol):
    """What `compare` needs of a runner; the tests bring one that measures nothing."""

    def measure(self, sample: Sample, mode: Mode, plans: Sequence[Plan]) -> Iterator[Record]:
        """One record per plan, in order."""
        ...


@dataclass(frozen=True)
class ModelRunner:
    """Runs a loaded model. `names` gives each plan's name in the records."""

    model: Any
    tokenizer: Any
    names: dict[Plan, str]

    @torch.no_grad()
    def measure(self, sample: Sample, mode: Mode, plans: Sequence[Plan]) -> Iterator[Record]:
        """One record per plan, those that share a prefill first."""
        timed = sample.index < TIMED
        for group in share(plans, self.model.config, timed=timed):
            alone = len(group) == 1 and not isinstance(group[0].prefill, FullPrefill)
            with attach(self.model, group[0] if alone else "full", observe=[] if alone else group) as attached:
                prompt = self._prefill(attached.new_store(), sample, mode)
                costs = {plan: costly(plan, self.model.config) for plan in group}
                for (
                    plan
                ) in group:  # a prefill that watched more than the plan needs tells nothing of the plan's own time
                    yield self._one(prompt, plan, sample, mode, timed=costs[plan] == any(costs.values()))

    def _prefill(self, store: KVStore, sample: Sample, mode: Mode) -> _Prompt:
        """The part of the prompt that comes before sealing, through the model; nothing is dropped yet."""
        ids = sample.context + sample.question if mode == "aware" else sample.context
        self._reset_peak()
        start = self._now()
        logits = self._forward(store, ids)
        return _Prompt(store, logits, self._now() - start, self._peak())

    def _one(self, prompt: _Prompt, plan: Plan, sample: Sample, mode: Mode, *, timed: bool) -> Record:
        self._reset_peak()
        start = self._now()
        store = prompt.store.fork(plan)
        store.seal()
        logits = self._forward(store, sample.question) if mode == "agnostic" else prompt.logits
        first = int(logits.argmax())
        first_token_s = prompt.seconds + self._now() - start
        held, read = store.held_bytes, store.read_bytes_per_token()
        if sample.measure == "match":
            score, said, steps = self._answer(store, first, sample)
        else:
            score, said, steps = self._follow(store, sample)
        shared = prompt.store.allocated_bytes if self._cuda else 0  # kept for the other plans alone
        now = self._peak() - shared if self._cuda else store.held_bytes
        return Record(
            task=sample.task,
            length=sample.length,
            index=sample.index,
            mode=mode,
            plan=self.names[plan],
            measure=sample.measure,
            depth=sample.depth,
            score=score,
            expected=sample.expected,
            said=said,
            first_token_s=first_token_s if timed else None,
            step_s=tuple(steps[WARM_UP:] or steps),
            prompt_bytes=held,
            read_bytes=read,
            peak_bytes=max(prompt.peak if self._cuda else prompt.store.held_bytes, now),
        )

    def _answer(self, store: KVStore, first: int, sample: Sample) -> tuple[float, str, list[float]]:
        """Greedy decoding until the answer is complete, or can no longer be right."""
        tokens, steps = [first], list[float]()
        while True:
            said = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
            if said.strip().startswith(sample.expected):
                return 1.0, said, steps
            full_length = len(tokens) >= len(sample.answer)  # at least as many steps for each plan, to time them alike
            if full_length and (
                not sample.expected.startswith(said.strip()) or len(tokens) >= len(sample.answer) + SLACK
            ):
                return 0.0, said, steps
            start = self._now()
            tokens.append(int(self._forward(store, tokens[-1:]).argmax()))
            steps.append(self._now() - start)

    def _follow(self, store: KVStore, sample: Sample) -> tuple[float, str, list[float]]:
        """Mean negative log-likelihood of the answer's tokens but the first, each true token given before the next."""
        total, steps = list[float](), list[float]()
        for given, wanted in zip(sample.answer, sample.answer[1:], strict=False):
            start = self._now()
            logits = self._forward(store, (given,))
            steps.append(self._now() - start)
            total.append(-float(logits.float().log_softmax(-1)[wanted]))
        return math.fsum(total) / len(total), "", steps

    def _forward(self, store: KVStore, ids: Sequence[int]) -> Tensor:
        """Logits (V,) after the last of these tokens."""
        tokens = torch.tensor([list(ids)], device=self.model.device)
        logits: Tensor = self.model(input_ids=tokens, past_key_values=store, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    @property
    def _cuda(self) -> bool:
        return bool(self.model.device.type == "cuda")

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _reset_peak(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.model.device)

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.model.device) if self._cuda else 0


@dataclass(frozen=True)
class _Prompt:
    """A store with the prompt in it, unsealed; the last logits; seconds and peak bytes that it took."""

    store: KVStore
    logits: Tensor
    seconds: float
    peak: int


def share(plans: Sequence[Plan], config: Any, *, timed: bool) -> list[list[Plan]]:
    """Plans in groups that share one prefill: all that prefill densely, or when `timed` those among them that watch
    alike (see `costly`).
    """
    groups: dict[object, list[Plan]] = {}
    for plan in plans:
        dense = isinstance(plan.prefill, FullPrefill)
        groups.setdefault(("dense", timed and costly(plan, config)) if dense else plan, []).append(plan)
    return list(groups.values())


def costly(plan: Plan, config: Any) -> bool:
    """Does watching the prompt for this plan take time? Sums over all queries do; a few last queries are free."""
    return any(plan.cache.needs_at(layer).column_sums for layer in range(config.get_text_config().num_hidden_layers))


def peak_kind(device: torch.device) -> str:
    """What `peak_bytes` means on this device, in words."""
    if device.type == "cuda":
        return "CUDA memory allocated at its highest, weights included; a prefill kept for other plans is left out"
    return "K and V payload at its highest; on a CPU the weights and the activations are not counted"


def answer_room(sample: Sample) -> int:
    """Tokens that may follow the prompt."""
    return len(sample.answer) + SLACK
