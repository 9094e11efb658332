"""The slots of one layer: where the entries of its lanes lie, and how entries leave them one by one.

Lanes of one capacity share one tensor. Capacities are whole pages of 64 tokens and never exceed a lane's length by more
than one page: a lane that grows or shrinks out of that moves to another group. At a decoding step a lane loses an entry
in place: its last entry takes the slot (`drop`), or, where every lane of a group loses one, the slot stays open for the
next token (`slide`, `vacate`) and nothing moves until someone else reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.inference.lanes import PAGE, Content, Group, carry, plain_tensors, position_order, shape_of, whole_pages


class Slots:
    """Lanes (row, KV head) of B rows × H KV heads, side by side in groups of one capacity. Lengths live on the host."""

    def __init__(
        self, batch: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        require(batch >= 0, "batch", batch, "an int ≥ 0")
        require(heads >= 1, "heads", heads, "an int ≥ 1")
        self.batch, self.heads, self.key_dim, self.value_dim = batch, heads, key_dim, value_dim
        self.dtype, self.device = dtype, torch.empty(0, device=device).device
        self._sorted = True  # every lane's slots are in order of position
        self._lengths: Tensor | None = None
        lanes = torch.arange(batch * heads)
        with plain_tensors():
            self._groups = [self._group(self._empty(len(lanes), 0), lanes, torch.zeros_like(lanes))]

    @property
    def lengths(self) -> Tensor:
        """(B, H) long, on the CPU: entries in each lane. Not to be written to."""
        if self._lengths is None:
            first = self._groups[0]
            flat = first.lengths
            if not first.complete:
                flat = torch.empty(self.batch * self.heads, dtype=torch.long)
                for group in self._groups:
                    flat[group.lanes] = group.lengths
            self._lengths = flat.view(self.batch, self.heads)
        return self._lengths

    @property
    def uniform(self) -> int | None:
        """The length of all lanes, if they have one."""
        first = self._groups[0]
        return first.uniform if first.complete else None

    @property
    def longest(self) -> int:
        """Entries of the longest lane."""
        return max(g.longest for g in self._groups)

    # ---- entries leave one by one

    def drop(self, slot: Tensor, active: Tensor | None = None) -> None:
        """Remove one entry of a lane, in place: the lane's last entry takes its slot.

        slot (B, H) long: a slot of `padded(sort=False)`, −1 = none. active (B, H) bool on the CPU: which lanes lose an
        entry, if the caller knows; without it `slot` is read and checked, which waits for the device.
        """
        lanes = (self.batch, self.heads)
        require(slot.shape == lanes, "slot", shape_of(slot), f"a shape {lanes}")
        if active is None:
            here = slot.cpu()
            fits = bool(((here >= -1) & (here < self.lengths)).all())
            require(fits, "slot", here.tolist(), f"−1 or a slot below the lane's length, {self.lengths.tolist()}")
            active = here >= 0
        require(active.shape == lanes, "active", shape_of(active), f"a shape {lanes}")
        self._settle()
        everyone = bool(active.all())
        held = all(g.shortest > 0 for g in self._groups) or bool((self.lengths > 0)[active].all())
        require(held, "active", active.tolist(), "lanes that hold entries")
        on, slot = active.reshape(-1), slot.to(self.device).reshape(-1)
        for group in self._groups:
            which = group.order if everyone else self._there(on[group.lanes].nonzero().view(-1))
            if len(which) == 0:
                continue
            group.own()
            chosen = slice(None) if everyone else which
            last = group.lengths_there[chosen] - 1
            group.content.write(which, slot[group.lanes_there[chosen]], group.content.at(which, last))
            group.ring = None
            if everyone:
                group.grow(-1)
            else:
                group.set_lengths(group.lengths - on[group.lanes].long())
            self._sorted = False
        self._lengths = None
        self._release()

    def together(self, active: Tensor) -> bool:
        """May these lanes (B, H), bool on the CPU, `slide`? Lanes of one group must have one length and go together."""
        return self._whole_groups(active) is not None

    def slide(self, n: int, active: Tensor | None = None) -> None:
        """Lanes lose the oldest of their entries but the first n, in place: the next token takes its slot.

        active (B, H) bool on the CPU: which lanes; None = all, which then must have one length. Raises ArgumentError
        for lanes that are not `together` and for lanes of n entries or fewer. Nothing waits for the device.
        """
        groups = [self._alike("n", n)] if active is None else self._whole_groups(active)
        if groups is None:
            raise ArgumentError("active", active, "lanes that are together")
        for group in groups:
            require(0 <= n < group.longest, "n", n, "0 or more, and fewer than the entries of a lane")
            ring = group.ring
            if group.hole is not None or (ring is None and not self._sorted):
                group = self._order(group)
            elif ring is not None and ring[0] != ring[1] and ring[0] != n:
                group = self._order(group)
            oldest = n if group.ring is None or group.ring[0] == group.ring[1] else group.ring[1]
            group.ring = (n, n if oldest + 1 == group.longest else oldest + 1)
            self._vacate(group, oldest)
        self._tidy()

    def vacate(self, slot: Tensor) -> None:
        """Every lane loses one entry, in place: the next token takes its slot.

        slot (B, H) long: a slot of `padded(sort=False)`; not looked at, so that nothing waits for the device. Raises
        ArgumentError unless all lanes have one length, at least 1.
        """
        if slot.shape != (self.batch, self.heads):
            raise ArgumentError("slot", shape_of(slot), f"a shape {(self.batch, self.heads)}")
        self._settle()
        group = self._alike("slot", "one a lane")
        group.ring = None
        self._vacate(group, slot.to(self.device).reshape(-1))
        self._tidy()

    def _alike(self, argument: str, got: object) -> Group:
        if not self.uniform:
            allowed = "a store whose lanes all have one length, at least 1"
            raise ArgumentError(argument, f"{got} for lanes of {self.lengths.tolist()}", allowed)
        return self._groups[0]

    def _whole_groups(self, active: Tensor) -> list[Group] | None:
        """The groups of these lanes, if each of them is of one length and has no other lanes."""
        on, groups = active.reshape(-1), []
        for group in self._groups:
            which = on[group.lanes]
            if not bool(which.any()):
                continue
            if group.uniform is None or not bool(which.all()):
                return None
            groups.append(group)
        return groups

    def _vacate(self, group: Group, slot: int | Tensor) -> None:
        group.open(slot)
        group.grow(-1)
        self._sorted, self._lengths = False, None

    def _tidy(self) -> None:
        """Free the page that a lane has emptied."""
        if any(group.capacity - group.longest > PAGE for group in self._groups if group.hole is not None):
            self._settle()
            self._release()

    # ---- open slots

    def _settle(self) -> None:
        """Close the holes that no token has filled, before anyone reads or moves slots."""
        for group in self._groups:
            if group.hole is not None:
                self._order(group)

    def _order(self, group: Group) -> Group:
        """Put the slots of a group's lanes, which have one length, in order of position, without holes: a new group."""
        length, hole = group.longest, group.hole
        held = group.content.positions[:, : length + (hole is not None)]
        if hole is not None:
            slot = torch.arange(held.shape[1], device=self.device)
            held = held.masked_fill(slot == (hole if isinstance(hole, int) else hole[:, None]), -1)
        slots = position_order(held)[:, :length]
        with plain_tensors():
            content = self._empty(len(group.lanes), group.capacity)
            content.write(slice(None), slice(0, length), group.content.at(group.order[:, None], slots))
            ordered = self._group(content, group.lanes, group.lengths)
        ordered.ring = (0, 0)
        self._groups = [ordered if g is group else g for g in self._groups]
        self._sorted = self._sorted or len(self._groups) == 1
        return ordered

    # ---- capacities

    def _release(self) -> None:
        if any(g.capacity - g.shortest > PAGE for g in self._groups):
            self._regroup(self._fitting(self.lengths.view(-1)))

    def _fitting(self, lengths: Tensor) -> Tensor:
        """Capacities (lanes,) for these lengths: a lane stays where it is while it fits and wastes at most a page."""
        now = torch.empty_like(lengths)
        for group in self._groups:
            now[group.lanes] = group.capacity
        if len(self._groups) > 1 and bool((lengths == lengths[0]).all()):
            return whole_pages(lengths)  # alike again: one group
        return torch.where((lengths <= now) & (now - lengths <= PAGE), now, whole_pages(lengths))

    def _regroup(self, capacities: Tensor, lengths: Tensor | None = None, slots: Tensor | None = None) -> None:
        """Move every lane to the group of its capacity; it takes the first `lengths` of `slots` (lanes, any) along."""
        self._settle()
        after = self.lengths.view(-1) if lengths is None else lengths
        groups = []
        with plain_tensors():
            for capacity in capacities.unique().tolist() or [0]:
                lanes = (capacities == capacity).nonzero().view(-1)
                same = next((g for g in self._groups if g.capacity == capacity and torch.equal(g.lanes, lanes)), None)
                if same is None or slots is not None:
                    content = self._empty(len(lanes), capacity)
                    for old in self._groups:
                        carry(old, content, lanes, after, slots)
                    same = self._group(content, lanes, after[lanes])
                groups.append(same)
        self._groups, self._lengths = groups, None

    def _empty(self, lanes: int, capacity: int) -> Content:
        return Content.empty(lanes, capacity, self.key_dim, self.value_dim, self.dtype, self.device)

    def _group(self, content: Content, lanes: Tensor, lengths: Tensor) -> Group:
        return Group(content, lanes, lengths, self.heads, complete=len(lanes) == self.batch * self.heads)

    def _there(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)
