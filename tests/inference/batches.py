"""Batches for the proofs, and the few ways of driving a model over them, attached or not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from tests.inference.zoo import PAD, VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

LENGTHS = (20, 13, 17)
"""Mixed, and all longer than the zoo's windows and chunks."""


@dataclass(frozen=True)
class Batch:
    """ids (B, N) long; real (B, N) bool; positions (B, N) long: a token's number among the real ones of its row, as
    `generate` gives it; each None where the model is to find out for itself."""

    ids: Tensor
    real: Tensor | None = None
    positions: Tensor | None = None

    @property
    def is_real(self) -> Tensor:
        """(B, N) bool."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.real is None else self.real

    def row(self, b: int) -> Batch:
        """One row alone, its padding removed."""
        ids = self.ids[b][self.is_real[b]][None]
        return padded(ids, torch.ones_like(ids, dtype=torch.bool))

    def then(self, more: Tensor) -> Batch:
        """The batch with `more` (B, T) real tokens at the end."""
        real = torch.cat([self.is_real, torch.ones_like(more, dtype=torch.bool)], 1)
        return padded(torch.cat([self.ids, more], 1), real)


def padded(ids: Tensor, real: Tensor) -> Batch:
    """A batch with the mask and positions that `generate` would give."""
    return Batch(ids, real, (real.long().cumsum(-1) - 1).clamp_min(0))


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """(batch, length) long, never a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def mixed(side: str, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Rows of these lengths, padded on the `left` or on the `right`."""
    longest = max(lengths)
    column = torch.arange(longest)
    length = torch.tensor(lengths)[:, None]
    real = column >= longest - length if side == "left" else column < length
    return padded(tokens(len(lengths), longest).masked_fill(~real, PAD), real)


def accepts_positions(model: PreTrainedModel) -> bool:
    """Does its forward take `position_ids`? Then `generate` passes them."""
    return "position_ids" in inspect.signature(model.forward).parameters


def run(
    model: PreTrainedModel, batch: Batch, pieces: tuple[int, ...] = (), cache: object = None
) -> tuple[Tensor, object]:
    """Logits (B, N, V), on the CPU, of the batch and the cache it left, fed in pieces of these lengths (all at once
    without any), on the model's device.

    A given cache already holds every column before the pieces, which then are the end of the batch.
    """
    pieces = pieces or (batch.ids.shape[1],)
    start = batch.ids.shape[1] - sum(pieces)
    out = []
    for size in pieces:
        end = start + size
        given: dict[str, object] = {"past_key_values": cache, "use_cache": True}
        if batch.real is not None:
            given["attention_mask"] = batch.real[:, :end].long().to(model.device)
        if batch.positions is not None and accepts_positions(model):
            given["position_ids"] = batch.positions[:, start:end].to(model.device)
        result = model(input_ids=batch.ids[:, start:end].to(model.device), **given)
        cache = getattr(result, "past_key_values", None)  # recurrent models without attention have other names
        out.append(result.logits.cpu())
        start = end
    return torch.cat(out, 1), cache


def generate(model: PreTrainedModel, batch: Batch, new: int, **how: object) -> tuple[Tensor, Tensor]:
    """Tokens (rows, N + new) and raw logits (rows, new, V) of `generate`, seeded."""
    torch.manual_seed(7)
    result = model.generate(
        batch.ids.to(model.device),
        attention_mask=batch.is_real.long().to(model.device),
        max_new_tokens=new,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **how},
    )
    return result.sequences.cpu(), torch.stack(result.logits, 1).cpu()
