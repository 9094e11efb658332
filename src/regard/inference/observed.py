"""What was observed of one layer for its policy: the last queries and sums of weights, kept by position.

By position and not by slot, so that entries may move and go without it being told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from regard.errors import StoreError
from regard.inference import observe
from regard.inference.call import AttentionCall, MaskRecipe
from regard.inference.lanes import PAGE, plain_tensors
from regard.inference.policy import LayerView, Needs

if TYPE_CHECKING:
    from regard.inference.store import KVStore


class Logits(NamedTuple):
    """How a layer turns products into logits; kept from its last call for policies that look again."""

    recipe: MaskRecipe
    scale: float
    softcap: float | None
    sinks: Tensor | None


@dataclass
class Observed:
    """window: q (B, Hq, W, D) of the last queries and their columns (B, W), −1 = missing. window_weights (B, 1, Hq, W,
    positions): their weights, where the cached keys are not what they attend to. sums (B, Hkv, positions) float32.

    Decoded tokens are added to the sums in place, and make room there for those to come, a page at a time: sums with
    room belong to one layer alone.
    """

    window: tuple[Tensor, Tensor] | None = None
    window_weights: Tensor | None = None
    sums: Tensor | None = None
    logits: Logits | None = None

    def prompt(self, call: AttentionCall, needs: Needs, store: KVStore, heads: int, latent: bool) -> None:
        """A forward of the prompt. heads: cached KV heads; latent: the model expands keys after caching them."""
        self.logits = Logits(call.recipe, call.scale, call.softcap, call.sinks)
        if needs.last_queries or needs.last_row:
            self.window = observe.last_queries(self.window, call, max(needs.last_queries, 1))
            if latent:
                self.window_weights = self._latent_weights(call, store)
        if needs.column_sums:
            total = observe.column_sums(call)
            if total.shape[1] != heads:
                total = total.unflatten(1, (heads, -1)).sum(2)
            if call.k_real is not None:
                total = total * (call.k_real if call.k_real.ndim == 3 else call.k_real[:, None])
            positions = call.k_positions
            while positions.ndim < 3:
                positions = positions.unsqueeze(-2) if positions.ndim == 2 else positions[None]
            self._add(total, positions, store)

    def token(self, q: Tensor, call: AttentionCall | None, store: KVStore) -> None:
        """A decoded token q (B, Hq, 1, D); `call` where the model expands keys after caching them."""
        columns, real = store.forward.last_column, store.forward.real
        if real is not None:  # a row's padding asks nothing
            columns = columns.where(real.to(columns.device), -1)
        self.window = (q.detach(), columns)
        if call is not None:
            self.window_weights = self._latent_weights(call, store)

    def add_token(self, view: LayerView, store: KVStore) -> None:
        """Add the newest query's weights to the sums, and to what the view shows of them."""
        view.column_sums = self.add(view.weights(1).sum((2, 3)) * view.exists, view.positions.clamp_min(0), store)

    def add(self, weights: Tensor, at: Tensor, store: KVStore) -> Tensor:
        """Add a decoded token's weights (B, Hkv, L) at these positions (B, Hkv, L). The sums there, (B, Hkv, L)."""
        if self.sums is None or self.sums.shape[2] < store.columns_now:
            with plain_tensors():
                held = weights.new_zeros((*weights.shape[:2], 0), dtype=torch.float32)
                held = held if self.sums is None else self.sums
                self.sums = pad(held, (0, store.columns_now + PAGE - held.shape[2]))
        self.sums.scatter_add_(2, at, weights.float())  # as the prompt's, of float64 keys too
        return self.sums.gather(2, at)

    def fork(self) -> Observed:
        """A copy of its own."""
        with plain_tensors():
            return replace(self, sums=None if self.sums is None else self.sums.clone())

    def show(self, view: LayerView, store: KVStore, last_row: bool) -> None:
        """Put what was observed into a view, by the positions of its slots."""
        at = view.positions.clamp_min(0)
        if self.sums is not None:
            view.column_sums = self._grown(store).gather(2, at)
        if self.window is None or self.logits is None:
            return
        view.last_queries, columns = self.window
        rows = torch.arange(len(columns), device=columns.device)
        view.query_positions = store.position(rows[:, None], columns)
        view.scale, view.softcap, view.sinks = self.logits.scale, self.logits.softcap, self.logits.sinks
        if self.window_weights is not None:
            wide = at[:, :, None, None].expand(-1, -1, *self.window_weights.shape[2:4], -1)
            view.window_weights = self.window_weights.gather(4, wide) * view.exists[:, :, None, None]
        elif self.logits.recipe.causal:
            view.visible = view.positions[:, :, None] <= view.query_positions[:, None, :, None]
        else:
            stored = store.column(rows[:, None, None], at)[:, :, None]
            zero = torch.zeros((), dtype=torch.long, device=columns.device)
            asked = columns.clamp_min(0)[:, None, :, None]
            view.visible = self.logits.recipe(rows.view(-1, 1, 1, 1), zero, asked, stored)
        if last_row:
            view.last_row = view.weights(1).mean((2, 3))

    def select_rows(self, rows: Tensor) -> None:
        """Row r becomes what row rows[r] was."""
        if self.window is not None:
            self.window = (self.window[0][rows], self.window[1][rows])
        self.window_weights = None if self.window_weights is None else self.window_weights[rows]
        with plain_tensors():
            self.sums = None if self.sums is None else self.sums[rows]

    def crop(self, columns: int) -> None:
        """Forget queries from that column on. Raises StoreError where their weights have been added up."""
        if self.sums is not None:
            raise StoreError("cannot remove tokens whose attention has been added to column sums (h2o)")
        if self.window is not None:
            self.window = (self.window[0], self.window[1].masked_fill(self.window[1] >= columns, -1))

    def _grown(self, store: KVStore) -> Tensor:
        """The sums of the columns so far: without room."""
        assert self.sums is not None
        return pad(self.sums, (0, store.columns_now - self.sums.shape[2]))

    def _add(self, total: Tensor, positions: Tensor, store: KVStore) -> None:
        held = total.new_zeros(*total.shape[:2], store.columns_now) if self.sums is None else self._grown(store).clone()
        self.sums = held.scatter_add_(2, positions.clamp_min(0).expand_as(total), total)

    def _latent_weights(self, call: AttentionCall, store: KVStore) -> Tensor:
        """(B, 1, Hq, W, P): the window's weights over the expanded keys, laid out by position."""
        assert self.window is not None
        q, columns = self.window
        rows = []
        for b in range(len(columns)):
            row = slice(b, b + 1)
            one = replace(
                call,
                q=q[row].to(call.k.dtype),
                k=call.k[row],
                v=call.v[row],
                q_columns=columns[b].clamp_min(0),
                q_real=columns[row] >= 0,
                recipe=_of_row(call.recipe, b),
                k_columns=call.k_columns if call.k_columns.ndim == 1 else call.k_columns[row],
                k_real=None if call.k_real is None else call.k_real[row],
                position_of=None if call.position_of is None else call.position_of[row],
                fresh=False,
            )
            found = observe.weights(one, slice(None)).flatten(1, 2)  # (1, Hq, W, M)
            if one.k_real is not None:
                found = found * one.k_real.reshape(1, 1, 1, -1)
            positions = one.k_positions.reshape(1, 1, 1, -1).expand_as(found).clamp_min(0)
            out = found.new_zeros(1, *found.shape[1:3], store.columns_now)
            rows.append(out.scatter_add_(3, positions, found))
        return torch.stack(rows)


def _of_row(recipe: MaskRecipe, b: int) -> MaskRecipe:
    """The recipe as seen by one row alone: its function keeps being asked about row b of the batch."""

    def mask_function(_: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return recipe(torch.full((), b, dtype=torch.long, device=j.device), h, i, j)

    return replace(recipe, mask_function=mask_function, by_element=False)
