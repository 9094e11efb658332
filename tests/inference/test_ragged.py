"""The ragged store against a list of entries per lane."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regard.errors import ArgumentError, StoreError
from regard.inference.lanes import PAGE
from regard.inference.ragged import RaggedKV

KEY, VALUE = 3, 2
Entry = tuple[int, float, float]  # position, what k is filled with, what v is filled with
Lane = list[Entry]


class Model:
    """What the store means: per row and head a list of entries, in order of position."""

    def __init__(self, batch: int, heads: int) -> None:
        self.lanes: list[list[Lane]] = [[[] for _ in range(heads)] for _ in range(batch)]
        self.seen = [0] * batch

    @property
    def lengths(self) -> list[list[int]]:
        return [[len(lane) for lane in row] for row in self.lanes]


def append(store: RaggedKV, model: Model, rng: random.Random, n: int, padding: bool) -> None:
    batch, heads = store.batch, store.heads
    marks_k = torch.tensor([rng.random() for _ in range(batch * heads * n)]).view(batch, heads, n)
    marks_v = torch.tensor([rng.random() for _ in range(batch * heads * n)]).view(batch, heads, n)
    real = torch.tensor([[not padding or rng.random() < 0.7 for _ in range(n)] for _ in range(batch)])
    real = real.view(batch, n).bool()
    positions = torch.zeros(batch, n, dtype=torch.long)
    for b in range(batch):
        for i in range(n):
            positions[b, i] = model.seen[b]
            if real[b, i]:
                for h in range(heads):
                    model.lanes[b][h].append((model.seen[b], marks_k[b, h, i].item(), marks_v[b, h, i].item()))
                model.seen[b] += 1
    marks_k, marks_v, positions = (x.to(store.device) for x in (marks_k, marks_v, positions))
    k = marks_k[..., None].repeat(1, 1, 1, KEY)
    v = marks_v.transpose(1, 2).contiguous().transpose(1, 2)[..., None].expand(-1, -1, -1, VALUE)  # strided on purpose
    alike = not padding and len(set(model.seen)) == 1
    first = int(positions[0, 0]) if alike and n and rng.random() < 0.8 else None
    store.append(k, v, positions, real if padding or rng.random() < 0.5 else None, first)


def keep(store: RaggedKV, model: Model, rng: random.Random, alike: bool) -> None:
    shortest = min((n for row in model.lengths for n in row), default=0)
    same = rng.randint(0, shortest)
    counts = [[same if alike else rng.randint(0, n) for n in row] for row in model.lengths]
    width = max((n for row in counts for n in row), default=0) + rng.randint(0, 2)
    index = torch.full((store.batch, store.heads, width), 10**6)
    for b, row in enumerate(counts):
        for h, count in enumerate(row):
            chosen = rng.sample(range(len(model.lanes[b][h])), count)
            index[b, h, :count] = torch.tensor(chosen, dtype=torch.long)
            model.lanes[b][h] = [model.lanes[b][h][i] for i in sorted(chosen)]
    store.keep(index, torch.tensor(counts).view(store.batch, store.heads).long())


def storage_order(store: RaggedKV) -> torch.Tensor:
    """(B, H, L): the storage slot of each slot of padded(sort=True), −1 where that is absent."""
    positions = store.padded(sort=False)[2]
    order = positions.masked_fill(positions < 0, 2**40).argsort(-1)
    return order.masked_fill(positions.gather(2, order) < 0, -1)


def drop(store: RaggedKV, model: Model, rng: random.Random, everyone: bool) -> None:
    order = storage_order(store)
    slot = torch.full((store.batch, store.heads), -1)
    for b, row in enumerate(model.lanes):
        for h, lane in enumerate(row):
            if lane and (everyone or rng.random() < 0.5):
                gone = rng.randrange(len(lane))
                slot[b, h] = order[b, h, gone]
                del lane[gone]
    store.drop(slot, slot >= 0 if rng.random() < 0.5 else None)


def slide(store: RaggedKV, model: Model, rng: random.Random) -> None:
    """Every lane loses its n-th entry; n is mostly the same, so that slots are used in turn."""
    if store.uniform:
        n = min(rng.choice((2, 2, 2, 0)), store.uniform - 1)
        for row in model.lanes:
            for lane in row:
                del lane[n]
        store.slide(n)


def slide_some(store: RaggedKV, model: Model, rng: random.Random, length: int | None = None) -> None:
    """Lanes of one length lose their n-th entry, where the store can."""
    length = rng.choice([1, *(n for row in model.lengths for n in row)]) if length is None else length
    active = store.lengths == length
    if length and bool(active.any()) and store.together(active):
        n = min(rng.choice((2, 2, 2, 0)), length - 1)
        store.slide(n, active)
        for b, row in enumerate(model.lanes):
            for h, lane in enumerate(row):
                if active[b, h]:
                    del lane[n]


def vacate(store: RaggedKV, model: Model, rng: random.Random) -> None:
    if store.uniform:
        order = storage_order(store)
        slot = torch.zeros(store.batch, store.heads, dtype=torch.long)
        for b, row in enumerate(model.lanes):
            for h, lane in enumerate(row):
                gone = rng.randrange(len(lane))
                slot[b, h] = order[b, h, gone]
                del lane[gone]
        store.vacate(slot)


def crop(store: RaggedKV, model: Model, rng: random.Random) -> None:
    limit = [rng.randint(0, seen + 1) for seen in model.seen]
    for b, stop in enumerate(limit):
        model.lanes[b] = [[e for e in lane if e[0] < stop] for lane in model.lanes[b]]
        model.seen[b] = min(model.seen[b], stop)
    store.crop(torch.tensor(limit, dtype=torch.long))


def select(store: RaggedKV, model: Model, rng: random.Random) -> None:
    index = [rng.randrange(store.batch) for _ in range(rng.randint(1, 3))]
    model.lanes = [copy.deepcopy(model.lanes[i]) for i in index]
    model.seen = [model.seen[i] for i in index]
    store.select_rows(torch.tensor(index))


def repeat(store: RaggedKV, model: Model) -> None:
    store.repeat_rows(2)
    model.lanes = [copy.deepcopy(row) for row in model.lanes for _ in range(2)]
    model.seen = [n for n in model.seen for _ in range(2)]


def entries(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> Lane:
    assert bool((k == k[:, :1]).all()) and bool((v == v[:, :1]).all())
    return [(int(p), a.item(), b.item()) for p, a, b in zip(positions, k[:, 0], v[:, 0], strict=True)]


def check(store: RaggedKV, model: Model) -> None:
    batch, heads = len(model.lanes), store.heads
    assert store.batch == batch and store.lengths.dtype == torch.long and store.lengths.device.type == "cpu"
    assert store.lengths.tolist() == model.lengths

    longest = max((n for row in model.lengths for n in row), default=0)
    for ordered in (True, False):
        k, v, positions = store.padded(sort=ordered)
        assert k.shape == (batch, heads, longest, KEY) and v.shape == (batch, heads, longest, VALUE)
        assert positions.dtype == torch.long and positions.shape == (batch, heads, longest)
        for b in range(batch):
            for h in range(heads):
                n = len(model.lanes[b][h])
                found = entries(k[b, h, :n], v[b, h, :n], positions[b, h, :n])
                assert (found if ordered else sorted(found)) == model.lanes[b][h]
                assert bool((positions[b, h, n:] == -1).all())
                assert not k[b, h, n:].any() and not v[b, h, n:].any()

    seen = set()
    for group in store.groups():
        assert group.complete == (len(group.rows) == batch * heads)
        lengths = group.lengths.tolist()
        assert group.uniform == (lengths[0] if len(set(lengths)) == 1 else None)
        for i, (b, h, n) in enumerate(zip(group.rows.tolist(), group.heads.tolist(), lengths, strict=True)):
            seen.add((b, h))
            assert sorted(entries(group.k[i, :n], group.v[i, :n], group.positions[i, :n])) == model.lanes[b][h]
    assert seen == {(b, h) for b in range(batch) for h in range(heads)}

    order, unsorted = storage_order(store), store.padded(sort=False)[2]
    there = order >= 0
    assert torch.equal(there, store.padded()[2] >= 0)
    assert torch.equal(unsorted.gather(2, order.clamp(min=0))[there], store.padded()[2][there])

    held = sum(g.k.untyped_storage().nbytes() + g.v.untyped_storage().nbytes() for g in store.groups())
    each = (KEY + VALUE) * 4
    assert store.payload_bytes == each * sum(n for row in model.lengths for n in row)
    assert store.allocated_bytes == held <= store.payload_bytes + each * PAGE * batch * heads


STEPS = (
    *("one", "one", "many", "page", "padded", "keep", "keep alike", "drop", "drop all", "crop", "select", "repeat"),
    *("slide", "slide", "vacate", "step", "slide some", "step some"),
)


def act(step: str, store: RaggedKV, model: Model, rng: random.Random) -> None:
    match step:
        case "one":
            append(store, model, rng, 1, padding=False)
        case "many":
            append(store, model, rng, rng.randint(0, 9), padding=False)
        case "page":
            append(store, model, rng, rng.choice((PAGE - 1, PAGE, PAGE + 1)), padding=False)
        case "padded":
            append(store, model, rng, rng.choice((1, 5, PAGE + 20)), padding=True)
        case "keep" | "keep alike":
            keep(store, model, rng, alike=step == "keep alike")
        case "drop" | "drop all":
            drop(store, model, rng, everyone=step == "drop all")
        case "slide":
            slide(store, model, rng)
        case "vacate":
            vacate(store, model, rng)
        case "step":  # as a policy steps, unlooked at between
            for _ in range(rng.randint(1, 9)):
                append(store, model, rng, 1, padding=False)
                slide(store, model, rng)
        case "slide some":
            slide_some(store, model, rng)
        case "step some":
            length = rng.choice([n for row in model.lengths for n in row] or [0])
            for _ in range(rng.randint(1, 9)):
                append(store, model, rng, 1, padding=False)
                slide_some(store, model, rng, length + 1)
        case "crop":
            crop(store, model, rng)
        case "select":
            select(store, model, rng)
        case "repeat":
            if store.batch <= 2:
                repeat(store, model)


def run(store: RaggedKV, steps: list[str], rng: random.Random) -> None:
    """Take the steps on the store and on its forks, each beside its own model. All must agree at the end, and after
    every other step: looking closes holes, and what follows must also be right when nobody has looked."""
    pairs = [(store, Model(store.batch, store.heads))]
    check(*pairs[0])
    for step in steps:
        store, model = rng.choice(pairs)
        if step == "fork":
            pairs.append((store.fork(), copy.deepcopy(model)))
        else:
            act(step, store, model, rng)
        if rng.random() < 0.5:
            for pair in pairs:
                check(*pair)
    for pair in pairs:
        check(*pair)


BEGINNINGS = ((), ("padded", "page", "padded"), ("page", "page", "keep"))  # nothing yet, unlike rows, unlike heads
SEQUENCE = st.lists(st.sampled_from((*STEPS, "fork")), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(BEGINNINGS), SEQUENCE, st.integers(0, 2**20))
def test_any_sequence_of_operations(
    batch: int, heads: int, beginning: tuple[str, ...], steps: list[str], seed: int
) -> None:
    store = RaggedKV(batch, heads, KEY, VALUE, torch.float32, "cpu")
    run(store, [*beginning, *steps], random.Random(seed))


def test_positions_numbered_ahead_stay_true() -> None:
    """Of rows alike a page's positions are written before its tokens come: whatever moves slots must be noticed."""

    def add(store: RaggedKV, *numbers: int, first: int | None = None, real: torch.Tensor | None = None) -> None:
        new = torch.zeros(store.batch, 1, len(numbers), 2)
        store.append(new, new, torch.tensor(numbers).expand(store.batch, -1), real, first)

    dropped = RaggedKV(1, 1, 2, 2, torch.float32, "cpu")
    add(dropped, 0, 1, 2, first=0)
    dropped.drop(torch.tensor([[1]]))
    add(dropped, 3, first=3)
    assert dropped.padded()[2].tolist() == [[[0, 2, 3]]]
    named = RaggedKV(1, 1, 2, 2, torch.float32, "cpu")
    add(named, 0, 1, 2, first=0)
    add(named, 7)
    named.drop(torch.tensor([[3]]))
    add(named, 3, first=3)
    assert named.padded()[2].tolist() == [[[0, 1, 2, 3]]]
    padded = RaggedKV(2, 1, 2, 2, torch.float32, "cpu")
    add(padded, 0, 1, first=0)
    add(padded, 9, 2, 3, real=torch.tensor([[False, True, True], [False, False, True]]))
    padded.crop(torch.tensor([2, 2]))
    add(padded, 2, 3, first=2)
    assert padded.padded()[2].tolist() == [[[0, 1, 2, 3]]] * 2
    assert dropped.fork().state()["positions"].tolist() == [0, 2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_on_cuda(seed: int) -> None:
    rng = random.Random(seed)
    steps = [*rng.choice(BEGINNINGS), *rng.choices((*STEPS, "fork"), k=15)]
    run(RaggedKV(rng.randint(1, 3), rng.randint(1, 3), KEY, VALUE, torch.float32, "cuda"), steps, rng)


@pytest.mark.parametrize("seed", range(3))
def test_long_runs(seed: int) -> None:
    """Pages fill and empty, lanes drift apart and come together, over many more steps than hypothesis takes."""
    rng = random.Random(seed)
    store, model = RaggedKV(2, 2, KEY, VALUE, torch.float32, "cpu"), Model(2, 2)
    append(store, model, rng, 2 * PAGE + 3, padding=True)
    keep(store, model, rng, alike=False)
    for i in range(90):
        append(store, model, rng, 1, padding=i % 7 == 0)
        drop(store, model, rng, everyone=i % 2 == 0)
        check(store, model)


def test_equal_lanes_are_one_group_of_views_written_in_place() -> None:
    store, model, rng = RaggedKV(2, 3, KEY, VALUE, torch.float32, "cpu"), Model(2, 3), random.Random(0)
    append(store, model, rng, 5, padding=False)
    (group,) = store.groups()
    assert group.complete and group.uniform == 5 and group.k.shape[1] == PAGE
    place = group.k.data_ptr()
    for _ in range(PAGE - 5):
        append(store, model, rng, 1, padding=False)
    view = store.uniform_view()
    assert view is not None and view[0].data_ptr() == place == store.groups()[0].k.data_ptr()
    assert view[0].shape == (2, 3, PAGE, KEY) and view[1].shape == (2, 3, PAGE, VALUE)
    assert view[2][1, 2].tolist() == list(range(PAGE))
    append(store, model, rng, 1, padding=False)
    assert store.groups()[0].k.shape[1] == 2 * PAGE
    keep(store, model, random.Random(1), alike=False)
    assert store.uniform_view() is None


def test_drop_is_in_place_until_a_whole_page_is_empty() -> None:
    store, model, rng = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu"), Model(1, 2), random.Random(0)
    append(store, model, rng, PAGE, padding=False)
    places = set()
    for _ in range(200):  # a window that slides over a page boundary never moves once it has its second page
        append(store, model, rng, 1, padding=False)
        drop(store, model, rng, everyone=True)
        places.add(store.groups()[0].k.data_ptr())
    assert len(places) == 1
    for _ in range(PAGE):
        drop(store, model, rng, everyone=True)
    assert store.lengths.tolist() == [[0, 0]] and store.allocated_bytes <= 2 * PAGE * (KEY + VALUE) * 4
    check(store, model)


@pytest.mark.parametrize("way", [slide, vacate])
def test_an_entry_for_an_entry_stays_in_place(way: Callable[[RaggedKV, Model, random.Random], None]) -> None:
    """Hundreds of tokens, each in the slot of an entry that went: nothing is allocated, no page is passed."""
    store, model, rng = RaggedKV(2, 2, KEY, VALUE, torch.float32, "cpu"), Model(2, 2), random.Random(0)
    append(store, model, rng, 70, padding=False)
    places = set()
    for i in range(300):
        append(store, model, rng, 1, padding=False)
        places.add(store.groups()[0].k.data_ptr())
        assert sorted(store.groups()[0].positions[3, :71].tolist()) == [e[0] for e in model.lanes[1][1]]
        if i % 100 == 99:
            check(store, model)
            places.clear()  # whoever asks for an order makes a copy
        if way is slide:
            slide(store, model, random.Random(1))  # always the same n
        else:
            slot = torch.tensor([[rng.randrange(71) for _ in range(2)] for _ in range(2)])
            gone = store.padded(sort=False)[2].gather(2, slot[..., None])[..., 0].tolist()
            for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
                model.lanes[b][h] = [e for e in model.lanes[b][h] if e[0] != gone[b][h]]
            store.vacate(slot)
        assert len(places) <= 2
    check(store, model)


def test_fork_shares_until_one_side_changes() -> None:
    store, model, rng = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu"), Model(1, 2), random.Random(0)
    append(store, model, rng, 5, padding=False)
    twin, twin_model = store.fork(), copy.deepcopy(model)
    third = store.fork()
    place = store.groups()[0].k.data_ptr()
    assert twin.groups()[0].k.data_ptr() == place
    append(twin, twin_model, rng, 1, padding=False)
    assert twin.groups()[0].k.data_ptr() != place == third.groups()[0].k.data_ptr()
    check(store, model)
    check(twin, twin_model)
    del third
    append(store, model, rng, 1, padding=False)
    assert store.groups()[0].k.data_ptr() == place, "the last holder writes in place"
    check(store, model)
    check(twin, twin_model)


@pytest.mark.parametrize("step", sorted({*STEPS}))
@pytest.mark.parametrize("unlike", [False, True])
def test_nothing_done_to_one_side_of_a_fork_is_seen_on_the_other(step: str, unlike: bool) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        store, model = RaggedKV(2, 2, KEY, VALUE, torch.float32, "cpu"), Model(2, 2)
        append(store, model, rng, 70, padding=unlike)
        for side in (0, 1):
            pairs = [(store.fork(), copy.deepcopy(model)), (store, copy.deepcopy(model))]
            act(step, *pairs[side], rng)
            for pair in pairs:
                check(*pair)
            store, model = pairs[0]


def test_a_fork_survives_being_the_one_that_keeps() -> None:
    """Plans share one prefill: each keeps other entries of it."""
    store, model = RaggedKV(2, 2, KEY, VALUE, torch.float32, "cpu"), Model(2, 2)
    append(store, model, random.Random(0), 150, padding=True)
    for seed in range(3):
        twin, twin_model = store.fork(), copy.deepcopy(model)
        keep(twin, twin_model, random.Random(seed), alike=False)
        drop(twin, twin_model, random.Random(seed), everyone=False)
        check(twin, twin_model)
        check(store, model)


def test_keep_of_everything_copies_nothing() -> None:
    store, model = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu"), Model(1, 2)
    append(store, model, random.Random(0), 70, padding=False)
    place = store.groups()[0].k.data_ptr()
    store.keep(torch.arange(70).flip(0).expand(1, 2, 70), torch.full((1, 2), 70))
    assert store.groups()[0].k.data_ptr() == place
    check(store, model)


def test_keep_restores_the_order_so_that_reading_needs_no_sort() -> None:
    store, model = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu"), Model(1, 2)
    append(store, model, random.Random(0), 70, padding=False)
    drop(store, model, random.Random(0), everyone=True)
    keep(store, model, random.Random(0), alike=True)
    assert store.padded(sort=True)[0].data_ptr() == store.groups()[0].k.data_ptr()
    check(store, model)


def test_a_row_without_real_tokens() -> None:
    store = RaggedKV(2, 2, KEY, VALUE, torch.float32, "cpu")
    k, v = torch.randn(2, 2, 4, KEY), torch.randn(2, 2, 4, VALUE)
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    real = torch.tensor([[True] * 4, [False] * 4])
    store.append(k, v, positions, real)
    assert store.lengths.tolist() == [[4, 4], [0, 0]]
    assert store.allocated_bytes == 2 * PAGE * (KEY + VALUE) * 4
    assert sorted(g.uniform for g in store.groups()) == [0, 4]
    assert torch.equal(store.padded()[0][0], k[0])


def test_inference_mode_may_begin_and_end_between_tokens() -> None:
    store = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu")
    k, v = torch.randn(1, 2, 1, KEY), torch.randn(1, 2, 1, VALUE)

    def token(i: int) -> None:
        store.append(k, v, torch.tensor([[i]]))

    with torch.inference_mode():
        token(0)
        store.repeat_rows(1)
    token(1)
    with torch.inference_mode():
        token(2)
        twin = store.fork()
        twin.append(k, v, torch.tensor([[3]]))
        store.drop(torch.tensor([[0, -1]]))
    token(3)
    twin.append(k, v, torch.tensor([[4]]))
    assert store.lengths.tolist() == [[3, 4]] and twin.lengths.tolist() == [[5, 5]]


def test_what_needs_a_gradient_is_stored_without() -> None:
    store = RaggedKV(1, 1, KEY, VALUE, torch.float32, "cpu")
    store.append(torch.randn(1, 1, 2, KEY, requires_grad=True), torch.randn(1, 1, 2, VALUE), torch.tensor([[0, 1]]))
    assert not store.padded()[0].requires_grad and not store.groups()[0].k.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    store = RaggedKV(1, 2, KEY, VALUE, dtype, "cpu")
    k, v = torch.randn(1, 2, 5, KEY, dtype=dtype), torch.randn(1, 2, 5, VALUE, dtype=dtype)
    store.append(k, v, torch.arange(5)[None])
    store.keep(torch.tensor([[[4, 0], [1, 2]]]), torch.tensor([[2, 1]]))
    got_k, got_v, positions = store.padded()
    assert got_k.dtype == got_v.dtype == dtype and positions.tolist() == [[[0, 4], [1, -1]]]
    assert torch.equal(got_k[0, 0], k[0, 0, [0, 4]]) and torch.equal(got_v[0, 1, 0], v[0, 1, 1])
    assert store.payload_bytes == 3 * (KEY + VALUE) * dtype.itemsize


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=6), st.integers(0, 2**20))
def test_state_round_trip(steps: list[str], seed: int) -> None:
    rng = random.Random(seed)
    store, model = RaggedKV(2, 2, KEY, VALUE, torch.float32, "cpu"), Model(2, 2)
    for step in steps:
        act(step, store, model, rng)
    state = store.state()
    again = RaggedKV.from_state(state)
    check(again, model)
    for a, b in zip(store.padded(sort=False), again.padded(sort=False), strict=True):
        assert torch.equal(a, b), "storage order is part of the state"
    more = copy.deepcopy(model)
    act("keep", again, more, rng)
    act("one", again, more, rng)
    check(again, more)


@pytest.mark.parametrize("name", ["k", "v", "positions", "lengths"])
def test_state_that_does_not_fit_together(name: str) -> None:
    store = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu")
    append(store, Model(1, 2), random.Random(0), 3, padding=False)
    state = store.state()
    with pytest.raises(StoreError, match=f"lacks {name}"):
        RaggedKV.from_state({key: t for key, t in state.items() if key != name})
    with pytest.raises(StoreError, match="fit together"):
        RaggedKV.from_state({**state, name: state[name][..., :-1] if name == "lengths" else state[name][:-1]})
    with pytest.raises(StoreError, match="fit together"):
        RaggedKV.from_state({**state, name: state[name].to(torch.int16)})


def test_state_with_a_negative_length() -> None:
    store = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu")
    append(store, Model(1, 2), random.Random(0), 3, padding=False)
    with pytest.raises(StoreError, match="fit together"):
        RaggedKV.from_state({**store.state(), "lengths": torch.tensor([[7, -1]])})


def test_state_with_a_negative_position() -> None:
    store = RaggedKV(1, 1, KEY, VALUE, torch.float32, "cpu")
    append(store, Model(1, 1), random.Random(0), 3, padding=False)
    with pytest.raises(StoreError, match="fit together"):
        RaggedKV.from_state({**store.state(), "positions": torch.tensor([0, -1, 2])})


def test_bad_arguments_are_named() -> None:
    store = RaggedKV(1, 2, KEY, VALUE, torch.float32, "cpu")
    k, v, positions = torch.zeros(1, 2, 4, KEY), torch.zeros(1, 2, 4, VALUE), torch.arange(4)[None]
    store.append(k, v, positions)
    one, four = torch.ones(1, 2, dtype=torch.long), torch.arange(4).expand(1, 2, 4)
    for argument, call in {
        "k": lambda: store.append(k[:, :1], v, positions),
        "v": lambda: store.append(k, v[..., :1], positions),
        "positions": lambda: store.append(k, v, positions[0]),
        "real": lambda: store.append(k, v, positions, torch.ones(1, 4)),
        "k and v": lambda: store.append(k.double(), v, positions),
        "counts": lambda: store.keep(four, 5 * one),
        "index": lambda: store.keep(torch.tensor([[[0, 4], [0, 1]]]), 2 * one),
        "slot": lambda: store.drop(4 * one),
        "active": lambda: store.drop(one, torch.ones(2, 1, dtype=torch.bool)),
        "limit": lambda: store.crop(torch.tensor([1, 2])),
        "n of slide": lambda: store.slide(4),
        "slot of vacate": lambda: store.vacate(one[0]),
        "active of slide": lambda: store.slide(0, torch.tensor([[True, False]])),
        "n": lambda: store.repeat_rows(0),
        "heads": lambda: RaggedKV(1, 0, KEY, VALUE, torch.float32, "cpu"),
    }.items():
        with pytest.raises(ArgumentError) as caught:
            call()
        assert caught.value.argument == argument.split(" of ")[0]
    for index in ([[[1, 1], [0, 1]]], [[[-1, 0], [0, 1]]], [[[0, 2**31 - 1], [0, 1]]], [[[0, 2**40], [0, 1]]]):
        with pytest.raises(ArgumentError, match="index"):
            store.keep(torch.tensor(index), 2 * one)
    with pytest.raises(ArgumentError, match="rows 0 … 0"):
        store.select_rows(torch.tensor([1]))
    store.keep(four, 0 * one)
    with pytest.raises(ArgumentError, match="hold entries"):
        store.drop(0 * one, torch.ones(1, 2, dtype=torch.bool))
    assert store.lengths.tolist() == [[0, 0]]
