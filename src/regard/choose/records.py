"""What was measured, one line of JSON each, written down at once: neither Ctrl-C nor kill −9 loses a finished line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from regard.errors import ArgumentError, RegardError

FORMAT = 1
JOURNAL = "records.jsonl"


@dataclass(frozen=True)
class Key:
    """Which measurement: a plan on one prompt in one mode."""

    task: str
    length: int
    index: int
    mode: str
    plan: str


@dataclass(frozen=True)
class Record:
    """One plan measured on one prompt.

    length: tokens of the prompt. score: 1 right, 0 wrong; for `likelihood` the mean negative log-likelihood in nats.
    first_token_s: seconds from the prompt to its first token, compression included; None where the prefill was shared
    with plans that observe more of it than this one needs, so that its time is not this plan's. step_s: seconds of
    each decoding step. prompt_bytes: K and V payload held right after the prompt; read_bytes: what one decoding step
    reads of it; peak_bytes: see `peak_kind`.
    """

    task: str
    length: int
    index: int
    mode: str
    plan: str
    measure: str
    depth: float | None
    score: float
    expected: str
    said: str
    first_token_s: float | None
    step_s: tuple[float, ...]
    prompt_bytes: int
    read_bytes: int
    peak_bytes: int

    @property
    def key(self) -> Key:
        """Which measurement this is."""
        return Key(self.task, self.length, self.index, self.mode, self.plan)


class Journal:
    """The append-only file of a run: a first line of settings, then one record a line. A context manager."""

    def __init__(self, path: Path, file: TextIO, records: list[Record]) -> None:
        self.path, self.records = path, records
        self._file = file

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Journal:
        """Begin the journal of `folder`, or go on with the one that lies there.

        Raises ArgumentError when the folder cannot be written, when a journal lies there and neither `resume` nor
        `overwrite` is asked for, and when the one to go on with was made with other settings or is no journal.
        """
        path = folder / JOURNAL
        found = check(folder, settings, resume=resume, overwrite=overwrite)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if found is not None:
                records, end = found
                os.truncate(path, end)  # a line that was cut off by the end of the process
                return cls(path, path.open("a", encoding="utf-8"), records)
            journal = cls(path, path.open("w", encoding="utf-8"), [])
        except OSError as error:
            raise ArgumentError("out", str(folder), f"a folder that can be written ({error.strerror})") from error
        journal._write({"regard_compare": FORMAT, "settings": dict(settings)})
        return journal

    def add(self, record: Record) -> None:
        """Write a record down, to the disk, before returning."""
        self.records.append(record)
        self._write(asdict(record))

    def done(self) -> set[Key]:
        """What need not be measured again."""
        return {record.key for record in self.records}

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def check(
    folder: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> tuple[list[Record], int] | None:
    """The records of the journal to go on with and the bytes of it that are whole; None when a new one is to be begun.

    Changes nothing; raises what `Journal.open` would.
    """
    path = folder / JOURNAL
    try:
        there = path.exists() and path.stat().st_size > 0
        if there and not (resume or overwrite):
            raise ArgumentError("out", str(folder), "a folder without a run in it, or --resume, or --overwrite")
        return _read(path, settings) if there and resume else None
    except OSError as error:
        raise ArgumentError("out", str(folder), f"a folder that can be read ({error.strerror})") from error


def _read(path: Path, settings: Mapping[str, Any]) -> tuple[list[Record], int]:
    """Records of a journal made with these settings, and the byte where its last whole line ends."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = _lines(path, whole)
    head: Any = next(lines, None)
    if not isinstance(head, dict) or head.get("regard_compare") != FORMAT or not isinstance(head.get("settings"), dict):
        raise ArgumentError("resume", str(path), f"a journal that regard compare wrote (format {FORMAT})")
    before, now = head["settings"], json.loads(json.dumps(dict(settings)))
    other = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if other:
        said = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in other)
        raise ArgumentError("resume", said, "the settings that the run was begun with (only --samples may differ)")
    return [_record(path, line) for line in lines], len(whole)


def _lines(path: Path, data: bytes) -> Iterator[Any]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RegardError(f"{path}, line {number}: not JSON ({error})") from error


def _record(path: Path, line: Any) -> Record:
    names = {field.name for field in fields(Record)}
    if not isinstance(line, dict) or set(line) != names:
        raise RegardError(f"{path}: a line that is no record of a measurement")
    return Record(**{**line, "step_s": tuple(line["step_s"])})
