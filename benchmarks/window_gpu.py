"""A causal window with sinks, and causal attention, on one GPU, bf16, Hq32 Hkv8 D128, beside FlexAttention and cuDNN.

Counted first: 4 · D operations a visible pair forward, 10 · D more backward (two and five products), over the rate of a
large matrix product; `floor` is that, at the pairs themselves. Outputs are compared with the reference in float32 at
200 queries, gradients with those of the first executor, before a time is printed. First calls (compilation, block maps)
are measured as well. `ms` is of calls queued one after the other, `graph ms` of a CUDA graph of one call, in which no
Python runs. Run it with `python benchmarks/window_gpu.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.evidence.record import machine, versions
from regard.evidence.timing import milliseconds
from regard.patterns import Pattern, attention_sink, causal, sliding_window

PEAK, D, HEADS, KV_HEADS = 731e12, 128, 32, 8
WINDOW = causal() & (sliding_window(1024) | attention_sink(4))
WORK: dict[str, tuple[Pattern, int, bool, float | None]] = {  # pattern, N, backward too, asked ms
    "window 1024 + 4 sinks, forward": (WINDOW, 32768, False, 1.6),
    "window 1024 + 4 sinks, forward and backward": (WINDOW, 8192, True, 2.2),
    "causal, forward": (causal(), 32768, False, None),
    "causal, forward and backward": (causal(), 8192, True, None),
}
EXECUTORS = ("hopper", "flex")


def tensors(n: int, grad: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, h, n, D) for h in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_(grad) for s in shapes]


def wrong(out: Tensor, inputs: list[Tensor], pattern: Pattern) -> float:
    """Relative error of 200 queries of the first head."""
    rows = torch.randint(0, out.shape[2], (200,), device="cuda").sort().values
    q, k, v = (x[:, :1].detach().float() for x in inputs)
    want = attend(q[:, :, rows], k, v, pattern=pattern, q_positions=rows[None], backend="reference")
    return float((out[:, :1, rows].float() - want).norm() / want.norm())


def worker(run: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    def work() -> tuple[Tensor, ...]:
        out = run(*inputs)
        return (out.detach(),) if dout is None else (out.detach(), *torch.autograd.grad(out, inputs, dout))

    return work


def graphed(work: Callable[[], object]) -> float | str:
    """Milliseconds of a replay; why there is none where the capture is refused."""
    graph = torch.cuda.CUDAGraph()
    try:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph):
            work()
    except Exception as problem:  # a refusal is a result too
        return f"{type(problem).__name__}: {problem}"[:200]
    return milliseconds(graph.replay)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def measure(pattern: Pattern, n: int, backward: bool) -> dict[str, Any]:
    inputs = tensors(n, backward)
    dout = torch.randn_like(inputs[0]) if backward else None
    pairs = pattern.cost(n, heads=HEADS).entries
    found: dict[str, Any] = {"N": n, "floor ms": pairs * (14 if backward else 4) * D / PEAK * 1e3}
    gradients: tuple[Tensor, ...] = ()
    for name in EXECUTORS:
        work = worker(partial(attend, pattern=pattern, backend=name), inputs, dout)
        try:
            start = time.perf_counter()
            results = work()
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            errors = [wrong(results[0], inputs, pattern)]
            errors += [
                float((a - b).float().norm() / b.float().norm()) for a, b in zip(results[1:], gradients, strict=False)
            ]
            assert max(errors) < 0.01, f"wrong by {errors}"
            gradients = gradients or results[1:]
            ms = milliseconds(work)
            found[name] = {
                "ms": ms,
                "graph ms": graphed(work),
                "over the floor": ms / found["floor ms"],
                "first call s": first,
                "errors": errors,
            }
        except Exception as problem:  # one executor's refusal is a result too
            found[name] = f"{type(problem).__name__}: {problem}"[:300]
    found["dense causal, cuDNN"] = {"ms": milliseconds(worker(dense, inputs, dout))}
    return found


def main() -> None:
    results = {}
    for name, (pattern, n, backward, asked) in WORK.items():
        results[name] = measure(pattern, n, backward) | {"asked ms": asked}
        print(name, json.dumps(results[name], indent=1), flush=True)
        torch.cuda.empty_cache()
        about = {"unit": "ms", "figures": results, "machine": machine(), "versions": versions()}
        Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
