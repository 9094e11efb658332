"""NATTEN (PyPI natten, installed with --no-deps --no-build-isolation) computes the same neighborhoods, on a CPU too."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from regard.attend import attend
from regard.attend_tiled import attend_tiled, tiling_of
from regard.patterns import neighborhood

natten = pytest.importorskip("natten")


def setting(seed: int) -> dict[str, tuple]:
    """Random sizes of one to three axes, each with a window of at least 2 and below the axis.

    NATTEN wants the first, and hands windows as large as the layout to dense kernels that it lacks on a CPU.
    """
    g = random.Random(seed)
    layout = tuple(g.randint(3, 40 // 3 ** (seed % 3)) for _ in range(seed % 3 + 1))
    window = tuple(g.randint(2, size - 1) for size in layout)
    return {
        "layout": layout,
        "window": window,
        "stride": tuple(g.randint(1, w) for w in window),
        "dilation": tuple(g.randint(1, size // w) for size, w in zip(layout, window, strict=True)),
        "causal": tuple(g.random() < 0.3 for _ in layout),
    }


@pytest.mark.parametrize("seed", range(24))
def test_same_neighborhoods(seed: int) -> None:
    about = setting(seed)
    p = neighborhood(**about)
    n = p.extent
    q, k, v = torch.randn(3, 2, 2, n, 16, generator=torch.Generator().manual_seed(seed))
    theirs = [x.transpose(1, 2).unflatten(1, about["layout"]) for x in (q, k, v)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = getattr(natten, f"na{len(about['layout'])}d")(
            *theirs,
            kernel_size=about["window"],
            stride=about["stride"],
            dilation=about["dilation"],
            is_causal=about["causal"],
        )
    want = want.flatten(1, len(about["layout"])).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, pattern=p), want, rtol=1e-5, atol=1e-5)
    tiled = attend_tiled(q, k, v, pattern=p, tiling=tiling_of(p, 8))
    torch.testing.assert_close(tiled, want, rtol=1e-5, atol=1e-5)
