"""Each cache policy against a slow definition of its own, and what all of them promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.inference.policy_views import DIM, GROUP, KV_HEADS, Prompt, kept, sealed, view_of

from regard.errors import ArgumentError, NotFiniteError
from regard.inference.apply import evict, narrow, select
from regard.inference.budget import UNLIMITED
from regard.inference.compose import Composed, Scope, Scoped
from regard.inference.policies.duoattention import DuoAttention
from regard.inference.policies.full import Full
from regard.inference.policies.h2o import H2O
from regard.inference.policies.keydiff import KeyDiff
from regard.inference.policies.knorm import KeyNorm
from regard.inference.policies.random import Random
from regard.inference.policies.snapkv import SnapKV
from regard.inference.policies.streaming import Streaming
from regard.inference.policies.tova import Tova
from regard.inference.policy import MUST, CachePolicy, LayerView
from regard.registry import entries

TABLE = ((0.9, 0.1), (0.4, 0.6))
BUDGETED = {
    "streaming": Streaming(sinks=2),
    "snapkv": SnapKV(window=3, kernel=3),
    "h2o": H2O(),
    "tova": Tova(),
    "knorm": KeyNorm(),
    "keydiff": KeyDiff(),
    "random": Random(),
}
EVERY = BUDGETED | {"full": Full(), "duoattention": DuoAttention(table=TABLE, sinks=1, recent=3)}


def top(scores: dict[int, float], count: int) -> list[int]:
    """The `count` largest, the earlier of equals, in order of position."""
    return sorted(sorted(scores, key=lambda j: (-scores[j], j))[:count])


def budgeted(name: str, budget: int | float | str) -> CachePolicy:
    policy = EVERY[name]
    return policy if name == "full" else replace(policy, budget=budget)  # type: ignore[type-var]


def test_every_registered_cache_policy_is_tested() -> None:
    """Here, or in a file of its own that names it."""
    ours = {e.key: e for e in entries("cache") if e.factory.__module__.startswith("regard.inference.policies")}
    assert set(EVERY) <= set(ours)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert {key for key in set(ours) - set(EVERY) if ours[key].factory.__qualname__ not in tests} == set()


# ---- each policy and its definition


def snapkv_slowly(p: Prompt, head: int, budget: int, window: int, kernel: int, pooling: str) -> list[int]:
    """The authors' procedure on one KV head: attend, sum over window and group, crop, pool, top, add window."""
    old = p.n - window
    votes = [0.0] * old
    for g in range(p.group):
        for i in range(old, p.n):
            for j, w in p.weights(head * p.group + g, i).items():
                if j < old:
                    votes[j] += w
    pooled = {}
    for j in range(old):
        near = [votes[i] if 0 <= i < old else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
        pooled[j] = max(near) if pooling == "max" else sum(near) / kernel
    return top(pooled, budget - window) + list(range(old, p.n))


@pytest.mark.parametrize("pooling", ["max", "average"])
@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("group", [1, 3])
def test_snapkv_keeps_what_the_authors_procedure_keeps(group: int, kernel: int, pooling: str) -> None:
    for seed in range(6):
        p = Prompt(15, seed, group=group)
        got = sealed(SnapKV(9, window=4, kernel=kernel, pooling=pooling), p)
        assert got == [[snapkv_slowly(p, h, 9, 4, kernel, pooling) for h in range(KV_HEADS)]]


@pytest.mark.parametrize("logits", [{"softcap": 1.5}, {"sink": 5.0}, {"reach": 9}, {"softcap": 2.0, "sink": 1.0}])
def test_snapkv_votes_under_the_layers_own_softcap_sinks_and_mask(logits: dict[str, float]) -> None:
    differs = False
    for seed in range(4):
        p = Prompt(20, seed, **logits)
        got = sealed(SnapKV(8, window=4, kernel=1), p)
        assert got == [[snapkv_slowly(p, h, 8, 4, 1, "max") for h in range(KV_HEADS)]]
        differs |= got != sealed(SnapKV(8, window=4, kernel=1), Prompt(20, seed))
    assert differs, "the prompts must be able to show the setting"


def test_snapkv_of_a_share_smaller_than_its_window_keeps_the_most_recent() -> None:
    assert sealed(SnapKV(0.25, window=8), Prompt(20)) == [[[15, 16, 17, 18, 19]] * KV_HEADS]


@pytest.mark.parametrize(("n", "budget", "want"), [(12, 7, [0, 1, 2, 8, 9, 10, 11]), (6, 9, [0, 1, 2, 3, 4, 5])])
def test_streaming_keeps_sinks_and_the_most_recent(n: int, budget: int, want: list[int]) -> None:
    assert sealed(Streaming(budget, sinks=3), Prompt(n)) == [[want] * KV_HEADS]


def test_streaming_of_a_share_without_room_keeps_the_newest_and_the_earliest_sinks() -> None:
    assert sealed(Streaming(0.3, sinks=4), Prompt(10)) == [[[0, 1, 9]] * KV_HEADS]


@pytest.mark.parametrize("budget", [1, 6, 7])
def test_h2o_halves_its_budget(budget: int) -> None:
    p = Prompt(15, 3)
    want = []
    for h in range(KV_HEADS):
        recent = list(range(p.n - budget // 2, p.n))
        sums = dict(enumerate(p.column_sums(h)))
        want.append(top({j: sums[j] for j in sums if j not in recent}, budget - len(recent)) + recent)
    assert sealed(H2O(budget), p) == [want]


def test_tova_keeps_what_the_last_query_attends_to() -> None:
    p = Prompt(15, 1)
    assert sealed(Tova(6), p) == [[top(dict(enumerate(p.last_row(h))), 6) for h in range(KV_HEADS)]]


def test_knorm_keeps_the_smallest_keys() -> None:
    p = Prompt(15)
    norms = [{j: -math.hypot(*p.k[h, j].tolist()) for j in range(p.n)} for h in range(KV_HEADS)]
    assert sealed(KeyNorm(6), p) == [[top(norm, 6) for norm in norms]]


def test_keydiff_keeps_the_keys_least_like_the_mean() -> None:
    p = Prompt(15)
    want = []
    for h in range(KV_HEADS):
        unit = [[x / math.hypot(*key) for x in key] for key in p.k[h].tolist()]
        mean = [sum(u[d] for u in unit) / p.n for d in range(DIM)]
        want.append(top({j: -sum(a * b for a, b in zip(u, mean, strict=True)) for j, u in enumerate(unit)}, 6))
    assert sealed(KeyDiff(6), p) == [want]


def test_random_depends_on_seed_layer_and_head_and_is_uniform() -> None:
    p = Prompt(12)
    base = sealed(Random(6), p)
    assert base == sealed(Random(6, seed=0), Prompt(12, seed=9)), "keys do not matter"
    assert base[0][0] != base[0][1] and base != sealed(Random(6, seed=1), p) and base != sealed(Random(6), p, layer=1)
    view = view_of([p])
    often = torch.zeros(12)
    for seed in range(400):
        index, _ = select(Random(3, seed=seed), view)
        often += torch.bincount(index.flatten(), minlength=12)
    assert often.sum() == 400 * KV_HEADS * 3
    assert (often - 200).abs().max() < 5 * math.sqrt(200 * 0.75), "each position is kept in a quarter of 800 draws"


# ---- what all of them promise


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("budget", [4, 0.4])
def test_a_row_decides_in_a_batch_as_it_would_alone(name: str, budget: int | float) -> None:
    policy, rows = budgeted(name, budget), [Prompt(n, seed=n) for n in (2, 17, 9, 17)]
    together = sealed(policy, *rows)
    assert together == [sealed(policy, row)[0] for row in rows]
    view = view_of(rows)
    score = policy.importance(replace(view, target=policy.counts(view)))
    for b, row in enumerate(rows):
        alone = view_of([row])
        want = policy.importance(replace(alone, target=policy.counts(alone)))[0]
        torch.testing.assert_close(score[b, :, : row.n], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BUDGETED)
def test_budgets_are_exact_to_the_token(name: str) -> None:
    each = 2 * DIM * 8  # K and V of one entry, float64
    rows = [Prompt(n, seed=1) for n in (3, 10, 20)]
    budgets = {4: [4] * 3, 11: [11] * 3, 0.29: [1, 2, 5], 0.7: [2, 7, 14], 1.0: [3, 10, 20], 100: [100] * 3}
    payload = 2 * len(rows) * KV_HEADS * each  # one entry in every lane of both layers
    budgets |= {f"{5 * payload}B": [5] * 3, f"{6 * payload - 1}B": [5] * 3}
    for budget, wanted in budgets.items():
        lanes = sealed(budgeted(name, budget), *rows)
        want = [[min(w, row.n)] * KV_HEADS for w, row in zip(wanted, rows, strict=True)]
        assert [[len(lane) for lane in row] for row in lanes] == want, budget


@dataclass(frozen=True)
class Given(CachePolicy):
    """Scores given by the test."""

    scores: tuple[float, ...]
    budget: int

    def importance(self, view: LayerView) -> torch.Tensor:
        return torch.tensor(self.scores, dtype=torch.float32).expand(view.positions.shape)


@pytest.mark.parametrize(
    ("scores", "budget", "want"),
    [
        ((1, 1, 1, 1), 2, [0, 1]),
        ((0, 2, 1, 2), 3, [1, 2, 3]),
        ((MUST, 0, MUST, MUST), 2, [2, 3]),
        ((-MUST, 0, -MUST, 1), 3, [0, 1, 3]),
        ((5, MUST, 1, 5), 2, [0, 1]),
    ],
)
def test_ties_must_and_never(scores: tuple[float, ...], budget: int, want: list[int]) -> None:
    assert sealed(Given(scores, budget), Prompt(4)) == [[want] * KV_HEADS]


def test_a_nan_score_is_named_not_used() -> None:
    view = view_of([Prompt(6)])
    with pytest.raises(NotFiniteError, match="Given"):
        select(Given((0, 1, math.nan, 1, 0, 0), 3), view)
    with pytest.raises(NotFiniteError, match="Given"):
        evict(Given((0, 1, math.nan, 1, 0, 0), 3), view, view.lengths - 1)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "knorm", "keydiff", "tova"])
def test_nan_in_keys_is_seen(name: str) -> None:
    p = Prompt(9)
    p.k[1, 4] = math.nan
    with pytest.raises(NotFiniteError):
        sealed(budgeted(name, 4), p)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_drops_the_entry_that_sealing_would_drop_whatever_the_order_of_slots(name: str) -> None:
    policy, larger = budgeted(name, 6), budgeted(name, 7)
    if name == "duoattention":
        policy, larger = (DuoAttention(table=TABLE, sparsity=0.5, sinks=2, recent=r) for r in (4, 5))
    view = view_of([Prompt(9, 1), Prompt(7, 2), Prompt(5, 3)])
    lane = narrow(view, *select(larger, view))
    limits = policy.limits(lane)
    if policy.acts == "seal":
        assert (limits == UNLIMITED).all()
        return
    stay = kept(lane, *select(policy, lane))
    order = torch.randperm(lane.positions.shape[-1])
    mixed = replace(lane, positions=lane.positions[..., order], k=lane.k[:, :, order], v=lane.v[:, :, order])
    mixed.column_sums, mixed.last_row = lane.column_sums[..., order], lane.last_row[..., order]  # type: ignore[index]
    slot = evict(policy, mixed, limits)
    for b in range(3):
        for h in range(KV_HEADS):
            held = [x for x in mixed.positions[b, h].tolist() if x >= 0]
            gone = [] if len(held) <= limits[b, h] else [int(mixed.positions[b, h, slot[b, h]])]
            assert sorted(set(held) - set(gone)) == stay[b][h]
            assert bool(gone) == (slot[b, h] >= 0)


def test_h2o_through_a_prompt_and_many_steps() -> None:
    """Sums of the kept keys go on; recent = budget // 2; one key goes per step. Against lists, one lane at a time."""
    p, budget, start = Prompt(40, 7), 6, 8
    first = Prompt(40, 7)
    first.n, first.q, first.k, first.v = start, p.q[:, :start], p.k[:, :start], p.v[:, :start]
    lanes = sealed(H2O(budget), first)[0]
    sums = [dict(enumerate(first.column_sums(h))) for h in range(KV_HEADS)]
    slow = [list(lane) for lane in lanes]
    for t in range(start, p.n):
        positions = torch.tensor([[*lane, t] for lane in lanes])[None]
        for h in range(KV_HEADS):
            slow[h].append(t)
            sums[h][t] = 0.0
            for g in range(GROUP):
                for j, w in p.weights(h * GROUP + g, t, slow[h]).items():
                    sums[h][j] += w
        view = LayerView(
            layer=0,
            layers=1,
            k=p.k[torch.arange(KV_HEADS)[:, None], positions[0]][None],
            v=p.v[torch.arange(KV_HEADS)[:, None], positions[0]][None],
            positions=positions,
            lengths=torch.full((1, KV_HEADS), budget + 1),
            prompt=torch.tensor([start]),
            column_sums=torch.tensor([[sums[h][j] for j in lane] for h, lane in enumerate(positions[0].tolist())])[
                None
            ],
        )
        slot = evict(H2O(budget), view, H2O(budget).limits(view))[0].tolist()
        for h in range(KV_HEADS):
            slow[h].remove(min(slow[h][: -(budget // 2)], key=lambda j: sums[h][j]))
            lanes[h] = [j for s, j in enumerate(positions[0, h].tolist()) if s != slot[h]]
        assert lanes == slow
    assert any(max(lane[:3]) >= start for lane in lanes), "heavy hitters changed while decoding"


# ---- scopes and compositions


def test_a_scope_leaves_the_rest_of_the_model_alone() -> None:
    policy = Scoped(Streaming(4, sinks=1), Scope.parse("1-.0"))
    everything, some = list(range(9)), [0, 6, 7, 8]
    assert sealed(policy, Prompt(9), layer=0) == [[everything, everything]]
    assert sealed(policy, Prompt(9), layer=1) == [[some, everything]]
    assert policy.limits(view_of([Prompt(9)], layer=1)).tolist() == [[4, UNLIMITED]]
    assert (
        Scoped(H2O(4), Scope.parse("1-")).needs_at(0) != Scoped(H2O(4), Scope.parse("1-")).needs_at(1) == H2O().needs()
    )


def test_a_composition_acts_in_order_each_on_what_is_left() -> None:
    p, other = Prompt(15, 2), Prompt(6, 1)
    got = sealed(Composed((Streaming(8, sinks=2), KeyNorm(5))), p, other)
    for row, lanes in ((p, got[0]), (other, got[1])):
        left = [0, 1, *range(9, 15)] if row is p else range(6)
        for h, lane in enumerate(lanes):
            assert lane == top({j: -math.hypot(*row.k[h, j].tolist()) for j in left}, 5)


def test_a_composed_vote_is_taken_among_what_is_left() -> None:
    """SnapKV after streaming attends to what streaming kept: softmax over those keys only."""
    p = Prompt(18, 4)
    got = sealed(Composed((Streaming(10, sinks=4), SnapKV(5, window=2, kernel=1))), p)[0]
    left = [*range(4), *range(12, 18)]
    for h, lane in enumerate(got):
        votes = dict.fromkeys(left[:-2], 0.0)
        for g in range(GROUP):
            for i in (16, 17):
                for j, w in p.weights(h * GROUP + g, i, left).items():
                    if j in votes:
                        votes[j] += w
        assert lane == [*top(votes, 3), 16, 17]


def test_while_decoding_the_tightest_part_decides() -> None:
    view = view_of([Prompt(7, 1)])
    both = Composed((Streaming(6, sinks=1), Scoped(Tova(5), Scope.parse("0-.1")), KeyNorm(4)))
    limits = both.limits(view)
    assert limits.tolist() == [[6, 5]] and both.acts == "step"
    slot = evict(both, view, limits)
    assert slot.tolist() == [[1, int(view.last_row[0, 1].argmin())]]  # type: ignore[index]


# ---- bad settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(8, window=9), r"SnapKV\.window: got 9; allowed: at most the budget of 8"),
        (lambda: SnapKV(8, window=0), r"SnapKV\.window: got 0; allowed: an int ≥ 1"),
        (lambda: SnapKV(64, kernel=4), r"SnapKV\.kernel: got 4; allowed: an odd int"),
        (lambda: SnapKV(64, pooling="mean"), r"SnapKV\.pooling: got 'mean'; allowed: 'max' or 'average'"),
        (lambda: Streaming(4), r"Streaming\.sinks: got 4; allowed: fewer than the budget of 4"),
        (lambda: Streaming(8, sinks=True), r"Streaming\.sinks: got True"),
        (lambda: Random(8, seed=-1), r"Random\.seed: got -1"),
        (lambda: DuoAttention(), r"DuoAttention\.table: got None"),
        (
            lambda: DuoAttention(table=TABLE, sparsity=2),
            r"DuoAttention\.sparsity: got 2; allowed: a number in \[0, 1\]",
        ),
        (lambda: DuoAttention(table=TABLE, sparsity=0.5, budget=4), "either sparsity or a budget"),
        (lambda: DuoAttention(table=((1.0,), (1.0, 2.0))), r"head table scores of layer 1"),
        (lambda: DuoAttention(table="no-such-table"), r"head table: got 'no-such-table'"),
        (lambda: select(KeyNorm(), view_of([Prompt(4)])), r"KeyNorm\.budget: got None"),
        (lambda: select(DuoAttention(table=TABLE), view_of([Prompt(4)])), r"DuoAttention\.budget: got None"),
        (lambda: Composed((Full(),)), "parts: got 1"),
        (lambda: Scope.parse("3-1"), r"scope\.layers"),
        (lambda: Scope.parse("x"), r"scope: got 'x'"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=message):
        make()
