"""The independent check: the model's own eager attention, recomputed in full, with keys struck out head by head.

Nothing of regard is used here. An attention function of transformers' interface hands every call on to the model's own
eager function, after blanking in its mask what `allowed` says this layer's queries may not see.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache

import torch
from tests.inference.batches import Batch, run
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "struck_out_eager"
_calls: list[int] = []
_allowed: list[Callable[[int], Tensor | None]] = []


def _own_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    for cls in type(module).__mro__:
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise LookupError(f"{type(module).__name__} has no eager attention function beside it")


def _struck_out(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: object
) -> tuple[Tensor, Tensor]:
    allowed = _allowed[-1](_calls[-1])
    _calls[-1] += 1
    if allowed is not None:
        assert attention_mask is not None, "eager attention came without a mask"
        each = allowed.to(query.device).repeat_interleave(query.shape[1] // allowed.shape[1], 1)
        attention_mask = attention_mask.masked_fill(~each, torch.finfo(query.dtype).min)
    return _own_eager(module)(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _struck_out)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def _counting(allowed: Callable[[int], Tensor | None]) -> Iterator[list[int]]:
    _calls.append(0)
    _allowed.append(allowed)
    try:
        yield _calls
    finally:
        _calls.pop()
        _allowed.pop()


@lru_cache(maxsize=4)
def eager_copy(model: PreTrainedModel, name: str = "eager") -> PreTrainedModel:
    """The same weights in a model of its own."""
    copy = deepcopy(model)
    copy.set_attn_implementation(name)
    return copy


def attention_calls(model: PreTrainedModel, batch: Batch) -> int:
    """How often a forward reaches the attention interface: 0 for a model that it cannot route."""
    with _counting(lambda number: None) as calls:
        run(eager_copy(model, NAME), batch)
        return calls[-1]


def logits_under(model: PreTrainedModel, batch: Batch, allowed: Callable[[int], Tensor | None]) -> Tensor:
    """Logits (B, N, V), no cache; allowed(call number) (B, Hkv, N, N) bool strikes keys out of the model's own mask."""
    with _counting(allowed):
        return run(eager_copy(model, NAME), batch)[0]
