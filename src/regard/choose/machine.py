"""What a measurement depends on beside the settings: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import regard


def describe(device: torch.device) -> dict[str, Any]:
    """The device that ran the model, in words; processor, cores, threads; versions of what computes."""
    facts: dict[str, Any] = {
        "device": "CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"regard": regard.__version__, "python": platform.python_version()},
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    else:
        facts["device"] = f"{facts['processor']}, {facts['threads']} threads"
    for package in ("torch", "transformers", "triton"):
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _processor() -> str:
    """The name of the CPU: Linux keeps it in a file, elsewhere Python knows at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
