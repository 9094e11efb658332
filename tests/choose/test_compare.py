"""The whole job on a toy model: what is written, repeated, resumed and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.choose.made_up import record
from tests.toy_language import TEXT, toy_model, toy_tokenizer

from regard.choose.compare import compare
from regard.choose.records import Record
from regard.choose.runner import ModelRunner, share
from regard.errors import ArgumentError, RegardError, UnknownNameError
from regard.inference.plan import Plan
from regard.models.pretrained import Loaded
from regard.tasks import Sample, parse

PLANS = ("full", "streaming", "snapkv", "h2o", "prefill=streaming(window=64);cache=knorm(budget=24)")


class Stub:
    """Measures nothing; counts what it was asked for, and may be stopped."""

    def __init__(self, names: dict[Plan, str], stop_after: int | None = None) -> None:
        self.names, self.asked, self.stop_after = names, list[tuple[str, int, str]](), stop_after

    def measure(self, sample: Sample, mode: str, plans: Sequence[Plan]) -> Iterator[Record]:
        for plan in plans:
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            name = self.names[plan]
            self.asked.append((sample.task, sample.index, name))
            made = record(sample.task.split("(")[0], sample.index, name, 1.0, mode=mode, length=sample.length)
            yield replace(made, task=sample.task)


def run(settings: Any, out: Path, toy: Loaded, stop_after: int | None = None, **how: Any) -> tuple[Any, Stub]:
    stubs: list[Stub] = []

    def make(_: Loaded, names: dict[Plan, str]) -> Stub:
        stubs.append(Stub(names, stop_after))
        return stubs[0]

    return compare(settings, out, loaded=toy, make_runner=make, **how), stubs[0]


def test_a_real_run_writes_what_it_says(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    asked = settings(plans=PLANS, modes=("aware", "agnostic"))
    outcome = compare(asked, tmp_path / "out", loaded=toy)
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["regard_compare"] == 1 and told["complete"] and told["wanted"] == 2 * 2 * 2 * 5 == len(told["records"])
    assert list(told["plans"]) == ["full", "streaming 32", "snapkv 32", "h2o 32", PLANS[4]]
    assert {"command", "settings", "machine", "text", "recommendation", "summary", "notices"} <= set(told)
    assert told["machine"]["versions"]["torch"] == torch.__version__
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    each = 2 * 2 * 2 * 8 * 4  # K and V, layers, KV heads, dim, bytes
    for made in outcome.results.records:
        assert made.length == 200 and all(s > 0 for s in made.step_s)
        sealed = 200 if made.mode == "aware" else 200 - len(_question(made, asked))
        kept = {"full": sealed, PLANS[4]: 24}.get(made.plan, 32)
        if made.mode == "aware":
            assert made.prompt_bytes == kept * each
        else:  # the question is appended whole; what acts at each step also holds it to the budget
            assert kept * each <= made.prompt_bytes <= (kept + 200 - sealed) * each
        assert made.peak_bytes >= made.prompt_bytes
        assert (made.first_token_s is not None) == (made.index == 0 or made.plan in (PLANS[4], "h2o 32"))


def _question(made: Record, settings: Any) -> tuple[int, ...]:
    return parse(made.task).sample(toy_tokenizer(), TEXT, made.length, made.index, settings.seed).question


def test_the_same_seed_gives_the_same_scores_and_full_is_the_model(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    first = compare(settings(), tmp_path / "a", loaded=toy).results.records
    again = compare(settings(), tmp_path / "b", loaded=toy).results.records
    assert [(r.key, r.score, r.said) for r in first] == [(r.key, r.score, r.said) for r in again]
    for made in first:
        if made.plan == "full" and made.measure == "likelihood":
            sample = parse(made.task).sample(toy_tokenizer(), TEXT, 200, made.index, 0)
            ids = torch.tensor([sample.context + sample.question + sample.answer])
            logits = toy_model()(ids).logits[0, 200:-1].log_softmax(-1)
            wanted = -logits.gather(1, ids[0, 201:, None]).mean().item()
            assert made.score == pytest.approx(wanted, abs=1e-4)


def test_a_budget_as_long_as_the_prompt_scores_as_full_does(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    asked = settings(budget=("400",), plans=("full", "snapkv", "knorm"), modes=("aware", "agnostic"))
    records = compare(asked, tmp_path / "o", loaded=toy).results.records
    for mode in asked.modes:
        scores: dict[Any, set[float]] = {}
        for r in records:
            if r.mode == mode:
                scores.setdefault((r.task, r.index), set()).add(round(r.score, 4))
        assert all(len(found) == 1 for found in scores.values())


def test_scoring_of_answers(toy: Loaded) -> None:
    """A right answer scores 1 and a wrong one 0, whatever the cache: the model is replaced by one that spells it
    out."""
    sample = parse("needle").sample(toy.tokenizer, TEXT, 200, 0, 0)
    plan = Plan.parse("full")
    for said, score in ((sample.answer, 1.0), ((*sample.answer[:-1], 5), 0.0)):
        runner = Spelling(toy.model, toy.tokenizer, {plan: "full"}, answer=said)
        (made,) = runner.measure(sample, "aware", [plan])
        assert made.score == score and made.said.strip().startswith(sample.expected) == bool(score)


class Spelling(ModelRunner):
    """A runner whose model says what it is told to."""

    def __init__(self, *args: Any, answer: tuple[int, ...]) -> None:
        super().__init__(*args)
        object.__setattr__(self, "_spelled", list(answer))

    def _forward(self, store: Any, ids: Sequence[int]) -> Any:
        super()._forward(store, ids)
        logits = torch.zeros(len(self.tokenizer))
        logits[self._spelled.pop(0) if self._spelled else 3] = 1  # type: ignore[attr-defined]
        return logits


def test_prefills_are_shared_but_timed_apart() -> None:
    plans = [Plan.parse(t) for t in ("full", "snapkv(budget=20)", "h2o(budget=20)", "prefill=streaming(window=8)")]
    config = toy_model().config
    assert share(plans, config, timed=False) == [plans[:3], plans[3:]]
    assert share(plans, config, timed=True) == [plans[:2], plans[2:3], plans[3:]]


def test_ctrl_c_keeps_what_was_measured_and_resume_does_the_rest(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    outcome, _ = run(settings(), tmp_path / "o", toy, stop_after=3)
    assert outcome.interrupted and len(outcome.results.records) == 3 and not outcome.results.complete
    assert json.loads((tmp_path / "o" / "results.json").read_text())["complete"] is False
    assert "stopped early: 3 of 8" in (tmp_path / "o" / "report.html").read_text()
    outcome, stub = run(settings(), tmp_path / "o", toy, resume=True)
    assert not outcome.interrupted and outcome.results.complete and len(stub.asked) == 5
    assert len({r.key for r in outcome.results.records}) == 8
    outcome, stub = run(settings(samples=3), tmp_path / "o", toy, resume=True)  # more prompts: only the new ones
    assert len(stub.asked) == 4 and {index for _, index, _ in stub.asked} == {2}


KILLED = """
import os, signal, sys
from regard.choose.compare import compare
from regard.choose.settings import Settings
from regard.models.pretrained import Loaded
from tests.choose.test_compare import Stub
from tests.toy_language import toy_model, toy_tokenizer

class Fatal(Stub):
    def measure(self, sample, mode, plans):
        for made in super().measure(sample, mode, plans):
            if len(self.asked) == 4:
                with open(sys.argv[2] + "/records.jsonl", "a") as file:
                    file.write('{"task": "needle", "len')  # a line that was being written
                os.kill(os.getpid(), signal.SIGKILL)
            yield made

settings = Settings(model="toy", context=(200,), budget=("32",), plans=("full", "snapkv"),
    tasks=("needle", "perplexity(tokens=3)"), modes=("aware",), samples=2, text=sys.argv[1])
compare(settings, __import__("pathlib").Path(sys.argv[2]), loaded=Loaded(toy_model(), toy_tokenizer(), "toy", 512),
    make_runner=lambda _, names: Fatal(names))
"""


def test_kill_9_loses_nothing_that_was_finished(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    out = tmp_path / "o"
    made = settings()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, made.text, str(out)], env={**os.environ, "PYTHONPATH": "."}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "results.json").exists()
    outcome, stub = run(made, out, toy, resume=True)
    assert outcome.results.complete and len(stub.asked) == 5  # 3 of 8 had been written down
    lines = (out / "records.jsonl").read_text().splitlines()
    assert len(lines) == 9 and all(json.loads(line) for line in lines)


def test_resume_refuses_another_runs_journal(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    run(settings(), tmp_path / "o", toy)
    for change, named in (
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"budget": ("16",)}, "plans"),
        ({"context": (220,)}, "220"),
    ):
        with pytest.raises(ArgumentError, match=f"resume: got .*{named}"):
            run(settings(**change), tmp_path / "o", toy, resume=True)
    (tmp_path / "o" / "records.jsonl").write_text('{"something": "else"}\n')
    with pytest.raises(ArgumentError, match="a journal that regard compare wrote"):
        run(settings(), tmp_path / "o", toy, resume=True)
    (tmp_path / "o" / "records.jsonl").write_text("no json\n")
    with pytest.raises(RegardError, match="line 1: not JSON"):
        run(settings(), tmp_path / "o", toy, resume=True)


def test_a_run_is_not_overwritten_unasked(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    run(settings(), tmp_path / "o", toy)
    before = (tmp_path / "o" / "records.jsonl").read_bytes()
    with pytest.raises(ArgumentError, match=r"out: got .*--resume, or --overwrite"):
        run(settings(), tmp_path / "o", toy)
    assert (tmp_path / "o" / "records.jsonl").read_bytes() == before
    _, stub = run(settings(), tmp_path / "o", toy, overwrite=True)
    assert len(stub.asked) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": (511,)}, "context: got 511; allowed: at most 505: the model's maximum of 512, less 7"),
        ({"context": (64,), "tasks": ("multi-needle(keys=3)",)}, "context: got 64; allowed: at least"),
        ({"context": (1,)}, "context: got 1"),
        ({"context": (200, 200)}, "each length once"),
        ({"budget": ("0",)}, "budget: got 0"),
        ({"budget": ("-3",)}, "budget: got -3"),
        ({"budget": ("lots",)}, "budget: got 'lots'"),
        ({"plans": ("snapvk",)}, "did you mean snapkv"),
        ({"plans": ("full",)}, "at least one plan besides full"),
        ({"tasks": ("needel",)}, "did you mean needle"),
        ({"tasks": ("needle", "needle")}, "each task once"),
        ({"modes": ("awar",)}, "did you mean aware"),
        ({"modes": ("aware", "aware")}, "each mode once"),
        ({"plans": ()}, "plans: got nothing"),
        ({"plans": ("snapkv",), "budget": ("7",)}, r"plans: got 'snapkv 7'; .*SnapKV.window: got 16"),
        ({"context": (100_000,)}, "context: got 100000; allowed: at most 511"),
        ({"samples": 0}, "samples: got 0"),
        ({"max_drop": 1.5}, r"max-drop: got 1\.5"),
        ({"objective": "speed"}, "objective: got 'speed'"),
        ({"text": "/no/such/file"}, "text: got /no/such/file"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    settings: Any, toy: Loaded, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(settings(**change), tmp_path / "o", loaded=toy)
    assert not (tmp_path / "o").exists()


def test_a_plan_that_does_not_fit_the_model_is_named(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    table = "[[0.1,0.2],[0.3,0.4],[0.5,0.6]]"  # three layers, the model has two
    with pytest.raises(RegardError, match=r"plans: duoattention\(.* cannot be served by toy"):
        compare(settings(plans=("full", f"duoattention(table={table})")), tmp_path / "o", loaded=toy)


def test_a_folder_that_cannot_be_written_is_refused(settings: Any, toy: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match=r"out: got .*a folder that can be written"):
            compare(settings(), out, loaded=toy)


def test_an_unknown_model_is_refused(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean smollm2"):
        compare(settings(model="smolm2"), tmp_path / "o")
