"""The worked examples and the identities of the papers' cards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError
from regard.patterns import (
    Pattern,
    aki_modality_mutual_attention,
    attention_sink,
    bamm,
    causal,
    dilated_window,
    ee_mllm,
    flashattention,
    full,
    longlora,
    moa_mixture_of_sparse_attention,
    next_block_prediction,
    power_attention,
    s2_attention,
    sinklora,
    sliding_window,
    tokens,
)
from regard.patterns.block_layouts import butterfly_layout
from regard.patterns.cuts import crosses
from regard.patterns.modality import prefill_flops
from regard.patterns.powers import receptive_field
from regard.patterns.sharded import drops_for_good


def seen(p: Pattern, n: int, q: int, head: int = 0) -> set[int]:
    """The keys that query q sees."""
    dense = p.dense(n)
    return set(dense[0, head if dense.shape[1] > 1 else 0, q].nonzero()[:, 0].tolist())


def same(p: Pattern, other: Pattern, n: int) -> bool:
    a, b = p.dense(n), other.dense(n)
    return torch.equal(
        a.expand_as(b) if a.shape[1] < b.shape[1] else a, b.expand_as(a) if b.shape[1] < a.shape[1] else b
    )


# ---- PowerAttention


def test_power_attention_sets() -> None:
    p = power_attention(1, 0, block=1)
    assert [seen(p, 12, q) for q in (0, 5, 11)] == [{0}, {1, 3, 4, 5}, {3, 7, 9, 10, 11}]
    p = power_attention(3, 1, block=1)
    assert [seen(p, 12, q) for q in (5, 11)] == [{0, 1, 3, 4, 5}, {0, 3, 7, 9, 10, 11}]
    assert same(power_attention(12, 0, block=1), causal(), 12)
    for w, q in ((1, 100), (4, 200), (5, 63)):  # the count, without sinks
        count = w + math.floor(math.log2(q)) - math.ceil(math.log2(w)) + 1
        assert len(seen(power_attention(w, 0, block=1), q + 1, q)) == count
    # Blocks: the token form over block numbers, repeated.
    blocks = power_attention(2, 1, block=1).dense(9)[0, 0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(power_attention(2, 1, block=4).dense(36)[0, 0], blocks & causal().dense(36)[0, 0])


def test_power_attention_reaches_all_distances_of_few_binary_ones() -> None:
    p, n = power_attention(1, 0, block=1), 256
    distance = torch.arange(n)
    ones = sum((distance >> bit) & 1 for bit in range(8))
    for d, (contiguous, size) in enumerate(
        zip((2, 6, 14, 30, 62, 126, 254, 255), (9, 37, 93, 163, 219, 247, 255, 256), strict=True), 1
    ):
        reached = receptive_field([p] * d, n, query=n - 1).flip(0)  # by distance
        assert torch.equal(reached, ones <= d)
        assert int(reached.sum()) == size and bool(reached[: contiguous + 1].all())
        assert d == 8 or not reached[contiguous + 1]
        window = receptive_field(
            [sliding_window(9)] * d, n, query=n - 1
        )  # as many keys in a row as the power pattern has
        assert int(window.sum()) == min(n, 1 + 8 * d)


# ---- S2-Attention


def test_s2_attention_sets() -> None:
    p = s2_attention(4, local=2, stride=4, block=1)
    rows = {0: ({0, 4, 5}, {0, 4, 8, 10, 11}), 1: ({3, 4, 5}, {3, 7, 10, 11}), 2: ({2, 4, 5}, {2, 6, 10, 11})}
    rows[3] = ({1, 4, 5}, {1, 5, 9, 10, 11})
    for h, sets in rows.items():
        assert (seen(p, 12, 5, h), seen(p, 12, 11, h)) == sets
    far = [seen(p, 12, 11, h) - {10, 11} for h in range(4)]
    assert set.union(*far) == set(range(10)) and sum(map(len, far)) == 10, "each far block in exactly one shard"
    assert same(s2_attention(2, local=1, stride=1, block=2), causal(), 12)
    assert same(s2_attention(2, local=6, stride=4, block=2), causal(), 12)
    assert seen(s2_attention(4, local=1, stride=4, block=1, dense=1), 12, 11, 3) == set(range(12))
    grouped = s2_attention(4, kv_heads=2, local=1, stride=4, block=1)
    assert [seen(grouped, 12, 11, h) for h in range(4)] == [{0, 4, 8, 11}] * 2 + [{2, 6, 10, 11}] * 2
    assert seen(s2_attention(1, local=1, stride=4, block=1, offset=1), 12, 11) == {3, 7, 11}


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 5, 8])
def test_s2_attention_covers_everything_iff_its_shards_hit_every_residue(kv_heads: int) -> None:
    p = s2_attention(kv_heads, local=2, stride=4, block=1)
    covered = torch.equal(p.dense(24).any(1), causal().dense(24).any(1))
    step = max(1, 4 // kv_heads)
    assert covered == (len({h * step % 4 for h in range(kv_heads)}) == 4)
    assert covered == (kv_heads >= 4)


def test_s2_attention_drops_blocks_for_good_and_a_relative_dilation_does_not() -> None:
    assert drops_for_good(s2_attention(4, local=2, stride=4, block=3), 40, 2 * 3)
    assert not drops_for_good(causal() & (sliding_window(4) | dilated_window(9, 4)), 40, 4)
    assert not drops_for_good(power_attention(2, 0, block=1), 40, 2)


# ---- MoA


def test_moa_sets() -> None:
    p = moa_mixture_of_sparse_attention([(2, 1 / 3), (4, 0)], block=2).bind(12)
    assert [seen(p, 12, 5, h) for h in (0, 1)] == [set(range(6))] * 2
    assert seen(p, 12, 11, 0) == {0, 1, 6, 7, 8, 9, 10, 11}
    assert seen(p, 12, 11, 1) == {0, 1, 8, 9, 10, 11}
    assert same(moa_mixture_of_sparse_attention([(0, 1.0)], block=2).bind(12), causal(), 12)
    unbound = moa_mixture_of_sparse_attention([(2, 0.5), (4, 0)], block=2)
    with pytest.raises(ArgumentError, match=r"allowed: pattern.bind\(length\)"):
        unbound.dense(12)
    longer = unbound.bind(8).dense(24)  # decoding goes on with the prompt's length
    assert torch.equal(longer[:, :, :8, :8], unbound.bind(8).dense(8))
    assert not torch.equal(longer, unbound.bind(24).dense(24))


# ---- LongLoRA, SinkLoRA


def test_shifted_groups_sets() -> None:
    for border, last in (("leak-free", {10, 11}), ("wrapped", {0, 1, 10, 11})):
        p = longlora(2, 4, border=border, length=12)
        assert [seen(p, 12, q, 0) for q in (5, 6, 11)] == [{4, 5}, {4, 5, 6}, {8, 9, 10, 11}]
        assert [seen(p, 12, q, 1) for q in (1, 5, 6, 11)] == [{0, 1}, {2, 3, 4, 5}, {6}, last]
    p = sinklora(4, 4, sinks=1)
    assert seen(p, 12, 5, 0) == {0, 4, 5} and seen(p, 12, 6, 2) == {0, 6} and seen(p, 12, 6, 3) == {0, 4, 5, 6}
    assert same(sinklora(4, 12, rho=0), causal(), 12)
    assert same(sinklora(4, 4, rho=1, sinks=0), longlora(4, 4), 12)
    assert same(longlora(4, 12, border="wrapped", length=12), causal(), 12), "of one group nothing is cut off"


@pytest.mark.parametrize(("half", "rho", "moved"), [(1, 0.5, 1), (3, 0.5, 2), (5, 0.5, 3), (4, 0.5, 2), (3, 0.3, 1)])
def test_sinklora_rounds_halves_up(half: int, rho: float, moved: int) -> None:
    p = sinklora(2 * half, 4, sinks=0, rho=rho)
    assert [seen(p, 12, 6, h) == {6} for h in range(2 * half)] == [half <= h < half + moved for h in range(2 * half)]


@pytest.mark.parametrize("border", ["leak-free", "wrapped"])
def test_rolling_is_the_mask_and_the_naive_roll_leaks(border: str) -> None:
    """Roll by half a group, attend inside groups, roll back: with the right mask it is the pattern. Gradients tell."""
    n, group = 12, 4
    q, k, v = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def rolled(naive: bool) -> Tensor:
        a, b, c = (x.roll(-group // 2, 0).view(-1, group, 3) for x in (q, k, v))
        place = torch.arange(n).roll(-group // 2).view(-1, group)
        order = torch.arange(group).expand_as(place) if naive else place
        allowed = order[:, :, None] >= order[:, None]
        if border == "leak-free" and not naive:
            allowed = allowed & ((place[:, :, None] - place[:, None]).abs() < group)
        weights = (a @ b.mT / 3**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ c).view(n, 3).roll(group // 2, 0)

    mask = longlora(2, group, border=border, length=n).dense(n)[0, 1]
    direct = (q @ k.T / 3**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(rolled(naive=False), direct, rtol=0, atol=1e-12)
    for naive in (False, True):
        future = [bool(torch.autograd.grad(rolled(naive)[i].sum(), v)[0][i + 1 :].any()) for i in range(n - 1)]
        assert any(future) == naive, "the naive path sees the future, the right mask does not"
    (leak,) = torch.autograd.grad(rolled(naive=True)[0].sum(), v)
    assert leak.any(-1).nonzero()[:, 0].tolist() == [0, 10, 11]
    (leak,) = torch.autograd.grad(rolled(naive=True)[10].sum(), v)
    assert leak.any(-1).nonzero()[:, 0].tolist() == [10]


def test_information_crosses_groups_only_with_both_kinds_of_heads() -> None:
    n, group, last = 32, 8, 31
    plain = sinklora(2, group, rho=0, sinks=0)
    assert receptive_field([plain] * 4, n)[last].nonzero()[:, 0].tolist() == list(range(24, 32))
    for layers in range(1, 6):
        field = receptive_field([longlora(2, group)] * layers, n)[last]
        assert int(field.sum()) == min(n, group + (layers - 1) * group // 2), "half a group per layer"
    sinks = receptive_field([sinklora(2, group, rho=0, sinks=2)] * 4, n)[last].nonzero()[:, 0].tolist()
    assert sinks == [0, 1, *range(24, 32)], "sinks carry the first tokens only"


# ---- AKI, EE-MLLM, tokens


ROLES = torch.tensor([-1, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1])


def test_mutual_attention_sets() -> None:
    p = aki_modality_mutual_attention(ROLES)
    want = {0: {0}, 2: {0, 1, 2, 5, 6, 7}, 5: set(range(6)), 9: set(range(10))}
    assert {q: seen(p, 12, q) for q in want} == want
    image, prompt = ROLES == 0, ROLES == 1
    assert same(p, causal() | (tokens(image, of="queries") & tokens(prompt)), 12)
    assert int((p.dense(12) & ~causal().dense(12)).sum()) == 4 * 3
    assert same(aki_modality_mutual_attention(ROLES.masked_fill(image, -1)), causal(), 12)
    # two turns, and a follow-up prompt without an image
    p = aki_modality_mutual_attention(torch.tensor([0, 0, 1, -1, 0, -1, 1, -1, 1]))
    assert [seen(p, 9, q) for q in (0, 4, 6)] == [{0, 2}, {0, 1, 2, 3, 4, 6}, set(range(7))]


def test_no_answer_leaks_through_any_depth() -> None:
    field = receptive_field([aki_modality_mutual_attention(ROLES)] * 5, 12)
    for target in range(8, 12):
        assert not field[:target, target:].any()


def test_a_prefill_cut_inside_the_prompt_is_found() -> None:
    p = aki_modality_mutual_attention(ROLES)
    assert [cut for cut in range(1, 12) if crosses(p, 12, cut)] == [2, 3, 4, 5, 6, 7]
    assert not any(crosses(causal(), 12, cut) for cut in range(1, 12))


VISUAL = torch.tensor([False] + [True] * 4 + [False] * 7)


def test_ee_mllm_sets_and_independence() -> None:
    p = ee_mllm(VISUAL)
    assert [seen(p, 12, q) for q in (0, 2, 5, 9)] == [{0}, {2}, set(range(6)), set(range(10))]
    assert same(ee_mllm(torch.zeros(12, dtype=torch.bool)), causal(), 12)
    field = receptive_field([p] * 5, 12)
    assert torch.equal(field[VISUAL], torch.eye(12, dtype=torch.bool)[VISUAL]), "visual states depend on themselves"


def test_ee_mllm_without_visual_queries() -> None:
    """Three ways: the dense mask, the pattern, and text queries alone with `v` itself for visual rows."""
    from regard.attend import attend

    q, k, v = (torch.randn(2, h, 12, 8, dtype=torch.float64) for h in (4, 2, 2))
    p = ee_mllm(VISUAL)
    out = attend(q, k, v, pattern=p)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = (q @ keys.mT / 8**0.5).masked_fill(~p.dense(12), -torch.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ values, rtol=0, atol=1e-12)
    text = (~VISUAL).nonzero()[:, 0]
    fast = attend(q[:, :, text], k, v, pattern=p, q_positions=text.expand(2, -1))
    torch.testing.assert_close(out[:, :, text], fast, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:, :, VISUAL], values[:, :, VISUAL], rtol=0, atol=1e-12)


def test_ee_mllm_images_are_computed_once_for_all_prompts() -> None:
    """Through two layers: visual states are the same whatever is asked, so their keys and values can be kept."""
    from regard.attend import attend

    visual = torch.arange(9) < 5
    p, maps = ee_mllm(visual), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    image, *prompts = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)

    def states(x: Tensor) -> Tensor:
        out = []
        for q, k, v in maps:
            out += [x @ k, x @ v]
            x = x + attend(x @ q, x @ k, x @ v, pattern=p)
        return torch.stack([*out, x])

    one, other = (states(torch.cat([image, prompt[:, :, :4]], 2)) for prompt in prompts)
    assert torch.equal(one[..., :5, :], other[..., :5, :]) and not torch.equal(one[..., 5:, :], other[..., 5:, :])


def test_ee_mllm_text_does_not_mind_the_order_of_visual_tokens() -> None:
    """Visual tokens that move together with their positions leave the text's output as it was."""
    from regard.attend import attend

    q, k, v = torch.randn(3, 1, 2, 12, 4, dtype=torch.float64)
    text, order = (~VISUAL).nonzero()[:, 0], torch.tensor([0, 3, 1, 4, 2, *range(5, 12)])
    want = attend(q, k, v, pattern=ee_mllm(VISUAL))[:, :, text]
    asked = {"pattern": ee_mllm(VISUAL), "q_positions": text[None], "kv_positions": order[None]}
    torch.testing.assert_close(attend(q[:, :, text], k[:, :, order], v[:, :, order], **asked), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("square", "percent"), [(False, (13.0, 16.5, 20.7, 23.9)), (True, (17.7, 23.6, 24.9, 30.4))])
def test_ee_mllm_saves_the_operations_that_it_says(square: bool, percent: tuple[float, ...]) -> None:
    shape = {"text": 64, "dim": 4096, "hidden": 11008}
    saved = [
        100 * (1 - prefill_flops(n, reading=reading, **shape) / prefill_flops(n, square=square, **shape))
        for reading in ("self-only", "ffn-only")
        for n in (2880, 5000)
    ]
    assert [round(x, 1) for x in saved] == list(percent)


# ---- next-block prediction, BAMM, block layouts


def test_next_block_prediction_sets() -> None:
    p = next_block_prediction(3, 2, 11)
    for rows, last in (((0, 1), 2), ((2, 3, 4), 5), ((5, 6, 7), 8), ((8, 9, 10), 11)):
        assert [seen(p, 11, q) for q in rows] == [set(range(last))] * len(rows)
    assert same(next_block_prediction(1), causal(), 9)
    assert torch.equal(
        next_block_prediction(4).dense(12)[0, 0], torch.kron(torch.ones(3, 3).tril(), torch.ones(4, 4)) > 0
    )
    assert p.cost(11).entries == 2**2 + sum(3 * (2 + 3 * (c + 1)) for c in range(3))
    field = receptive_field([p] * 4, 11)
    assert not field[2:5, 5:].any() and not field[5:8, 8:].any(), "a block never learns of a later one"


def test_next_block_prediction_with_a_padded_condition() -> None:
    """allowed = a valid condition token, or no later block, the queries of the condition seeing the condition alone."""
    valid = torch.arange(11) != 1
    p = next_block_prediction(3, 3, 9) & tokens(valid[:9])
    assert [seen(p, 9, q) for q in (0, 2, 3, 5, 6, 8)] == [{0, 2}] * 2 + [{0, 2, 3, 4, 5}] * 2 + [
        {0, 2, 3, 4, 5, 6, 7, 8}
    ] * 2


def test_bamm_sets() -> None:
    given = torch.tensor([True, False, False, False, True, False])
    p = bamm(given)
    rows = [{0, 4}, {0, 1, 4}, {0, 1, 2, 4}, {0, 1, 2, 3, 4}, {0, 4}, set(range(6))]
    assert [seen(p, 6, q) for q in range(6)] == rows
    first = torch.arange(6) == 0
    assert same(bamm(first), causal(), 6) and same(bamm(torch.ones(6, dtype=torch.bool)), full(), 6)
    field = receptive_field([p] * 5, 6)  # position i predicts token i + 1
    for i in range(5):
        if not given[i + 1]:
            assert not field[i, i + 1] and not (field[i, i + 1 :] & ~given[i + 1 :]).any()


def test_butterfly_connects_all_blocks_in_as_many_layers_as_binary_digits() -> None:
    p = flashattention(butterfly_layout(8), block=2)
    assert torch.equal(receptive_field([p] * 2, 16)[5], receptive_field([p] * 2, 16, query=5))
    assert not receptive_field([p] * 2, 16).all() and receptive_field([p] * 3, 16).all()
    mask = p.dense(16)[0, 0].view(8, 2, 8, 2)
    assert torch.equal(mask.any(3).any(1), butterfly_layout(8)) and torch.equal(mask.all(3).all(1), butterfly_layout(8))


def test_tokens_beside_a_window() -> None:
    text = torch.tensor([True, False, False, False, False, True])
    p = sliding_window(1) | tokens(text) | tokens(text, of="queries")
    assert seen(p, 6, 3) == {0, 3, 5} and seen(p, 6, 0) == set(range(6))
    assert same(p & tokens(~text), sliding_window(1) & tokens(~text) | tokens(text, of="queries") & tokens(~text), 6)
    assert same(causal() & tokens(torch.arange(6) < 2), causal() & attention_sink(2), 6)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: power_attention(0), "window: got 0"),
        (lambda: power_attention(block=0), "block: got 0"),
        (lambda: s2_attention(4, kv_heads=3), "kv_heads: got 3; allowed: a divisor of heads=4"),
        (lambda: s2_attention(4, local=0), "local: got 0"),
        (lambda: s2_attention(4, dense=5), "dense: got 5; allowed: at most the 4"),
        (lambda: moa_mixture_of_sparse_attention([]), "rules"),
        (lambda: moa_mixture_of_sparse_attention(None), "rules: got None"),
        (lambda: moa_mixture_of_sparse_attention([(1, -0.5)]), "beta: got -0.5"),
        (lambda: moa_mixture_of_sparse_attention([(math.inf, 0)]), "alpha: got inf"),
        (lambda: longlora(2, 5), "group: got 5; allowed: an even number"),
        (lambda: sinklora(3, 4), "heads: got 3; allowed: an even number"),
        (lambda: sinklora(2, 4, rho=1.5), "rho: got 1.5"),
        (lambda: longlora(2, 4, length=10), "length: got 10; allowed: a multiple of the group size 4"),
        (lambda: sinklora(2, 4).bind(10), "length: got 10; allowed: a multiple"),
        (lambda: longlora(2, 4, border="wrapped").dense(8), r"bind\(length\)"),
        (lambda: next_block_prediction(4, 2, 13), "length: got 13; allowed: 2 condition tokens and one or more whole"),
        (lambda: next_block_prediction(4, 2).bind(13), "length: got 13"),
        (lambda: next_block_prediction(4, 2, 10).dense(11), "positions: got 11; allowed: at most 10"),
        (lambda: tokens(torch.ones(3)), r"mask: got dtype torch.float32; allowed: torch.bool"),
        (lambda: tokens(torch.ones(3, dtype=torch.bool)).dense(4), "positions: got 4; allowed: at most 3"),
        (lambda: bamm(torch.ones(3, dtype=torch.bool)).bind(4), "n: got 4; allowed: at most 3"),
        (lambda: ee_mllm(torch.ones(1, 2, 3, dtype=torch.bool)), r"visual: got shape \(1, 2, 3\)"),
        (lambda: aki_modality_mutual_attention(torch.tensor([-2, 0])), "ranks: got a rank of -2"),
        (lambda: flashattention(torch.ones(2, 2)), "layout: got torch.float32"),
        (lambda: flashattention(torch.ones(2, 2, dtype=torch.bool), 0), "block: got 0"),
        (lambda: s2_attention(4).dense(8, heads=8), "heads: got 8; allowed: 4"),
    ],
)
def test_bad_input_is_named(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


def test_unknown_names_get_their_neighbours() -> None:
    with pytest.raises(UnknownNameError, match="did you mean keys"):
        tokens(torch.ones(3, dtype=torch.bool), of="key")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="did you mean wrapped"):
        longlora(2, 4, border="wraped")  # type: ignore[arg-type]
