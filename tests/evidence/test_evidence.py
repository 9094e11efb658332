"""Claims can be measured, recorded, read back and shown; the table in docs is the one its records give."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.toy_language import TEXT, toy_model, toy_tokenizer

from regard import evidence
from regard.errors import ArgumentError, RegardError, UnknownNameError, UnsupportedError
from regard.evidence import Measured, Record, Settings, batch, language
from regard.evidence.claim import Claim, find
from regard.evidence.claims import duoattention, snapkv
from regard.evidence.record import RESULTS, measure
from regard.inference.head_table import HeadTable
from regard.models.pretrained import Loaded
from regard.registry import Paper

ROOT = Path(__file__).parents[2]
CLAIMS = evidence.entries()
PAPERS = {"snapkv", "streaming", "h2o", "duoattention", "moh", "lightning-attention-2"}


def _claim(**changes: object) -> Claim:
    about = {
        "id": "nobody/nothing",
        "paper": Paper("T", "A", 2024),
        "statement": "s",
        "figure": "f",
        "measurement": "m",
        "unit": "u",
        "tolerance": "t",
        "needs": "cpu",
        "minutes": 1,
        "measure": lambda settings: Measured(float(torch.rand(())), "partly", "because | so", {"seed": settings.seed}),
    }
    return Claim(**(about | changes))  # type: ignore[arg-type]


def test_every_paper_has_a_claim() -> None:
    assert {entry.id.split("/")[0] for entry in CLAIMS} >= PAPERS


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A toy language model in SmolLM2's place: the code of a claim is tested here, not what it says."""
    made = Loaded(toy_model(), toy_tokenizer(), "toy", 512)
    monkeypatch.setattr(language, "load", lambda name: made)
    monkeypatch.setattr(language, "long_text", lambda: TEXT)
    monkeypatch.setattr(duoattention, "_table", lambda: HeadTable(((0.1, 0.9), (0.8, 0.2))))
    caches = (language.smollm2, language.text, language.passages, snapkv._needles)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize("entry", CLAIMS, ids=lambda c: c.id)
def test_claim_measures(entry: Claim, toy: None) -> None:
    """At the smallest sizes the code runs through and returns finite figures that JSON can hold."""
    if entry.needs == "h100" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    record = measure(entry, Settings(quick=True))
    assert record.measured.why
    assert math.isfinite(record.measured.value)
    json.dumps(record.measured.details)


def test_record_round_trip(tmp_path: Path) -> None:
    record = measure(_claim(), Settings(seed=3))
    path = record.write(tmp_path / "new")
    assert path.name == "nobody--nothing.json"
    assert evidence.read(path.parent) == {"nobody/nothing": record}
    assert record.versions["torch"] == torch.__version__
    assert measure(_claim(), Settings(seed=3)).measured == record.measured
    assert measure(_claim(), Settings(seed=4)).measured != record.measured


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 1}', encoding="utf-8")
    with pytest.raises(ArgumentError, match=r"a\.json"):
        evidence.read(tmp_path)


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RegardError, match="cannot be written"):
        measure(_claim(), Settings()).write(tmp_path / "file" / "below")


def test_unknown_claim_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean snapkv/needle"):
        find("snapkv/needl")


def test_unknown_verdict_is_refused() -> None:
    with pytest.raises(ArgumentError, match="verdict"):
        Measured(1.0, "proven", "")  # type: ignore[arg-type]


def test_timings_are_refused_elsewhere(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        evidence.run("snapkv/decode-speed", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_table_says_what_was_not_run_and_what_changed(tmp_path: Path) -> None:
    entry = CLAIMS[0]
    assert f"[{entry.id}](#{entry.id.replace('/', '')}) | not run" in evidence.table(tmp_path)
    record = measure(_claim(id=entry.id), Settings())
    record.write(tmp_path)
    page = evidence.table(tmp_path)
    assert "**partly**" in page and "because \\| so" in page
    assert "tolerance" in page.split("changed since it was measured")[0].splitlines()[-1]


@pytest.mark.parametrize("record", evidence.read().values(), ids=lambda r: r.id)
def test_committed_record_is_of_a_claim(record: Record) -> None:
    entry = find(record.id)
    assert not record.settings.quick
    assert record.claim["tolerance"] == entry.tolerance, "measured under another tolerance: measure again"


def test_page_in_docs_is_up_to_date() -> None:
    assert (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8") == evidence.table(RESULTS), "run: make docs"


def test_batch_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: None) -> None:
    def broken(id: str, out: str) -> Record:
        if id == "snapkv/needle":
            raise UnsupportedError("broken")
        return measure(find(id), Settings(quick=True))

    monkeypatch.setattr(batch, "run", broken)
    assert batch.main("smollm2", str(tmp_path), ["snapkv/needle", "snapkv/hit-rate"]) == 1
    with pytest.raises(UnknownNameError, match="need"):
        batch.main("gpu", str(tmp_path), [])
