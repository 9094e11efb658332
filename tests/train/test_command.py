"""`regard train`: from the words to the table, the picture and the results; and what it refuses, in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from regard import cli
from regard.models.saving import load_model
from regard.train import run as job
from regard.train.picture import Line, Panel, svg
from regard.train.run import RunSettings
from regard.train.settings import TrainSettings
from regard.train.trainer import Step

ROOT = Path(__file__).parents[2]
TASK = "mqar(length=8,pairs=2,vocab=10)"
TINY = ("--task", TASK, "--mixer", "lightning-attention-2", "--layers", "2", "--dim", "8", "--steps", "4")
QUICK = ("--batch", "2", "--evaluate-every", "2")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code, stdout and stderr of `regard train WORDS`."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regard", "train", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), told.out, told.err

    return call


def test_from_end_to_end(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "o"
    code, told, err = run(*TINY, *QUICK, "--out", str(out))
    assert code == 0, err
    assert "1 × lightning-attention-2, 1 × full" in told and "2 × full" in told
    assert "model: step 2 of 4, loss" in told and "left" in told
    results = json.loads((out / "results.json").read_text())
    hybrid, full = results["models"]
    assert hybrid["mixers"] == ["lightning-attention-2", "multi-head-attention"]
    assert full["name"] == "full-attention" and [p["step"] for p in full["curve"]] == [2, 4]
    assert full["state_bytes"] == 2 * 2 * 8 * 8 * 4
    assert {"device", "versions"} <= set(results["machine"]) and not results["interrupted"]
    assert f"{full['curve'][-1]['accuracy']:.1%}" in told
    assert results["settings"]["training"]["steps"] == 4
    picture = ElementTree.parse(out / "curves.svg").getroot()
    assert len(picture.findall("{*}polyline")) == 4
    model = load_model(out / "model")
    assert model.generate(torch.tensor([[1, 6, 2, 7]]), 2).shape == (1, 2)

    code, _, err = run(*TINY, *QUICK, "--out", str(out))
    assert code == 2 and "which holds a run" in err
    code, _, err = run(*TINY, *QUICK, "--out", str(out), "--resume", "--lr", "0.5")
    assert code == 2 and "lr=0.003" in err
    code, _, _ = run(*TINY, *QUICK, "--out", str(out), "--resume")
    assert code == 0 and json.loads((out / "results.json").read_text())["models"] == results["models"]
    code, _, _ = run(*TINY, *QUICK, "--out", str(out), "--overwrite", "--no-compare-full")
    assert code == 0 and len(json.loads((out / "results.json").read_text())["models"]) == 1


def test_the_command_that_results_name_repeats_the_run(run: Any, tmp_path: Path) -> None:
    settings = RunSettings(TASK, "lightning-attention-2(chunk_size=4)", "1:1", 2, 8, 2, False, "cpu", TrainSettings(4))
    words = shlex.split(settings.command())[2:]
    code, _, err = run(*words, "--out", str(tmp_path))
    assert code == 0, err
    assert json.loads((tmp_path / "results.json").read_text())["command"] == settings.command()


def test_bytes_are_compared_in_bits(run: Any, tmp_path: Path) -> None:
    code, told, _ = run(*TINY[2:], "--task", "bytes(length=8)", *QUICK, "--no-compare-full", "--out", str(tmp_path))
    assert code == 0 and "bits a label" in told
    assert "held-out bits" in (tmp_path / "curves.svg").read_text()


def test_nothing_beside_a_transformer(run: Any) -> None:
    settings = RunSettings(TASK, "lightning-attention-2", "0:1", 2, 8)
    assert list(settings.configs) == ["model"]


def test_ctrl_c_says_how_to_go_on(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = job.progress_line

    def pressing(name: str, steps: int, console: Any) -> Any:
        class Line:
            def __enter__(self) -> Any:
                return lambda step: os.kill(os.getpid(), signal.SIGINT) if step.done == 2 else None

            def __exit__(self, *_: object) -> None: ...

        return Line()

    monkeypatch.setattr(job, "progress_line", pressing)
    out = tmp_path / "with a space"
    code, told, _ = run(*TINY, *QUICK, "--out", str(out))
    assert code == 130 and "Stopped after step 2 of model" in told
    assert json.loads((out / "results.json").read_text())["interrupted"]
    monkeypatch.setattr(job, "progress_line", printed)
    (line,) = re.findall(r"Go on: regard train (.*)$", told, flags=re.MULTILINE)
    code, _, err = run(*shlex.split(line))
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert [m["steps"] for m in results["models"]] == [4, 4] and not results["interrupted"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "mqra"), "did you mean mqar"),
        (("--mixer", "gated-deltanets"), "mixer: got 'gated-deltanets'"),
        (("--mixer", "lightning-attention-2(chunk=4)"), "did you mean chunk_size"),
        (("--mixer", "halonet"), "causal"),
        (("--ratio", "three"), "ratio: got 'three'"),
        (("--layers", "0"), "layers: got 0"),
        (("--heads", "3"), "divisor of dim=8"),
        (("--steps", "0"), "steps: got 0"),
        (("--lr", "-1"), "lr: got -1"),
        (("--device", "tpu"), "device: got 'tpu'"),
        (("--device", "meta"), "device: got 'meta'"),
        (("--mixer", "retnet(key_dim='x')"), "key_dim: got 'x'"),
        (("--mixer", "gated-linear-attention(key_dim=0)"), "key_dim: got 0"),
        (("--mixer", "mamba-2(groups='x')"), "groups: got 'x'"),
        (("--seed", "99999999999999999999"), "seed: got 99999999999999999999"),
        (("--task", "mqar(length=64,pairs=4,length=32)"), "mqar.length: got 64, then 32; allowed: one value"),
        (("--resume",), "out: got None"),
        (("--resume", "--out", "nowhere"), "saved a checkpoint"),
        (("--resume", "--overwrite", "--out", "x"), "one of the two"),
        (("--out", "/proc/nowhere"), "out: got /proc/nowhere"),
    ],
)
def test_what_is_refused_is_one_line(
    run: Any, words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*TINY, *words)
    assert code == 2 and message in err and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_progress_line_on_a_terminal(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from regard.train.checkpoint import CurvePoint
    from regard.train.progress import progress_line

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with progress_line("model", 10, console) as report:
        report(Step(1, 10, 2.5, None))
        report(Step(2, 10, 2.25, CurvePoint(2, 2.375, 2.0, 0.625, 1.0)))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "2/10" in shown and "loss 2.250" in shown and "held-out accuracy 62.5%" in shown


def test_a_picture_escapes_names_and_leaves_out_what_is_no_number() -> None:
    line = Line("a < b", [(1.0, 2.0), (2.0, float("nan")), (3.0, 5.0)])
    drawn = ElementTree.fromstring(svg("x & y", [Panel("p", "steps", [line], str)]))
    (curve,) = drawn.findall("{*}polyline")
    assert len(curve.attrib["points"].split()) == 2
    assert {"x & y", "a < b"} <= {text.text for text in drawn.findall("{*}text")}


@pytest.mark.parametrize("page", ["README.md"])
def test_the_readme_s_command_runs(page: str, run: Any, tmp_path: Path) -> None:
    """Its own words, with fewer steps."""
    (line,) = re.findall(r"^regard train ([^#\n]*)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    code, told, err = run(*shlex.split(line), "--steps", "2", "--batch", "2", "--out", str(tmp_path / "o"))
    assert code == 0, err
    assert "2 × gated-deltanet, 1 × full" in told and "3 × full" in told
