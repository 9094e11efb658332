"""Every paper on static patterns is in the list with its settings and cost, and has a claim, measured or for later."""

from __future__ import annotations

import pytest

import regard
from regard import evidence

PAPERS = """faster-neighborhood-attention generalized-neighborhood-attention halonet clear combiner power-attention
radial-attention s2-attention moa-mixture-of-sparse-attention sinklora aki-modality-mutual-attention ee-mllm m-var
next-block-prediction bamm sener croc bico enerverse videofactory-swap-attention flashattention""".split()
ABOUT_TRAINING_ALONE = {"croc", "bico"}  # the mask itself is claimed to do nothing that could be measured without it


@pytest.mark.parametrize("key", PAPERS)
def test_it_is_listed_with_settings_and_cost(key: str) -> None:
    found = [entry for entry in regard.list(family="static-pattern") if entry.key == key]
    assert found
    for entry in found:
        assert entry.cost and entry.paper is not None and isinstance(entry.settings["causal"], bool)
        assert entry.example is not None or entry.kind == "layer"


@pytest.mark.parametrize("key", PAPERS)
def test_it_has_a_claim(key: str) -> None:
    measured = [entry for entry in evidence.entries() if entry.id.startswith(f"{key}/")]
    waiting = [entry for entry in evidence.postponed() if entry.id.startswith(f"{key}/")]
    assert measured or waiting
    assert bool(measured) != (key in ABOUT_TRAINING_ALONE)
    (paper,) = {entry.paper for entry in [*measured, *waiting]}
    assert paper in {entry.paper for entry in regard.list() if entry.key == key}


@pytest.mark.parametrize("key", PAPERS)
def test_what_a_cpu_can_measure_is_measured(key: str) -> None:
    records = evidence.read()
    for entry in evidence.entries():
        if entry.id.startswith(f"{key}/") and entry.needs == "cpu":
            assert entry.id in records
