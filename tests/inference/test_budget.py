"""Budgets: what may be written, and how many entries it means."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.errors import ArgumentError
from regard.inference.budget import Budget
from regard.inference.policy import LayerView


def view(prompts: list[int], heads: int = 2, layers: int = 3, dtype: torch.dtype = torch.float32) -> LayerView:
    """Lanes that hold the whole prompt; K of 8 and V of 4 numbers."""
    batch, length = len(prompts), max(prompts)
    lengths = torch.tensor(prompts)[:, None].expand(batch, heads)
    slot = torch.arange(length)
    positions = torch.where(slot < lengths[..., None], slot, -1)
    k = torch.empty(1, dtype=dtype).expand(batch, heads, length, 8)
    return LayerView(0, layers, k, k[..., :4], positions, lengths, torch.tensor(prompts))


@given(st.integers(1, 400), st.integers(1, 5000))
def test_a_share_is_the_decimal_that_was_written_rounded_down(percent_of_four: int, n: int) -> None:
    """0.29 of 100 is 29, though the nearest binary fraction to 0.29 is below it."""
    share = Fraction(percent_of_four, 400)
    budget = Budget.parse(float(share))
    assert budget is not None
    want = max(1, int(share * n))
    assert budget.entries(view([n], heads=1)).tolist() == [[want]]


def test_a_share_is_of_each_rows_own_prompt() -> None:
    assert Budget(0.29).entries(view([100, 10, 1])).tolist() == [[29, 29], [2, 2], [1, 1]]


def test_tokens_are_no_more_than_a_lane_holds_but_all_that_it_may() -> None:
    assert Budget(7).entries(view([3, 9])).tolist() == [[3, 3], [7, 7]]
    assert Budget(7).wanted(view([3, 9])).tolist() == [[7, 7], [7, 7]]
    assert Budget(10**30).entries(view([3])).tolist() == [[3, 3]]


@pytest.mark.parametrize(("dtype", "entry"), [(torch.float32, 48), (torch.bfloat16, 24)])
def test_payload_is_spread_over_layers_rows_and_heads(dtype: torch.dtype, entry: int) -> None:
    lanes = 3 * 2 * 2
    held = view([50, 40], dtype=dtype)
    assert Budget(f"{lanes * entry * 7}B").entries(held).tolist() == [[7, 7], [7, 7]]
    assert Budget(f"{lanes * entry * 8 - 1}B").entries(held).tolist() == [[7, 7], [7, 7]]
    assert Budget("64KiB").wanted(held).unique().tolist() == [65536 // (lanes * entry)]
    with pytest.raises(ArgumentError, match=f"budget: got '1B'; allowed: at least {lanes * entry} bytes"):
        Budget("1B").entries(held)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (512, 512),
        ("512", 512),
        (0.25, 0.25),
        ("0.25", 0.25),
        (".5", 0.5),
        (1.0, 1.0),
        ("64MiB", "64MiB"),
        ("1.5 GB", "1.5 GB"),
    ],
)
def test_what_may_be_written(written: object, value: object) -> None:
    budget = Budget.parse(written)  # type: ignore[arg-type]
    assert budget == Budget(value) and Budget.parse(budget) is budget  # type: ignore[arg-type]
    assert type(budget.value) is type(value) and Budget.parse(str(budget)) == budget


def test_no_budget_stays_none() -> None:
    assert Budget.parse(None) is None


@pytest.mark.parametrize(
    "wrong",
    [
        0,
        -1,
        "0",
        "-3",
        0.0,
        -0.5,
        1.5,
        "1.5",
        float("nan"),
        float("inf"),
        True,
        "",
        "lots",
        "64 furlongs",
        "-1MiB",
        "0B",
        [1],
        b"1",
    ],
)
def test_what_may_not_be_written_is_named(wrong: object) -> None:
    with pytest.raises(ArgumentError, match=r"^budget: got .*; allowed: an int ≥ 1"):
        Budget.parse(wrong)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert Budget.parse(numpy.int64(5)) == Budget(5)
    budget = Budget.parse(numpy.float64(0.29))
    assert budget is not None and budget.entries(view([100])).tolist() == [[29, 29]]
