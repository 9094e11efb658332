"""What a comparison is asked to do: checked whole before any work, and what of it a resumed run must share."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regard.choose import recommend
from regard.choose.runner import MODES, Mode
from regard.errors import ArgumentError, UnknownNameError, require
from regard.inference.budget import Budget
from regard.inference.compose import Scoped, parts_of
from regard.inference.head_table import packaged_tables
from regard.inference.plan import Plan
from regard.tasks import Task, parse
from regard.tasks.text import Text

BASELINE = "full"
PLANS = ("full", "streaming", "snapkv", "h2o", "keydiff", "tova", "knorm", "duoattention", "random")
TASKS = ("needle", "multi-needle", "recall", "perplexity")
LEAST_CONTEXT = 64


@dataclass(frozen=True)
class Settings:
    """A comparison. Text where a user writes text; `checked_*` and the functions below make it into things.

    context: prompt lengths in tokens. budget: as Budget takes them; each is given to every plan that names none.
    plans: None means all of PLANS that the model allows. samples: prompts for each task and length.
    """

    model: str
    context: tuple[int, ...]
    budget: tuple[str, ...]
    plans: tuple[str, ...] | None = None
    tasks: tuple[str, ...] = TASKS
    modes: tuple[Mode, ...] = MODES
    samples: int = 16
    seed: int = 0
    max_drop: float = 0.05
    objective: recommend.Objective = "memory"
    text: str | None = None
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raise ArgumentError for what can be seen to be wrong without loading anything."""
        require(bool(self.context), "context", "nothing", "one or more prompt lengths")
        for length in self.context:
            require(length >= LEAST_CONTEXT, "context", length, f"prompt lengths of at least {LEAST_CONTEXT} tokens")
        require(len(set(self.context)) == len(self.context), "context", self.context, "each length once")
        require(bool(self.budget), "budget", "nothing", "one or more budgets")
        for budget in self.budget:
            Budget.parse(budget)
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ArgumentError("device", repr(self.device), "a device of torch: cpu, cuda, cuda:1, …") from error
        require(self.samples >= 1, "samples", self.samples, "an integer ≥ 1")
        require(bool(self.tasks), "tasks", "nothing", "one or more tasks")
        for mode in self.modes:
            if mode not in MODES:
                raise UnknownNameError("mode", mode, MODES)
        require(bool(self.modes), "mode", "nothing", " or ".join(MODES))
        require(len(set(self.modes)) == len(self.modes), "mode", ", ".join(self.modes), "each mode once")
        recommend.check(self.max_drop, self.objective)
        self.checked_tasks()
        self.checked_plans()

    def checked_tasks(self) -> dict[str, Task]:
        """Tasks by their text form, each once."""
        made = [parse(text) for text in self.tasks]
        found = {str(task): task for task in made}
        require(len(found) == len(made), "tasks", ", ".join(self.tasks), "each task once")
        return found

    def checked_plans(self) -> dict[str, Plan]:
        """Plans by the name that tables give them, `full` first: what everything is compared with.

        A plan that names no budget is made once for each budget, and named `snapkv 512`.
        """
        found: dict[str, Plan] = {BASELINE: Plan.parse(BASELINE)}
        for text in self.asked_plans():
            bare = text == "duoattention" and self._table() is not None
            plan = Plan.parse(f"duoattention(table={self._table()})" if bare else text)
            needy = _lacks_budget(plan)
            for budget in self.budget if needy else ("",):
                name = f"{text} {budget}" if needy else text
                try:
                    made = (plan.with_budget(budget) if needy else plan).check()
                except ArgumentError as error:
                    raise ArgumentError("plans", repr(name), f"a plan that its budget suits ({error})") from error
                if made not in found.values():
                    require(name not in found, "plans", text, "each plan once")
                    found[name] = made
        require(
            len(found) > 1, "plans", ", ".join(self.plans or ()) or "nothing", f"at least one plan besides {BASELINE}"
        )
        return found

    def asked_plans(self) -> tuple[str, ...]:
        """The plans as written; of PLANS, what needs data that this model has not is left out (see `notices`)."""
        if self.plans is not None:
            return self.plans
        return tuple(text for text in PLANS if text != "duoattention" or self._table() is not None)

    def notices(self) -> list[str]:
        """What a reader of the results should know of the choice of plans."""
        left_out = set(PLANS) - set(self.asked_plans()) if self.plans is None else set()
        return [f"{name} is left out: no head table for {self.model} is packaged" for name in sorted(left_out)]

    def identity(self, text: Text) -> dict[str, Any]:
        """What a resumed run must have in common with the first: all that bears on a measurement."""
        return {
            "model": self.model,
            "context": list(self.context),
            "plans": {name: str(plan) for name, plan in self.checked_plans().items()},
            "tasks": list(self.checked_tasks()),
            "modes": list(self.modes),
            "seed": self.seed,
            "text": f"{text.source} ({text.digest})",
            "dtype": self.dtype,
            "device": self.device,
        }

    def _table(self) -> str | None:
        name = Path(self.model).name.lower()
        return name if name in packaged_tables() else None


def check_lengths(context: Sequence[int], room: int, longest: int | None) -> None:
    """Raise ArgumentError when prompt and answer together exceed the model's positions."""
    if longest is None:
        return
    for length in context:
        if length + room > longest:
            allowed = f"at most {longest - room}: the model's maximum of {longest}, less {room} for the answer"
            raise ArgumentError("context", length, allowed)


def check_writable(folder: Path) -> None:
    """Raise ArgumentError when `folder` cannot be made or written to. Found out by trying; nothing is left behind."""
    made: list[Path] = []
    try:
        for each in reversed([folder, *folder.parents]):
            if not each.exists():
                each.mkdir()
                made.append(each)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError("out", str(folder), f"a folder that can be written ({error.strerror})") from error
    finally:
        for each in reversed(made):
            each.rmdir()


def _lacks_budget(plan: Plan) -> bool:
    return any((p.policy if isinstance(p, Scoped) else p).lacks_budget for p in parts_of(plan.cache))
