"""Steps in place — a token takes the slot of the entry that goes — against steps by importance alone, one lane's scores
at a time: the same entries are kept, whatever the plan, the batch and what happens between steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from tests.inference.policy_views import Prompt, view_of
from tests.inference.proof import relative_error
from tests.inference.tiny import ids, left_padded, llama
from tests.inference.zoo import build
from torch import Tensor

from regard import registry
from regard.errors import NotFiniteError
from regard.inference import pruning
from regard.inference.apply import evict, lowest, narrow, oldest, select
from regard.inference.compose import Composed, Scope, Scoped
from regard.inference.policies.duoattention import DuoAttention
from regard.inference.policies.h2o import H2O
from regard.inference.policies.moa import MoA
from regard.inference.policies.streaming import Streaming
from regard.inference.policies.tova import Tova
from regard.inference.policy import MUST, CachePolicy, LayerView
from regard.inference.pruning import PrunedLayer
from regard.inference.ragged import RaggedKV
from regard.inference.seam import Attached, attach
from regard.inference.store import KVStore

STEPS, SEEDS = 250, 1


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def by_importance(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on every step is taken as for a policy of which nothing is known but its importance."""
    allow = PrunedLayer.allow

    def knows_nothing(self: PrunedLayer, limits: Tensor) -> None:
        allow(self, limits)
        self._weighs, self._first = False, None

    def take() -> None:
        monkeypatch.setattr(PrunedLayer, "allow", knows_nothing)
        monkeypatch.setattr(PrunedLayer, "step", lambda self, *given: self.limits is None or generic(self, *given))

    def generic(self: PrunedLayer, *given: object) -> None:
        self._has_window = False
        self._step_apart(*given)  # type: ignore[arg-type]

    return take


def plan_of(kind: str, rng: random.Random) -> str:
    """A plan with a random budget, of 2 … 30 entries."""
    budget = rng.choice((rng.randint(2, 30), rng.randint(2, 30), round(rng.uniform(0.1, 0.9), 2)))
    sinks = rng.randint(0, min(5, budget - 1) if isinstance(budget, int) else 5)
    return {
        "streaming": f"streaming(budget={budget},sinks={sinks})",
        "tova": f"tova(budget={budget})",
        "h2o": f"h2o(budget={budget})",
        "duoattention": "duoattention(table=[[0.9,0.1],[0.2,0.3]],sparsity=0.7,sinks=2,recent=9)",
        "a + b": f"knorm(budget={rng.randint(8, 30)})+streaming(budget=7,sinks={rng.randint(0, 6)})",
        "b + a": f"streaming(budget=20,sinks=2)+tova(budget={rng.randint(2, 19)})",
        "h2o + snapkv": f"h2o(budget={rng.randint(8, 30)})+snapkv(budget=6,window=2)",
        "in a layer": f"tova(budget={rng.randint(2, 20)})@0+h2o(budget={rng.randint(2, 20)})@1",
        "in a head": f"streaming(budget={rng.randint(6, 20)})@0-.1+h2o(budget=18)@1-.0",
    }[kind]


KINDS = ("streaming", "tova", "h2o", "duoattention", "a + b", "b + a", "h2o + snapkv", "in a layer", "in a head")
Kept = list[list[list[list[int]]]]


def kept(store: KVStore) -> Kept:
    """By layer, row and KV head."""
    return [[[lane.tolist() for lane in row] for row in store.kept(n)] for n in range(store.caching_layers)]


def prompt(rng: random.Random) -> tuple[Tensor, Tensor | None]:
    """Of one row or more, alike, or of other lengths each; some shorter than the budgets."""
    lengths = [rng.choice((3, 25, 40, 41)) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.5:
        lengths = [max(lengths)] * len(lengths)
        return ids(len(lengths), lengths[0], seed=rng.randint(0, 99)), None
    return left_padded(lengths, seed=rng.randint(0, 99))


def drive(attached: Attached, seed: int, events: bool, path: Path) -> tuple[list[Kept], Tensor]:
    """What is kept now and then through several hundred steps, and the last logits.

    events: between steps beams are reordered, rows selected, stores forked, saved and loaded, a row is fed padding, a
    turn of several tokens comes, the store is sealed again.
    """
    rng = random.Random(seed)
    tokens, mask = prompt(rng)
    store = attached.new_store()
    attached.model(tokens, attention_mask=mask, past_key_values=store)
    seen: list[Kept] = []
    for step in range(STEPS):
        rows = len(store.counts)
        n, padding = 1, False
        if events and rng.random() < 0.06 and store.sealed:
            match rng.choice(("look", "beams", "repeat", "fork", "save", "padding", "turn", "seal")):
                case "look":
                    seen.append(kept(store))
                case "beams":
                    store.reorder_cache(torch.tensor([rng.randrange(rows) for _ in range(rows)]))
                case "repeat":
                    store.reorder_cache(torch.tensor([rng.randrange(rows) for _ in range(rng.randint(1, 3))]))
                case "fork":
                    left = store
                    store = store.fork()
                    attached.model(ids(rows, 1, seed=step), past_key_values=left)
                case "save":
                    store.save(path)
                    store = attached.load_store(path)
                case "padding":
                    padding = rows > 1
                case "turn":
                    n = rng.randint(2, 5)
                case "seal":
                    store.seal()
        rows = len(store.counts)
        real = None
        if padding or store.real is not None:
            past = torch.ones(rows, store.columns, dtype=torch.bool) if store.real is None else store.real
            real = torch.cat([past, torch.ones(rows, n, dtype=torch.bool)], 1)
            real[0, -1] = not padding
        out = attached.model(
            ids(rows, n, seed=1000 + step),
            attention_mask=None if real is None else real.long(),
            past_key_values=store,
        )
    seen.append(kept(store))
    return seen, out.logits


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_keep_what_importance_keeps(
    kind: str, events: bool, by_importance: Callable[[], None], tmp_path: Path
) -> None:
    seeds = [100 * KINDS.index(kind) + 10 * events + i for i in range(SEEDS)]
    model = llama().double()
    runs = []
    for general in (False, True):
        if general:
            by_importance()
        for seed in seeds:
            with attach(model, plan_of(kind, random.Random(seed))) as attached:
                runs.append(drive(attached, seed, events, tmp_path / "past.safetensors"))
    for (seen, logits), (want, wanted) in zip(runs[: len(seeds)], runs[len(seeds) :], strict=True):
        assert seen == want
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-8)  # weights are summed in float32


@pytest.mark.parametrize("plan", ["streaming(budget=9,sinks=3)", "tova(budget=9)", "h2o(budget=9)"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral", "deepseek_v3"])
def test_softcaps_sinks_windows_and_latents(name: str, plan: str, by_importance: Callable[[], None]) -> None:
    model = build(name)
    runs = []
    for general in (False, True):
        if general:
            by_importance()
        with attach(model, plan) as attached:
            store = attached.new_store()
            attached.model(ids(2, 30), past_key_values=store)
            for step in range(60):
                logits = attached.model(ids(2, 1, seed=step), past_key_values=store).logits
            runs.append((kept(store), logits))
    assert runs[0][0] == runs[1][0]
    assert relative_error(runs[0][1], runs[1][1]) < 1e-5


# ---- is it the short way at all?


@pytest.mark.parametrize("plan", ["streaming(budget=9)", "tova(budget=9)", "h2o(budget=9)"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_usual_step_moves_nothing(plan: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of any lengths above the budget: no entry is moved or gathered, no order is looked for."""
    tokens, mask = left_padded([30, 17] if padded else [30, 30])
    with attach(llama(), plan) as attached:
        store = attached.new_store()
        attached.model(tokens, attention_mask=mask, past_key_values=store)
        attached.model(ids(2, 1), past_key_values=store)
        attached.model(ids(2, 1), past_key_values=store)  # the first two make room and a hole
        for name in ("_order", "_regroup", "padded", "drop", "keep"):
            monkeypatch.setattr(RaggedKV, name, None)
        for step in range(200):
            attached.model(ids(2, 1, seed=step), past_key_values=store)
        assert all(held.tolist() == [[9, 9], [9, 9]] for held in store.entries)


def test_the_short_way_serves_a_composition_and_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    with attach(llama(), "knorm(budget=20)@0+streaming(budget=9)@1") as attached:
        store = attached.new_store()
        attached.model(ids(1, 30), past_key_values=store)
        attached.model(ids(1, 1), past_key_values=store)
        monkeypatch.setattr(pruning, "lowest", None)
        attached.model(ids(1, 1), past_key_values=store)
        assert [held.tolist() for held in store.entries] == [[[22, 22]], [[9, 9]]]


@pytest.mark.parametrize("lengths", [[2, 2], [30, 3]])
def test_sinks_that_come_after_the_prompt_stay(lengths: list[int]) -> None:
    tokens, mask = left_padded(lengths)
    with attach(llama(), "streaming(budget=9,sinks=4)") as attached:
        store = attached.new_store()
        attached.model(tokens, attention_mask=mask, past_key_values=store)
        for step in range(30):
            attached.model(ids(2, 1, seed=step), past_key_values=store)
        want = [[[0, 1, 2, 3, *range(n + 25, n + 30)]] * 2 for n in lengths]
        assert kept(store) == [want] * 2


def test_every_token_adds_its_weights_once_and_to_its_own_store() -> None:
    """A query's weights sum to one: with two query heads a KV head, a token adds two to the sums of a lane."""
    with attach(llama(), "h2o(budget=9)") as attached:
        store = attached.new_store()
        attached.model(ids(1, 30), past_key_values=store)
        for step in range(5):
            attached.model(ids(1, 1, seed=step), past_key_values=store)
        left = store.fork()
        for step in range(3):
            attached.model(ids(1, 1, seed=step), past_key_values=left)
        for one, tokens in ((store, 35), (left, 38)):
            for layer in one.kv_layers:
                assert layer.observed.sums is not None
                total = layer.observed.sums.sum(-1)
                torch.testing.assert_close(total, torch.full((1, 2), 2.0 * tokens), rtol=1e-5, atol=0)


# ---- the contract


@dataclass(frozen=True)
class Loud(CachePolicy):
    """A policy that says nothing but importance, and acts on steps: small values and many ties, MUST among them."""

    budget: int | None = None
    acts: ClassVar[Literal["seal", "step"]] = "step"

    def importance(self, view: LayerView) -> Tensor:
        score = view.v.norm(dim=-1).mul(3).floor()
        return score.masked_fill(view.positions % 3 == 0, MUST).masked_fill(view.positions % 7 == 0, -MUST)


def test_a_policy_that_says_nothing_steps_in_place_too(
    by_importance: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.register("loud", kind="cache", families=("kv-cache",), cost="-")(Loud)
    model, runs = llama().double(), []
    for general in (False, True):
        if general:
            by_importance()
        for budget in (3, 17):
            with attach(model, f"loud(budget={budget})") as attached:
                runs.append(drive(attached, budget, True, tmp_path / "past.safetensors")[0])
    assert runs[:2] == runs[2:]


@dataclass(frozen=True)
class Given(CachePolicy):
    """Scores given by the test, by position."""

    scores: tuple[float, ...]
    budget: int | None = None
    acts: ClassVar[Literal["seal", "step"]] = "step"

    def importance(self, view: LayerView) -> Tensor:
        return torch.tensor(self.scores)[view.positions.clamp_min(0)]


@pytest.mark.parametrize(
    ("scores", "gone"),
    [
        ((2, 1, 1, 2), 2),
        ((1, 1, 1, 1), 3),
        ((MUST, MUST, MUST, MUST), 0),
        ((MUST, 5, MUST, MUST), 1),
        ((0, -MUST, 3, -MUST), 3),
        ((1e-30, 0, MUST, 1e-30), 1),
    ],
)
def test_of_equals_the_latest_goes_but_of_must_the_oldest(scores: tuple[float, ...], gone: int) -> None:
    order = torch.tensor([2, 0, 3, 1])
    positions = order.expand(1, 2, 4)
    zeros, lengths = torch.zeros(1, 2, 4, 4), torch.full((1, 2), 4)
    view = LayerView(0, 1, zeros, zeros, positions, lengths, torch.tensor([4]))
    policy = Given(tuple(map(float, scores)))
    for slot in (
        evict(policy, view, lengths - 1),
        lowest(policy, replace(view, target=lengths - 1, limit=3)),
    ):
        assert positions.gather(-1, slot[..., None]).flatten().tolist() == [gone, gone]
    assert evict(policy, view, lengths).tolist() == [[-1, -1]]


TABLE = ((0.9, 0.1), (0.4, 0.6))
SLIDING = {
    "streaming": lambda sinks: Streaming(sinks + 2, sinks=sinks),
    "duoattention": lambda sinks: DuoAttention(table=TABLE, sparsity=1.0, sinks=sinks, recent=2),
    "moa-mixture-of-sparse-attention": lambda sinks: MoA((((8.0, 0.0),) * 2,) * 2, block=max(sinks, 1)),
}


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_what_slides_is_what_scores_lowest(name: str, sinks: int) -> None:
    """`slides` against `importance`, on lanes in any order and of any length above it."""
    policy = SLIDING[name](sinks)
    n = policy.slides
    assert n is not None
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(n + 2, n + 9, (2, 2), generator=draw)
        length = int(lengths.max())
        positions = torch.stack(
            [torch.stack([torch.randperm(30, generator=draw)[:length] for _ in range(2)]) for _ in range(2)]
        )
        positions = positions.masked_fill(torch.arange(length) >= lengths[..., None], -1)
        zeros = torch.zeros(2, 2, length, 4)
        view = LayerView(0, 2, zeros, zeros, positions, lengths, torch.tensor([30, 30]))
        assert torch.equal(oldest(positions, n), evict(policy, view, lengths - 1))


def test_every_sliding_policy_is_tested() -> None:
    ours = [e for e in registry.entries("cache") if isinstance(e.factory, type) and "slides" in vars(e.factory)]
    assert {e.key for e in ours} == set(SLIDING)


def test_compositions_slide_where_all_that_step_agree() -> None:
    one, other = Streaming(9, sinks=2), Streaming(7, sinks=2)
    scoped = Scoped(other, Scope.parse("0-.1"))
    assert scoped.slides == Composed((one, scoped)).slides == Composed((H2O(3), one)).parts[1].slides == 2
    assert Composed((one, Streaming(9, sinks=3))).slides is None
    assert Composed((one, Tova(5))).slides is None and Tova(5).slides is None


@pytest.mark.parametrize("divisor", [2, 3])
def test_the_most_recent_are_found_with_and_without_a_limit(divisor: int) -> None:
    view = view_of([Prompt(9, 1), Prompt(9, 2)])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for limit in range(1, 9):
        lane = narrow(view, *select(Tova(limit + 1), view))
        mixed = narrow(lane, order[order <= limit].expand(2, 2, -1), lane.lengths)
        target = torch.full((2, 2), limit)
        slow = replace(mixed, target=target).recent(divisor)
        assert torch.equal(replace(mixed, target=target, limit=limit).recent(divisor), slow)
        held = mixed.positions[1, 0].tolist()
        newest = sorted(held)[limit + 1 - limit // divisor :]
        assert slow[1, 0].tolist() == [p in newest for p in held]


def test_nan_met_by_steps_is_named_within_a_page() -> None:
    model = llama()
    with attach(model, "h2o(budget=9)") as attached:
        store = attached.new_store()
        attached.model(ids(1, 30), past_key_values=store)
        attached.model(ids(1, 1), past_key_values=store)
        model.model.layers[1].self_attn.k_proj.weight[0] = torch.nan
        attached.model(ids(1, 1), past_key_values=store)
        with pytest.raises(NotFiniteError, match="H2O"):
            store.fork().seal()
        with pytest.raises(NotFiniteError, match="H2O"):
            for _ in range(64):
                attached.model(ids(1, 1), past_key_values=store)
