"""HaloNet: blocks with a halo share their keys, where a window around every pixel copies them; and what waits."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.evidence.clock import cpu_milliseconds
from regard.evidence.peak_memory import peak_bytes
from regard.layers.halonet import HaloAttention
from regard.patterns.halos import HALONET

BLOCK, HALO, HEADS, WIDTH = 8, 3, 4, 16


@claim(
    "halonet/blocks",
    paper=HALONET,
    statement="attention by blocks with a halo takes less memory and time than a window around every pixel, since the "
    "queries of a block share their keys",
    figure="keys and values (b + 2h)² / b² times in memory, 3.06 with b = 8 and h = 3, where a window of 2h + 1 around "
    "each pixel takes them 49 times",
    measurement="the same layer with blocks of 8 and with blocks of 1, halo 3 and relative logits in both, 4 heads of "
    "width 16, one forward in float32 on the CPU: size of the gathered keys over that of the keys at 128 × 128 pixels, "
    "peak of memory beyond input and weights and time at 64 × 64",
    unit="× less memory",
    tolerance="keys 3.06 and 49 times (to 1 %, borders included), at least 2 × less memory and less time; partly: "
    "the copies of keys, and one of memory and time",
    needs="cpu",
    minutes=0.3,
)
@torch.no_grad()
def blocks(settings: Settings) -> Measured:
    side, large = settings.pick((64, 128), (16, 16))
    layers = {"blocks": _layer(side, BLOCK), "pixels": _layer(side, 1)}
    x = torch.randn(1, side * side, HEADS * WIDTH)
    copies = {name: _copies(large, block) for name, block in (("blocks", BLOCK), ("pixels", 1))}
    memory = {name: peak_bytes(partial(layer, x)) for name, layer in layers.items()}
    times = cpu_milliseconds({name: partial(layer, x) for name, layer in layers.items()})
    less, faster = (of["pixels"] / of["blocks"] for of in (memory, times))
    expected = {"blocks": (BLOCK + 2 * HALO) ** 2 / BLOCK**2, "pixels": float((2 * HALO + 1) ** 2)}
    counted = all(abs(copies[name] / expected[name] - 1) <= 0.01 for name in copies)
    word = verdict(reproduced=counted and less >= 2 and faster > 1, partly=counted and (less >= 2 or faster > 1))
    why = (
        f"keys {copies['blocks']:.2f} and {copies['pixels']:.1f} times; {memory['blocks'] / 2**20:.0f} MiB and "
        f"{times['blocks']:.0f} ms by blocks, {memory['pixels'] / 2**20:.0f} MiB and {times['pixels']:.0f} ms by pixels"
    )
    return Measured(less, word, why, {"copies": copies, "bytes": memory, "ms": times})


def _layer(side: int, block: int) -> nn.Module:
    layer: nn.Module = HaloAttention(HEADS * WIDTH, HEADS, layout=(side, side), block=block, halo=HALO)
    return layer.eval()


def _copies(side: int, block: int) -> float:
    """The gathered keys over the keys."""
    layer = _layer(side, block)
    assert isinstance(layer, HaloAttention)
    keys = torch.empty(1, HEADS, side, side, WIDTH, device="meta")
    return layer._windows(keys).numel() / keys.numel()


later(
    "halonet/digits",
    paper=HALONET,
    statement="a network of halo attention is as accurate as one of convolutions with more parameters",
    figure="better accuracy for its parameters than convolutions on ImageNet",
    needs="training of a 3-stage image network of halo attention and of its convolutional twin (8 × 8 digits at 32 × "
    "32 pixels; to be 97 % right with fewer parameters)",
)
