"""One layer's entries as its policy sees them (`LayerView`) and what they lose: to the policy, when the prompt ends and
at each decoded token, and to the layer's own window."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from regard.inference.apply import Doubts, evict, lowest, oldest, select, settle
from regard.inference.call import AttentionCall
from regard.inference.lanes import PAGE
from regard.inference.observed import Observed
from regard.inference.policies.full import Full
from regard.inference.policy import CachePolicy, LayerView, Needs
from regard.inference.ragged import RaggedKV

if TYPE_CHECKING:
    from regard.inference.store import KVStore


class Seen(NamedTuple):
    """What a decoded token attended to, slot by slot: k (B, H, L, Dk), v (B, H, L, Dv), weights (B, H, G, L)."""

    k: Tensor
    v: Tensor
    weights: Tensor


class PrunedLayer:
    """Ragged storage, what the layer's policy asked to observe, and the policy's acts.

    `direct`: attention's keys are the cached ones (true of all but latent attention).
    """

    def __init__(self, store: KVStore, number: int, direct: bool, sliding_window: int | None = None) -> None:
        self.store, self.number, self.direct = store, number, direct
        self.sliding_window = sliding_window  # what transformers' own cache would keep of such a layer
        self.storage: RaggedKV | None = None
        self.observed = Observed()
        self._needs, self._weighs = Needs(), False  # what a step needs to see; by the weights of its token?
        self._slides: int | None = None  # as the policy says
        self._has_window = False  # do all lanes have room for more than the tokens that it never drops?
        self._first: int | None = None  # as many of those does every lane hold
        self.limits = None
        self.doubts: Doubts = []  # scores of steps, to be looked at when someone waits for the device anyway
        self._seen: Seen | None = None  # by the newest query
        self.pruned = False
        self.horizon: Tensor | None = None  # (B,) on the CPU: smallest position that may still be held behind a window
        self.watched = 0  # columns when the prompt was last observed for the policy
        self._before: tuple[int, Observed] | None = None  # what was observed before the forward from that column on

    @property
    def limits(self) -> Tensor | None:
        """(B, H) on the CPU: entries a lane may hold while decoding; None = as many as come."""
        return self._limits

    @limits.setter
    def limits(self, limits: Tensor | None) -> None:
        self._limits = limits
        self._limit: int | None = None  # of all lanes, if they have one
        self._limits_there: tuple[Tensor, Tensor] | None = None  # limits, and limits + 1, on the device
        if limits is not None and limits.numel():
            least, most = int(limits.min()), int(limits.max())
            self._limit = least if least == most else None
            self._has_window = self._slides is not None and least > self._slides

    def reset(self) -> None:
        """Forget everything."""
        self.storage = self.limits = self._seen = None
        self.observed, self.doubts = Observed(), []
        self.pruned = False
        self.horizon, self.watched, self._before = None, 0, None

    # ---- the prompt

    def watch(self, call: AttentionCall, needs: Needs) -> None:
        """Observe a forward of the prompt for the policy."""
        assert self.storage is not None
        self._before, self.observed = (self.store.forward.offset, self.observed), replace(self.observed)
        self.watched = self.store.columns_now
        self.observed.prompt(call, needs, self.store, self.storage.heads, latent=not self.direct)

    def unwatch(self, offset: int) -> None:
        """The forward from that column on failed: what was observed of it did not happen."""
        if self._before is not None and self._before[0] == offset:
            self.observed, self.watched = self._before[1], min(self.watched, offset)

    def view(self, sort: bool = True, last_row: bool = False) -> LayerView:
        """The layer as its policy sees it."""
        assert self.storage is not None
        k, v, positions = self.storage.padded(sort=sort)
        view = LayerView(
            layer=self.number,
            layers=self.store.caching_layers,
            k=k,
            v=v,
            positions=positions,
            lengths=self.storage.lengths.to(k.device),
            prompt=self.store.prompt.to(k.device),
        )
        self.observed.show(view, self.store, last_row)
        return view

    def seal(self, policy: CachePolicy) -> None:
        """The prompt has ended: the policy keeps what its budget allows, the rest is freed."""
        self.settle_doubts()
        if self.storage is None or not bool((self.storage.lengths > 0).any()):
            return
        if not isinstance(policy, Full):  # a budget is for what can still be seen
            self.forget_unreachable(spare=0)
        view = self.view(last_row=policy.needs_at(self.number).last_row)
        index, counts = select(policy, view)
        if bool((counts.cpu() < self.storage.lengths).any()):
            self.storage.keep(index, counts)
            self.pruned = True
        if policy.acts == "step":
            self.allow(policy.limits(view).cpu())
        else:
            self.observed = Observed()

    def allow(self, limits: Tensor) -> None:
        """From now on a lane holds at most limits (B, H), on the CPU, after each decoded token: the policy steps."""
        assert self.storage is not None
        policy = self.store.plan.cache
        self._needs, self._slides = policy.needs_at(self.number), policy.slides
        self._weighs = self._needs.last_row or self._needs.column_sums
        self.limits = limits
        self._first = None
        if self._has_window and self.sliding_window is None:
            assert self._slides is not None
            positions = self.storage.padded()[2]
            held = ((positions >= 0) & (positions < self._slides)).sum(-1).cpu()
            first = held + (self._slides - self.store.counts).clamp_min(0)[:, None]  # those that are still to come
            if first.numel() and bool((first == first[0, 0]).all()):
                self._first = int(first[0, 0])

    # ---- a step

    def settle_doubts(self) -> None:
        """Raise NotFiniteError where a step met NaN. Steps themselves do not wait for the device to tell: one in 64
        does."""
        doubts, self.doubts = self.doubts, []
        settle(doubts)

    def step(self, policy: CachePolicy, q: Tensor, call: AttentionCall | None) -> None:
        """A token was decoded: a policy that acts on steps drops as much as came in."""
        seen, self._seen = self._seen, None
        if len(self.doubts) >= PAGE:
            self.settle_doubts()
        if self.storage is None or self._limits is None:
            return
        length, limit = self.storage.uniform, self._limit
        if length is None or limit is None or not self._sees_all(call, seen):
            self._step_apart(policy, q, call)
            return
        positions = sums = None
        if self._needs.any:
            self.observed.token(q, None, self.store)
        if seen is not None and self._needs.column_sums:
            positions = self.storage.positions()
            sums = self.observed.add(seen.weights.sum(2), positions, self.store)
        if length <= limit:
            return
        self.pruned = True
        if self._first is not None:
            self.storage.slide(self._first)
            return
        positions = self.storage.positions() if positions is None else positions
        if self._has_window:
            assert self._slides is not None
            self.storage.vacate(oldest(positions, self._slides))
        else:
            self.storage.vacate(lowest(policy, self._view_alike(positions, seen, sums), self.doubts))

    def _sees_all(self, call: AttentionCall | None, seen: Seen | None) -> bool:
        """Does the policy need nothing of the token but what it attended to, which was all that the store holds?"""
        if not self._needs.any:
            return True
        logits = self.observed.logits
        known = seen is not None or not self._weighs
        return known and call is None and logits is not None and logits.recipe.causal

    def _view_alike(self, positions: Tensor, seen: Seen | None, sums: Tensor | None) -> LayerView:
        """What `view` shows after a token, where all lanes have one length and one limit, and all of it is seen."""
        assert self.storage is not None and self._limits is not None
        pair = seen or self.storage.side_by_side()
        assert pair is not None
        if self._limits_there is None:
            there = self._limits.to(positions.device)
            self._limits_there = there, there + 1
        view = LayerView(
            layer=self.number,
            layers=self.store.caching_layers,
            k=pair[0],
            v=pair[1],
            positions=positions,
            lengths=self._limits_there[1],
            prompt=self.store.prompt.to(positions.device, non_blocking=True),
            column_sums=sums,
            target=self._limits_there[0],
            limit=self._limit,
        )
        logits = self.observed.logits
        if self.observed.window is not None and logits is not None:
            view.last_queries, view.query_positions = self.observed.window[0], self.store.forward.positions
            view.scale, view.softcap, view.sinks = logits.scale, logits.softcap, logits.sinks
        if seen is not None and self._needs.last_row:
            view.last_row = seen.weights.mean(2)
        return view

    def _step_apart(self, policy: CachePolicy, q: Tensor, call: AttentionCall | None) -> None:
        """The step of lanes of different lengths or limits, of latent keys, and under masks of the layer's own."""
        assert self.storage is not None and self._limits is not None
        over = self.storage.lengths > self._limits
        if self._needs.any:
            self.observed.token(q, call, self.store)
        elif not bool(over.any()):
            return
        elif self._first is not None and self.storage.together(over):
            self.storage.slide(self._first, over)
            self.pruned = True
            return
        elif self._has_window:
            assert self._slides is not None
            self.storage.drop(oldest(self.storage.positions(), self._slides), over)
            self.pruned = True
            return
        view = self.view(sort=False, last_row=self._needs.last_row)
        if self._needs.column_sums:
            self.observed.add_token(view, self.store)
        if bool(over.any()):
            if self._has_window:
                assert self._slides is not None
                slot = oldest(view.positions, self._slides)
            else:
                slot = evict(policy, view, self._limits.to(view.k.device), self.doubts)
            self.storage.drop(slot, over)
            self.pruned = True

    # ---- the layer's own window

    def forget_unreachable(self, spare: int = PAGE) -> None:
        """Drop what the layer's own window has passed: no later query sees it. At the end of a forward it is done by
        the page.

        Each lane waits for `spare` such entries of its own: what a row holds must not depend on its neighbours."""
        window = self.sliding_window
        if window is None or self.storage is None or self.storage.longest < window + spare:
            return
        due = self.storage.lengths >= window + spare
        oldest = (self.store.counts - window + 1).clamp_min(0)  # what the next query still sees
        positions = self.storage.padded(sort=True)[2]
        stays = positions >= (oldest[:, None] * due).to(positions.device)[..., None]
        counts = stays.sum(-1)
        index = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(counts.max())]
        self.storage.keep(index, counts)
        passed = oldest * due.any(1)
        self.horizon = passed if self.horizon is None else torch.maximum(self.horizon, passed)
