"""Compile the Hopper kernels for an H100 where there is none, and print what the compiler made of them.

Triton brings ptxas along; only its driver, which asks a GPU what it is, is stood in for.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver


class H100:
    """What compilation asks of a driver."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

        @staticmethod
        def load_binary(*_: object) -> tuple[int, ...]:
            return 0, 0, 0, 0, 1024

        @staticmethod
        def unload_module(*_: object) -> None:
            return None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


driver.set_active(H100())

from regard.kernels.hopper.backward_keys import backward_keys  # noqa: E402
from regard.kernels.hopper.backward_queries import backward_queries  # noqa: E402
from regard.kernels.hopper.block_sparse import FORWARD, KEYS, LAUNCH, QUERIES  # noqa: E402
from regard.kernels.hopper.forward import block_sparse_forward  # noqa: E402
from regard.kernels.hopper.parts import ROWS, descriptor, line  # noqa: E402

D = 128
x, lists, terms = (
    torch.zeros(1, 2, 256, D, dtype=torch.bfloat16),
    torch.zeros(8, dtype=torch.int32),
    torch.zeros(2, 256),
)
rows, shape = descriptor(x, ROWS), {"D": D, "DV": D, "grid": (1,), **LAUNCH}
made = {
    "forward": block_sparse_forward.warmup(
        rows, *(descriptor(x, FORWARD[1]),) * 2, rows, terms, *(lists,) * 7, 256, 8, 4, 2, 40, 0.1,
        BM=FORWARD[0], BN=FORWARD[1], SLOTS=2, **shape,
    ),
    "queries": backward_queries.warmup(
        rows, rows, *(descriptor(x, QUERIES[1]),) * 2, rows, terms, terms, *(lists,) * 7, 256, 8, 4, 2, 40, 0.1, 0.1,
        BM=QUERIES[0], BN=QUERIES[1], SLOTS=3, **shape,
    ),
    "keys": backward_keys.warmup(
        *(descriptor(x, KEYS[0]),) * 2, *(line(terms, KEYS[0]),) * 2, rows, rows, rows, rows, terms, *(lists,) * 8,
        8, 4, 2, 40, 0.1, 0.1, BM=KEYS[0], BN=KEYS[1], SLOTS=3, **shape,
    ),
}  # fmt: skip


def assembled(ptx: str) -> str:
    """What ptxas says when it is asked to say more."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", source, "-o", source.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def carried(ir: str) -> set[str]:
    """The numbers that loops carry, by name."""
    found: set[str] = set()
    for given, types in re.findall(r"iter_args\((.*?)\) -> \((.*?)\)  ?:", ir):
        names = re.findall(r"%(\w+?)(?:_\d+)? =", given)
        found |= {name for name, kind in zip(names, types.split(", "), strict=False) if kind == "i32"}
    return found


print(
    json.dumps(
        {
            name: {
                "products": len(re.findall("wgmma.mma_async", kernel.asm["ptx"])),
                "copies": len(re.findall("cp.async.bulk.tensor", kernel.asm["ptx"])),
                "shared": kernel.metadata.shared,
                "serialized": "serialized" in assembled(kernel.asm["ptx"]),
                "dropped": sorted(carried(kernel.asm["source"]) - carried(kernel.asm["ttgir"])),
            }
            for name, kernel in made.items()
        }
    )
)
