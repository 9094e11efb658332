"""Combiner: its regions against a definition by loops, and full support whatever the regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.layers import create
from regard.layers.combiner_regions import Pool, Pooling, axial, axial_rows, fixed, logsparse
from regard.models import CausalLM, CausalLMConfig, Mixer
from regard.patterns import causal

KINDS = ["fixed", "logsparse", "axial", "axial-rows", "bidirectional"]
S = 4


def regions_of(kind: str, i: int, n: int) -> tuple[list[int], list[list[int]]]:
    """What query i of n sees directly, and its regions; written down from the card."""
    own = i // S
    if kind == "bidirectional":
        segments = [list(range(s, min(s + S, n))) for s in range(0, n, S)]
        return segments[own], [r for s, r in enumerate(segments) if s != own]
    if kind in ("fixed", "axial-rows"):
        return list(range(own * S, i + 1)), [list(range(s * S, s * S + S)) for s in range(own)]
    if kind == "logsparse":
        regions, right = [], i
        while right:
            low = right & -right
            regions.append(list(range(right - low, right)))
            right -= low
        return [i], regions
    column = [j for j in range(own * S) if j % S == i % S]
    others = [[j for j in range(own * S) if j % S == c] for c in range(S) if c != i % S and own]
    return column + list(range(own * S, i + 1)), others


def by_hand(kind: str, q: Tensor, k: Tensor, pool: Pool, weigh: bool) -> Tensor:
    """(n, n): p(j|i) of one head, by loops."""
    n, scale = len(q), q.shape[1] ** -0.5
    pooled = {"max": lambda x: x.amax(0), "mean": lambda x: x.mean(0), "sum": lambda x: x.sum(0)}[pool]
    out = q.new_zeros(n, n)
    for i in range(n):
        direct, regions = regions_of(kind, i, n)
        logits = [q[i] @ k[j] * scale for j in direct]
        within = []
        for r in regions:
            asks = q[r[i % S]] if kind == "axial-rows" else pooled(q[r])
            within.append((k[r] @ asks * scale).softmax(0))
            key = within[-1] @ k[r] if kind == "axial-rows" else pooled(k[r])
            logits.append(q[i] @ key * scale + (torch.tensor(float(len(r))).double().log() if weigh else 0))
        slots = torch.stack(logits).softmax(0)
        for slot, j in zip(slots, direct, strict=False):
            out[i, j] += slot
        for slot, r, weights in zip(slots[len(direct) :], regions, within, strict=True):
            out[i, r] += slot * weights
    return out


def run(kind: str, q: Tensor, k: Tensor, v: Tensor, pooling: Pooling, real: Tensor | None = None) -> Tensor:
    """(B, H, n, Dv) by the library."""
    real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if real is None else real
    if kind == "logsparse":
        return logsparse(q, k, v, real, pooling)
    if kind in ("axial", "axial-rows"):
        return (axial if kind == "axial" else axial_rows)(q, k, v, real, S, pooling)
    return fixed(q, k, v, real, S, pooling, causal=kind == "fixed")[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
@pytest.mark.parametrize("weigh", [False, True])
def test_weights_are_those_of_the_card_and_cover_everything(kind: str, pool: Pool, weigh: bool) -> None:
    for n in (1, 4, 14):
        q, k = torch.randn(2, 1, 2, n, 5, dtype=torch.float64)
        eye = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n)
        got = run(kind, q, k, eye, Pooling(pool, weigh_by_size=weigh))
        want = torch.stack([by_hand(kind, q[0, h], k[0, h], pool, weigh) for h in range(2)])[None]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        allowed = torch.ones(n, n, dtype=torch.bool) if kind == "bidirectional" else torch.ones(n, n).tril().bool()
        assert torch.equal(got > 0, allowed.expand_as(got)), "full support, and nothing beyond it"
        torch.testing.assert_close(got.sum(-1), torch.ones(1, 2, n, dtype=torch.float64))


def test_worked_examples() -> None:
    assert regions_of("fixed", 5, 12) == ([4, 5], [[0, 1, 2, 3]])
    assert regions_of("fixed", 11, 12) == ([8, 9, 10, 11], [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert regions_of("fixed", 2, 12) == ([0, 1, 2], [])
    zero = torch.zeros(1, 1, 12, 2, dtype=torch.float64)
    eye = torch.eye(12, dtype=torch.float64)[None, None]
    weights = run("fixed", zero, zero, eye, Pooling())[0, 0, 11]
    torch.testing.assert_close(weights, torch.tensor([1 / 24] * 8 + [1 / 6] * 4, dtype=torch.float64))
    dense = run("fixed", zero, zero, eye, Pooling(weigh_by_size=True))[0, 0, 11]
    torch.testing.assert_close(dense, torch.full((12,), 1 / 12, dtype=torch.float64))
    cells = {5: [[4], [0, 1, 2, 3]], 11: [[10], [8, 9], list(range(8))], 12: [[8, 9, 10, 11], list(range(8))]}
    q, k = torch.randn(2, 1, 1, 13, 4, dtype=torch.float64)
    for i, regions in cells.items():
        assert regions_of("logsparse", i, 13) == ([i], regions)
    eye = torch.eye(13, dtype=torch.float64)[None, None]
    torch.testing.assert_close(
        run("logsparse", q, k, eye, Pooling())[0, 0], by_hand("logsparse", q[0, 0], k[0, 0], "max", False)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_running_pool_leaks_nothing(kind: str) -> None:
    n = 11
    x = torch.randn(1, n, 8, dtype=torch.float64, requires_grad=True)
    regions = "fixed" if kind == "bidirectional" else kind
    layer = create("combiner", dim=8, heads=2, segment_size=S, regions=regions, summary="dense").double()
    out = layer(x, pattern=None if kind == "bidirectional" else causal()).out
    for i in range(n):
        (grad,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        reached = grad[0].abs().amax(-1) > 0
        assert reached.tolist() == [kind == "bidirectional" or j <= i for j in range(n)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["max", "mean", "sum"])
def test_padding_takes_no_place_in_any_region(kind: str, pool: str) -> None:
    regions = "fixed" if kind == "bidirectional" else kind
    chosen = {} if kind == "axial-rows" else {"pool": pool}
    layer = create("combiner", dim=8, heads=2, segment_size=3, regions=regions, **chosen).double()
    pattern = None if kind == "bidirectional" else causal()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, [0, 1, 4, 10]] = False
    out = layer(x, pattern=pattern, key_padding=real).out
    torch.testing.assert_close(out[1:, real[1]], layer(x[1:, real[1]], pattern=pattern).out, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[0], layer(x[:1], pattern=pattern).out[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("regions", ["fixed", "logsparse", "axial", "axial-rows"])
def test_one_segment_or_one_token_each_is_dense(regions: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    dense = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    real = torch.ones(1, 9, dtype=torch.bool)
    if regions == "fixed":
        for size in (1, 9, 20):
            torch.testing.assert_close(fixed(q, k, v, real, size, Pooling(), causal=True)[0], dense)
    elif regions.startswith("axial"):  # one row, or one column: nothing is left for a summary
        for width in (1, 9):
            form = axial if regions == "axial" else axial_rows
            torch.testing.assert_close(form(q, k, v, real, width, Pooling()), dense)
    else:  # up to two tokens back each block is one token
        torch.testing.assert_close(logsparse(q, k, v, real, Pooling())[:, :, :2], dense[:, :, :2])


def test_one_layer_reaches_far_where_a_window_does_not() -> None:
    from regard.patterns import documents

    n, width = 330, 32
    x = torch.randn(1, n, 8, requires_grad=True)
    reached = {}
    for key, settings, pattern in (
        ("combiner", {"segment_size": width}, causal()),
        ("multi-head-attention", {}, causal() & documents(torch.arange(n) // width)),
    ):
        out = create(key, dim=8, heads=2, **settings)(x, pattern=pattern).out
        (grad,) = torch.autograd.grad(out[0, 320].sum(), x)
        reached[key] = float(grad[0, 20].abs().max())
    assert reached["combiner"] > 0 and reached["multi-head-attention"] == 0


def test_the_state_holds_an_open_segment_and_summaries_only() -> None:
    layer = create("combiner", dim=8, heads=2, segment_size=S)
    x = torch.randn(2, 30, 8)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :5] = False
    state = layer(x, pattern=causal(), key_padding=real).state
    assert state.opened.tolist() == [2, 1] and state.finished.tolist() == [7, 6]
    assert state.k.shape[2] == 2 and state.finished_k.shape[2] == 7
    for _ in range(9):
        state = layer(torch.randn(2, 1, 8), pattern=causal(), state=state).state
    assert state.opened.tolist() == [3, 2] and state.finished.tolist() == [9, 8] and state.k.shape[2] == 3


def test_the_public_code_keeps_the_own_region() -> None:
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    plain = create("combiner", dim=8, heads=2, segment_size=3).double()
    own = create("combiner", dim=8, heads=2, segment_size=3, own_region=True).double()
    own.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(x).out, own(x).out)
    assert torch.equal(plain(x, pattern=causal()).out, own(x, pattern=causal()).out)


def test_a_state_is_for_one_size_of_segments_and_takes_no_tokens_too() -> None:
    layer, x = create("combiner", dim=8, heads=2, segment_size=4), torch.randn(2, 9, 8)
    state = layer(x[:, :5], pattern=causal()).state
    for real in (None, torch.ones(2, 0, dtype=torch.bool)):
        out, same, _ = layer(x[:, :0], pattern=causal(), key_padding=real, state=state)
        assert out.shape == (2, 0, 8)
        for got, want in zip(same, state, strict=True):
            torch.testing.assert_close(got, want)
    with pytest.raises(ArgumentError, match=r"^state: got segments of 4; allowed: segments of 8"):
        create("combiner", dim=8, heads=2, segment_size=8)(x, pattern=causal(), state=state)


def test_what_is_undefined_is_refused() -> None:
    x = torch.randn(1, 5, 8)
    for regions in ("logsparse", "axial", "axial-rows"):
        layer = create("combiner", dim=8, heads=2, regions=regions)
        with pytest.raises(UnsupportedError, match=r"combiner takes no regions='.*' without causal\(\)"):
            layer(x)
        first = layer(x, pattern=causal()).state
        for state in (first, create("combiner", dim=8, heads=2)(x, pattern=causal()).state):
            with pytest.raises(
                UnsupportedError, match=r"combiner takes no state with regions='.*': only regions='fixed'"
            ):
                layer(x, pattern=causal(), state=state)
        model = CausalLM(CausalLMConfig(11, 8, (Mixer("combiner", 2, {"regions": regions}),)))
        with pytest.raises(UnsupportedError, match="only regions='fixed'"):
            model.generate(torch.arange(5)[None], 3)
    with pytest.raises(UnsupportedError, match="combiner takes no pool='mean' with regions='axial-rows'"):
        create("combiner", dim=8, heads=2, regions="axial-rows", pool="mean")
    layer = create("combiner", dim=8, heads=2)
    state = layer(x, pattern=causal()).state
    with pytest.raises(UnsupportedError, match="combiner takes no state"):
        layer(x, state=state)
    with pytest.raises(ArgumentError, match="segment_size: got 0"):
        create("combiner", dim=8, heads=2, segment_size=0)
    for name in ("segment_size", "own_region", "weigh_by_size"):
        with pytest.raises(ArgumentError, match=f"^{name}: got 1.5"):
            create("combiner", dim=8, heads=2, **{name: 1.5})
    with pytest.raises(UnknownNameError, match="did you mean logsparse"):
        create("combiner", dim=8, heads=2, regions="logspase")
