"""What every recurrence refuses in the same words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.catalogue import list_entries
from regard.errors import ArgumentError

ENTRIES = {entry.key: entry for entry in list_entries("recurrence")}


def example(key: str) -> tuple[Any, Any]:
    make = ENTRIES[key].example
    assert make is not None
    recurrence, inputs = make()
    return recurrence, inputs


@pytest.mark.parametrize("key", ENTRIES)
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_step_is_one_token(key: str, tokens: int) -> None:
    recurrence, inputs = example(key)
    with pytest.raises(ArgumentError, match=f"inputs: got {tokens} tokens; allowed: one token"):
        recurrence.step(recurrence.init(inputs), inputs.tokens(0, tokens))


@pytest.mark.parametrize("key", ENTRIES)
def test_a_state_is_the_recurrence_s_own(key: str) -> None:
    recurrence, inputs = example(key)
    with pytest.raises(ArgumentError, match=r"state: got tuple; allowed: a .*State"):
        recurrence.scan(inputs, (1, 2))
    with pytest.raises(ArgumentError, match=r"state: got tuple; allowed: a .*State"):
        recurrence.step(tuple(recurrence.init(inputs)), inputs.tokens(0, 1))


@pytest.mark.parametrize("key", ENTRIES)
def test_integers_are_refused(key: str) -> None:
    recurrence, inputs = example(key)
    state = recurrence.init(inputs)
    whole = type(inputs)(*(x.long() if isinstance(x, torch.Tensor) and x.ndim > 2 else x for x in inputs))
    for ask in (lambda: recurrence.scan(whole), lambda: recurrence.step(state, whole.tokens(0, 1))):
        with pytest.raises(ArgumentError, match=r"got torch.int64; allowed: a floating-point dtype"):
            ask()
