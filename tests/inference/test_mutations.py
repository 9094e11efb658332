"""The proofs can fail: what a seam is likely to forget is taken out of ours, one thing at a time, and each shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.inference import proof, zoo
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from regard.inference import cache, interface
from regard.inference.call import AttentionCall
from regard.inference.store import KVStore

torch.set_num_threads(1)


def _window(call: AttentionCall) -> AttentionCall:
    """Windows and chunks come as a mask function: with plain causality in its place both are gone."""
    return replace(call, recipe=replace(call.recipe, mask_function=causal_mask_function, by_element=False, causal=True))


PROMPT: dict[str, Callable[[AttentionCall], AttentionCall]] = {
    "softcap": lambda call: replace(call, softcap=None),
    "sinks": lambda call: replace(call, sinks=None),
    "window": _window,
    "scale": lambda call: replace(call, scale=call.q.shape[-1] ** -0.5),
    "key": lambda call: replace(call, k=call.k.roll(1, 2)),
    "column": lambda call: replace(call, k_columns=call.k_columns - 1, fresh=False),
    "padding": lambda call: replace(call, k_real=None),
}
"""What happens to a prompt's call before it is executed."""

DECODE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "softcap": lambda given: {**given, "softcap": None},
    "sinks": lambda given: {**given, "sinks": None},
    "window": lambda given: {**given, "visible": None},
    "scale": lambda given: {**given, "scale": given["groups"][0].k.shape[-1] ** -0.5},
    "key": lambda given: {**given, "groups": [g._replace(k=g.k.roll(1, 1)) for g in given["groups"]]},
    "length": lambda given: {**given, "groups": [_shorter(g) for g in given["groups"]]},
}
"""What happens to a new token's attention to the store."""

CASES = [
    ("gemma2", "softcap"),
    ("gpt_oss", "sinks"),
    ("mistral", "window"),
    ("gemma3_text", "window"),
    ("llama4_text", "window"),
    ("granite", "scale"),
    ("gemma2", "scale"),
    ("llama", "key"),
]


def _shorter(group: Any) -> Any:
    return group._replace(lengths=group.lengths - 1, uniform=None if group.uniform is None else group.uniform - 1)


def _failed(checks: list[proof.Check]) -> set[str]:
    return {check.name for check in checks if not check.ok}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_unmutated_is_green(name: str) -> None:
    assert not _failed(proof.full_plan(zoo.build(name), ["greedy"]))


@pytest.mark.parametrize(("name", "mutation"), [*CASES, ("llama", "column"), ("llama", "padding")])
def test_prompt_mutations_are_red(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(name)
    original, mutate = interface.run_call, PROMPT[mutation]
    monkeypatch.setattr(interface, "run_call", lambda call: original(mutate(call)))
    failed = _failed(proof.full_plan(model, []))
    expected = {"left-padded"} if mutation == "padding" else {"unpadded", "left-padded", "right-padded"}
    assert expected | {"chunked prefill"} <= failed


@pytest.mark.parametrize(("name", "mutation"), [*CASES, ("llama", "length")])
def test_decode_mutations_are_red(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build(name)
    original, mutate = cache.ragged_attend, DECODE[mutation]

    def mutated(q: Tensor, groups: Any, **given: Any) -> Any:
        return original(q, **mutate({"groups": groups, **given}))

    monkeypatch.setattr(cache, "ragged_attend", mutated)
    assert _failed(proof.full_plan(model, ["greedy"])) >= {"decode", "greedy"}
    plan = proof.plans(model, 16)["keydiff"]
    assert "decode = dense under kept ∪ new" in _failed(proof.compressed(model, plan))


def test_a_wrong_record_of_what_was_kept_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    plan = proof.plans(model, 8)["keydiff"]
    original = KVStore.kept

    def off_by_one(store: Any, layer: int) -> list[list[Tensor]]:
        return [[(lane - 1).clamp_min(0) for lane in row] for row in original(store, layer)]

    monkeypatch.setattr(KVStore, "kept", off_by_one)
    assert "decode = dense under kept ∪ new" in _failed(proof.compressed(model, plan))


def test_a_mutation_of_the_short_cut_for_equal_lanes_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpadded rows that dropped nothing decode by another path than ragged ones."""
    model = zoo.build("llama")
    original = cache.over_cache

    def mutated(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return original(q, k.roll(1, 2), v, scale)

    monkeypatch.setattr(cache, "over_cache", mutated)
    assert "chunked prefill, unpadded" in _failed(proof.full_plan(model, []))
