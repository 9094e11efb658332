"""The store: budgets to the token, memory really freed, rows moved, columns cropped, forks, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.inference.tiny import ids, left_padded, llama
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from regard.errors import ArgumentError, StoreError
from regard.inference.lanes import PAGE
from regard.inference.seam import Attached, attach
from regard.inference.store import KVStore

EVICTING = [
    "snapkv(budget=16,window=4)",
    "streaming(budget=16)",
    "h2o(budget=16)",
    "tova(budget=16)",
    "keydiff(budget=16)",
]
ENTRY = 2 * 8 * 4  # K and V of one entry: head dim 8, float32


@pytest.fixture(autouse=True)
def no_grad() -> None:
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def sealed(attached: Attached, tokens: Tensor, mask: Tensor | None = None) -> KVStore:
    store = attached.new_store()
    attached.model(tokens, attention_mask=mask, past_key_values=store)
    store.seal()
    return store


def steps(attached: Attached, store: KVStore, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of feeding tokens (B, T) one by one."""
    rows = [attached.model(tokens[:, t : t + 1], past_key_values=store).logits for t in range(tokens.shape[1])]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("plan", EVICTING)
@pytest.mark.parametrize("lengths", [[130, 130], [17, 90], [5, 16]])
def test_budget_is_exact_and_memory_is_freed(plan: str, lengths: list[int]) -> None:
    tokens, mask = left_padded(lengths)
    with attach(llama(), plan) as attached:
        store = sealed(attached, tokens, mask)
        want = torch.tensor([min(16, n) for n in lengths])[:, None].expand(2, 2)
        assert all(torch.equal(held, want) for held in store.entries)
        lanes = 2 * 2 * 2
        assert store.held_bytes == int(want.sum()) * 2 * ENTRY
        assert store.allocated_bytes <= store.held_bytes + lanes * PAGE * ENTRY
        storages = [t for layer in store.kv_layers for group in layer.storage.groups() for t in (group.k, group.v)]
        assert sum(t.untyped_storage().nbytes() for t in storages) == store.allocated_bytes


@pytest.mark.parametrize(
    ("plan", "growth"),
    [("snapkv(budget=16,window=4)", 3), ("keydiff(budget=16)", 3), ("streaming(budget=16)", 0), ("h2o(budget=16)", 0)],
)
def test_growth_while_decoding_is_as_stated(plan: str, growth: int) -> None:
    with attach(llama(), plan) as attached:
        store = sealed(attached, ids(2, 40))
        steps(attached, store, ids(2, 3, seed=2))
        assert all(bool((held == 16 + growth).all()) for held in store.entries)


def test_a_step_policy_grows_up_to_its_budget_first() -> None:
    with attach(llama(), "streaming(budget=16)") as attached:
        store = sealed(attached, ids(1, 12))
        steps(attached, store, ids(1, 6, seed=2))
        assert store.kept(0)[0][0].tolist() == [0, 1, 2, 3, *range(6, 18)]


def test_the_prompt_ends_at_the_first_single_token() -> None:
    with attach(llama(), "streaming(budget=16)") as attached:
        store = attached.new_store()
        attached.model(ids(1, 30), past_key_values=store)
        assert not store.sealed and int(store.entries[0].max()) == 30
        attached.model(ids(1, 1), past_key_values=store)
        assert store.sealed and int(store.entries[0].max()) == 16


def test_a_later_turn_is_appended_whole_until_sealed_again() -> None:
    with attach(llama(), "streaming(budget=16)") as attached:
        store = sealed(attached, ids(1, 30))
        attached.model(ids(1, 10), past_key_values=store)
        assert int(store.entries[0].max()) == 26
        steps(attached, store, ids(1, 2))
        assert int(store.entries[0].max()) == 26, "the window slides at the size the turn left"
        store.seal()
        assert store.kept(1)[0][1].tolist() == [0, 1, 2, 3, *range(30, 42)]


@pytest.mark.parametrize("plan", ["full", *EVICTING])
def test_forks_go_their_own_ways(plan: str) -> None:
    with attach(llama(), plan) as attached:
        store = sealed(attached, *left_padded([20, 33]))
        left, right = store.fork(), store.fork()
        a, b = ids(2, 4, seed=5), ids(2, 4, seed=6)
        first = steps(attached, left, a)
        second = steps(attached, right, b)
        assert torch.equal(first, steps(attached, store.fork(), a))
        assert torch.equal(second, steps(attached, store, b))


def test_plans_share_a_prefill() -> None:
    tokens, mask = left_padded([40, 25])
    more = ids(2, 3, seed=2)
    with attach(llama(), "full", observe=EVICTING) as attached:
        shared = attached.new_store()
        attached.model(tokens, attention_mask=mask, past_key_values=shared)
        together = {}
        for plan in EVICTING:
            fork = shared.fork(plan)
            fork.seal()
            together[plan] = steps(attached, fork, more)
        with pytest.raises(ArgumentError, match="observe"):
            shared.fork("snapkv(budget=16,window=8)")
    for plan in EVICTING:
        with attach(llama(), plan) as attached:
            assert torch.allclose(steps(attached, sealed(attached, tokens, mask), more), together[plan], atol=1e-6), (
                plan
            )


@pytest.mark.parametrize("plan", ["full", *EVICTING])
def test_rows_move_as_generate_moves_them(plan: str) -> None:
    tokens, mask = left_padded([20, 33])
    rows = torch.tensor([1, 1, 0])
    more = ids(3, 3, seed=3)
    with attach(llama(), plan) as attached:
        store = sealed(attached, tokens, mask)
        steps(attached, store, ids(2, 2, seed=2))
        moved = store.fork()
        moved.reorder_cache(rows)
        got = steps(attached, moved, more)
        for r, source in enumerate(rows.tolist()):
            one = store.fork()
            one.batch_select_indices(torch.tensor([source]))
            assert torch.allclose(steps(attached, one, more[r : r + 1])[0], got[r], atol=1e-6)
        twice = store.fork()
        twice.batch_repeat_interleave(2)
        assert twice.entries[0].shape[0] == 4 and torch.equal(twice.entries[0][0], twice.entries[0][1])


def test_crop_takes_back_generated_tokens() -> None:
    with attach(llama(), "snapkv(budget=16,window=4)") as attached:
        store = sealed(attached, *left_padded([20, 33]))
        more = ids(2, 5, seed=2)
        want = steps(attached, store.fork(), more)
        steps(attached, store, ids(2, 3, seed=9))
        store.crop(-3)
        assert torch.allclose(steps(attached, store, more), want, atol=1e-6)
        with pytest.raises(StoreError, match="dropped"):
            store.crop(-10)
    with attach(llama(), "streaming(budget=16)") as attached:
        store = sealed(attached, ids(1, 30))
        with pytest.raises(StoreError, match="dropped"):
            store.crop(-1)


@pytest.mark.parametrize("plan", ["full", *EVICTING])
def test_saved_stores_resume_with_identical_tokens(plan: str, tmp_path: Path) -> None:
    tokens, mask = left_padded([20, 33])
    more = ids(2, 4, seed=2)
    with attach(llama(), plan) as attached:
        store = sealed(attached, tokens, mask)
        steps(attached, store, ids(2, 2, seed=7))
        store.save(tmp_path / "past.safetensors")
        want = steps(attached, store, more)
    with attach(llama(), plan) as attached:
        resumed = attached.load_store(tmp_path / "past.safetensors")
        assert torch.equal(steps(attached, resumed, more), want)


def test_a_store_of_another_model_or_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "past.safetensors"
    with attach(llama(), "keydiff(budget=16)") as attached:
        store = sealed(attached, ids(1, 20))
        store.save(path)
        with pytest.raises(StoreError, match="unsealed"):
            attached.new_store().save(path)
    with attach(llama(), "knorm(budget=16)") as attached, pytest.raises(StoreError, match="keydiff"):
        attached.load_store(path)
    with attach(llama(hidden_size=64), "keydiff(budget=16)") as attached, pytest.raises(StoreError, match="model"):
        attached.load_store(path)
    path.write_bytes(path.read_bytes()[:-100])
    with attach(llama(), "keydiff(budget=16)") as attached, pytest.raises(StoreError):
        attached.load_store(path)


def test_a_failed_forward_leaves_the_store_as_it_was() -> None:
    model = llama()
    with attach(model, "full") as attached:
        store = sealed(attached, ids(1, 20))
        want = steps(attached, store.fork(), ids(1, 3, seed=2))

        def fail(*_: object) -> None:
            raise RuntimeError("on purpose")

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            attached.model(ids(1, 4), past_key_values=store)
        hook.remove()
        assert store.columns == 20 and int(store.entries[0].max()) == 20
        assert torch.allclose(steps(attached, store, ids(1, 3, seed=2)), want, atol=1e-6)


def test_a_layer_with_a_window_forgets_what_no_query_sees_again() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=64, sliding_window=20, initializer_range=0.1)
    model = MistralForCausalLM(config).eval()
    tokens, mask = left_padded([150, 131])
    whole = torch.cat([tokens, ids(2, 90, seed=4)], 1)
    real = torch.cat([mask, torch.ones(2, 90, dtype=torch.long)], 1)
    want = model(whole, attention_mask=real).logits[:, 150:]
    with attach(model, "full") as attached:
        store = attached.new_store()
        for part in (slice(0, 100), slice(100, 150)):
            model(whole[:, part], attention_mask=real[:, : part.stop], past_key_values=store)
        store.seal()
        got = steps(attached, store, whole[:, 150:])
        assert all(int(held.max()) < 20 + PAGE for held in store.entries)
        assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()))
        with pytest.raises(StoreError, match="window"):
            store.crop(-80)


def test_payload_budgets_hold_for_the_whole_batch() -> None:
    with attach(llama(), "knorm(budget='8KiB')") as attached:
        store = sealed(attached, *left_padded([60, 70]))
        assert store.held_bytes == 8192, "2 rows × 2 layers × 2 heads × 16 entries × 64 bytes"


def test_a_prompt_is_not_held_twice() -> None:
    """While later layers run, earlier layers' keys are in the store alone."""
    model = llama()
    alive: list[int] = []
    with attach(model, "full") as attached:
        store = attached.new_store()
        hook = model.model.layers[1].register_forward_pre_hook(
            lambda *_: alive.append(sum(given.k() is not None for _, given in store.forward.given))
        )
        model(ids(1, 30), past_key_values=store)
        hook.remove()
    assert alive == [0]
