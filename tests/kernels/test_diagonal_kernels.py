"""The diagonal-decay kernels, in Triton's CPU interpreter at tiny shapes and on a GPU at those that are used.

The interpreter must be chosen before Triton is imported, so the checks (`diagonal_checks`) run as a program.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from regard.errors import UnsupportedError
from regard.recurrence import DiagonalDecay, DiagonalInputs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def check(*arguments: str, interpret: bool) -> None:
    environment = dict(os.environ, TRITON_INTERPRET="1" if interpret else "0", PYTHONPATH=os.pathsep.join(sys.path))
    if interpret:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    program = [sys.executable, "-m", "tests.kernels.diagonal_checks", *arguments]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.endswith("agree\n"), done.stdout[-1000:] + done.stderr[-2000:]


def test_in_the_interpreter() -> None:
    check(interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", ["none", "fixed"] + [f"{x}{y}" for x in ("scalar", "channel") for y in ("", " strong", " extreme")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(kind: str, dtype: str) -> None:
    check(kind, dtype, interpret=False)


def test_long_sequences_are_cut_where_few_programs_would_walk_them() -> None:
    from regard.kernels.triton.diagonal import cuts

    assert cuts(8192, 128) == 1, "too short for the launches that a cut adds"
    assert cuts(8192, 4) == 1
    assert cuts(65536, 128) == cuts(131072, 128) == 4
    assert cuts(262144, 64) == 8
    assert cuts(262144, 256) == 1, "enough programs as it is"
    assert cuts(32768, 4) == 32, "pieces of no fewer than 1024 tokens"
    assert cuts(65536, 0) > 0


def test_the_columns_of_a_program() -> None:
    from regard.kernels.triton.diagonal import launch

    half = torch.bfloat16
    assert launch(128, 128, 64, half).columns == 32, "no more than one program for each processor"
    assert launch(128, 128, 512, half).columns == 64
    assert launch(256, 128, 512, half).columns == launch(128, 128, 512, torch.float32).columns == 32, "registers"


def test_what_the_kernels_refuse_is_said_with_who_serves_it() -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(UnsupportedError, match=r"run on CUDA.*executor='torch' serves it"):
        DiagonalDecay(executor="triton").scan(DiagonalInputs(x, x, x))


def test_an_unknown_executor_is_refused() -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="executor"):
        DiagonalDecay(executor="cuda").scan(DiagonalInputs(x, x, x))  # type: ignore[arg-type]
