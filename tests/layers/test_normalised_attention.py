"""Normalised attention: the three normalisers, and the form with the normaliser in the state."""

from __future__ import annotations

import pytest
import torch

from regard.errors import UnknownNameError
from regard.layers.normalised_attention import NormalisedAttention
from regard.recurrence.dsf import linear_system

ETA = {"exp": torch.exp, "softplus": torch.nn.functional.softplus, "sigmoid": torch.sigmoid}


@pytest.mark.parametrize("normaliser", ETA)
def test_the_weights_are_divided_by_what_is_learned_from_the_token(normaliser: str) -> None:
    layer = NormalisedAttention(8, 2, normaliser=normaliser).double()  # type: ignore[arg-type]
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    eta = ETA[normaliser](layer.normaliser_proj(x)).mT
    torch.testing.assert_close(layer.share(x)[..., 0], 1 / eta, rtol=1e-13, atol=0)

    inputs = layer.read(x, None, None).inputs
    want = layer.write(layer.mixer.scan(inputs)[0], x)
    torch.testing.assert_close(layer(x).out, want, rtol=0, atol=0)
    system = linear_system(layer.mixer, inputs)
    for form in (system, system.with_normaliser_in_state(eta)):
        torch.testing.assert_close(layer.write(form.run(inputs.v), x), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.write(form.matrix() @ inputs.v, x), want, rtol=0, atol=1e-12)


def test_rows_do_not_sum_to_one_and_the_state_has_no_column_for_a_sum() -> None:
    _, state, _ = NormalisedAttention(16, 4)(torch.randn(1, 5, 16))
    assert state.inner.s.shape == (1, 4, 4, 4)


def test_an_unknown_normaliser_is_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean softplus"):
        NormalisedAttention(16, 4, normaliser="softpluss")  # type: ignore[arg-type]
