"""Saved stores: one safetensors file of tensors and JSON, written whole or not at all, checked before it is believed.

Nothing is ever unpickled. The file's own metadata carries the format's name and version, the caller's JSON, the list of
tensors and a checksum over all of it.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard.errors import ArgumentError, StoreError, require

FORMAT, VERSION = "regard-store", 1


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and meta (what JSON holds exactly) to the file `path`, replaced only when all is written.

    Raises ArgumentError when the path cannot be written or meta would not come back as it is.
    """
    target, about = Path(path), _exact_json(meta)
    held = {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}
    described = {
        "format": FORMAT,
        "version": str(VERSION),
        "meta": about,
        "tensors": json.dumps(sorted(held)),
        "checksum": _checksum(held, about),
    }
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        require(not target.is_dir(), "path", repr(str(target)), "a file, not a folder")
        temporary.open("xb").close()  # the plain reason, if there is one, before the writer's own wording
        save_file(held, temporary, metadata=described)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        allowed = "a file that can be written in a folder that exists"
        raise ArgumentError("path", f"{str(target)!r} ({error})", allowed) from error
    finally:
        _remove(temporary)


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the meta that `save_state` wrote to `path`.

    Raises ArgumentError when there is no such file or it cannot be read, StoreError when what it holds is not a whole,
    unchanged store of this version.
    """
    source = Path(path)
    require(source.is_file(), "path", repr(str(source)), "a saved store that exists")
    try:
        source.open("rb").close()
    except OSError as error:
        raise ArgumentError("path", f"{str(source)!r} ({error})", "a file that can be read") from error
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            described = file.metadata() or {}
            _check_kind(source, described)
            expected = _parse(source, described, "tensors", list)
            meta = _parse(source, described, "meta", dict)
            names = list(file.keys())
            missing = sorted(set(map(str, expected)) - set(names))
            if missing:
                raise StoreError(f"{source} lacks the tensors {', '.join(missing)}: it was cut or edited")
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise StoreError(f"{source} is not a safetensors file, or only a part of one: {error}") from error
    if _checksum(tensors, described["meta"]) != described.get("checksum"):
        raise StoreError(f"{source} was changed after it was saved: its checksum does not fit its content")
    return tensors, meta


def _exact_json(meta: Mapping[str, Any]) -> str:
    allowed = "a dict of what JSON holds exactly: str keys; str, int, finite float, bool, None, lists and dicts"
    try:
        text = json.dumps(dict(meta), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError("meta", error, allowed) from error
    require(json.loads(text) == dict(meta), "meta", meta, allowed)
    return text


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    """CRC-32 over the meta and every tensor's name, dtype, shape and bytes: against damage, not against intent."""
    total = zlib.crc32(about.encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _check_kind(source: Path, described: Mapping[str, str]) -> None:
    kind, version = described.get("format"), described.get("version")
    if kind != FORMAT:
        what = "says nothing of its format" if kind is None else f"has the format {kind!r}"
        raise StoreError(f"{source} {what}; a saved store has the format {FORMAT!r}")
    if version != str(VERSION):
        raise StoreError(f"{source} is a store of version {version}; this regard reads version {VERSION}")


def _parse(source: Path, described: Mapping[str, str], field: str, kind: type) -> Any:
    try:
        found = json.loads(described[field])
    except (KeyError, ValueError, RecursionError) as error:
        raise StoreError(f"{source}: its {field!r} is missing or not JSON") from error
    if not isinstance(found, kind):
        raise StoreError(f"{source}: its {field!r} is a {type(found).__name__}, not a {kind.__name__}")
    return found


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # the folder does not exist or is not one: nothing was written
        pass
