"""The command line: what it prints, and one clean line with exit code 2 for what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.toy_language import TEXT, toy_model, toy_tokenizer

import regard
from regard import cli
from regard.choose import compare as job
from regard.models.pretrained import Loaded


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `regard WORDS`."""
    monkeypatch.setattr("sys.argv", ["regard", *words])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), told.out, told.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *words: call(monkeypatch, capsys, *words)


def test_version(run: Any) -> None:
    assert run("--version") == (0, f"regard {regard.__version__}\n", "")


def test_list_as_table_and_as_json(run: Any) -> None:
    code, out, _ = run("list", "--kind", "cache")
    assert code == 0 and "snapkv" in out and "needle" not in out
    code, out, _ = run("list", "--json")
    entries = json.loads(out)
    assert {"snapkv", "streaming", "needle"} <= {e["key"] for e in entries}
    about = {"key", "kind", "families", "summary", "settings", "arguments", "cost", "paper"}
    assert all(set(e) == about for e in entries)
    (snapkv,) = (e for e in entries if e["key"] == "snapkv")
    assert "window=16" in snapkv["arguments"]
    code, out, _ = run("list", "--family", "kv-cache", "--json")
    assert code == 0 and all("kv-cache" in e["families"] for e in json.loads(out))


def test_a_narrow_terminal_cuts_nothing(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = " ".join(run("list", "--kind", "cache")[1].split())
    for entry in regard.list("cache"):
        assert entry.key in said and entry.summary.split()[-1] in said and "…" not in said
    said = run("evidence", "list")[1]
    assert "moa-mixture-of-sparse-attention/recall" in said and "…" not in said


def test_show_and_its_picture(run: Any, tmp_path: Path) -> None:
    code, out, _ = run("show", "snapkv")
    assert code == 0 and "2404.14469" in out
    pytest.importorskip("matplotlib")
    picture = tmp_path / "window.svg"
    code, out, _ = run("show", "sliding-window", "--out", str(picture))
    assert code == 0 and "<svg" in picture.read_text() and str(picture) in out


def test_every_pattern_can_be_drawn(run: Any, tmp_path: Path) -> None:
    """Each at a length that its example has."""
    pytest.importorskip("matplotlib")
    for entry in regard.list("pattern"):
        code, _, error = run("show", entry.key, "--out", str(tmp_path / f"{entry.key}.png"))
        assert code == 0, error
        assert (tmp_path / f"{entry.key}.png").stat().st_size > 3000


def test_plan(run: Any) -> None:
    code, out, _ = run("plan", "cache=snapkv(budget=512)")
    assert code == 0 and "snapkv(budget=512)" in out and json.loads(out[out.index("{") :])["regard_plan"] == 1


def test_evidence_list_and_table(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("evidence", "list")
    assert code == 0 and "snapkv" in out and " later " in out
    ids = {line.split(" ")[0] for line in out.splitlines()}
    assert {entry.id for entry in regard.evidence.entries()} <= ids, "no id is shortened"
    code, out, _ = run("evidence", "table")
    assert code == 0 and "|" in out


COMPARE = ("compare", "--model", "smollm2", "--context", "256", "--budget", "64")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "snapvk"), "did you mean snapkv"),
        (("show", "snapkv", "--out", "x.svg"), "pattern: got 'snapkv'"),
        (("list", "--kind", "cahce"), "did you mean cache"),
        (("list", "--family", "nothing"), "family: got 'nothing'"),
        (("plan", "snapkv(budget=0)"), "budget: got 0"),
        (("plan", "cache="), "at character"),
        (("evidence", "run", "nothing"), "nothing"),
        ((*COMPARE, "--plans", "snapkv,magic"), "plan: got 'magic'"),
        ((*COMPARE, "--tasks", "needel"), "did you mean needle"),
        ((*COMPARE, "--resume"), "out: got None"),
        ((*COMPARE, "--resume", "--overwrite"), "one of the two"),
        ((*COMPARE[:3], "--context", "long", "--budget", "64"), "context: got 'long'"),
        ((*COMPARE[:3], "--context", "256", "--budget", "0"), "budget: got 0"),
        ((*COMPARE, "--out", "/proc/nowhere"), "out: got /proc/nowhere"),
        ((*COMPARE, "--dtype", "float8", "--out", "x"), "dtype: got 'float8'"),
        ((*COMPARE, "--device", "tpu", "--out", "x"), "device: got 'tpu'"),
        (("show", "causal", "--out", "nowhere/x.png"), "out: got nowhere/x.png"),
        (("show", "causal", "--out", "x.nonsense"), "out: got x.nonsense"),
        (("compare", "--model", "smolm2", "--context", "256", "--budget", "64", "--out", "x"), "did you mean smollm2"),
    ],
)
def test_what_is_refused_is_one_line(
    run: Any, words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words)
    assert code == 2 and message in err and "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [("compare",), ("nonsense",), ("list", "--no-such-option"), (*COMPARE, "--objective", "x")]
)
def test_usage_errors_have_code_two(run: Any, words: tuple[str, ...]) -> None:
    code, _, err = run(*words)
    assert code == 2 and "Traceback" not in err


def test_compare_from_end_to_end(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "load", lambda name, **_: Loaded(toy_model(), toy_tokenizer(), name, 512))
    text = tmp_path / "text.txt"
    text.write_text(TEXT.body, encoding="utf-8")
    words = (
        "compare",
        "--model",
        "toy",
        "--context",
        "200",
        "--budget",
        "24,48",
        "--plans",
        "full,snapkv(window=8),knorm",
    )
    words = (*words, "--tasks", "needle(digits=2)", "--mode", "aware", "--samples", "1", "--text", str(text))
    code, out, err = run(*words, "--out", str(tmp_path / "o"))
    assert code == 0, err
    assert "snapkv(window=8) 24" in out and "knorm 48" in out and str(tmp_path / "o" / "report.html") in out
    told = json.loads((tmp_path / "o" / "results.json").read_text())
    assert "--budget 24,48" in told["command"] and len(told["records"]) == 5
    code, _, err = run(*words, "--out", str(tmp_path / "o"))
    assert code == 2 and "--resume, or --overwrite" in err


def test_ctrl_c_says_what_is_kept(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "load", lambda name, **_: Loaded(toy_model(), toy_tokenizer(), name, 512))
    monkeypatch.setattr(job.ModelRunner, "measure", stop)
    text = tmp_path / "text.txt"
    text.write_text(TEXT.body, encoding="utf-8")
    code, out, _ = run(
        *("compare", "--model", "toy", "--context", "200", "--budget", "24", "--plans", "full,knorm"),
        *("--tasks", "needle", "--text", str(text), "--out", str(tmp_path / "o p")),
    )
    assert (
        code == 130
        and "Stopped: 0 of 64 measurements are kept" in out
        and f"--out '{tmp_path / 'o p'}' --resume" in out
    )
    assert (tmp_path / "o p" / "report.html").exists()
