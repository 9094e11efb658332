"""The suite turns red: multi-head attention is broken in one way at a time, and the check for it has to notice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from tests.conformance import test_layers as suite
from torch.autograd.gradcheck import GradcheckError

from regard.layers.base import Output
from regard.layers.multi_head_attention import MultiHeadAttention

KEY = "multi-head-attention"
COUNTER = count()
Forward = Callable[..., Output]
whole = MultiHeadAttention.forward


def without(argument: str) -> Forward:
    """A forward that does not look at one of its arguments."""

    def forward(self: MultiHeadAttention, x: Any, context: Any = None, **options: Any) -> Output:
        return whole(self, x, context, **{**options, argument: None})

    return forward


def spoilt(change: Callable[[Any, Any], Any]) -> Forward:
    """A forward whose output is changed by change(out, x)."""

    def forward(self: MultiHeadAttention, x: Any, context: Any = None, **options: Any) -> Output:
        result = whole(self, x, context, **options)
        return result._replace(out=change(result.out, x))

    return forward


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (suite.test_a_padded_batch_is_its_rows, without("key_padding")),
        (suite.test_the_future_changes_nothing_bitwise, without("pattern")),
        (suite.test_the_future_changes_nothing_bitwise, spoilt(lambda out, x: out + 1e-9 * x.flip(1))),
        (suite.test_a_pattern_is_obeyed, without("pattern")),
        (suite.test_steps_are_the_full_forward, without("state")),
        (suite.test_batch_rows_do_not_influence_each_other, spoilt(lambda out, x: out + 1e-9 * x.mean(0))),
        (suite.test_same_seed_same_result, spoilt(lambda out, x: out + next(COUNTER))),
        (suite.test_shape_and_dtype, spoilt(lambda out, x: out.double())),
        (suite.test_shape_and_dtype, spoilt(lambda out, x: out[:, :-1])),
        (suite.test_lengths, spoilt(lambda out, x: out / (x.shape[1] - 7))),
        (suite.test_identity, spoilt(lambda out, x: out * (1 + 1e-6))),
        (suite.test_cross_attention, without("key_padding")),
        (suite.test_every_token_sees_every_other, spoilt(lambda out, x: x * 2)),
        (suite.test_gradients, spoilt(lambda out, x: out + (x - x.detach()))),
    ],
)
def test_the_check_notices(check: Callable[[str], None], broken: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultiHeadAttention, "forward", broken)
    with pytest.raises((AssertionError, GradcheckError)):
        check(KEY)
