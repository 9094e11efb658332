"""Pictures: that they are saved, that their pixels are the rule, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from regard.errors import ArgumentError, UnsupportedError
from regard.patterns import attention_sink, causal, documents, full, per_head, sliding_window

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_saved(tmp_path: Path, suffix: str) -> None:
    p = causal() & (sliding_window(12) | attention_sink(2))
    figure = per_head([p, causal(), p]).show(32, path=tmp_path / f"p.{suffix}")
    assert (tmp_path / f"p.{suffix}").stat().st_size > 5000
    assert [a.get_title().replace("\n", " ") for a in figure.axes] == [f"head 0, 2: {p!r}", "head 1: Causal()"]


def test_pixels_are_the_rule_and_the_answers() -> None:
    figure = (causal() & documents(torch.tensor([[0] * 20, [0] * 6 + [1] * 14]))).show(10, 20, block=(4, 6), row=1)
    pixels = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    dense = (causal() & documents(torch.tensor([0] * 6 + [1] * 14))).dense(10, 20)[0, 0]
    assert torch.equal(pixels < 2, dense)
    assert pixels[4:8, 6:12].eq(0).all() and pixels[0, 0] == 3  # a FULL tile; an EMPTY one
    assert figure.axes[0].get_ylim() == (19.5, 9.5)  # the queries are the last ten positions


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="n, m: got 5000"):
        full().show(5000)
    with pytest.raises(ArgumentError, match="row: got 1"):
        full().show(8, row=1)
    with pytest.raises(ArgumentError, match=r"path: got .*png"):
        full().show(8, path=tmp_path / "p.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="matplotlib"):
        full().show(8)
