"""A byte-level language model's text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from regard.errors import UnsupportedError, require
from regard.registry import register
from regard.tasks.sample import whole
from regard.tasks.training.contract import Batch, Split, TrainingTask

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
GENERATED = ("_sysconfigdata", "sitecustomize", "usercustomize")
HELD_OUT = 10
"""One file in ten is held out."""


class Corpus(NamedTuple):
    """The bytes of all files of each split (n,) uint8, a zero byte after each file; digest: 16 hexadecimal digits."""

    train: Tensor
    held_out: Tensor
    digest: str


@register("bytes", kind="training-task", families=("language-modelling",), metric="bits")
@dataclass(frozen=True)
class Bytes(TrainingTask):
    """Windows of `length` bytes of the standard library's sources; at each position the next byte is to be said.

    Files are taken in the order of their paths within the library, tests and what was generated at installation left
    out. Which are held out depends on each path alone (SHA-256 modulo 10): other files do not change it, and no file
    is in both splits. A zero byte ends each file; windows begin anywhere, so that one may hold the end of one file and
    the beginning of the next. The text is that of the running Python: results of two versions of it differ slightly.
    """

    length: int = 256
    key = "bytes"
    metric = "bits"

    def __post_init__(self) -> None:
        whole(self.length, "bytes.length", 1, 2**20)

    @property
    def vocabulary(self) -> int:
        """256."""
        return 256

    @property
    def width(self) -> int:
        """The length of a window."""
        return self.length

    def batch(self, generator: torch.Generator, size: int, split: Split = "train") -> Batch:
        """See TrainingTask.batch. Raises UnsupportedError where Python comes without its sources."""
        found = standard_library()
        text = found.train if split == "train" else found.held_out
        require(len(text) > self.length + 1, "bytes.length", self.length, f"below {len(text) - 1}, what there is")
        starts = torch.randint(len(text) - self.length, (size, 1), generator=generator)
        windows = text[starts + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1], windows[:, 1:])


@cache
def standard_library() -> Corpus:
    """The corpus of the running Python, read once. Raises UnsupportedError where there are no sources."""
    return read_corpus(Path(sysconfig.get_path("stdlib")))


def read_corpus(folder: Path) -> Corpus:
    """All sources under `folder`, in the order of their paths. Raises UnsupportedError when either split is empty."""
    splits: dict[bool, list[bytes]] = {False: [], True: []}
    total = hashlib.sha256()
    for name in sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py")):
        parts = name.split("/")
        if LEFT_OUT.intersection(parts[:-1]) or parts[-1].startswith(GENERATED):
            continue
        text = (folder / name).read_bytes().replace(b"\0", b"") + b"\0"
        splits[is_held_out(name)].append(text)
        total.update(text)
    if not splits[False] or not splits[True]:
        raise UnsupportedError(f"the task bytes: {folder} holds no sources of Python's standard library to train on")
    train, held_out = (torch.frombuffer(bytearray(b"".join(splits[s])), dtype=torch.uint8) for s in (False, True))
    return Corpus(train, held_out, total.hexdigest()[:16])


def is_held_out(name: str) -> bool:
    """By the path within the library alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0
