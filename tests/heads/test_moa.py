"""MoA: the influence of a key against removing it, the search against trying everything, the plan on a model."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from tests.inference.batches import Batch
from tests.inference.struck_out import logits_under
from tests.inference.tiny import ids, left_padded, llama
from torch import Tensor
from transformers import LlamaForCausalLM

from regard.errors import ArgumentError, UnsupportedError
from regard.heads.moa_influence import Influence, Sample, influence, own_answers, profile
from regard.heads.moa_plan import moa_plan, served_loss
from regard.heads.moa_search import candidate_rules, density, search
from regard.inference.plan import Plan
from regard.inference.policies.moa import MoA, MoAPrefill
from regard.inference.seam import attach
from regard.patterns import moa_mixture_of_sparse_attention


def test_influence_is_exact_where_the_loss_is_linear() -> None:
    a = torch.randn(9, dtype=torch.float64).softmax(-1)
    g = torch.randn(9, dtype=torch.float64)
    for j in range(9):
        without = a.clone()
        without[j] = 0
        change = (g * without / without.sum()).sum() - (g * a).sum()
        torch.testing.assert_close(influence(a, g)[j], change, rtol=0, atol=1e-12)


def test_influence_vanishes_where_it_must() -> None:
    a = torch.randn(3, 7, dtype=torch.float64).softmax(-1)
    g = torch.randn(3, 7, dtype=torch.float64)
    assert influence(a, torch.full_like(g, 2.5)).abs().max() < 1e-12
    assert ((1 - a) * influence(a, g)).sum(-1).abs().max() < 1e-12
    sure = torch.tensor([[1.0, 0.0]])
    assert influence(sure, torch.tensor([[1.0, 3.0]])).isfinite().all()


def eager_influence(model: LlamaForCausalLM, sample: Sample, block: int) -> list[Tensor]:
    """By transformers' own maps and their gradients, and loops over all entries."""
    eager = LlamaForCausalLM(model.config).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    out = eager(sample.tokens[None], output_attentions=True)
    loss = torch.nn.functional.cross_entropy(
        out.logits[0, sample.answer_from - 1 : -1], sample.tokens[sample.answer_from :]
    )
    result = []
    for maps, grads in zip(out.attentions, torch.autograd.grad(loss, out.attentions), strict=True):
        e = influence(maps[0].double(), grads[0].double()).unflatten(0, (2, 2)).sum(1)  # over the group
        n = len(sample.tokens)
        total = torch.zeros(2, -(-n // block), dtype=torch.float64)
        for i in range(n):
            for j in range(block, i + 1):
                total[:, i // block - j // block] += e[:, i, j]
        result.append(total.detach())
    return result


def test_the_profile_is_that_of_eager_attention() -> None:
    model = llama()
    sample = Sample(ids(1, 23)[0], 15)
    with attach(model) as attached:
        found = profile(attached, [sample], block=4)
        twice = profile(attached, [sample, sample], block=4)
        assert not attached.listeners and not any(m._forward_pre_hooks for m in model.model.layers.modules())
    assert found.lengths == [23] and found.heads == [2, 2]
    for got, again, want in zip(
        found.by_distance[23], twice.by_distance[23], eager_influence(model, sample, 4), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6 * float(want.abs().max()) + 1e-8)
        torch.testing.assert_close(again, got)
        assert want.abs().max() > 1e-4
    assert torch.equal(found.loss(23, 2)[0], found.by_distance[23][0][:, 2:].sum(-1))
    assert all(not loss.any() for loss in found.loss(23, 6)), "a window of all blocks forbids nothing"


def test_a_frozen_model_is_profiled_as_well() -> None:
    model = llama()
    sample = Sample(ids(1, 12)[0], 6)
    with attach(model) as attached:
        want = profile(attached, [sample], block=4)
        model.requires_grad_(False)
        got = profile(attached, [sample], block=4)
    for a, b in zip(got.by_distance[12], want.by_distance[12], strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_profiled_is_refused() -> None:
    model = llama()
    sample = Sample(ids(1, 12)[0], 6)
    with attach(model) as attached:
        hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
            lambda m, args: (2 * args[0],), prepend=True
        )
        # hooks run in order; ours is added later and sees what this one changed
        with pytest.raises(UnsupportedError, match="layer 1 changes its attention's output"):
            profile(attached, [sample], block=4)
        hook.remove()
        with pytest.raises(ArgumentError, match="samples"):
            profile(attached, [])
    with attach(model, "streaming(budget=8)") as attached, pytest.raises(ArgumentError, match="plan `full`"):
        profile(attached, [sample])
    with pytest.raises(ArgumentError, match="answer_from: got 12"):
        Sample(ids(1, 12)[0], 12)


def made_up(layers: list[int], lengths: list[int], block: int) -> Influence:
    return Influence(
        {n: [torch.randn(heads, n // block, dtype=torch.float64) for heads in layers] for n in lengths}, block
    )


RULES = [(0.0, 1.0), (0.0, 0.5), (8.0, 0.0), (2.0, 0.25), (2.0, 0.0)]


def value(found: Influence, rules: tuple, n: int) -> float:
    from regard.patterns.elastic import window_blocks

    return sum(
        float(found.loss(n, window_blocks(rule, n, found.block))[layer][head])
        for layer, row in enumerate(rules)
        for head, rule in enumerate(row)
    )


def legal(rules: tuple, bounds: dict[int, float], block: int, distinct: int) -> bool:
    flat = [rule for row in rules for rule in row]
    few = all(len(set(row)) <= distinct for row in rules)
    return few and all(sum(density(r, n, block) for r in flat) / len(flat) <= d + 1e-9 for n, d in bounds.items())


@pytest.mark.parametrize("distinct", [1, 2])
def test_the_search_finds_what_trying_everything_finds(distinct: int) -> None:
    found = made_up([2, 3], [32], 2)
    bounds = {32: 0.5, 64: 0.45}
    every = [
        (tuple(c[:2]), tuple(c[2:])) for c in product(RULES, repeat=5) if legal((c[:2], c[2:]), bounds, 2, distinct)
    ]
    best = min(value(found, rules, 32) for rules in every)
    (got,) = search(found, most=bounds, candidates=RULES, distinct=distinct)
    assert legal(got.rules, bounds, 2, distinct)
    assert got.losses[32] == pytest.approx(value(found, got.rules, 32), abs=1e-9) == pytest.approx(best, abs=1e-6)
    uniform = [value(found, ((r,) * 2, (r,) * 3), 32) for r in RULES if legal(((r,), (r,)), bounds, 2, 1)]
    assert got.losses[32] <= min(uniform) + 1e-9


def test_several_lengths_give_a_pareto_set() -> None:
    found = made_up([2, 2], [16, 32], 2)
    chosen = search(found, most=0.6, candidates=RULES)
    assert len(chosen) > 1
    for each in chosen:
        assert legal(each.rules, {16: 0.6, 32: 0.6}, 2, 2)
        for n in (16, 32):
            assert each.losses[n] == pytest.approx(value(found, each.rules, n), abs=1e-9)
    for a, b in product(chosen, repeat=2):
        assert a is b or any(a.losses[n] < b.losses[n] for n in (16, 32))
    for n in (16, 32):  # the ends are those of one length alone
        alone = Influence({n: found.by_distance[n]}, 2)
        (end,) = search(alone, most={16: 0.6, 32: 0.6}, candidates=RULES)
        assert min(each.losses[n] for each in chosen) == pytest.approx(end.losses[n], abs=1e-6)


def test_a_bound_that_nothing_keeps_to_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"most: got 0\.05; allowed: a bound that some candidate keeps to"):
        search(made_up([2], [32], 2), most=0.05, candidates=RULES)
    with pytest.raises(ArgumentError, match="most"):
        search(made_up([2], [32], 2), most=1.5, candidates=RULES)


def test_the_grid_of_the_paper() -> None:
    rules = candidate_rules([2048, 8192])
    assert (
        (0.0, 1.0) in rules and (2048.0, 0.0) in rules and (-2048.0, 1.0) not in rules and (2048.0, 0.125) not in rules
    )
    assert all(0 < a + b * n <= n for a, b in rules for n in (2048, 4096, 8192))
    assert density((2048, 0), 8192) == 33 * 64 / 8192 and density((0, 1), 8192) == 1


def test_a_plan_is_found_and_frees_memory_by_head() -> None:
    model, block = llama(), 4
    grid = [(0, 1.0), (0, 0.5), (8, 0), (4, 0)]
    with attach(model) as attached:
        samples = own_answers(attached, [ids(1, n, seed)[0] for n in (20, 28) for seed in (1, 2)], 4)
        assert [len(s.tokens) for s in samples] == [24, 24, 32, 32] and samples[0].answer_from == 20
        longer = own_answers(attached, [ids(1, 44, 5)[0]], 4)
        plan = moa_plan(attached, samples, most=0.6, candidates=grid, block=block, validation=longer)
        assert served_loss(attached, Plan(), longer) > 0
    assert isinstance(plan.cache, MoA) and Plan.parse(str(plan)) == plan == Plan.from_json(plan.to_json())
    tokens, mask = left_padded([40, 21])
    with attach(model, plan) as attached:
        store = attached.new_store()
        model(tokens, attention_mask=mask, past_key_values=store)
        store.seal()
        held = torch.stack(store.entries, 1)  # (B, layers, heads)
        for b, n in enumerate((40, 21)):
            for layer, row in enumerate(plan.cache.by_layer):
                for head, (alpha, beta) in enumerate(row):
                    window = max(1, int(alpha // block + beta * n / block)) * block
                    assert held[b, layer, head] == min(n, window + block)
                    kept = store.kept(layer)[b][head].tolist()
                    assert kept == sorted({*range(min(block, n)), *range(max(0, n - window), n)}) or len(kept) == n
        assert int(held.unique().numel()) > 1
        limits = torch.tensor(
            [
                [[(max(1, int(a // block + b * n / block)) + 1) * block for a, b in row] for row in plan.cache.by_layer]
                for n in (40, 21)
            ]
        )
        for step in range(6):
            more = torch.cat([mask, torch.ones(2, step + 1, dtype=torch.long)], 1)
            model(ids(2, 1, step), attention_mask=more, past_key_values=store)
        assert torch.equal(torch.stack(store.entries, 1), torch.minimum(held + 6, limits)), "windows slide, spans stay"


def test_the_window_covers_the_prompt_so_nothing_changes() -> None:
    model = llama()
    prompt = ids(1, 16)
    want = model.generate(prompt, max_new_tokens=4, do_sample=False)
    wide = MoA((((0, 1.0),) * 2, ((64, 0),) * 2), block=4)
    with attach(model, Plan(cache=wide)):
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), want)


def test_decoding_is_eager_attention_over_what_each_head_holds() -> None:
    """After the prompt a query sees the first block and the window · block tokens before it, and itself."""
    model, block, n, total = llama(), 4, 24, 36
    rules = (((4, 0), (0, 0.5)), ((-4, 0.25), (16, 0.25)))
    windows = [[1, 3], [1, 5]]  # (-4, 0.25): −1 + 1.5 blocks, raised to one
    text = ids(1, total)
    with torch.no_grad(), attach(model, Plan(cache=MoA(rules, block))) as attached:
        store = attached.new_store()
        got = [model(text[:, :n], past_key_values=store).logits]
        got += [model(text[:, t : t + 1], past_key_values=store).logits for t in range(n, total)]

    def allowed(layer: int) -> Tensor:
        q, k = torch.arange(total)[:, None], torch.arange(total)
        each = [(q < n) | (k < block) | (q - k <= window * block) for window in windows[layer]]
        return torch.stack(each)[None]

    with torch.no_grad():
        want = logits_under(model, Batch(text), allowed)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=1e-5)
    assert (want[:, -1] - model(text).logits[:, -1]).abs().max() > 1e-3, "something was dropped"


def test_the_prompt_attends_under_the_same_rules() -> None:
    """One layer with the prefill part equals the pattern given to transformers as a mask of its own."""
    model = llama(num_hidden_layers=1)
    rules = (((2, 0.25), (4, 0)),)
    prompt = ids(1, 16)
    with attach(model, Plan(prefill=MoAPrefill(rules, group=2, length=16, block=2))):
        got = model(prompt).logits
    assert not torch.allclose(got, model(prompt).logits, atol=1e-4)
    mask = moa_mixture_of_sparse_attention(rules[0], group=2, block=2).bind(16).dense(16)
    model.set_attn_implementation("eager")
    want = model(prompt, attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min)).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoA(), r"MoA.rules: got None"),
        (lambda: MoA(rules=()), r"MoA.rules: got \(\)"),
        (lambda: MoA(rules=((("x", 1),),)), r"MoA.rules"),
        (lambda: MoA(rules=(((1, -1),),)), "beta: got -1"),
        (lambda: MoA(rules=(((1, 1),),), block=0), "MoA.block: got 0"),
        (lambda: attach(llama(), Plan(cache=MoA((((1, 1),),)))), r"MoA.rules: got 1 layers of 1 heads"),
    ],
)
def test_bad_rules_are_named(make: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()  # type: ignore[operator]


def test_seeds_are_the_librarys() -> None:
    """Profiling draws nothing: two runs agree, and the global state is as before."""
    model = llama()
    sample = Sample(ids(1, 12)[0], 6)
    state = torch.random.get_rng_state(), random.getstate()
    with attach(model) as attached:
        first, second = profile(attached, [sample], block=4), profile(attached, [sample], block=4)
    assert torch.equal(first.by_distance[12][0], second.by_distance[12][0])
    assert torch.equal(state[0], torch.random.get_rng_state()) and state[1] == random.getstate()


@pytest.mark.parametrize(
    ("tokens", "answer_from", "argument"),
    [([1, 2, 3], 1, "tokens"), (torch.ones(3), 1, "tokens"), (torch.arange(4), 2.5, "answer_from")],
)
def test_a_sample_checks_what_it_is_made_of(tokens: object, answer_from: object, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        Sample(tokens, answer_from)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"most": "x"}, {"most": True}, {"most": {"a": 0.5}}, {"candidates": [(8,)]}])
def test_a_search_checks_what_it_is_told(given: dict) -> None:
    found = Influence({64: [torch.ones(2, 8, dtype=torch.float64)]}, 8)
    with pytest.raises(ArgumentError, match=f"^{next(iter(given))}: got"):
        search(found, **{"candidates": [(8, 0.1)], **given})
