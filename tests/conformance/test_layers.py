"""What every registered layer must pass. A new layer is tested here without a line being added."""

from __future__ import annotations

import pytest
import torch
from tests.conformance.cases import check, entry, example, keys, make, refusal, some_length, tokens
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.layers import Layer, create, settings_of
from regard.patterns import causal, full, sliding_window

EXACT = {"rtol": 0.0, "atol": 1e-10}


@check("shape and dtype")
def test_shape_and_dtype(key: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens(key, some_length(key), dtype=dtype)
        out = make(key, dtype=dtype)(x).out
        assert out.shape == x.shape and out.dtype == dtype and out.isfinite().all()
    exact = make(key)(tokens(key, some_length(key))).out
    single = make(key, dtype=torch.float32)(tokens(key, some_length(key), dtype=torch.float32)).out
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-5)


@check("shape and dtype")
def test_autocast(key: str) -> None:
    layer, x = make(key, dtype=torch.float32), tokens(key, some_length(key), dtype=torch.float32)
    for training in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer.train(training)(x).out
        assert out.shape == x.shape and out.dtype.is_floating_point and out.isfinite().all()


@check("gradcheck")
def test_gradients(key: str) -> None:
    layer = make(key)
    names = [name for name, _ in layer.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = tokens(key, some_length(key, 5), batch=1).requires_grad_()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,)).out

    assert torch.autograd.gradcheck(run, (x, *leaves), fast_mode=True)


@check("any length")
def test_lengths(key: str) -> None:
    layer = make(key)
    for n in example(key).lengths:
        x = tokens(key, n, batch=1).requires_grad_()
        out = layer(x).out
        out.sum().backward()
        assert out.shape == x.shape and out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@check("any length")
def test_no_tokens_and_no_rows(key: str) -> None:
    layer, x = make(key), tokens(key, some_length(key))
    fixed = "layout" in example(key).settings
    for few in (x[:0], *[x[:, :0]] * (not fixed)):
        for real in (None, torch.ones(few.shape[:2], dtype=torch.bool)):
            for pattern in [causal()] * entry(key).settings["causal"] + [None]:
                for training in (True, False):
                    assert layer.train(training)(few, pattern=pattern, key_padding=real).out.shape == few.shape


@check("identity")
def test_identity(key: str) -> None:
    factory = entry(key).factory
    assert isinstance(factory, type) and issubclass(factory, Layer)
    got, want = factory.identity()
    assert got.dtype == want.dtype == torch.float64 and want.abs().max() > 1e-3
    torch.testing.assert_close(got, want, **EXACT)


@check("causal", declared="causal")
def test_the_future_changes_nothing_bitwise(key: str) -> None:
    layer, n = make(key), some_length(key, 70)
    x = tokens(key, n)
    out = layer(x, pattern=causal()).out
    tolerance = entry(key).settings.get("causality_tolerance", 0.0)
    for t in {1, n // 2, n - 1}:
        changed = x.clone()
        changed[:, t:] = 10 * tokens(key, n - t, seed=5)
        again = layer(changed, pattern=causal()).out
        assert (again[:, :t] - out[:, :t]).abs().max() <= tolerance
        assert (again[:, t] - out[:, t]).abs().max() > 1e-6, "the change itself must be seen"


@refusal("causal", declared="causal")
def test_causal_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        make(key)(tokens(key, some_length(key)), pattern=causal())


@check("bidirectional", declared="bidirectional")
def test_every_token_sees_every_other(key: str) -> None:
    layer, n = make(key), some_length(key)
    x = tokens(key, n)
    changed = x.clone()
    changed[:, -1, 0] += 1  # not all channels: a LayerNorm would take that out again
    assert ((layer(changed).out - layer(x).out).abs().amax(-1) > 1e-9).all()
    torch.testing.assert_close(layer(x, pattern=full()).out, layer(x).out, **EXACT)


@refusal("bidirectional", declared="bidirectional")
def test_bidirectional_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        make(key)(tokens(key, some_length(key)), pattern=full())


@check("patterns", declared="patterns")
def test_a_pattern_is_obeyed(key: str) -> None:
    layer, n, size = make(key), some_length(key), 3
    x = tokens(key, n)
    pattern = causal() & sliding_window(size)
    changed = x.clone()
    changed[:, 2, 0] += 1
    moved = (layer(changed, pattern=pattern).out - layer(x, pattern=pattern).out).abs().amax((0, 2)) > 1e-12
    assert moved.tolist() == [2 <= t < 2 + size for t in range(n)]


@refusal("patterns", declared="patterns")
def test_a_pattern_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        make(key)(tokens(key, some_length(key)), pattern=causal() & sliding_window(3))


def rows_alone(layer: Layer, x: Tensor, real: Tensor, pattern: object) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Each row without its padding: outputs, the gradient at x, and the gradients of the parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    outs = [layer(x[b : b + 1, real[b]], pattern=pattern).out[0] for b in range(len(x))]
    torch.cat(outs).sin().sum().backward()
    assert x.grad is not None
    return outs, x.grad, [p.grad.clone() for p in layer.parameters() if p.grad is not None]


@check("padding")
def test_a_padded_batch_is_its_rows(key: str) -> None:
    layer = make(key)
    n = some_length(key)
    shorter = max((m for m in example(key).lengths if m < n), default=n)
    for left in (True, False):
        real = torch.ones(2, n, dtype=torch.bool)
        real[1, slice(0, n - shorter) if left else slice(shorter, n)] = False
        for pattern in [causal()] * entry(key).settings["causal"] + [None]:
            x = tokens(key, n)
            wanted, grad, parameter_grads = rows_alone(layer, x, real, pattern)
            junk = torch.where(real[..., None], x, 1e3 * tokens(key, n, seed=9)).requires_grad_()
            layer.zero_grad()
            out = layer(junk, pattern=pattern, key_padding=real).out
            out[real].sin().sum().backward()
            torch.testing.assert_close(out[real], torch.cat(wanted), **EXACT)
            assert (out[~real] == 0).all(), "padding comes out as zeros"
            assert junk.grad is not None
            torch.testing.assert_close(junk.grad, grad, rtol=0, atol=1e-9)
            for p, want in zip((p for p in layer.parameters() if p.grad is not None), parameter_grads, strict=True):
                torch.testing.assert_close(p.grad, want, rtol=0, atol=1e-8)


@check("a row of padding only")
def test_a_row_without_tokens_gives_zeros_and_no_nan(key: str) -> None:
    layer, n = make(key), some_length(key)
    x = tokens(key, n).requires_grad_()
    real = torch.ones(2, n, dtype=torch.bool)
    real[1] = False
    out = layer(x, key_padding=real).out
    out.sum().backward()
    assert (out[1] == 0).all() and x.grad is not None and x.grad.isfinite().all() and (x.grad[1] == 0).all()


@check("grouped queries", declared="gqa")
def test_grouped_queries_are_repeated_heads(key: str) -> None:
    heads = example(key).heads
    assert heads % 2 == 0
    grouped, repeated = make(key, kv_heads=heads // 2), make(key, kv_heads=heads)
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        if name in weights:
            weights[name] = weights[name].unflatten(0, (heads // 2, -1)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    x = tokens(key, some_length(key))
    torch.testing.assert_close(grouped(x).out, repeated(x).out, **EXACT)


@refusal("grouped queries", declared="gqa")
def test_grouped_queries_are_refused(key: str) -> None:
    with pytest.raises(UnknownNameError, match=f"setting of {key}: got 'kv_heads'"):
        make(key, kv_heads=1)


@check("step by step", declared="steps")
def test_steps_are_the_full_forward(key: str) -> None:
    layer, n = make(key), some_length(key)
    x = tokens(key, n)
    for real in (
        None,
        torch.arange(n)[None] >= torch.tensor([[0], [3]]),
    ):  # without padding, and with padding on the left
        want = layer(x, pattern=causal(), key_padding=real).out
        for cuts in (
            range(1, n),
            (n // 2, n // 2, n // 2 + 1, n - 1),
        ):  # one by one; a prompt, none, single tokens, and several at once
            outs, state = [], None
            for start, stop in zip((0, *cuts), (*cuts, n), strict=True):
                now = None if real is None else real[:, start:stop]
                out, state, _ = layer(x[:, start:stop], pattern=causal(), key_padding=now, state=state)
                outs.append(out)
            torch.testing.assert_close(torch.cat(outs, 1), want, **EXACT)


@refusal("step by step", declared="steps")
def test_a_state_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match=key):
        make(key)(tokens(key, some_length(key)), state=object())


@check("cross-attention", declared="cross")
def test_cross_attention(key: str) -> None:
    layer, n = make(key), some_length(key)
    x, context = tokens(key, n), tokens(key, n + 4, seed=3)
    torch.testing.assert_close(layer(x, x).out, layer(x).out, **EXACT)
    real = torch.ones(2, n + 4, dtype=torch.bool)
    real[1, n:] = False
    out = layer(x, context, key_padding=real).out
    torch.testing.assert_close(out[:1], layer(x[:1], context[:1]).out, **EXACT)
    torch.testing.assert_close(out[1:], layer(x[1:], context[1:, :n]).out, **EXACT)


@refusal("cross-attention", declared="cross")
def test_a_context_is_refused(key: str) -> None:
    x = tokens(key, some_length(key))
    with pytest.raises(UnsupportedError, match=key):
        make(key)(x, x)


@check("rows apart")
def test_batch_rows_do_not_influence_each_other(key: str) -> None:
    layer = make(key)
    x = tokens(key, some_length(key), batch=3)
    out = layer(x).out
    changed = x.clone()
    changed[1] = 100 * tokens(key, x.shape[1], batch=1, seed=7)[0]
    again = layer(changed).out
    assert torch.equal(again[::2], out[::2]) and not torch.equal(again[1], out[1])


@check("state dict")
def test_state_dict_round_trip(key: str) -> None:
    first, second = make(key, seed=0), make(key, seed=1)
    x = tokens(key, some_length(key))
    assert not torch.equal(first(x).out, second(x).out)
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x).out, second(x).out)


@check("same seed, same result")
def test_same_seed_same_result(key: str) -> None:
    x = tokens(key, some_length(key))
    assert torch.equal(make(key, seed=3)(x).out, make(key, seed=3)(x).out)


@check("torch.compile", declared="compiles")
def test_compiled_is_eager(key: str) -> None:
    layer = make(key)
    x = tokens(key, some_length(key), batch=1)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out = run(leaf).out
        out.sin().sum().backward()
        results.append((out, leaf.grad))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@check("bad input")
def test_bad_input_is_named(key: str) -> None:
    layer, about = make(key), example(key)
    x = tokens(key, some_length(key))
    n = x.shape[1]
    for argument, call in (
        ("x", lambda: layer(x[0])),
        ("x", lambda: layer(x[..., :-1])),
        ("x", lambda: layer(x.tolist())),
        ("x", lambda: layer(x.long())),
        ("x", lambda: layer(x.float())),
        ("key_padding", lambda: layer(x, key_padding=[[True] * n] * 2)),
        ("key_padding", lambda: layer(x, key_padding=torch.ones(2, n + 1, dtype=torch.bool))),
        ("key_padding", lambda: layer(x, key_padding=torch.ones(2, n))),
        ("heads", lambda: create(key, dim=about.dim, heads=0)),
        ("dim", lambda: create(key, dim=0, heads=1)),
    ):
        with pytest.raises(ArgumentError, match=f"^{argument}: got"):
            call()
    with pytest.raises(UnknownNameError, match=f"setting of {key}: got 'no_such_setting'"):
        create(key, dim=about.dim, heads=about.heads, no_such_setting=1)
    if entry(key).settings["steps"]:
        state = layer(x, pattern=causal()).state
        with pytest.raises(ArgumentError, match=r"^state: got"):
            layer(x, state=(1, 2))
        with pytest.raises(ArgumentError, match=r"^state: got"):
            layer(x[:1], state=state)


WRONG: dict[type, tuple[object, ...]] = {
    bool: ("false", 1, None),
    int: (1.5, "x", True, -1),
    float: (torch.nan, torch.inf, "x", True, None),
    str: ("x", 1),
    type(None): ("x", True, -1),
}
"""By the type of a setting's default, what it cannot be."""


@check("bad input")
def test_bad_settings_are_named(key: str) -> None:
    about = example(key)
    for name in ("dim", "heads"):
        for value in WRONG[int]:
            with pytest.raises(ArgumentError, match=f"^{name}: got"):
                create(key, **{"dim": about.dim, "heads": about.heads, **about.settings, name: value})
    for name, default in settings_of(key).items():
        for value in WRONG[type(default)]:
            with pytest.raises(ArgumentError, match=f"^{name}: got"):
                create(key, dim=about.dim, heads=about.heads, **{**about.settings, name: value})


def test_a_mechanism_that_does_not_exist_is_answered_with_its_neighbours() -> None:
    with pytest.raises(UnknownNameError, match="did you mean moh"):
        create("mohh", dim=8, heads=2)


def test_few_compiled_cases() -> None:
    assert sum(bool(entry(key).settings["compiles"]) for key in keys("layer")) <= 10, "each costs seconds"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has checks of its own")
def test_memory_that_nobody_wrote_is_nan() -> None:
    assert torch.empty(64).isnan().all()
