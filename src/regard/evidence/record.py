"""Run a claim and keep what came out: JSON, with the machine, the versions and the time it took."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from regard.errors import ArgumentError, RegardError, UnsupportedError
from regard.evidence.claim import Claim, Measured, Settings, find

RESULTS = Path(__file__).parent / "results"
DEFAULT_OUT = Path("regard-out") / "evidence"
TEXTS = ("statement", "figure", "measurement", "unit", "tolerance", "needs")


@dataclass(frozen=True)
class Record:
    """One measured claim, as it lies on disk. claim: its texts, as they were when it was measured."""

    id: str
    claim: dict[str, Any]
    measured: Measured
    settings: Settings
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    date: str

    def write(self, folder: Path) -> Path:
        """Write to `folder`, made if need be; returns the file. Raises RegardError where it cannot be written."""
        path = folder / f"{self.id.replace('/', '--')}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RegardError(f"out: {folder} cannot be written ({error.strerror})") from error
        return path


def run(id: str, out: Path | str | None = None, *, seed: int = 0) -> Record:
    """Measure the claim `id` and write the record to `out` (`regard-out/evidence` by default).

    Raises UnknownNameError for an unknown id, UnsupportedError where this machine lacks what the claim needs.
    """
    entry = find(id)
    _need(entry)
    record = measure(entry, Settings(seed=seed))
    record.write(Path(out) if out is not None else DEFAULT_OUT)
    return record


def measure(entry: Claim, settings: Settings) -> Record:
    """Measure a claim; nothing is written."""
    torch.manual_seed(settings.seed)
    begin = time.perf_counter()
    measured = entry.measure(settings)
    seconds = time.perf_counter() - begin
    texts = {name: getattr(entry, name) for name in TEXTS} | {"paper": str(entry.paper)}
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return Record(entry.id, texts, measured, settings, machine(), versions(), round(seconds, 1), date)


def read(folder: Path = RESULTS) -> dict[str, Record]:
    """All records in a folder, by id. Raises ArgumentError for a file that is not one."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["measured"] = Measured(**fields["measured"])
            fields["settings"] = Settings(**fields["settings"])
            record = Record(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise ArgumentError("folder", path, f"files that regard.evidence.run wrote ({error})") from error
        found[record.id] = record
    return found


def machine() -> dict[str, Any]:
    """What a timing depends on: the processor, how many threads were used, the GPU."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return facts


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "scikit-learn", "regard"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The name of the CPU; Linux keeps it in one file, elsewhere Python knows at least its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _need(entry: Claim) -> None:
    if entry.needs == "h100":
        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device"
        if "H100" not in name and "H200" not in name:
            raise UnsupportedError(f"claim {entry.id}: timings are of an H100 or H200; this machine has {name}")
