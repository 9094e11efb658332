"""The ragged paged storage of one layer: K and V of every lane (row, KV head), each lane with its own length.

Lanes of one capacity share one tensor. Capacities are whole pages of 64 tokens and never exceed a lane's length by more
than one page, so what is held is at most the payload plus a page a lane, whatever happened before. When all lanes are
equally long they are one group in row-major order: a decoded token is then written in place by two copies (positions
are written a page at a time) and attention reads views. Where every lane loses an entry at each token, the next token
takes its slot (`slide`, `vacate`): nothing moves until someone else reads. Lengths live on the host: asking never waits
for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.inference.lanes import (
    ABSENT,
    PAGE,
    Content,
    Group,
    carry,
    check_state,
    plain_tensors,
    position_order,
    shape_of,
    whole_pages,
)
from regard.kernels.ragged import LaneGroup


class RaggedKV:
    """K and V of B rows × H KV heads, each lane (row, head) with its own length, in pages of 64 tokens.

    Positions are numbers of a row's real tokens; what is appended to a lane comes after what it holds. Slots beyond a
    lane's length are uninitialised memory. Tensors handed out by `groups`, `padded` and `uniform_view` may be views:
    they show later in-place changes and must not be written to. Nothing stored takes part in autograd.
    """

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
    def payload_bytes(self) -> int:
        """K and V bytes of the entries."""
        return int(self.lengths.sum()) * (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """K and V bytes of the storages held, those shared with a fork included."""
        held = (t for g in self._groups for t in (g.content.k, g.content.v))
        return sum(t.untyped_storage().nbytes() for t in held)

    @property
    def uniform(self) -> int | None:
        """The length of all lanes, if they have one."""
        first = self._groups[0]
        return first.uniform if first.complete else None

    def append(
        self, k: Tensor, v: Tensor, positions: Tensor, real: Tensor | None = None, first: int | None = None
    ) -> None:
        """Store new tokens in every head. k (B, H, N, Dk), v (B, H, N, Dv), positions (B, N) long.

        first: if known, that every row's positions are first, first + 1, …

        real (B, N) bool on the CPU: only real tokens are stored; None = all. Positions of a row's real tokens increase
        and are larger than those it holds. Raises ArgumentError when a shape or dtype does not fit.
        """
        self._check_new(k, v, positions, real)
        if k.requires_grad or v.requires_grad:
            k, v = k.detach(), v.detach()
        if k.shape[2] == 0:
            return
        if real is None or bool(real.all()):
            self._append_all(k, v, positions, first)
        else:
            self._append_real(k, v, positions, real)
        self._lengths = None

    def _append_all(self, k: Tensor, v: Tensor, positions: Tensor, first: int | None) -> None:
        new = k.shape[2]
        if new > 1:
            self._settle()
        if any(g.longest + new > g.capacity for g in self._groups):
            self._regroup(self._fitting(self.lengths.view(-1) + new))
        for group in self._groups:
            group.own()
            hole, group.hole = group.hole, None
            if isinstance(hole, Tensor):
                group.fill(hole, k, v, positions, first)
                group.grow(1)
                continue
            if hole is None and group.ring is not None and group.ring[0] != group.ring[1]:
                group.ring = None
            start = group.uniform if hole is None else hole
            if start is not None and group.complete:
                to_k, to_v = group.cut(start, new)
                to_k.copy_(k)
                to_v.copy_(v)
                group.number(start, positions, first)
            else:
                values = Content(k[group.rows, group.heads], v[group.rows, group.heads], positions[group.rows])
                if start is not None:
                    group.content.write(slice(None), slice(start, start + new), values)
                else:
                    slots = group.lengths_there[:, None] + torch.arange(new, device=self.device)
                    group.content.write(group.order[:, None], slots, values)
            group.grow(new)

    def _append_real(self, k: Tensor, v: Tensor, positions: Tensor, real: Tensor) -> None:
        self._settle()
        counts = real.sum(1).repeat_interleave(self.heads)
        self._regroup(self._fitting(self.lengths.view(-1) + counts))
        tokens = (~real).to(torch.int8).argsort(dim=1, stable=True)  # (B, N): the real ones first, in order
        for group in self._groups:
            count = counts[group.lanes]
            longest, start = int(count.max()), group.uniform
            if longest == 0:
                continue
            group.own()
            token = self._there(tokens[group.lanes // self.heads, :longest])
            row, head = group.rows[:, None], group.heads[:, None]
            values = Content(k[row, head, token], v[row, head, token], positions[row, token])
            if start is not None:  # what lanes with fewer tokens get besides lies beyond their length
                group.content.write(slice(None), slice(start, start + longest), values)
            else:
                lane, nth = (torch.arange(longest) < count[:, None]).nonzero(as_tuple=True)
                slots = self._there(group.lengths[lane] + nth)
                lane, nth = self._there(lane), self._there(nth)
                group.content.write(lane, slots, values.at(lane, nth))
            group.set_lengths(group.lengths + count)

    def groups(self) -> list[LaneGroup]:
        """All lanes by capacity: what attention over the store reads. Lanes without entries are included."""
        self._settle()
        return [
            LaneGroup(
                k=g.content.k,
                v=g.content.v,
                rows=g.rows,
                heads=g.heads,
                lengths=g.lengths_there,
                positions=g.content.positions,
                uniform=g.uniform,
                complete=g.complete,
            )
            for g in self._groups
        ]

    @property
    def longest(self) -> int:
        """Entries of the longest lane."""
        return max(g.longest for g in self._groups)

    def side_by_side(self) -> tuple[Tensor, Tensor] | None:
        """k (B, H, L, Dk), v (B, H, L, Dv) in storage order, without a copy; None unless all lanes have one length."""
        self._settle()
        group = self._groups[0]
        return group.cut(0, group.longest) if group.complete and group.uniform is not None else None

    def uniform_view(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same with positions (B, H, L) int32."""
        pair = self.side_by_side()
        return None if pair is None else (*pair, self._groups[0].by_row.positions.narrow(2, 0, self.longest))

    def positions(self) -> Tensor:
        """(B, H, L) long, in storage order; −1 where a lane has ended."""
        self._settle()
        length = self.uniform
        if length is None:
            return self._positions()
        return self._groups[0].by_row.positions.narrow(2, 0, length).long()

    def padded(self, sort: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Lanes side by side: k (B, H, L, Dk), v (B, H, L, Dv), positions (B, H, L) long, L = the longest lane.

        sort: by position; otherwise in storage order, whose slots `drop` takes. Absent slots, at the end of a lane,
        have position −1 and zeros.
        """
        k, v, positions = self._side_by_side()
        if sort and not self._sorted:
            order = position_order(positions)
            positions = positions.gather(2, order)
            k = k.gather(2, order[..., None].expand(k.shape))
            v = v.gather(2, order[..., None].expand(v.shape))
        return k, v, positions

    def _side_by_side(self) -> tuple[Tensor, Tensor, Tensor]:
        if (view := self.uniform_view()) is not None:
            return view[0], view[1], view[2].long()
        self._settle()
        k = self._spread([g.content.k for g in self._groups], 0)
        v = self._spread([g.content.v for g in self._groups], 0)
        return k, v, self._positions()

    def _positions(self) -> Tensor:
        self._settle()
        return self._spread([g.content.positions for g in self._groups], -1).long()

    def _spread(self, parts: list[Tensor], absent: int) -> Tensor:
        """(B, H, L, …) from one (G, C, …) per group; `absent` where a lane has ended."""
        shape = (self.batch, self.heads, self.longest, *parts[0].shape[2:])
        out = torch.full(shape, absent, dtype=parts[0].dtype, device=self.device)
        for group, part in zip(self._groups, parts, strict=True):
            missing = group.absent().view(len(group.lanes), group.longest, *(1,) * (part.ndim - 2))
            out[group.rows, group.heads, : group.longest] = part[:, : group.longest].masked_fill(missing, absent)
        return out

    def keep(self, index: Tensor, counts: Tensor) -> None:
        """Each lane keeps the first counts[b, h] entries of index[b, h], sorted by position; the rest is freed.

        index (B, H, K) long: distinct slots of `padded(sort=True)`. counts (B, H) long. Raises ArgumentError for slots
        that are absent or named twice and for counts beyond K. Waits for the device.
        """
        lanes, width = (self.batch, self.heads), index.shape[-1]
        require(index.shape == (*lanes, width), "index", shape_of(index), f"a shape {(*lanes, 'K')}")
        require(counts.shape == lanes, "counts", shape_of(counts), f"a shape {lanes}")
        counts, lengths = counts.cpu().reshape(-1), self.lengths.view(-1)
        fits = bool(((counts >= 0) & (counts <= width) & (counts <= lengths)).all())
        require(fits, "counts", counts.view(lanes).tolist(), f"0 … the lane's length, at most {width}")
        longest = max(counts.tolist(), default=0)
        wanted = torch.arange(width, device=self.device) < self._there(counts)[:, None]
        slots = index.to(self.device).reshape(len(counts), width).masked_fill(~wanted, ABSENT).sort(-1).values
        slots, wanted = slots[:, :longest], wanted[:, :longest]
        wrong = (slots < 0) | (slots >= self._there(lengths)[:, None])
        wrong[:, 1:] |= slots[:, 1:] == slots[:, :-1]
        require(not bool((wrong & wanted).any()), "index", "absent or repeated slots", "distinct slots that exist")
        if self._sorted and torch.equal(counts, lengths):
            return
        if not self._sorted and longest:
            slots = position_order(self._positions()).flatten(0, 1).gather(1, slots.masked_fill(~wanted, 0))
        self._regroup(whole_pages(counts), counts, slots)
        self._sorted = True

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

    def crop(self, limit: Tensor) -> None:
        """Remove the entries whose position is at least limit[b]; limit (B,) long. Waits for the device."""
        require(limit.shape == (self.batch,), "limit", shape_of(limit), f"a shape ({self.batch},)")
        positions = self._positions()
        stays = ((positions >= 0) & (positions < limit.to(self.device)[:, None, None])).flatten(0, 1)
        counts = stays.sum(1).cpu()
        if torch.equal(counts, self.lengths.view(-1)):
            return
        if self._sorted:  # what goes is at the end
            for group in self._groups:
                group.set_lengths(counts[group.lanes])
            self._lengths = None
            self._release()
        else:
            self._regroup(self._fitting(counts), counts, (~stays).to(torch.int8).argsort(dim=1, stable=True))

    def _release(self) -> None:
        if any(g.capacity - g.shortest > PAGE for g in self._groups):
            self._regroup(self._fitting(self.lengths.view(-1)))

    def select_rows(self, index: Tensor) -> None:
        """Row r becomes what row index[r] was; index (R,) long. Beam reorder, batch selection; R may differ from B.

        Waits for the device only when lanes differ in length and `index` is there. Raises ArgumentError for a row that
        does not exist, if `index` is on the CPU.
        """
        require(index.ndim == 1, "index", shape_of(index), "a shape (R,)")
        if index.device.type == "cpu":
            fits = bool(((index >= 0) & (index < self.batch)).all())
            require(fits, "index", index.tolist(), f"rows 0 … {self.batch - 1}")
        before, self.batch, self._lengths = self.batch, len(index), None
        first, groups = self._groups[0], []
        alike = first.complete and first.uniform is not None
        device = self.device if alike else torch.device("cpu")
        source = (index.to(device)[:, None] * self.heads + torch.arange(self.heads, device=device)).view(-1)
        with plain_tensors():
            if alike:
                lanes = torch.arange(len(source))
                groups.append(self._moved(first, source, lanes, torch.full_like(lanes, first.longest)))
            else:
                for group in self._groups:
                    place = torch.full((before * self.heads,), -1)
                    place[group.lanes] = torch.arange(len(group.lanes))
                    lanes = (place[source] >= 0).nonzero().view(-1)
                    if len(lanes):
                        slot = place[source[lanes]]
                        groups.append(self._moved(group, self._there(slot), lanes, group.lengths[slot]))
            self._groups = groups or [self._group(self._empty(0, 0), source, source)]

    def _moved(self, group: Group, source: Tensor, lanes: Tensor, lengths: Tensor) -> Group:
        """A group of `lanes` in which each is what lane source[i] of `group` was."""
        moved = self._group(group.content.at(source), lanes, lengths)
        moved.ring = group.ring
        if group.hole is not None:
            moved.open(group.hole if isinstance(group.hole, int) else group.hole[source])
        return moved

    def repeat_rows(self, n: int) -> None:
        """Each row n times in succession: rows 0, 0, …, 1, 1, …"""
        require(n >= 1, "n", n, "an int ≥ 1")
        self.select_rows(torch.arange(self.batch).repeat_interleave(n))

    def fork(self) -> RaggedKV:
        """A second store with the same content. Storage is shared until one side changes it in place."""
        twin = RaggedKV.__new__(RaggedKV)
        twin.__dict__.update(self.__dict__)
        twin._groups = [group.fork() for group in self._groups]
        return twin

    def state(self) -> dict[str, Tensor]:
        """What `from_state` needs: lengths (B, H) and, lane after lane in storage order, k, v and positions."""
        k, v, positions = self._side_by_side()
        held = positions >= 0
        return {"k": k[held], "v": v[held], "positions": positions[held], "lengths": self.lengths.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> RaggedKV:
        """The store that `state` was taken of. Raises StoreError when the tensors do not belong together."""
        check_state(state)
        lengths, flat = state["lengths"].cpu(), state["lengths"].cpu().reshape(-1)
        batch, heads = lengths.shape
        k, v = state["k"], state["v"]
        store = cls(batch, heads, k.shape[1], v.shape[1], k.dtype, device)
        values = Content(*(t.to(store.device) for t in (k, v, state["positions"])))
        store._regroup(whole_pages(flat))
        starts = flat.cumsum(0) - flat
        for group in store._groups:
            length = flat[group.lanes]
            lane, slot = (torch.arange(group.capacity) < length[:, None]).nonzero(as_tuple=True)
            source = store._there(starts[group.lanes][lane] + slot)
            group.content.write(store._there(lane), store._there(slot), values.at(source))
            group.set_lengths(length)
        store._lengths = None
        held = store._positions()
        store._sorted = bool(((held[..., 1:] > held[..., :-1]) | (held[..., 1:] < 0)).all())
        return store

    def _empty(self, lanes: int, capacity: int) -> Content:
        return Content.empty(lanes, capacity, self.key_dim, self.value_dim, self.dtype, self.device)

    def _group(self, content: Content, lanes: Tensor, lengths: Tensor) -> Group:
        return Group(content, lanes, lengths, self.heads, complete=len(lanes) == self.batch * self.heads)

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

    def _there(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _check_new(self, k: Tensor, v: Tensor, positions: Tensor, real: Tensor | None) -> None:
        lanes, new = (self.batch, self.heads), k.shape[-2] if k.ndim == 4 else 0
        if k.shape != (*lanes, new, self.key_dim):
            raise ArgumentError("k", shape_of(k), f"a shape {(*lanes, 'N', self.key_dim)}")
        if v.shape != (*lanes, new, self.value_dim):
            raise ArgumentError("v", shape_of(v), f"a shape {(*lanes, new, self.value_dim)}")
        if positions.shape != (self.batch, new):
            raise ArgumentError("positions", shape_of(positions), f"a shape {(self.batch, new)}")
        if real is not None and (real.shape != positions.shape or real.dtype != torch.bool):
            raise ArgumentError("real", f"{shape_of(real)} {real.dtype}", f"a bool tensor of shape {(self.batch, new)}")
        if k.dtype != self.dtype or v.dtype != self.dtype:
            raise ArgumentError("k and v", f"{k.dtype} and {v.dtype}", f"{self.dtype}, as the store was made for")
