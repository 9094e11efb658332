"""The Triton block-sparse kernels against the reference, in Triton's CPU interpreter at tiny shapes, or on a GPU.

The interpreter must be chosen before Triton is imported, so the checks run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from regard.kernels.triton.tile_lists import tiles_of
from regard.patterns import attention_sink, causal, documents, full, per_head, sliding_window
from regard.patterns.tiles import EMPTY, FULL, PARTIAL

CHECK = """
import sys
import torch
from regard.attend import attend
from regard.kernels.triton import block_sparse as kernels
from regard.patterns import attention_sink, causal, documents, per_head, sliding_window

torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
small = kernels.Launch((16, 16), 4, 2, 8)
large = kernels.Launch((32, 16), 4, 2, 16)
kernels.launches = lambda *_: kernels.Launches(small, large, large)
window = causal() & (sliding_window(9) | attention_sink(2))
ids = torch.tensor([[0] * 20 + [1] * 13, [0] * 5 + [-1] * 3 + [2] * 25], device=device)
cases = {
    "window": (window, 40, 40), "more keys": (causal(), 33, 50), "one query": (window, 1, 40), "empty rows":
    (~causal(), 20, 20),
    "documents": (documents(ids) & causal(), 33, 33), "heads": (per_head([causal(), window, sliding_window(3),
    causal()]), 35, 35),
}
torch.manual_seed(0)
for name, (pattern, n, m) in cases.items():
    q = torch.randn(2, 4, n, 16, device=device, requires_grad=True)
    k = torch.randn(2, 2, m, 16, device=device, requires_grad=True)
    v = torch.randn(2, 2, m, 32, device=device, requires_grad=True)
    sinks = torch.randn(4, device=device, requires_grad=True) if name == "window" else None
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    results = []
    for backend in ("triton", "reference"):
        out, lse = attend(q, k, v, pattern=pattern, sinks=sinks, return_lse=True, backend=backend)
        seen = torch.isfinite(lse)
        torch.manual_seed(1)
        loss = (out * torch.randn_like(out)).sum() + (lse.masked_fill(~seen, 0) * torch.randn_like(lse)).sum()
        results.append((out, lse, *torch.autograd.grad(loss, inputs)))
    for ours, truth in zip(*results, strict=True):
        error = (torch.nan_to_num(ours, neginf=-9) - torch.nan_to_num(truth, neginf=-9)).abs().max().item()
        assert error < 5e-5, (name, error)
out = attend(q, k, v, pattern=causal(), backend="triton")
(first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
try:
    first.sum().backward()
except RuntimeError as error:
    assert "once_differentiable" in str(error)
else:
    raise AssertionError("a gradient of gradients that is not one")
print("agree")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_forward_and_gradients_agree_with_the_reference() -> None:
    environment = dict(os.environ, TRITON_INTERPRET="" if torch.cuda.is_available() else "1")
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.strip() == "agree", done.stderr[-2000:]


@pytest.mark.parametrize(
    "pattern",
    [full(), causal(), causal() & (sliding_window(40) | attention_sink(3)), per_head([causal(), sliding_window(7)])],
)
@pytest.mark.parametrize("size", [64, 71])
def test_lists_and_bits_say_what_the_pattern_says(pattern: object, size: int) -> None:
    """From the lists and bits alone the dense mask is drawn again, from both sides."""
    bm, bn = 16, 8
    tiles = tiles_of(pattern, size, size, batch=1, heads=2, block=(bm, bn), device=torch.device("cpu"))
    want = pattern.dense(size, heads=2).expand(1, 2, size, size)[0]
    nq, nk = -(-size // bm), -(-size // bn)
    for side, lists in (("queries", tiles.by_query), ("keys", tiles.by_key)):
        drawn = torch.zeros(2, nq * bm, nk * bn, dtype=torch.bool)
        for h in range(2):
            for block, (run, run_end, part, part_end) in enumerate(lists.start[tiles.mask_of[h]].tolist()):
                met = [
                    (o, None)
                    for r in range(run, run_end)
                    for o in range(lists.first[r], lists.first[r] + lists.count[r])
                ]
                met += [(int(lists.other[t]), int(lists.slot[t])) for t in range(part, part_end)]
                for other, slot in met:
                    a, b = (block, other) if side == "queries" else (other, block)
                    bits = 255 if slot is None else tiles.bits[slot].long()[..., None]
                    entries = (torch.as_tensor(bits) >> torch.arange(8)) & 1
                    tile = entries.bool().expand(bm, bn // 8, 8).reshape(bm, bn)
                    drawn[h, a * bm : (a + 1) * bm, b * bn : (b + 1) * bn] = tile
        assert torch.equal(drawn[:, :size, :size], want), side
        assert not drawn[:, :, size:].any()


def test_other_ids_are_other_tiles() -> None:
    """Equality of patterns ignores ids; the lists must not."""
    a, b = (documents(torch.tensor(ids)) for ids in ([0] * 32, [0] * 16 + [1] * 16))
    assert a == b
    made = [tiles_of(p, 32, 32, batch=1, heads=1, block=(16, 16), device=torch.device("cpu")).touched for p in (a, b)]
    assert made == [1.0, 0.5] and (EMPTY, PARTIAL, FULL) == (0, 1, 2)
