"""The ragged paged storage of one layer: K and V of every lane (row, KV head), each lane with its own length.

What is held is at most the payload plus a page a lane, whatever happened before. When all lanes are equally long they
are one group in row-major order: a decoded token is then written in place by two copies (positions are written a page
at a time) and attention reads views. Asking for lengths never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.inference.lanes import (
    ABSENT,
    Content,
    Group,
    check_state,
    plain_tensors,
    position_order,
    shape_of,
    whole_pages,
)
from regard.inference.slots import Slots
from regard.kernels.ragged import LaneGroup


class RaggedKV(Slots):
    """K and V of B rows × H KV heads, each lane (row, head) with its own length, in pages of 64 tokens.

    Positions are numbers of a row's real tokens; what is appended to a lane comes after what it holds. Slots beyond a
    lane's length are uninitialised memory. Tensors handed out by `groups`, `padded` and `uniform_view` may be views:
    they show later in-place changes and must not be written to. Nothing stored takes part in autograd.
    """

    @property
    def payload_bytes(self) -> int:
        """K and V bytes of the entries."""
        return int(self.lengths.sum()) * (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """K and V bytes of the storages held, those shared with a fork included."""
        held = (t for g in self._groups for t in (g.content.k, g.content.v))
        return sum(t.untyped_storage().nbytes() for t in held)

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
