"""Proofs that an attached model computes what the model itself computes: every one of them able to fail.

Each function returns `Check`s. An error is the largest absolute difference of logits at real tokens, divided by the
largest absolute logit there; tokens that differ are an infinite error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from batches import LENGTHS, Batch, generate, mixed, run, tokens
from struck_out import attention_calls, eager_copy, logits_under
from torch import Tensor
from transformers import PreTrainedModel

from regard.inference.seam import attach

ALLOWED = 1e-5
NEW = 6
PIECES = (7, 8, 5)
"""Chunks of a prefill that end inside windows, chunks and rows' padding."""
GENERATIONS: dict[str, dict[str, object]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
}


@dataclass(frozen=True)
class Check:
    """One comparison. `error` is relative; `remark` says why a comparison was impossible for the model itself."""

    name: str
    error: float
    allowed: float = ALLOWED
    remark: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not


def relative_error(got: Tensor, want: Tensor, real: Tensor | None = None) -> float:
    """max |got − want| / max |want| over real tokens, as a float; got and want (B, N, V), real (B, N) bool."""
    if got.shape != want.shape:
        return torch.inf
    if real is not None:
        got, want = got[real], want[real]
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def forwards() -> dict[str, Batch]:
    """Unpadded, left- and right-padded, with positions as `generate` and as a plain forward gives them."""
    left, right = mixed("left"), mixed("right")
    return {
        "unpadded": Batch(tokens(2, max(LENGTHS))),
        "left-padded": left,
        "left-padded, no positions": Batch(left.ids, left.real),
        "right-padded": Batch(right.ids, right.real),
    }


@torch.no_grad()
def full_plan(model: PreTrainedModel, generations: tuple[str, ...] = tuple(GENERATIONS)) -> list[Check]:
    """The plan `full` against the model's own eager: forwards, chunked prefill, decode steps, generation."""
    eager = eager_copy(model)
    with attach(model, "full"):
        return list(_full_checks(model, eager, generations))


def _full_checks(model: PreTrainedModel, eager: PreTrainedModel, generations: tuple[str, ...]) -> Iterator[Check]:
    for name, batch in forwards().items():
        yield Check(name, relative_error(run(model, batch)[0], run(eager, batch)[0], batch.is_real))
    steps = tokens(len(LENGTHS), 3, seed=2)
    for name, batch in {"chunked prefill": mixed("left"), "chunked prefill, unpadded": Batch(tokens(2, 20))}.items():
        whole = batch.then(steps[: len(batch.ids)]) if batch.real is not None else batch
        pieces = PIECES + (1,) * (whole.ids.shape[1] - sum(PIECES))
        try:
            want, _ = run(eager, whole, pieces)
        except Exception as refusal:  # the model's own refusal, recorded as such
            yield Check(name, 0.0, remark=f"eager itself: {type(refusal).__name__}: {refusal}")
            continue
        got, _ = run(model, whole, pieces)
        yield Check(name, relative_error(got, want, whole.is_real))
    batch = mixed("left")
    longer = batch.then(steps)
    want, _ = run(eager, longer, (1, 1, 1), run(eager, batch)[1])
    got, _ = run(model, longer, (1, 1, 1), run(model, batch)[1])
    yield Check("decode", relative_error(got, want))
    for name in generations:
        try:
            want_tokens, want = generate(eager, batch, NEW, **GENERATIONS[name])
        except Exception as refusal:
            yield Check(name, 0.0, remark=f"eager itself: {type(refusal).__name__}: {refusal}")
            continue
        got_tokens, got = generate(model, batch, NEW, **GENERATIONS[name])
        yield Check(name, relative_error(got, want) if torch.equal(got_tokens, want_tokens) else torch.inf)


@torch.no_grad()
def ample_budget(model: PreTrainedModel, plan: str) -> Check:
    """A plan whose budget covers prompt and generated tokens generates what eager generates."""
    batch = mixed("left")
    want_tokens, want = generate(eager_copy(model), batch, NEW)
    with attach(model, plan):
        got_tokens, got = generate(model, batch, NEW)
    return Check("ample budget", relative_error(got, want) if torch.equal(got_tokens, want_tokens) else torch.inf)


@dataclass(frozen=True)
class Decoded:
    """A prompt attended to, sealed, and continued with given tokens.

    prompt (B, N, V) and steps (B, T, V): logits; kept[t][layer][row][head]: positions held just before step t.
    """

    prompt: Tensor
    steps: Tensor
    kept: list[list[list[list[Tensor]]]]


def decode(model: PreTrainedModel, plan: str, batch: Batch, more: Tensor, layers: int) -> Decoded:
    """Run a plan over a prompt and `more` (B, T) tokens one by one."""
    kept, steps = [], []
    with attach(model, plan) as attached:
        store = attached.new_store()
        prompt, _ = run(model, batch, cache=store)
        store.seal()
        for t in range(more.shape[1]):
            kept.append([[list(row) for row in store.kept(layer)] for layer in range(layers)])
            steps.append(run(model, batch.then(more[:, : t + 1]), (1,), store)[0])
    return Decoded(prompt, torch.cat(steps, 1), kept)


@torch.no_grad()
def kept_and_new(model: PreTrainedModel, plan: str, steps: int = 3) -> list[Check]:
    """Decode after compression equals dense eager attention under the mask "kept ∪ new" of each layer and KV head."""
    batch, more = mixed("left"), tokens(len(LENGTHS), steps, seed=2)
    layers = attention_calls(model, batch)
    decoded = decode(model, plan, batch, more, layers)
    whole = batch.then(more)
    first = whole.ids.shape[1] - steps
    padding = (~batch.is_real).sum(1)

    def allowed(layer: int) -> Tensor:
        heads = len(decoded.kept[0][layer][0])
        size = whole.ids.shape[1]
        out = torch.ones(len(LENGTHS), heads, size, size, dtype=torch.bool)
        for t in range(steps):
            out[:, :, first + t] = False
            out[:, :, first + t, first + t] = True
            for row, lanes in enumerate(decoded.kept[t][layer]):
                for head, positions in enumerate(lanes):
                    out[row, head, first + t, positions.long() + padding[row]] = True
        return out

    want = logits_under(model, whole, allowed)
    most = max(len(lane) for layer in decoded.kept[0] for row in layer for lane in row)
    return [
        Check("prompt before compression", relative_error(decoded.prompt, want[:, :first], batch.is_real)),
        Check("decode = dense under kept ∪ new", relative_error(decoded.steps, want[:, first:])),
        Check("something was dropped", 0.0 if plan == "full" or most < max(LENGTHS) else torch.inf),
    ]


@torch.no_grad()
def rows_alone(model: PreTrainedModel, plan: str, steps: int = 2) -> Check:
    """A batch of mixed lengths equals its rows one by one."""
    batch, more = mixed("left"), tokens(len(LENGTHS), steps, seed=2)
    together = decode(model, plan, batch, more, 0)
    error = 0.0
    for b in range(len(LENGTHS)):
        row = batch.row(b)
        row = Batch(row.ids, torch.ones_like(row.ids, dtype=torch.bool), torch.arange(row.ids.shape[1])[None])
        alone = decode(model, plan, row, more[b : b + 1], 0)
        error = max(error, relative_error(together.steps[b : b + 1], alone.steps))
        error = max(error, relative_error(together.prompt[b : b + 1][:, batch.is_real[b]], alone.prompt))
    return Check("rows alone", error)
