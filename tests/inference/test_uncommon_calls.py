"""Calls that tutorials do not show: tokens taken back, pieces retried, sealing again, copies; windows, latents,
hybrids."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from tests.inference.batches import mixed, run, tokens
from tests.inference.proof import relative_error
from tests.inference.struck_out import eager_copy
from tests.inference.tiny import ids, llama
from tests.inference.zoo import WINDOW, build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from regard.errors import AttachError, StoreError, UnsupportedError
from regard.inference.lanes import PAGE
from regard.inference.seam import Attached, attach

LONG = WINDOW + PAGE + 30


@pytest.fixture(autouse=True)
def no_grad() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def fail_in_last_layer(attached: Attached, new: Tensor, store: object) -> None:
    """A forward over the store that dies after the layers before the last have run."""

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    hook = attached.model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        attached.model(new, past_key_values=store)
    hook.remove()


def rows_apart(model: PreTrainedModel, plan: str, lengths: tuple[int, ...], steps: int) -> float:
    """Largest relative difference of decoded logits between a batch and its rows one by one."""
    batch, more = mixed("left", lengths), tokens(len(lengths), steps, seed=2)
    worst = 0.0
    with attach(model, plan):
        outs = []
        for one, new in [(batch, more), *((batch.row(b), more[b : b + 1]) for b in range(len(lengths)))]:
            _, store = run(model, one)
            outs.append(run(model, one.then(new), (1,) * steps, store)[0])
    for b in range(len(lengths)):
        worst = max(worst, relative_error(outs[0][b : b + 1], outs[b + 1]))
    return worst


@pytest.mark.parametrize("plan", ["tova(budget=20)", "h2o(budget=20)"])
def test_a_latent_layer_goes_by_the_right_weights_when_slots_are_out_of_order(plan: str) -> None:
    """Lanes of one length are read in storage order, keys that the model expanded come by position."""
    assert rows_apart(build("deepseek_v3"), plan, (110, 1, 40), 6) < 1e-5


@pytest.mark.parametrize("plan", ["keydiff(budget=0.3)", "h2o(budget=0.5)"])
def test_what_a_window_holds_when_sealed_does_not_depend_on_neighbours(plan: str) -> None:
    assert rows_apart(build("mistral"), plan, (LONG, 1, 40), 3) < 1e-5


def test_what_a_window_holds_when_sealed_does_not_depend_on_the_pieces() -> None:
    model, batch, more = build("mistral"), mixed("left", (LONG, 40)), tokens(2, 3, seed=2)
    with attach(model, "keydiff(budget=4)"):
        got = [
            run(model, batch.then(more), (1, 1, 1), run(model, batch, pieces)[1])[0]
            for pieces in ((), (LONG - 10, 10), (20, LONG - 20))
        ]
    assert relative_error(got[1], got[0]) < 1e-5 and relative_error(got[2], got[0]) < 1e-5


def test_tokens_are_taken_back_from_windows() -> None:
    """Where the window has not passed: in prompts shorter than it, and in each row of a mixed batch."""
    for lengths, size in (((5, 3), WINDOW), ((LONG, 20), WINDOW)):
        model = build("mistral", sliding_window=size)
        batch, wrong, more = mixed("left", lengths), tokens(2, 4, seed=5), tokens(2, 6, seed=6)
        with attach(model, "full"):
            _, store = run(model, batch)
            run(model, batch.then(wrong), (4,), store)
            store.crop(-4)
            got = run(model, batch.then(more), (6,), store)[0]
        want = run(eager_copy(model), batch.then(more))[0][:, -6:]
        assert relative_error(got, want) < 1e-5


@pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="transformers cannot either")
def test_prompt_lookup_decoding_over_a_window() -> None:
    model = build("mistral")
    prompt = tokens(1, LONG // 2).repeat(1, 2)
    want = eager_copy(model).generate(prompt, max_new_tokens=12, do_sample=False)
    with attach(model, "full"):
        got = model.generate(prompt, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(got, want)


def test_a_saved_window_still_knows_what_it_forgot(tmp_path: Path) -> None:
    model = build("mistral")
    with attach(model, "full") as attached:
        _, store = run(model, mixed("left", (LONG, 20)))
        store.seal()
        store.save(tmp_path / "past.safetensors")
        with pytest.raises(StoreError, match="passed"):
            attached.load_store(tmp_path / "past.safetensors").crop(-5)


def test_recurrent_states_beside_keys_do_not_go_back() -> None:
    model, prompt = build("falcon_h1"), tokens(1, 20)
    with attach(model, "full") as attached:
        store = attached.new_store()
        model(prompt, past_key_values=store)
        with pytest.raises(StoreError, match="recurrent"):
            store.crop(-5)
        fail_in_last_layer(attached, prompt, store)
        with pytest.raises(StoreError, match="halfway"):
            model(prompt, past_key_values=store)


def test_forks_of_an_empty_hybrid_store_are_apart() -> None:
    model, prompts = build("falcon_h1"), tokens(2, 12)
    with attach(model, "full") as attached:
        store = attached.new_store()
        stores = [store, store.fork()]
        got = torch.cat([model(prompts[b : b + 1], past_key_values=stores[b]).logits for b in range(2)])
    assert relative_error(got, eager_copy(model)(prompts).logits) < 1e-5


@pytest.mark.parametrize("plan", ["h2o(budget=10)", "snapkv(budget=12,window=8)"])
def test_a_prompt_is_observed_once_when_a_piece_of_it_is_tried_again(plan: str) -> None:
    prompt = ids(2, 40)
    seen = []
    with attach(llama(), plan) as attached:
        for fails in (False, True):
            store = attached.new_store()
            attached.model(prompt[:, :34], past_key_values=store)
            if fails:
                fail_in_last_layer(attached, prompt[:, 34:], store)
            attached.model(prompt[:, 34:], past_key_values=store)
            observed = store.kv_layers[0].observed
            seen.append(observed.sums if observed.sums is not None else observed.window[1])
    assert torch.equal(seen[0], seen[1])


def test_padding_asks_nothing_of_h2o() -> None:
    """A row that is fed padding while its neighbour decodes keeps the sums that it has."""
    real = torch.tensor([[1], [0]])
    with attach(llama(), "h2o(budget=10)") as attached:
        store = attached.new_store()
        attached.model(ids(2, 40), past_key_values=store)
        store.seal()
        before = store.kv_layers[0].observed.sums.clone()  # steps add to them in place
        mask = torch.cat([torch.ones(2, 40, dtype=torch.long), real], 1)
        attached.model(ids(2, 1, seed=3), attention_mask=mask, past_key_values=store)
        after = store.kv_layers[0].observed.sums[..., :40]
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])


def test_h2o_serves_a_float64_model() -> None:
    with attach(llama().double(), "h2o(budget=10)") as attached:
        store = attached.new_store()
        attached.model(ids(1, 30), past_key_values=store)
        attached.model(ids(1, 1), past_key_values=store)
        assert all(held.tolist() == [[10, 10]] for held in store.entries)


def test_sealing_again_needs_queries_that_were_observed() -> None:
    with attach(llama(), "snapkv(budget=16,window=4)") as attached:
        store = attached.new_store()
        attached.model(ids(1, 40), past_key_values=store)
        store.seal()
        store.seal()
        attached.model(ids(1, 1), past_key_values=store)
        with pytest.raises(StoreError, match="one by one"):
            store.seal()
        attached.model(ids(1, 9), past_key_values=store)
        store.seal()
        assert all(held.tolist() == [[16, 16]] for held in store.entries)


def test_an_attached_model_is_not_copied_and_a_detached_one_not_entered() -> None:
    model = llama()
    with attach(model, "full") as attached:
        for duplicate in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachError, match="detach"):
                duplicate(model)
    with pytest.raises(AttachError, match="again"), attached:
        pass
    assert torch.equal(copy.deepcopy(model)(ids(1, 5)).logits, model(ids(1, 5)).logits)


def test_gradient_checkpointing_is_refused_by_name() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable()
    with attach(model, "full"), torch.enable_grad(), pytest.raises(UnsupportedError, match="checkpointing"):
        model(ids(1, 5), labels=ids(1, 5))


def test_taking_back_tokens_of_an_unsealed_prompt_is_refused_under_a_policy() -> None:
    """Prompt-lookup decoding would seal late and choose other tokens than the plan alone."""
    model = llama()
    with attach(model, "snapkv(budget=16,window=4)") as attached:
        store = attached.new_store()
        model(ids(1, 20), past_key_values=store)
        with pytest.raises(StoreError, match="prompt-lookup"):
            store.crop(-2)


def test_autocast_is_refused_by_name() -> None:
    model = llama()
    with attach(model, "full"), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(UnsupportedError, match="autocast"):
            model(ids(1, 8))
