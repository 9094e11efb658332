"""Recurrences on a CPU, 2 threads: the chunked forms against the loop over tokens and torch's dense causal attention.

8 heads of 64, float32, forward. Asked: at least 5 times the speed of the loop at N = 8192, and time linear in N. Each
time is the least of several, the forms taking turns. Where other work shares the machine (the load is written beside
the figures) wall time says little: the ratios are given in processor time too, all threads together, and a thread that
waits sleeps instead of spinning. Equal outputs are checked first. Floor: the operations of the matrix products at the
speed of one large product.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from regard.evidence.record import machine, versions
from regard.recurrence import delta, diagonal

HEADS, DIM, CHUNK = 8, 64, 64
LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
LONGEST_DENSE = 16384
FORMS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]] = {
    "no decay": (diagonal.chunked, diagonal.recurrent),
    "fixed decay": (diagonal.chunked, diagonal.recurrent),
    "scalar gate": (diagonal.chunked, diagonal.recurrent),
    "gate per channel": (diagonal.chunked, diagonal.recurrent),
    "delta rule": (delta.chunked, delta.recurrent),
    "gated delta rule": (delta.chunked, delta.recurrent),
}


def inputs(name: str, n: int) -> list[Tensor | None]:
    """Of one form: q, k, v, then beta for the delta rule, then the decay."""
    q, k, v = (torch.randn(1, HEADS, n, DIM) for _ in range(3))
    k, beta, gate = normalize(k, dim=-1), torch.rand(1, HEADS, n), -torch.rand(1, HEADS, n, DIM)
    return {
        "no decay": [q, k, v],
        "fixed decay": [q, k, v, gate[0, :, 0, 0]],
        "scalar gate": [q, k, v, gate[..., :1]],
        "gate per channel": [q, k, v, gate],
        "delta rule": [q, k, v, beta],
        "gated delta rule": [q, k, v, beta, gate[..., 0]],
    }[name]


class Took(NamedTuple):
    """Seconds: by the clock, and of processor time in all threads."""

    wall: float
    cpu: float


def least(functions: dict[str, Callable[[], object]], budget: float = 0.6, rounds: int = 3) -> dict[str, Took]:
    """The least of at least `rounds` runs of each, taken in turns, until `budget` seconds each are spent."""
    times = dict.fromkeys(functions, Took(float("inf"), float("inf")))
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < budget * len(functions):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            took = Took(time.perf_counter() - start[0], time.process_time() - start[1])
            times[name] = Took(*map(min, times[name], took))
        done += 1
    return times


def peak() -> float:
    """Operations per second of a product of two 2048×2048 matrices."""
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / least({"": lambda: a @ b})[""].wall


def operations(name: str, n: int) -> int:
    """Matrix products of the chunked form: within chunks C·(Dk+Dv) per token, the state twice; the solve for delta."""
    per_token = 2 * (CHUNK * 2 * DIM + 2 * DIM * DIM)
    if "delta" in name:  # K Kᵀ, the triangular solve for Dk + Dv columns (half a product), and the state once more
        per_token += 2 * (CHUNK * DIM + CHUNK * DIM + DIM * DIM)
    return HEADS * n * per_token


def check(name: str) -> float:
    """The largest difference from the loop in float64, at a length that chunks do not divide."""
    given = inputs(name, 1000)
    chunked, loop = FORMS[name]
    exact, _ = loop(*(None if x is None else x.double() for x in given))
    error = (chunked(*given)[0] - exact).abs().max().item()
    assert error < 1e-4, (name, error)
    return error


def ratio(a: Took, b: Took) -> Took:
    return Took(*(round(x / y, 2) for x, y in zip(a, b, strict=True)))


def crossover(by_length: dict[int, dict[str, Took]], name: str, clock: int) -> int | None:
    """The length from which on the form is faster than dense attention at every length that was timed."""
    timed = [n for n in LENGTHS if n <= LONGEST_DENSE]
    late = [n for n in timed if by_length[n][name][clock] >= by_length[n]["dense causal"][clock]]
    return min((n for n in timed if n > max(late, default=0)), default=None)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    load, speed = os.getloadavg()[0], peak()
    errors = {name: check(name) for name in FORMS}
    by_length: dict[int, dict[str, Took]] = {}
    for n in LENGTHS:
        given = {name: inputs(name, n) for name in FORMS}
        runs: dict[str, Callable[[], object]] = {
            name: (lambda form=chunked, x=given[name]: form(*x, chunk_size=CHUNK))
            for name, (chunked, _) in FORMS.items()
        }
        if n <= LONGEST_DENSE:
            q, k, v = given["no decay"]
            runs["dense causal"] = lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True)
        by_length[n] = least(runs)
        print(n, {name: f"{1e3 * s.wall:.2f} ms" for name, s in by_length[n].items()}, flush=True)
    figures = {}
    for name, (_, loop) in FORMS.items():
        given = inputs(name, 8192)
        slow = least({name: lambda loop=loop, given=given: loop(*given)}, budget=0.0)[name]
        fast, dense, double = by_length[8192][name], by_length[8192]["dense causal"], by_length[16384][name]
        short, long = by_length[2048][name], by_length[32768][name]
        figures[name] = {
            "chunked_s": fast,
            "loop_s": slow,
            "times_faster_than_loop": ratio(slow, fast),
            "dense_causal_s": dense,
            "times_faster_than_dense": ratio(dense, fast),
            "faster_than_dense_from": [crossover(by_length, name, clock) for clock in range(2)],
            "time_per_token_16384_over_8192": ratio(double, Took(2 * fast.wall, 2 * fast.cpu)),
            "time_per_token_32768_over_2048": ratio(long, Took(16 * short.wall, 16 * short.cpu)),
            "floor_s": operations(name, 8192) / speed,
            "error": errors[name],
        }
        print(name, figures[name], flush=True)
    result = {
        "shape": {"batch": 1, "heads": HEADS, "dim": DIM, "chunk_size": CHUNK, "n": 8192},
        "each_pair": "by the clock, processor time of all threads",
        "figures": figures,
        "seconds_by_length": by_length,
        "peak_gflops": speed / 1e9,
        "load_before_and_after": [load, os.getloadavg()[0]],
        "machine": machine(),
        "versions": versions(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
