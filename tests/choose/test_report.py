"""The report: nothing that a user or a model wrote becomes markup, nothing is fetched, the figures say what was
measured."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from tests.choose.made_up import record, records

from regard.choose.figures import dodge, heat_map, nice_ticks, pareto, spread
from regard.choose.report import embedded_json, render
from regard.choose.results import Results, conclude
from regard.choose.terminal import bytes_text, show

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&\u2028"
MACHINE = {"device": EVIL, "versions": {"regard": "0", "torch": "2"}}


class Tags(HTMLParser):
    """Names and attributes of all elements, and the text of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


@pytest.fixture
def results(settings: Any) -> Results:
    made = settings(
        plans=("full", "snapkv", "random"), modes=("aware", "agnostic"), model=EVIL, tasks=("needle", "perplexity")
    )
    rows = records({"full": 1.0, "snapkv 32": 0.75, "random 32": 0.25}, 8, modes=made.modes, said=EVIL)
    return conclude(made, rows, text=EVIL, machine=MACHINE, peak="payload", wanted=len(rows))


def test_what_others_wrote_stays_text(results: Results) -> None:
    page = Tags()
    page.feed(render(results))
    assert "img" not in page.tags and page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    told = json.loads("".join(page.scripts))
    assert told["records"][0]["said"] == EVIL and told["settings"]["model"] == EVIL


def test_the_page_fetches_nothing(results: Results) -> None:
    page = Tags()
    page.feed(render(results))
    assert not [v for name, v in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert "link" not in page.tags and "@import" not in render(results) and "url(" not in render(results)


def test_embedded_json_cannot_end_its_element() -> None:
    text = str(embedded_json({"a": EVIL, "b": "<!--"}))
    assert not re.search(r"[<>&\u2028]", text) and json.loads(text) == {"a": EVIL, "b": "<!--"}


def test_the_page_shows_each_plan_task_and_the_advice(results: Results) -> None:
    html = render(results)
    for word in ("snapkv 32", "random 32", "needle", "perplexity", "Question-aware", "Question-agnostic", "--max-drop"):
        assert word in html
    assert html.count("<svg") == 4 and html.count('class="heat"') == 2
    assert results.advice[0].reason.split(";")[0].split(":")[0] in html


def test_results_without_right_and_wrong_or_with_one_prompt_render(settings: Any) -> None:
    made = settings(tasks=("perplexity",))
    rows = [record("perplexity", 0, name, 2.0) for name in ("full", "snapkv 32")]
    done = conclude(made, rows, text="t", machine=MACHINE, peak="p", wanted=4)
    assert "stopped early: 2 of 4" in render(done)
    json.dumps(done.to_json(), allow_nan=False)
    nothing = conclude(made, [], text="t", machine=MACHINE, peak="p", wanted=4)
    assert "stopped early: 0 of 4" in render(nothing)


def test_the_terminal_shows_the_same_numbers(results: Results) -> None:
    out = StringIO()
    show(results, Console(file=out, width=140))
    text = out.getvalue()
    assert "75% [41, 93]" in text and "9.8 KiB" in text and "20.0" in text and "[bold" not in text
    narrow = StringIO()
    show(results, Console(file=narrow, width=80))
    wanted = {bytes_text(row.peak_bytes) for row in results.summary.plans}
    assert "…" not in narrow.getvalue() and all(peak in narrow.getvalue() for peak in wanted)


def test_front_ticks_and_labels() -> None:
    assert pareto([(1, 0.5), (2, 0.4), (2, 0.9), (3, 0.9), (1, 0.5)]) == {0, 2, 4}
    assert nice_ticks(0, 47) == [0, 10, 20, 30, 40, 50]
    ticks = nice_ticks(0.31, 1.02)
    assert ticks[0] <= 0.31 and ticks[-1] >= 1.02 and len(ticks) <= 7
    heights = sorted(spread([10, 11, 12, 200], 0, 210))
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(heights)) and heights[-1] <= 210
    assert dodge([5.0, 50.0]) == [5.0, 50.0] and sorted(dodge([5.0, 5.0])) == [3.5, 6.5]


def test_heat_map_puts_depths_where_they_belong() -> None:
    rows = [record("needle", i, "p", float(i == 0)) for i in range(3)]  # depths 1/2, 1/4, 3/4
    heat = heat_map(rows, ["p"])
    assert heat is not None and [c.share for c in heat.rows[0].cells] == [None, 0.0, 1.0, 0.0]
    assert heat_map([record("perplexity", 0, "p", 1.0)], ["p"]) is None


def test_bytes_in_words() -> None:
    assert [bytes_text(n) for n in (12, 2048, 45 * 2**20, 3 * 2**30)] == ["12 B", "2.0 KiB", "45.0 MiB", "3.00 GiB"]
