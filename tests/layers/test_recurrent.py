"""The base of layers around a recurrence: which states it takes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from regard.errors import ArgumentError, UnsupportedError
from regard.layers import create
from regard.patterns import causal, sliding_window

KEYS = {"hgrn": {}, "retnet": {}, "deltanet": {}, "mamba-2": {"key_dim": 8}}


@pytest.mark.parametrize("key", KEYS)
def test_a_state_of_another_mixer_or_size_is_refused(key: str) -> None:
    x = torch.randn(2, 5, 16)
    layer = create(key, dim=16, heads=2, **KEYS[key])
    others = [create(name, dim=16, heads=2, **KEYS[name]) for name in KEYS if name != key]
    for other, width in [*((o, 16) for o in others), (create(key, dim=32, heads=2, **KEYS[key]), 32)]:
        with pytest.raises(ArgumentError, match=r"^state: got"):
            layer(x, state=other(torch.randn(2, 5, width)).state)


@pytest.mark.parametrize("key", KEYS)
def test_the_state_does_not_grow_and_padding_may_lie_anywhere(key: str) -> None:
    layer = create(key, dim=16, heads=2, **KEYS[key]).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    sizes = [[t.numel() for t in tree_leaves(layer(tokens).state)] for tokens in (x, x[:, :1])]
    assert sizes[0] == sizes[1]
    real = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    out, state, _ = layer(x.masked_fill(~real[..., None], torch.nan), key_padding=real)
    for b in range(2):
        alone = layer(x[b : b + 1, real[b]])
        torch.testing.assert_close(out[b, real[b]], alone.out[0], rtol=0, atol=1e-11)
        assert state.seen[b] == alone.state.seen[0] == real[b].sum()
        for mine, want in zip((*state.inner, *state.windows), (*alone.state.inner, *alone.state.windows), strict=True):
            torch.testing.assert_close(mine[b], want[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("key", KEYS)
def test_autocast_stays_out_of_the_recurrence(key: str) -> None:
    torch.manual_seed(0)
    layer, x, seen = create(key, dim=16, heads=2, **KEYS[key]), torch.randn(2, 9, 16), []
    scan = type(layer.mixer).scan

    class Watched(type(layer.mixer)):  # type: ignore[misc]
        def scan(self, *args: object) -> object:
            seen.append(torch.is_autocast_enabled("cpu"))
            return scan(self, *args)

    layer.mixer = Watched()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state, _ = layer(x)
        layer(x[:, :1], state=state)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] and state.inner[0].dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x).out, rtol=0.1, atol=0.02)


def test_what_it_does_not_take() -> None:
    layer, x = create("retnet", dim=8, heads=2), torch.randn(1, 5, 8)
    assert torch.equal(layer(x, pattern=causal()).out, layer(x).out)
    with pytest.raises(UnsupportedError, match="retnet takes no context"):
        layer(x, x)
    with pytest.raises(UnsupportedError, match="retnet takes no pattern"):
        layer(x, pattern=sliding_window(3))
