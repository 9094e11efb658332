"""Saved stores come back as they were, or with a sentence that says why not."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from regard.errors import ArgumentError, StoreError
from regard.inference.ragged import RaggedKV
from regard.inference.saved import load_state, save_state

META = {"layers": 2, "model": {"kind": "llama", "heads": [4, 2]}, "scale": 0.1, "note": "größer\n", "none": None}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "0.k": torch.randn(5, 3, generator=generator),
        "0.v": torch.randn(5, 2, generator=generator).bfloat16(),
        "0.lengths": torch.tensor([[2, 3]]),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "strided": torch.randn(4, 6, generator=generator).t()[::2],
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_state(path, tensors(), META)
    return path


def test_round_trip(saved: Path) -> None:
    found, meta = load_state(str(saved))
    assert meta == META
    expected = tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name], "no temporary file stays"


def test_views_of_one_storage_and_no_tensors_at_all(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    save_state(tmp_path / "a", {"whole": whole, "half": whole[3:], "again": whole}, {})
    found, meta = load_state(tmp_path / "a")
    assert meta == {} and torch.equal(found["half"], whole[3:]) and torch.equal(found["again"], whole)
    save_state(tmp_path / "b", {}, {"only": "meta"})
    assert load_state(tmp_path / "b") == ({}, {"only": "meta"})


def test_a_ragged_store_through_a_file(tmp_path: Path) -> None:
    store = RaggedKV(2, 2, 3, 2, torch.bfloat16, "cpu")
    k, v = torch.randn(2, 2, 70, 3).bfloat16(), torch.randn(2, 2, 70, 2).bfloat16()
    store.append(k, v, torch.arange(70).expand(2, 70))
    store.keep(torch.arange(70).expand(2, 2, 70), torch.tensor([[70, 3], [0, 65]]))
    save_state(tmp_path / "s", store.state(), {"layers": 1})
    again = RaggedKV.from_state(load_state(tmp_path / "s")[0])
    assert torch.equal(again.lengths, store.lengths)
    for a, b in zip(again.padded(), store.padded(), strict=True):
        assert torch.equal(a, b)


def test_what_was_loaded_does_not_depend_on_the_file(saved: Path) -> None:
    found, _ = load_state(saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert torch.equal(found["0.k"], tensors()["0.k"])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_flipped_bit_anywhere_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("flip") / "s.safetensors"
    save_state(path, tensors(), META)
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        found, meta = load_state(path)
    except StoreError as error:
        assert str(path) in str(error)
        return
    # What is not noticed must not matter: padding blanks after the header are read as nothing.
    assert meta == META and all(torch.equal(found[name], t) for name, t in tensors().items())


def test_truncated_anywhere(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="not a safetensors file, or only a part of one") as caught:
            load_state(saved)
        assert str(saved) in str(caught.value)


class Bomb:
    """Unpickling it is noticed."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, ("unpickled",))


def test_a_pickle_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.safetensors"
    for content in (pickle.dumps(Bomb()), None):
        if content is None:
            torch.save({"k": Bomb()}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(StoreError, match="not a safetensors file"):
            load_state(path)
    assert not (tmp_path / "unpickled").exists()


def rewrite(path: Path, drop: str = "", **changes: str | None) -> None:
    """The same file with other metadata (None = without that field) or without one tensor."""
    with safe_open(path, framework="pt") as file:
        described = dict(file.metadata())
    held = load_file(path)
    held.pop(drop, None)
    described.update({k: v for k, v in changes.items() if v is not None})
    save_file(held, path, metadata={k: v for k, v in described.items() if changes.get(k, "") is not None})


def test_foreign_files(tmp_path: Path, saved: Path) -> None:
    plain = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    with pytest.raises(StoreError, match="says nothing of its format"):
        load_state(plain)
    save_file({"w": torch.zeros(2)}, plain, metadata={"format": "pt"})
    with pytest.raises(StoreError, match="has the format 'pt'"):
        load_state(plain)
    rewrite(saved, version="2")
    with pytest.raises(StoreError, match="version 2; this regard reads version 1"):
        load_state(saved)


def test_a_missing_or_an_added_tensor(saved: Path) -> None:
    rewrite(saved, drop="0.v")
    with pytest.raises(StoreError, match=r"lacks the tensors 0\.v"):
        load_state(saved)
    rewrite(saved, tensors=json.dumps(["0.k"]))
    with pytest.raises(StoreError, match="checksum"):
        load_state(saved)


def test_a_tensor_in_another_shape(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        described = dict(file.metadata())
    held = load_file(saved)
    save_file({**held, "0.k": held["0.k"].view(3, 5)}, saved, metadata=described)
    with pytest.raises(StoreError, match="checksum"):
        load_state(saved)


@pytest.mark.parametrize("field", ["meta", "tensors"])
@pytest.mark.parametrize("text", [None, "{", "3", "[" * 100_000])
def test_metadata_that_is_not_what_it_should_be(saved: Path, field: str, text: str | None) -> None:
    rewrite(saved, **{field: text})
    with pytest.raises(StoreError, match=f"its '{field}' is"):
        load_state(saved)


def test_edited_meta_and_missing_checksum(saved: Path) -> None:
    rewrite(saved, meta=json.dumps({**META, "layers": 3}))
    with pytest.raises(StoreError, match="checksum"):
        load_state(saved)
    rewrite(saved, meta=json.dumps(META), checksum=None)
    with pytest.raises(StoreError, match="checksum"):
        load_state(saved)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ArgumentError, match=r"path: got .*a saved store that exists"):
            load_state(path)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("kept")
    for path in (blocker / "s", tmp_path / "absent" / "s", tmp_path):
        with pytest.raises(ArgumentError, match="path: got") as caught:
            save_state(path, tensors(), META)
        assert str(path) in str(caught.value)
    assert blocker.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArgumentError, match="Permission denied"):
        save_state(tmp_path / "s", tensors(), META)
    tmp_path.chmod(0o700)


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regard.inference.saved.save_file", full)
    with pytest.raises(ArgumentError, match="No space left"):
        save_state(saved, {}, {})
    monkeypatch.undo()
    monkeypatch.setattr("regard.inference.saved.os.replace", full)  # nothing reaches the old file before this
    with pytest.raises(ArgumentError, match="No space left"):
        save_state(saved, {}, {})
    assert load_state(saved)[1] == META and [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("meta", [{"a": (1, 2)}, {1: "a"}, {"a": float("nan")}, {"a": torch.zeros(1)}, {"a": {3}}])
def test_meta_that_json_would_change(tmp_path: Path, meta: dict[str, object]) -> None:
    with pytest.raises(ArgumentError, match="meta: got"):
        save_state(tmp_path / "s", {}, meta)
    assert not list(tmp_path.iterdir())
