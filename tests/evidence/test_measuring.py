"""The instruments of the claims: time on the CPU, and the peak of memory."""

from __future__ import annotations

import time

import torch

from regard.evidence.clock import cpu_milliseconds
from regard.evidence.peak_memory import peak_bytes


def test_times_of_works_that_take_turns() -> None:
    calls: list[str] = []

    def wait(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    times = cpu_milliseconds({"a": lambda: wait("a", 0.001), "b": lambda: wait("b", 0.02)}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert 1 <= times["a"] < times["b"] and times["b"] >= 20


def test_the_peak_counts_what_is_alive_at_once() -> None:
    x = torch.ones(1000)  # 4000 bytes, an input

    def two_at_once() -> torch.Tensor:
        a = x + 1
        b = a * 2
        del a
        c = b + 1  # a is gone, b and c are there
        del b
        return c.view(10, 100).T  # a view holds no memory of its own

    def three_at_once() -> torch.Tensor:
        a, b = x + 1, x + 2
        return a + b

    def in_place() -> torch.Tensor:
        a = x + 1
        for _ in range(5):
            a += 1
        return a

    assert peak_bytes(two_at_once) == 8000
    assert peak_bytes(three_at_once) == 12000
    assert peak_bytes(in_place) == 4000
    assert peak_bytes(lambda: torch.zeros(3, 1000).split(1)) == 12000
    assert peak_bytes(lambda: x.view(10, 100)) == 0
