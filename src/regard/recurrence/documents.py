"""Packed documents: sequences of unequal lengths, one after the other on one time axis, each with its own state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from regard.errors import ArgumentError, UnsupportedError, require
from regard.recurrence.contract import Inputs, Recurrence, State

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@runtime_checkable
class PackedRecurrence(Protocol):
    """A recurrence that takes packed documents itself, as a kernel does that reads the boundaries on the device.

    It is handed what `scan_documents` has checked, cu_seqlens as a tensor (where the caller had it), states or None."""

    def scan_documents(self, inputs: Any, cu_seqlens: Tensor, states: Any) -> tuple[Tensor, Any]: ...


def scan_documents(
    recurrence: Recurrence[Inputs, State],
    inputs: Inputs,
    cu_seqlens: Tensor | Sequence[int],
    states: State | None = None,
) -> tuple[Tensor, State]:
    """Scan S documents that lie one after the other on the time axis of `inputs`; none sees another.

    inputs: batch 1, all documents' tokens in order. cu_seqlens: (S + 1,) ints, document s is tokens
    [cu_seqlens[s], cu_seqlens[s + 1]); from 0, strictly ascending, to inputs.length. states: what each document starts
    from, every tensor batched along axis 0 (S); None = `init`.

    Returns (out of batch 1, time on axis 2, packed as the inputs are; final states, batched along axis 0 (S)).
    One scan per document, unless the recurrence brings its own `scan_documents` (`PackedRecurrence`). Where cu_seqlens
    lies on a device, checking it waits for the device. Raises ArgumentError naming cu_seqlens, inputs or states;
    UnsupportedError where the states of two documents differ in shape (an open chunk)."""
    known = isinstance(getattr(inputs, "length", None), int)
    require(known, "inputs", f"a {type(inputs).__name__}", "the recurrence's own NamedTuple, such as DiagonalInputs")
    bounds = boundaries(cu_seqlens, inputs.length)
    one = recurrence.init(inputs)
    batch = one[0].shape[0]
    require(batch == 1, "inputs", f"a batch of {batch}", "batch 1: the documents lie on the time axis")
    if states is not None:
        _check_states(states, one, len(bounds) - 1)
    if isinstance(recurrence, PackedRecurrence):
        return recurrence.scan_documents(inputs, torch.as_tensor(cu_seqlens), states)
    return one_by_one(recurrence, inputs, bounds, states)


def one_by_one(
    recurrence: Recurrence[Inputs, State], inputs: Inputs, bounds: Sequence[int], states: State | None
) -> tuple[Tensor, State]:
    """`scan_documents`, one scan after the other; `bounds` are checked ones."""
    outs: list[Tensor] = []
    finals: list[State] = []
    for s, (start, stop) in enumerate(pairwise(bounds)):
        state = None if states is None else type(states)(*(x[s : s + 1] for x in states))
        out, last = recurrence.scan(inputs.tokens(start, stop), state)
        outs.append(out)
        finals.append(last)
    fields = list(zip(*finals, strict=True))
    if any(x.shape != field[0].shape for field in fields for x in field):
        raise UnsupportedError(f"{type(recurrence).__name__}: its documents end in states of different shapes")
    return torch.cat(outs, 2), type(finals[0])(*map(torch.cat, fields))


def boundaries(cu_seqlens: Tensor | Sequence[int], length: int) -> list[int]:
    """cu_seqlens as checked ints: from 0, strictly ascending, to `length`. Raises ArgumentError saying which fails."""
    allowed = "ints (S + 1,), S ≥ 1 documents"
    try:
        bounds = torch.as_tensor(cu_seqlens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("cu_seqlens", repr(cu_seqlens), allowed) from error
    kind = f"{bounds.dtype} of shape {tuple(bounds.shape)}"
    fits = bounds.dtype in INTEGERS and bounds.ndim == 1 and len(bounds) >= 2
    require(fits, "cu_seqlens", kind, allowed)
    values: list[int] = bounds.tolist()
    require(values[0] == 0, "cu_seqlens", f"first entry {values[0]}", "first entry 0")
    for i, (a, b) in enumerate(pairwise(values), start=1):
        require(a < b, "cu_seqlens", f"{a} then {b} at entry {i}", "strictly ascending (no empty document)")
    require(
        values[-1] == length, "cu_seqlens", f"last entry {values[-1]}", f"last entry {length}, the tokens in inputs"
    )
    return values


def _check_states(states: Any, one: Any, count: int) -> None:
    """`states` are `count` of what `one` is one of."""
    require(type(states) is type(one), "states", type(states).__name__, type(one).__name__)
    for name, got, want in zip(one._fields, states, one, strict=True):
        allowed = (count, *want.shape[1:])
        require(got.shape == allowed, "states", f"{name} {tuple(got.shape)}", f"{name} {allowed}: axis 0 = documents")
