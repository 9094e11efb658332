"""Studies: every cell has an outcome, the same seed the same outcome, time that is over is said."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regard.errors import ArgumentError, RegardError, UnknownNameError
from regard.evidence import Settings, study
from regard.evidence.claim import find
from regard.evidence.claims.based import at, state_bytes, windowed
from regard.evidence.claims.dynamical_systems_framework import linear
from regard.evidence.record import measure
from regard.evidence.study import Cell, Outcome, best, caveat, percent, run_cells
from regard.evidence.study_picture import PICTURES, draw, write
from regard.evidence.study_training import train_cell
from regard.models import CausalLM, CausalLMConfig, Mixer, full_attention, held_bytes
from regard.tasks.training import python_bytes
from regard.tasks.training.mqar import MQAR

TASK = MQAR(8, 1, 16, curriculum=False)
CONFIG = CausalLMConfig(16, 8, (Mixer("base-conv", 1), Mixer("normalised-attention", 1)), mlp_width=0)


def cell(name: str = "a", lr: float = 1e-2, steps: int = 4) -> Cell:
    return Cell(name, TASK, CONFIG, lr, steps, 4, seed=0, held_out=8)


def test_a_cell_learns_and_the_same_seed_repeats_it() -> None:
    one = train_cell(replace(cell(steps=60), batch=16, lr=3e-2, held_out=64), "cpu", time.time() + 60)
    assert one.state == "done" and one.accuracy is not None and one.accuracy > 0.5  # by chance 1/8
    assert one.curve[0][2] > one.curve[-1][2]
    first, again = (train_cell(cell(), "cpu", time.time() + 60) for _ in range(2))
    assert replace(first, seconds=0) == replace(again, seconds=0)


def test_what_the_time_did_not_suffice_for_is_said() -> None:
    outcomes = run_cells([cell("a"), cell("b")], 0.0, workers=0)
    assert [(o.name, o.state) for o in outcomes] == [("a", "not run"), ("b", "not run")]
    assert caveat(outcomes) == "; 2 of 2 runs not run"
    with pytest.raises(RegardError, match="a was not trained"):
        percent(outcomes, ["a"])
    cut = train_cell(cell(steps=1000), "cpu", time.time() - 1)
    assert cut.state == "cut" and cut.steps == 0 and cut.accuracy is not None


def test_a_solved_name_needs_no_further_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def solved(cell: Cell, device: str, deadline: float) -> Outcome:
        if cell.name == "bad":
            raise ValueError("why")
        return Outcome(cell.name, cell.lr, "done", 1, 1.0, 0.0)

    monkeypatch.setattr(study, "train_cell", solved)
    cells = [cell("a", 1e-2), cell("bad"), cell("a", 3e-3)]
    outcomes = run_cells(cells, 60.0, workers=0)
    assert [o.state for o in outcomes] == ["done", "failed", "not needed"]
    assert outcomes[1].how == "ValueError: why"
    assert percent(outcomes, ["a"]) == {"a": 100.0}


def test_the_best_of_a_name_prefers_runs_to_their_end() -> None:
    outcomes = [
        Outcome("a", 1e-2, "cut", 5, 0.9, 0.1),
        Outcome("a", 3e-3, "done", 9, 0.5, 0.7),
        Outcome("a", 1e-3, "done", 9, 0.4, 0.6),
    ]
    assert best(outcomes, "a").lr == 3e-3
    assert best(outcomes, "a", by="loss").lr == 1e-3
    assert best(outcomes[:1], "a").state == "cut"
    with pytest.raises(ArgumentError, match=r"^name: got b;"):
        best(outcomes, "b")


def test_workers_give_what_this_process_gives() -> None:
    cells = [cell("a"), cell("b", 3e-3)]
    here, there = (run_cells(cells, 120.0, workers=n) for n in (0, 1))
    assert [replace(o, seconds=0) for o in here] == [replace(o, seconds=0) for o in there]


def test_windows_and_states_of_based() -> None:
    model = CausalLM(CausalLMConfig(16, 64, (Mixer("based", 2, {"feature_dim": 4}), full_attention(2))))
    windowed(model, (None, 3))
    assert model.blocks[0].pattern is None
    assert int(model.blocks[1].pattern.dense(5).sum()) == 1 + 2 + 3 + 3 + 3
    tokens = TASK.batch(torch.Generator(), 1).tokens
    based, attention = model(tokens).state.layers
    assert held_bytes(based.inner) == state_bytes(None, 4)
    assert held_bytes((attention.k, attention.v)) == state_bytes(8, None)
    assert [at([(0, 10.0), (2, 20.0)], x) for x in (-1, 1, 3)] == [10.0, 15.0, 20.0]


def test_linear_attention_takes_the_place_of_normalised() -> None:
    model = CausalLM(CONFIG)
    before = model.blocks[1].mixer.q_proj.weight.clone()
    linear(model)
    after = model.blocks[1].mixer
    assert type(after).__name__ == "Linear" and after.q_proj.weight.equal(before)


@pytest.mark.parametrize("id", PICTURES)
def test_a_study_measures_and_is_drawn(id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (torch.arange(2000) % 7).to(torch.uint8)  # the standard library takes seconds to read
    monkeypatch.setattr(python_bytes, "standard_library", lambda: python_bytes.Corpus(text, text, "0"))
    record = measure(find(id), Settings(quick=True))
    record.write(tmp_path)
    (path,) = write(tmp_path / "images", tmp_path)
    assert path.read_text(encoding="utf-8").count("<polyline") >= 1
    with pytest.raises(UnknownNameError):
        draw(replace(record, id="nobody/nothing"))
