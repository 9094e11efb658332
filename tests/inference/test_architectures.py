"""The seam computes what each architecture itself computes. The whole table is written by `write_architectures`."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import torch
from tests.inference import proof, zoo
from tests.inference.batches import Batch, run, tokens
from tests.inference.struck_out import attention_calls
from tests.inference.write_architectures import DOCS, page

from regard.errors import AttachError
from regard.inference.seam import attach

torch.set_num_threads(1)

PLANS = ("full", "streaming", "snapkv", "h2o", "tova", "keydiff", "knorm", "random", "duoattention")


SAMPLE = zoo.known(zoo.OTHERS)[::3]
"""Architectures beside the twelve that every run of the tests tries; the table's writer tries them all."""

model_of = lru_cache(maxsize=1)(zoo.build)
"""Tests of one model follow one another and leave it as it was: what is eager about it is computed once."""


def _all_hold(checks: list[proof.Check]) -> None:
    bad = [f"{check.name}: {check.error:.1e}" for check in checks if not check.ok]
    assert not bad, "; ".join(bad)


@pytest.mark.parametrize("name", zoo.TWELVE)
def test_full_plan_of_the_twelve(name: str) -> None:
    checks = proof.full_plan(zoo.build(name))
    _all_hold(checks)
    assert not [check.remark for check in checks if check.remark], "eager itself refused something"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", zoo.TWELVE)
def test_every_plan_of_the_twelve(name: str, plan: str) -> None:
    model = model_of(name)
    small, ample = proof.plans(model, 8)[plan], proof.plans(model, 64)[plan]
    if (name, plan) in zoo.REFUSED_PLANS:
        with pytest.raises(AttachError, match=zoo.REFUSED_PLANS[name, plan]):
            attach(model, small)
        return
    _all_hold([*proof.compressed(model, small), proof.ample_budget(model, ample)])


@pytest.mark.parametrize("name", SAMPLE)
def test_full_plan_of_others(name: str) -> None:
    _all_hold(proof.full_plan(zoo.build(name), []))


def test_there_are_sixty() -> None:
    assert len(zoo.known()) >= 60
    for name in zoo.known()[:: len(zoo.known()) // 8]:
        model = zoo.build(name)
        assert attention_calls(model, Batch(tokens(1, 4))) >= 1, name


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.known(zoo.UNROUTED))
def test_what_is_never_reached_is_refused(name: str) -> None:
    model = zoo.build(name)
    batch = Batch(tokens(1, 6))
    assert attention_calls(model, batch) == 0
    before = model(batch.ids).logits
    with pytest.raises(AttachError, match=type(model).__name__):
        attach(model, "full")
    assert torch.equal(model(batch.ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.known(tuple(zoo.REFUSED)))
def test_what_needs_more_is_refused_by_name(name: str) -> None:
    model = zoo.build(name)
    before, _ = run(model, Batch(tokens(1, 6)))
    with pytest.raises(AttachError, match=zoo.REFUSED[name]):
        attach(model, "full")
    assert torch.equal(run(model, Batch(tokens(1, 6)))[0], before)


def test_the_table_is_what_was_measured() -> None:
    data = json.loads((DOCS / "architectures.json").read_text(encoding="utf-8"))
    assert page(data) == (DOCS / "architectures.md").read_text(encoding="utf-8")
    assert sum(row["full"]["ok"] for row in data["served"]) >= 60
    twelve = {row["architecture"]: row["plans"] for row in data["served"] if "plans" in row}
    assert set(twelve) == set(zoo.TWELVE)
    for name, plans in twelve.items():
        assert set(plans) == set(PLANS)
        failed = {plan for plan, outcome in plans.items() if not outcome["ok"]}
        assert failed == {plan for refused, plan in zoo.REFUSED_PLANS if refused == name}
