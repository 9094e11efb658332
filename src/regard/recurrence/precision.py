"""States, sums and solves keep their dtype under torch.autocast, which would take their products in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def outside_autocast(form: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """The function, with autocast off on the device of its first argument `q` while it runs."""

    @wraps(form)
    def run(q: Tensor, *rest: Rest.args, **named: Rest.kwargs) -> Result:
        if not torch.amp.is_autocast_available(q.device.type) or not torch.is_autocast_enabled(q.device.type):
            return form(q, *rest, **named)
        with torch.autocast(q.device.type, enabled=False):
            return form(q, *rest, **named)

    return run
