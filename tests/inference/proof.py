"""Proofs that an attached model computes what the model itself computes: every one of them able to fail.

Each function returns `Check`s. An error is the largest absolute difference of logits at real tokens, divided by the
largest absolute logit there; tokens that differ are an infinite error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from tests.inference.batches import LENGTHS, Batch, generate, mixed, run, tokens
from tests.inference.struck_out import eager_copy, logits_under
from torch import Tensor
from transformers import PreTrainedModel

from regard.inference.plan import Plan
from regard.inference.policies.duoattention import DuoAttention
from regard.inference.seam import Attached, attach

ALLOWED = 1e-5
NEW = 6
PIECES = (7, 8, 5)
"""Pieces of a prefill that end inside windows, chunks and rows' padding; three single tokens follow."""
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
def full_plan(model: PreTrainedModel, generations: Sequence[str] = tuple(GENERATIONS)) -> list[Check]:
    """The plan `full` against the model's own eager: forwards, chunked prefill, decode steps, generation."""
    eager = eager_copy(model)
    with attach(model, "full"):
        return list(_full_checks(model, eager, generations))


def _full_checks(model: PreTrainedModel, eager: PreTrainedModel, generations: Sequence[str]) -> Iterator[Check]:
    for name, batch in forwards().items():
        yield Check(name, relative_error(run(model, batch)[0], run(eager, batch)[0], batch.is_real))
    batch = mixed("left")
    longer = batch.then(tokens(len(LENGTHS), 3, seed=2))
    pieces = (*PIECES, 1, 1, 1)
    unpadded = Batch(tokens(2, sum(pieces)))
    for name, whole in {"chunked prefill": longer, "chunked prefill, unpadded": unpadded}.items():
        try:
            want, _ = run(eager, whole, pieces)
        except Exception as refusal:  # the model's own refusal, recorded as such
            yield Check(name, 0.0, remark=f"eager itself: {type(refusal).__name__}: {refusal}")
            continue
        got, _ = run(model, whole, pieces)
        yield Check(name, relative_error(got, want, whole.is_real))
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


@lru_cache(maxsize=2)
@torch.no_grad()
def _kv_heads(model: PreTrainedModel) -> tuple[int, ...]:
    """KV heads of each caching layer."""
    with attach(model, "full") as attached:
        store = attached.new_store()
        run(model, Batch(tokens(1, 4)), cache=store)
        return tuple(len(store.kept(layer)[0]) for layer in range(store.caching_layers))


def plans(model: PreTrainedModel, budget: int) -> dict[str, Plan]:
    """Every cache policy by name at one budget; the head table of `duoattention` fits this model's layers and heads."""
    heads = _kv_heads(model)
    table = tuple(tuple(float((layer + head) % 2) for head in range(n)) for layer, n in enumerate(heads))
    made = {name: Plan.parse(f"{name}(budget={budget})") for name in ("h2o", "tova", "keydiff", "knorm", "random")}
    made["streaming"] = Plan.parse(f"streaming(budget={budget},sinks=2)")
    made["snapkv"] = Plan.parse(f"snapkv(budget={budget},window=4,kernel=3)")
    made["duoattention"] = Plan(cache=DuoAttention(table=table, budget=budget, sinks=2, recent=4))
    return {"full": Plan(), **made}


@torch.no_grad()
def ample_budget(model: PreTrainedModel, plan: Plan) -> Check:
    """A plan whose budget covers prompt and generated tokens generates what eager generates."""
    want_tokens, want = _eager_generation(model)
    with attach(model, plan):
        got_tokens, got = generate(model, mixed("left"), NEW)
    return Check("ample budget", relative_error(got, want) if torch.equal(got_tokens, want_tokens) else torch.inf)


@lru_cache(maxsize=2)
@torch.no_grad()
def _eager_generation(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    return generate(eager_copy(model), mixed("left"), NEW)


@dataclass(frozen=True)
class Decoded:
    """A prompt attended to, sealed, and continued with given tokens.

    prompt (B, N, V) and steps (B, T, V): logits; kept[t][layer][row][head]: positions held just before step t.
    """

    prompt: Tensor
    steps: Tensor
    kept: list[list[list[list[Tensor]]]]


def decode(attached: Attached, batch: Batch, more: Tensor) -> Decoded:
    """Run the plan over a prompt and `more` (B, T) tokens one by one."""
    store = attached.new_store()
    prompt, _ = run(attached.model, batch, cache=store)
    store.seal()
    kept, steps = [], []
    for t in range(more.shape[1]):
        kept.append([store.kept(layer) for layer in range(store.caching_layers)])
        steps.append(run(attached.model, batch.then(more[:, : t + 1]), (1,), store)[0])
    return Decoded(prompt, torch.cat(steps, 1), kept)


@torch.no_grad()
def compressed(model: PreTrainedModel, plan: Plan, steps: int = 3) -> list[Check]:
    """Decode after compression equals dense eager attention under the mask "kept ∪ new" of each layer and KV head;
    and a batch of mixed lengths equals its rows one by one."""
    batch, more = mixed("left"), tokens(len(LENGTHS), steps, seed=2)
    with attach(model, plan) as attached:
        together = decode(attached, batch, more)
        alone = [decode(attached, batch.row(b), more[b : b + 1]) for b in range(len(LENGTHS))]
    want = logits_under(model, batch.then(more), lambda layer: _kept_and_new(together, batch, layer))
    first = batch.ids.shape[1]
    apart = []
    for b, one in enumerate(alone):
        row = torch.cat([together.prompt[b][batch.is_real[b]], together.steps[b]])
        apart.append(relative_error(row[None], torch.cat([one.prompt, one.steps], 1)))
    held = torch.tensor([[len(lane) for lane in row] for layer in together.kept[0] for row in layer])
    dropped = bool((held < torch.tensor(LENGTHS).repeat(len(together.kept[0]))[:, None]).any())
    return [
        Check("prompt before compression", relative_error(together.prompt, want[:, :first], batch.is_real)),
        Check("decode = dense under kept ∪ new", relative_error(together.steps, want[:, first:])),
        Check("batch = its rows", max(apart)),
        Check("something is dropped", 0.0 if dropped != (plan == Plan()) else torch.inf),
    ]


def _kept_and_new(decoded: Decoded, batch: Batch, layer: int) -> Tensor:
    """(B, Hkv, N + T, N + T) bool: a prompt token may see all; step t what was kept before it, and itself."""
    rows, first = batch.ids.shape
    steps = len(decoded.kept)
    heads = len(decoded.kept[0][layer][0])
    out = torch.ones(rows, heads, first + steps, first + steps, dtype=torch.bool)
    padding = (~batch.is_real).sum(1)
    for t, layers in enumerate(decoded.kept):
        out[:, :, first + t] = False
        out[:, :, first + t, first + t] = True
        for row, lanes in enumerate(layers[layer]):
            for head, positions in enumerate(lanes):
                out[row, head, first + t, positions.long() + padding[row]] = True
    return out
