"""From scores and a budget to slots: which entries of each lane stay, and which one goes at a step.

Deterministic: of equal scores the earlier position stays; of more MUST entries than a lane may keep, the most recent.
Exact: each lane keeps as many entries as the policy's counts say, or all it holds where that is fewer.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from regard.errors import ArgumentError, NotFiniteError
from regard.inference.compose import Composed
from regard.inference.lanes import ABSENT
from regard.inference.policy import MUST, CachePolicy, LayerView


def select(policy: CachePolicy, view: LayerView) -> tuple[Tensor, Tensor]:
    """What a policy keeps of a layer: index (B, H, K) long into the view's slots, in order of position; counts (B, H).

    The view's slots must be in order of position. K is the largest count; beyond a lane's count its index is 0 and
    means nothing. A composition acts in order, each part on what the one before it kept. Raises NotFiniteError,
    naming the policy, when a score is NaN.
    """
    if not isinstance(policy, Composed):
        return _select(policy, view)
    index, counts = _everything(view)
    for number, part in enumerate(policy.parts):
        if number == 0:
            index, counts = _select(part, view)
        else:
            chosen, counts = _select(part, narrow(view, index, counts))
            index = index.gather(-1, chosen)
    return index, counts


Doubts = list[tuple[CachePolicy, Tensor]]
"""Policies and their lowest scores (B, H, 1), not yet looked at: a NaN among a lane's scores is its lowest."""


def settle(doubts: Doubts) -> None:
    """Look at them, which waits for the device. Raises NotFiniteError, naming the policy, for a score that is NaN."""
    if doubts and bool(torch.cat([scores for _, scores in doubts]).isnan().any()):
        policy = next(policy for policy, scores in doubts if bool(scores.isnan().any()))
        raise NotFiniteError(f"{policy} scored a key NaN: NaN in keys or queries, or a fault of the policy")


def evict(policy: CachePolicy, view: LayerView, target: Tensor, doubts: Doubts | None = None) -> Tensor:
    """(B, H) long: the one slot each lane drops at this step, −1 where it holds no more than `target` (B, H).

    `target` is what `policy.limits` said when the store was sealed. The view holds the new entry; its slots may be in
    any order, positions tell them apart. In a composition each lane obeys the part that allows it fewest entries, the
    first of them on a tie. Raises NotFiniteError, naming the policy, when a score is NaN; given `doubts`, that is put
    there for `settle` instead, and nothing waits for the device.
    """
    slot = lowest(policy, replace(view, target=torch.minimum(target, view.lengths)), doubts)
    return slot.masked_fill(view.lengths <= target, -1)


def lowest(policy: CachePolicy, view: LayerView, doubts: Doubts | None = None) -> Tensor:
    """(B, H) long: the slot that `evict` would drop of each lane, where all are to drop one. view.target is set."""
    if not isinstance(policy, Composed):
        return _lowest(policy, view, doubts)
    slot = torch.zeros_like(view.lengths)
    limits = torch.stack([part.limits(view) for part in policy.parts])
    decides = limits.argmin(0)
    for number, part in enumerate(policy.parts):
        if part.acts == "step":
            slot = torch.where(decides == number, _lowest(part, view, doubts), slot)
    return slot


def oldest(positions: Tensor, first: int) -> Tensor:
    """(B, H) long: the slot of each lane's oldest entry but for the first so many tokens of the row. positions
    (B, H, L)."""
    return positions.masked_fill(positions < first, ABSENT).argmin(-1)  # absent ones, −1, are none either


def narrow(view: LayerView, index: Tensor, counts: Tensor) -> LayerView:
    """The view that is left when each lane keeps `counts` (B, H) entries, those of `index` (B, H, K).

    Sums and rows already observed are those over all keys; `weights()` afterwards are over the keys that are left.
    """
    real = torch.arange(index.shape[-1], device=index.device) < counts[..., None]

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.gather(-1, index)

    visible = view.visible
    if visible is not None:
        batch, heads, length = view.positions.shape
        wide = index[:, :, None].expand(-1, -1, visible.shape[2], -1)
        visible = visible.expand(batch, heads, -1, length).gather(-1, wide)
    weights = view.window_weights
    if weights is not None:
        weights = weights.gather(-1, index[:, :, None, None].expand(*weights.shape[:-1], -1))
    return replace(
        view,
        window_weights=weights,
        k=_pick_rows(view.k, index),
        v=_pick_rows(view.v, index),
        positions=view.positions.gather(-1, index).masked_fill(~real, -1),
        lengths=counts,
        column_sums=pick(view.column_sums),
        last_row=pick(view.last_row),
        visible=visible,
        target=None,
        limit=None,
    )


def _pick_rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(2, index[..., None].expand(-1, -1, -1, values.shape[-1]))


def _everything(view: LayerView) -> tuple[Tensor, Tensor]:
    slot = torch.arange(view.positions.shape[-1], device=view.positions.device)
    return slot.expand(view.positions.shape).masked_fill(~view.exists, 0), view.lengths


def _scores(policy: CachePolicy, view: LayerView, absent: float) -> Tensor:
    """(B, H, L) of the policy, `absent` where a lane has ended."""
    score, shape = policy.importance(view), view.positions.shape
    if score.shape != shape:
        raise ArgumentError(f"{type(policy).__name__}.importance", tuple(score.shape), f"shape {tuple(shape)}")
    return score if view.limit is not None else score.masked_fill(~view.exists, absent)


def _select(policy: CachePolicy, view: LayerView) -> tuple[Tensor, Tensor]:
    counts = torch.minimum(policy.counts(view), view.lengths)
    if torch.equal(counts, view.lengths):
        return _everything(view)
    score = _scores(policy, replace(view, target=counts), absent=-torch.inf)
    settle([(policy, score)])
    must = score == MUST
    newer = must.flip(-1).cumsum(-1).flip(-1)  # how many MUST entries there are from here on
    score = score.masked_fill(must & (newer > counts[..., None]), -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)  # stable: of equals the earlier slot comes first
    slot = torch.arange(order.shape[-1], device=order.device)
    keep = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, slot < counts[..., None])
    index = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(counts.max())]
    return index.masked_fill(slot[: index.shape[-1]] >= counts[..., None], 0), counts


def _lowest(policy: CachePolicy, view: LayerView, doubts: Doubts | None) -> Tensor:
    score = _scores(policy, view, absent=MUST)
    least = score.amin(-1, keepdim=True)
    if doubts is None:
        settle([(policy, least)])
    else:
        doubts.append((policy, least.detach()))
    # of equals the earlier position stays; of MUST entries, if there are no others, the most recent do
    last_to_stay = torch.where(least == MUST, -view.positions, view.positions)
    others = score != least
    if view.limit is None:
        others |= ~view.exists
    return last_to_stay.masked_fill(others, -ABSENT).argmax(-1)
