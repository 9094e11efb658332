"""The seam: what it refuses, and that prefill parts do what they say. Its equality to eager is proved in
test_architectures."""

from __future__ import annotations

import pytest
import torch
from tests.inference.tiny import ids, left_padded, llama
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, StaticCache, T5Config, T5ForConditionalGeneration

import regard.patterns as patterns
from regard.errors import ArgumentError, AttachError, RegardError, StoreError, UnknownNameError, UnsupportedError
from regard.inference.call import CallPattern
from regard.inference.seam import attach


@pytest.fixture(autouse=True)
def no_grad() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def test_a_model_that_is_not_reached_is_refused_and_left_alone() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)).eval()
    before = model(ids(1, 5)).logits
    config = model.config
    with pytest.raises(AttachError, match=r"never asks|interface"):
        attach(model)
    assert model.config is config and not model._forward_pre_hooks and not model._forward_hooks
    assert torch.equal(model(ids(1, 5)).logits, before)


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(ArgumentError, match="model"):
        attach(torch.nn.Linear(2, 2))
    config = T5Config(d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2, vocab_size=64)
    with pytest.raises(AttachError, match="encoder-decoder"):
        attach(T5ForConditionalGeneration(config))


def test_attaching_twice_is_refused_and_the_first_stays() -> None:
    model = llama()
    with attach(model, "streaming(budget=16)") as first:
        with pytest.raises(AttachError, match=r"streaming\(budget=16\)"):
            attach(model, "full")
        with pytest.raises(AttachError, match="attached already"):
            attach(model.model, "full")
        store = first.new_store()
        model(ids(1, 20), past_key_values=store)
        store.seal()
        assert int(store.entries[0].max()) == 16
    attach(model, "full").detach()


@pytest.mark.parametrize(
    "plan", ["snapkw(budget=3)", "snapkv(budgte=16)", "snapkv(budget=0)", "snapkv", "prefill=fast"]
)
def test_bad_plans_are_refused_before_anything_happens(plan: str) -> None:
    model = llama()
    config = model.config
    with pytest.raises((ArgumentError, UnknownNameError)):
        attach(model, plan)
    assert model.config is config


def test_other_caches_are_refused_by_name() -> None:
    model = llama()
    filled = DynamicCache(config=model.config)
    model(ids(1, 4), past_key_values=filled)
    with attach(model, "full"):
        with pytest.raises(ArgumentError, match="StaticCache"):
            model(ids(1, 4), past_key_values=StaticCache(config=model.config, max_cache_len=32))
        with pytest.raises(ArgumentError, match="filled elsewhere"):
            model(ids(1, 4), past_key_values=filled)
        with pytest.raises(ArgumentError, match="static"):
            model.generate(ids(1, 4), max_new_tokens=2, cache_implementation="static")


def test_an_empty_dynamic_cache_stands_for_our_store_each_time_it_comes() -> None:
    model, tokens = llama(), ids(1, 12)
    want = model(tokens).logits[:, -1]
    with attach(model, "full"):
        cache = DynamicCache()
        model(tokens[:, :8], past_key_values=cache)
        got = model(tokens[:, 8:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "input_ids"),
    ],
)
def test_bad_calls_name_the_argument(arguments: dict, error: str) -> None:
    model = llama()
    with attach(model, "full"):
        with pytest.raises(ArgumentError, match=error):
            model(**{"input_ids": ids(1, 4), **arguments})
        assert torch.isfinite(model(ids(1, 4)).logits).all(), "the next call is served"


def test_a_store_serves_the_attachment_it_was_made_by() -> None:
    model = llama()
    with attach(model, "full") as attached:
        store = attached.new_store()
        model(ids(1, 4), past_key_values=store)
    with pytest.raises(RegardError):
        model(ids(1, 1), past_key_values=store)
    with attach(model, "full"), pytest.raises(StoreError, match="another attachment"):
        model(ids(1, 1), past_key_values=store)


def test_rows_may_not_change_between_forwards() -> None:
    model = llama()
    with attach(model, "full") as attached:
        store = attached.new_store()
        model(ids(2, 4), past_key_values=store)
        with pytest.raises(ArgumentError, match="rows"):
            model(ids(3, 1), past_key_values=store)


def test_calling_past_the_attached_model_is_noticed() -> None:
    model = llama()
    with attach(model, "full"), pytest.raises(AttachError, match="past the attached model"):
        model.model(ids(1, 4))


def test_dropout_is_refused() -> None:
    model = llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with attach(model, "full"):
        model.train()
        with pytest.raises(UnsupportedError, match="dropout"):
            model(ids(1, 4))


@pytest.mark.parametrize("lengths", [[24, 24], [24, 11]])
def test_a_prefill_part_is_the_dense_model_under_its_mask(lengths: list[int]) -> None:
    """Λ-shaped prefill against transformers' eager under the same mask, drawn independently."""
    tokens, mask = left_padded(lengths)
    model = llama()
    n = tokens.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    allowed = []
    for length in lengths:
        pad = n - length
        lambda_shape = (j <= i) & ((i - j < 6) | ((j - pad) < 2)) & (j >= pad)
        allowed.append(lambda_shape)
    drawn = torch.zeros(2, 1, n, n).masked_fill(~torch.stack(allowed)[:, None], torch.finfo(torch.float32).min)
    with attach(model, "prefill=streaming(sinks=2,window=6)"):
        got = model(tokens, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    want = model(tokens, attention_mask=drawn).logits
    real = mask.bool()
    assert torch.allclose(got[real], want[real], atol=1e-5)
    dense = model(tokens, attention_mask=mask).logits
    assert not torch.allclose(got[real], dense[real], atol=1e-3)


def test_a_sparse_prompt_without_padding_draws_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pattern answers for tiles: nothing is asked of the rule that stands for transformers' mask."""
    model, tokens = llama(), ids(2, 40)
    drawn = torch.ones(2, 41, dtype=torch.bool)
    drawn[:, 0] = False  # one padded column in front, so that the mask has to be drawn
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens], 1)
    with attach(model, "prefill=streaming(sinks=2,window=6)"):
        want = model(padded, attention_mask=drawn).logits[:, 1:]
        monkeypatch.setattr(CallPattern, "rule", lambda *_: pytest.fail("a mask was drawn"))
        got = model(tokens).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_patterns_and_the_seam_agree_on_what_a_window_is() -> None:
    assert patterns.sliding_window(6).dense(8)[0, 0, 7].tolist() == [False] * 2 + [True] * 6


def test_training_with_gradients_goes_through_the_seam() -> None:
    torch.set_grad_enabled(True)
    model, tokens = llama(), ids(2, 10)
    model(tokens, labels=tokens).loss.backward()
    want = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    with attach(model, "full"):
        model(tokens, labels=tokens).loss.backward()
    assert torch.allclose(model.model.layers[0].self_attn.k_proj.weight.grad, want, atol=1e-6)


@pytest.mark.parametrize("plan", ["streaming(budget=9)@7-", "streaming(budget=9)@0-.5"])
def test_a_scope_that_names_nothing_of_the_model_is_refused(plan: str) -> None:
    model = llama()
    with pytest.raises(RegardError, match=r"scope: got .*allowed: .* from 0 to 1"):
        with attach(model, plan):
            model(ids(1, 12), use_cache=True)
