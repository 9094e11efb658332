"""Recurrences on one GPU, bfloat16, B4 T8192 H16 D128, beside flash-linear-attention (fla-core) where it is installed.

Floors: bytes of inputs, outputs and their gradients, each once, over the bandwidth of a device-to-device copy. Times
are those of calls queued one after the other, so that what Python does is hidden wherever the GPU is the slower. Every
result is compared with the torch form in float64 (one row, one head) before a time is printed. First calls, compilation
included, are measured in a process of their own for fla, which tunes itself there; its timings wait for ours (a lock),
so that nothing runs beside them. Run it with `python benchmarks/recurrence_gpu.py`.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from regard.evidence.record import machine, versions
from regard.recurrence import DeltaInputs, DeltaRule, DeltaState, DiagonalDecay, DiagonalInputs, DiagonalState

B, T, H, D = 4, 8192, 16, 128
COPY = 3.02e12  # bytes per second of a device-to-device copy, read and written counted
ASKED = {
    ("fixed decay", "forward"): 0.38, ("scalar gate", "forward"): 0.38, ("scalar gate", "both"): 1.7,
    ("gate per channel", "forward"): 1.2, ("gate per channel", "both"): 5.2,
    ("gated delta rule", "forward"): 0.80, ("gated delta rule", "both"): 4.0,
}  # fmt: skip
KINDS = ("fixed decay", "scalar gate", "gate per channel", "gated delta rule")
LOCK = Path(tempfile.gettempdir()) / "regard-recurrence-benchmark"


@contextmanager
def alone() -> Iterator[None]:
    """Nobody else is being timed."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def inputs(kind: str, batch: int = B, length: int = T, heads: int = H) -> dict[str, Tensor]:
    """q, k, v (B, H, N, D) as projections leave them in memory, and the gates."""
    torch.manual_seed(0)
    shape = (batch, length, heads, D)
    made = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for name in "qkv"}
    per_token = torch.randn(shape[:3], device="cuda").transpose(1, 2)
    if kind == "fixed decay":
        made["g"] = -torch.linspace(0.01, 1, heads, device="cuda")
    elif kind == "scalar gate":
        made["g"] = logsigmoid(per_token + 2)[..., None]
    elif kind == "gate per channel":
        made["g"] = (logsigmoid(torch.randn(shape, device="cuda")) / 16).transpose(1, 2)
    else:
        made["k"] = normalize(made["k"].float(), dim=-1).bfloat16()
        made |= {"g": logsigmoid(per_token + 2), "beta": per_token.sigmoid()}
    return made


def ours(kind: str, x: dict[str, Tensor], executor: str = "triton") -> Tensor:
    if "beta" in x:
        return DeltaRule(executor=executor).scan(DeltaInputs(x["q"], x["k"], x["v"], x["beta"], x["g"]))[0]  # type: ignore[arg-type]
    return DiagonalDecay(executor=executor).scan(DiagonalInputs(x["q"], x["k"], x["v"], x.get("g")))[0]  # type: ignore[arg-type]


def theirs(kind: str, x: dict[str, Tensor]) -> Tensor:
    """fla's chunk kernels; they take (B, T, H, D)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    turned = {name: t.transpose(1, 2) for name, t in x.items() if t.ndim > 1}
    q, k, v = (turned[name] for name in "qkv")
    if kind == "fixed decay":
        return chunk_simple_gla(q, k, v, g_gamma=x["g"], scale=1.0)[0].transpose(1, 2)
    if kind == "scalar gate":
        return chunk_simple_gla(q, k, v, g=turned["g"][..., 0], scale=1.0)[0].transpose(1, 2)
    if kind == "gate per channel":
        return chunk_gla(q, k, v, g=turned["g"], scale=1.0)[0].transpose(1, 2)
    return chunk_gated_delta_rule(q, k, v, g=turned["g"], beta=turned["beta"], scale=1.0)[0].transpose(1, 2)


def queued(work: Callable[[], object], calls: int = 20) -> float:
    """Milliseconds a call: the median of five rows of calls."""
    times = []
    work()
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def both(run: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward; no gradient of a decay that is fixed."""
    leaves = {name: t.detach().requires_grad_(t.ndim > 1) for name, t in x.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    dout = torch.randn_like(x["v"])
    return lambda: torch.autograd.grad(run(leaves), wanted, dout)


def one_head(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (t[:1, :1] if t.ndim > 1 else t[:1]).detach() for name, t in x.items()}


def wrong(kind: str, run: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> float:
    """Largest relative error (Frobenius) of the outputs of the first row and head, computed with all others."""
    truth = ours(kind, {name: t.double() for name, t in one_head(x).items()}, "torch")
    with torch.no_grad():
        out = run(x)[:1, :1]
    return ((out.double() - truth).norm() / truth.norm()).item()


def measure(kind: str, run: Callable[[dict[str, Tensor]], Tensor], directions: tuple[str, ...]) -> dict[str, Any]:
    x, found = inputs(kind), {}
    for direction in directions:
        work = both(run, x) if direction == "both" else lambda: run(x)
        with torch.set_grad_enabled(direction == "both"):
            start = time.perf_counter()
            try:
                work()
                torch.cuda.synchronize()
                first = time.perf_counter() - start
                error = wrong(kind, run, x)
                assert error < 0.02, f"wrong by {error}"
                with alone():
                    found[direction] = {"ms": queued(work), "first call s": first, "error": error}
            except Exception as problem:  # a refusal is a result too
                found[direction] = f"{type(problem).__name__}: {problem}"[:200]
    return found


def floor(kind: str, direction: str) -> float:
    """Milliseconds to move inputs and output once; with the backward, them again and their gradients."""
    once = 4 * 2 * B * T * H * D + {"gate per channel": 4 * B * T * H * D}.get(kind, 0)
    return (once if direction == "forward" else 3 * once) / COPY * 1e3


def lengths() -> list[dict[str, float]]:
    """262,144 tokens, 32 heads, in sequences of 2k to 256k; "undecayed": the same without a decay, where nothing of a
    long sequence's earlier pieces may be skipped."""
    rows = []
    for length in (2048, 8192, 32768, 131072, 262144):
        x = inputs("fixed decay", 262144 // length, length, 32)
        row: dict[str, float] = {"length": length}
        for name, given in (("ms", x), ("undecayed ms", {name: t for name, t in x.items() if name != "g"})):
            run = partial(ours, "fixed decay")
            error = wrong("fixed decay", run, given)
            assert error < 0.02, f"wrong by {error} at {length}"
            with torch.no_grad(), alone():
                row[name] = queued(partial(run, given), 5)
        rows.append(row)
    return rows


def decoding(batch: int = 64) -> dict[str, Any]:
    """One token for 64 sequences: eager, and as a CUDA graph replays it."""
    found: dict[str, Any] = {"floor": 2 * batch * H * D * D * 4 / COPY * 1e3}
    for kind in KINDS[1:]:
        x = inputs(kind, batch, 1)
        state = torch.randn(batch, H, D, D, device="cuda")
        if "beta" in x:
            told, held, rule = DeltaInputs(x["q"], x["k"], x["v"], x["beta"], x["g"]), DeltaState(state), DeltaRule()
        else:
            told, held, rule = DiagonalInputs(x["q"], x["k"], x["v"], x["g"]), DiagonalState(state), DiagonalDecay()  # type: ignore[assignment]
        step = lambda: rule.step(held, told)  # type: ignore[arg-type]  # noqa: B023, E731
        with torch.no_grad():
            step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            with alone():
                found[kind] = {"eager ms": queued(step), "graph ms": queued(graph.replay)}
    return found


def main() -> None:
    peers = {}
    if find_spec("fla") is not None:
        for kind in KINDS:
            command = [sys.executable, __file__, "fla", kind]
            peers[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[kind] = {"ours": measure(kind, lambda x, k=kind: ours(k, x), ("forward", "both"))}
        print(kind, results[kind], flush=True)
    results["lengths"], results["decoding"] = lengths(), decoding()
    print(results["lengths"], results["decoding"], flush=True)
    for kind, peer in peers.items():
        try:
            said = peer.communicate(timeout=240)[0].strip().splitlines()
        except subprocess.TimeoutExpired:
            peer.kill()
            said = []
        results[kind]["fla"] = json.loads(said[-1]) if said else "no answer"
        print(kind, "fla", results[kind]["fla"], flush=True)
    for kind in KINDS:
        results[kind]["floor ms"] = {direction: floor(kind, direction) for direction in ("forward", "both")}
        results[kind]["asked ms"] = {d: ms for (k, d), ms in ASKED.items() if k == kind}
    about = {"unit": "ms", "shape": {"B": B, "T": T, "H": H, "D": D}, "figures": results}
    about |= {"machine": machine(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["fla"]:
        print(json.dumps(measure(sys.argv[2], lambda x: theirs(sys.argv[2], x), ("forward", "both"))))
    else:
        main()
