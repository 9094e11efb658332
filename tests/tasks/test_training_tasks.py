"""Training tasks: what MQAR, copying and the bytes of the standard library hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.registry import entries
from regard.tasks.training import IGNORE, Batch, TrainingTask, parse_training
from regard.tasks.training.copying import Copying
from regard.tasks.training.mqar import MQAR
from regard.tasks.training.python_bytes import Bytes, is_held_out, read_corpus, standard_library


def draw(task: TrainingTask, size: int = 32, seed: int = 0) -> Batch:
    return task.batch(torch.Generator().manual_seed(seed), size)


def look_up(tokens: torch.Tensor, pairs: int) -> torch.Tensor:
    """The oracle: in each row, a dictionary of the pairs; what it says of every later token that it knows."""
    said = torch.full_like(tokens, IGNORE)
    for row, of in zip(tokens.tolist(), said, strict=True):
        value = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        for at, token in enumerate(row[2 * pairs :], start=2 * pairs):
            of[at] = value.get(token, IGNORE)
    return said


GRID = [MQAR(), MQAR(length=128, pairs=32, vocab=130), MQAR(length=64, pairs=4, vocab=8192, power=1.0), MQAR(4, 1, 6)]


@pytest.mark.parametrize("task", GRID, ids=str)
def test_mqar_rows(task: MQAR) -> None:
    tokens, labels = draw(task)
    half, written = task.vocab // 2, 2 * task.pairs
    assert tokens.shape == labels.shape == (32, task.length) and tokens.dtype == labels.dtype == torch.long
    keys, values = tokens[:, 0:written:2], tokens[:, 1:written:2]
    assert 1 <= keys.min() and keys.max() < half <= values.min() and values.max() < task.vocab
    for drawn in (keys, values):
        assert all(len(set(row)) == task.pairs for row in drawn.tolist()), "no key and no value twice"
    scored = labels != IGNORE
    assert (scored.sum(-1) == task.pairs).all() and not scored[:, :written].any()
    later = tokens[:, written:]
    assert not later[:, 1::2].any(), "keys stand at the first token of their slot"
    asked = [sorted(t for t in row if t) for row in later.tolist()]
    assert asked == [sorted(row) for row in keys.tolist()], "each key once more, nothing else, and no answer"


@pytest.mark.parametrize("task", GRID, ids=str)
def test_the_oracle_is_always_right_and_shuffled_values_are_chance(task: MQAR) -> None:
    tokens, labels = draw(task, 200)
    assert torch.equal(look_up(tokens, task.pairs), labels)
    scored = labels != IGNORE
    order = torch.rand(200, task.pairs, generator=torch.Generator().manual_seed(1)).argsort(-1)
    mixed = tokens.clone()
    mixed[:, 1 : 2 * task.pairs : 2] = tokens[:, 1 : 2 * task.pairs : 2].gather(1, order)
    right = (look_up(mixed, task.pairs) == labels)[scored].double().mean().item()
    chance, count = 1 / task.pairs, 200 * task.pairs
    assert abs(right - chance) <= 5 * (chance * (1 - chance) / count) ** 0.5


def test_slots_follow_the_power_law() -> None:
    """One pair: its slot is one draw from p. Several: without replacement, so the first drawn is."""
    task = MQAR(length=22, pairs=1, vocab=24, power=0.3)
    at = (draw(task, 20_000).labels != IGNORE).long().argmax(-1)
    assert (at % 2 == 0).all()
    found = torch.bincount((at - 2) // 2, minlength=10).double() / 20_000
    x = torch.arange(1, 11, dtype=torch.float64)
    wanted = 0.3 * x ** (0.3 - 1)
    wanted /= wanted.sum()
    assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / 20_000).sqrt()).all()
    even = (draw(MQAR(length=22, pairs=1, vocab=24, power=1.0), 20_000).labels != IGNORE).long().argmax(-1)
    assert (torch.bincount((even - 2) // 2, minlength=10) - 2000).abs().max() < 5 * (20_000 * 0.09) ** 0.5


def test_random_non_queries_fill_the_rest_and_change_no_label() -> None:
    task = MQAR(length=64, pairs=4, vocab=1024, random_non_queries=True)
    tokens, labels = draw(task, 64)
    assert (tokens == 0).sum() < 20 and (labels != IGNORE).sum() == 64 * 4
    assert torch.equal(look_up(tokens, 4)[labels != IGNORE], labels[labels != IGNORE])


def test_the_curriculum_ends_with_the_task_itself() -> None:
    task = MQAR(pairs=16)
    assert [task.at(x).pairs for x in (0.0, 0.4, 0.5, 0.6, 1.0)] == [4, 4, 8, 16, 16]
    assert MQAR(curriculum=False).at(0.0) == MQAR(curriculum=False) and task.at(0.6) is task


@pytest.mark.parametrize("name", ["mqar", "mqar(random_non_queries=True)", "copying", "bytes(length=32)"])
def test_a_seed_gives_the_same_rows(name: str) -> None:
    task = parse_training(name)
    first, again, other = draw(task, seed=3), draw(task, seed=3), draw(task, seed=4)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.tokens, other.tokens)
    assert parse_training(str(task)) == task
    assert first.tokens.shape == (32, task.width) and int(first.tokens.max()) < task.vocabulary


def test_copying_asks_for_what_was_read() -> None:
    tokens, labels = draw(Copying(length=10, vocab=7))
    assert (tokens[:, 5] == 0).all() and (tokens[:, :5] > 0).all() and (labels[:, :5] == IGNORE).all()
    assert torch.equal(labels[:, 5:], tokens[:, :5]) and torch.equal(tokens[:, 6:], labels[:, 5:-1])


def test_bytes_are_the_library_in_windows() -> None:
    corpus = standard_library()
    assert corpus.train.dtype == torch.uint8 and len(corpus.train) > 5 * len(corpus.held_out) > 0
    generator = torch.Generator().manual_seed(0)
    for split, text in (("train", corpus.train), ("held-out", corpus.held_out)):
        tokens, labels = Bytes(length=40).batch(generator, 8, split)  # type: ignore[arg-type]
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        whole = bytes(text.tolist())
        assert all(
            bytes([*row, last]) in whole for row, last in zip(tokens.tolist(), labels[:, -1].tolist(), strict=True)
        )


def test_files_are_held_out_by_their_path(tmp_path: Path) -> None:
    names = [f"package/module_{i}.py" for i in range(40)]
    left_out = ["test/a.py", "site-packages/b.py", "package/tests/c.py", "_sysconfigdata_x.py"]
    for name in [*names, *left_out]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    corpus = read_corpus(tmp_path)
    splits = {"train": bytes(corpus.train.tolist()), "held-out": bytes(corpus.held_out.tolist())}
    wanted = {
        split: "".join(f"<{n}>\0" for n in sorted(names) if is_held_out(n) == (split == "held-out")).encode()
        for split in splits
    }
    assert splits == wanted and wanted["held-out"]
    assert read_corpus(tmp_path).digest == corpus.digest
    (tmp_path / "package" / "another.py").write_text("x")
    assert read_corpus(tmp_path).digest != corpus.digest


def test_no_sources_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no sources"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mqar(length=63)", "length: got 63"),
        ("mqar(length=64,pairs=17)", "≥ 68"),
        ("mqar(vocab=64)", "above length=64"),
        ("mqar(vocab=1025)", "even"),
        ("mqar(power=0)", "power: got 0"),
        ("mqar(pairs=0)", "pairs: got 0"),
        ("mqar(curriculum=1)", "True or False"),
        ("mqar(pair=3)", "did you mean pairs"),
        ("mqra", "did you mean mqar"),
        ("needle", "known: bytes, copying, mqar"),
        ("mqar(", "NAME"),
        ("copying(length=7)", "length"),
        ("copying(vocab=1)", "vocab: got 1"),
        ("bytes(length=0)", "length: got 0"),
    ],
)
def test_what_is_refused(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_training(name)


def test_they_are_registered_apart_from_the_tasks_of_compare() -> None:
    assert {e.key for e in entries("training-task")} == {"mqar", "copying", "bytes"}
    with pytest.raises(UnknownNameError):
        parse_training("perplexity")


def test_windows_longer_than_the_text_are_refused() -> None:
    with pytest.raises(ArgumentError, match="what there is"):
        Bytes(length=2**20).batch(torch.Generator(), 1, "held-out")
