"""A toy run for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.toy_language import TEXT, toy_model, toy_tokenizer

from regard.choose.settings import Settings
from regard.models.pretrained import Loaded


@pytest.fixture
def toy() -> Loaded:
    return Loaded(toy_model(), toy_tokenizer(), "toy", 512)


@pytest.fixture
def toy_text(tmp_path: Path) -> str:
    path = tmp_path / "toy.txt"
    path.write_text(TEXT.body, encoding="utf-8")
    return str(path)


@pytest.fixture
def settings(toy_text: str) -> Any:
    """Settings of a tiny run; keyword arguments change them."""

    def make(**changes: Any) -> Settings:
        base: dict[str, Any] = {
            "model": "toy",
            "context": (200,),
            "budget": ("32",),
            "plans": ("full", "snapkv"),
            "tasks": ("needle", "perplexity(tokens=3)"),
            "modes": ("aware",),
            "samples": 2,
            "text": toy_text,
        }
        return Settings(**{**base, **changes})

    return make
