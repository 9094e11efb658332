"""The trainer: it learns, it is the same for the same seed, it goes on after kill −9 and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.train.small import TASK, quick, small
from torch import Tensor

from regard.errors import ArgumentError, CheckpointError, NotFiniteError
from regard.inference.saved import save_state
from regard.models import CausalLM, CausalLMConfig, Mixer
from regard.tasks.training import Batch, TrainingTask, parse_training
from regard.train.evaluation import Score, evaluate
from regard.train.settings import TrainSettings
from regard.train.trainer import Step, train


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Sums in the order of one thread: what is compared bitwise must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(model: CausalLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: CausalLM, b: CausalLM) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_it_learns_to_copy() -> None:
    """A vocabulary of 4 and texts of 3 are learnt in seconds; chance is one in three."""
    task, model = parse_training("copying(length=6,vocab=4)"), small("0:1")
    got = train(model, task, quick(steps=120, batch=32, lr=2e-2, evaluate_every=120, held_out=64))
    assert got.last is not None and got.last.accuracy > 0.9 and not got.interrupted


def test_the_curve_is_what_evaluate_says_and_steps_are_all_reported() -> None:
    model, seen = small(), list[Step]()
    got = train(model, TASK, quick(), report=seen.append)
    assert [p.step for p in got.curve] == [5, 10, 12] and [s.done for s in seen] == list(range(1, 13))
    losses = [s.loss for s in seen]
    assert got.curve[1].training_loss == pytest.approx(sum(losses[5:10]) / 5)
    score = evaluate(model, TASK, rows=10, seed=0)
    assert got.last is not None and (got.last.loss, got.last.accuracy) == (score.loss, score.accuracy)
    assert not model.training


def test_held_out_rows_are_those_of_the_seed() -> None:
    model = small()
    assert evaluate(model, TASK, rows=10, seed=0) == evaluate(model, TASK, rows=10, seed=0)
    assert evaluate(model, TASK, rows=10, seed=1) != evaluate(model, TASK, rows=10, seed=0)
    assert Score(0.5, 0.0).bits == pytest.approx(0.7213475)


def test_evaluation_by_hand() -> None:
    """More rows than go at a time: sums over all labels, not means of means."""
    model, task = small(), parse_training("copying(length=2,vocab=10)")
    generator = torch.Generator().manual_seed(7 + 1_000_003)
    batches = [task.batch(generator, size) for size in (128, 2)]
    tokens, labels = (torch.cat(parts)[:, 1:] for parts in zip(*batches, strict=True))
    logits = model(torch.cat([b.tokens for b in batches])).logits[:, 1]
    score = evaluate(model, task, rows=130, seed=7)
    assert tokens.eq(0).all() and score.accuracy == (logits.argmax(-1) == labels[:, 0]).double().mean().item()
    assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels[:, 0]).item(), rel=1e-5)


def test_the_first_step_by_hand() -> None:
    """AdamW's first step is lr·sign(g) where g is not tiny, after decay of the matrices alone."""
    model, before = small("0:1"), small("0:1")
    train(model, TASK, quick(steps=1, warmup=2, lr=1e-2, clip=1e9, decay=0.5))
    batch = TASK.batch(torch.Generator().manual_seed(0), 4)
    logits = before(batch.tokens).logits
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.labels).backward()
    named = dict(before.named_parameters())
    for name, now in model.named_parameters():
        was, gradient = named[name].detach(), named[name].grad
        decayed = was.ndim >= 2 and name != "embedding.weight"
        wanted = was * (1 - 5e-3 * 0.5 * decayed) - 5e-3 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(now.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_the_rate() -> None:
    settings = TrainSettings(steps=110, warmup=10, lr=2.0)
    assert [settings.rate(s) for s in (0, 9)] == [0.2, 2.0]
    assert settings.rate(60) == pytest.approx(1.0) and 0 < settings.rate(109) < 0.001


def test_load_balance_is_added() -> None:
    """MoH's routers learn from its loss: another weight of it, other routers."""
    with_loss, without = small("1:0"), small("1:0")
    for model, weight in ((with_loss, 1.0), (without, 0.0)):
        train(model, TASK, quick(steps=3, auxiliary=weight))
    assert not same(with_loss, without)


def test_what_layers_call_loss_is_added_as_it_is() -> None:
    """The gates of selected attention learn from it: another weight of it in the layer, other gates."""
    models = []
    for weight in (0.0, 1.0):
        torch.manual_seed(5)
        mixer = Mixer("selective-attention-hybrid", 2, {"loss_weight": weight, "rows": 1})
        models.append(CausalLM(CausalLMConfig(10, 8, (mixer,))))
        train(models[-1], TASK, quick(steps=3, auxiliary=0.0))
    assert not same(*models)


def test_a_seed_gives_the_same_weights() -> None:
    models = [small() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, TASK, quick(seed=seed))
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_killed_and_gone_on_with_is_never_stopped(tmp_path: Path) -> None:
    """kill −9 between two checkpoints and two evaluations: the same weights, the same curve but for the seconds."""
    after, file = 6, tmp_path / "checkpoint.safetensors"
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "tests.train.killed", str(file), str(after)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with safe_open(file, "pt") as held:
        assert json.loads(held.metadata()["meta"])["progress"]["step"] == 4
    broken, whole, seen = small(), small(), list[Step]()
    torch.manual_seed(99)  # whatever the new process drew before
    resumed = train(broken, TASK, quick(), save_to=file, resume=True, report=seen.append)
    unbroken = train(whole, TASK, quick())
    assert seen[0].done == 5
    assert same(broken, whole)
    for a, b in zip(resumed.curve, unbroken.curve, strict=True):
        assert replace(a, seconds=0.0) == replace(b, seconds=0.0)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model, again, file = small(), small(), tmp_path / "c.safetensors"
    first = train(model, TASK, quick(), save_to=file)
    second = train(again, TASK, quick(), save_to=file, resume=True, report=lambda _: pytest.fail("a step"))
    assert same(model, again) and second == first


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "c.safetensors"

    def press(step: Step) -> None:
        if step.done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    got = train(model, TASK, quick(), save_to=file, report=press)
    assert got.interrupted and got.step == 2 and file.exists()
    assert signal.getsignal(signal.SIGINT) is handler
    whole = small()
    train(whole, TASK, quick())
    assert not train(model, TASK, quick(), save_to=file, resume=True).interrupted and same(model, whole)


def test_a_second_ctrl_c_stops_at_once() -> None:
    def press(step: Step) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(small(), TASK, quick(), report=press)


def test_it_trains_outside_the_main_thread() -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(train(small(), TASK, quick(steps=2)).step))
    thread.start()
    thread.join()
    assert done == [2]


def test_bf16_is_only_asked_for() -> None:
    """float32 by default; under autocast other numbers come out."""
    plain, half = small(), small()
    train(plain, TASK, quick(steps=2))
    train(half, TASK, quick(steps=2, bf16=True))
    assert half.embedding.weight.dtype == torch.float32 and not same(plain, half)


class Broken(TrainingTask):
    """A task whose labels are out of the vocabulary's range never: its tokens make the loss infinite by hand."""

    key = "broken"
    vocabulary = 10  # type: ignore[assignment]

    def batch(self, generator: torch.Generator, size: int, split: str = "train") -> Batch:
        return TASK.batch(generator, size)

    def __str__(self) -> str:
        return self.key


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = small()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"step 1 is nan: a lower learning rate \(--lr\) may help$"):
        train(model, Broken(), quick())


def test_another_run_s_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    train(small(), TASK, quick(), save_to=file)
    for model, task, settings, name in (
        (
            small("0:1"),
            TASK,
            quick(),
            r"with layer 0=moh in 4 heads; .*=multi-head-attention\(rotary=True\) in 4 heads",
        ),
        (CausalLM(replace(small().config, dim=16)), TASK, quick(), "with dim=8; allowed: one with dim=16"),
        (small(), parse_training("mqar(length=8,pairs=1,vocab=10)"), quick(), "task"),
        (small(), TASK, quick(lr=1e-2), "lr=0.003"),
    ):
        with pytest.raises(ArgumentError, match=name):
            train(model, task, settings, save_to=file, resume=True)
    train(small(), TASK, quick(save_every=7), save_to=file, resume=True)


def test_spoilt_and_foreign_files_are_refused(tmp_path: Path) -> None:
    file, model = tmp_path / "c.safetensors", small()
    train(model, TASK, quick(), save_to=file)
    whole = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            train(small(), TASK, quick(), save_to=file, resume=True)

    file.write_bytes(whole[:-9])
    refused("a part of one")
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    refused("checksum|safetensors")
    file.write_bytes(b"")
    refused("safetensors")
    save_state(file, {"x": torch.zeros(1)}, {"plan": "full"})
    refused("not a checkpoint of a training run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"lr": float("inf")}, "lr"),
        ({"warmup": -1}, "warmup"),
        ({"decay": -0.1}, "decay"),
        ({"beta2": 1.0}, "beta2"),
        ({"batch": 2.5}, "batch"),
        ({"seed": 10**20}, r"seed: got 1\d*; allowed: an int from 0 to"),
    ],
)
def test_settings_that_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        quick(**change)


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ArgumentError, match="vocab 10"):
        train(small(), parse_training("mqar(length=8,pairs=2,vocab=12)"), quick())


def test_no_place_for_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="path"):
        train(small(), TASK, quick(save_every=1), save_to=tmp_path / "nowhere" / "c.safetensors")
