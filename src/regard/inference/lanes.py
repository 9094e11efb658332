"""Parts of the ragged store: lanes of one capacity side by side in one storage, which forks may share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from regard.errors import StoreError

PAGE = 64
ABSENT = torch.iinfo(torch.int32).max
"""Larger than any position or slot: what is absent sorts behind what is there."""
NEVER = -ABSENT
"""For a group whose lanes have gaps or came back from unlike lengths: positions are written token by token."""


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors made here may be changed in place later, whether or not the caller is in inference mode; no autograd."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def whole_pages(lengths: Tensor) -> Tensor:
    """The smallest capacities that hold these lengths."""
    return (lengths + PAGE - 1).div(PAGE, rounding_mode="floor") * PAGE


def position_order(positions: Tensor) -> Tensor:
    """Slots in order of position, along the last dimension; absent ones (−1) last."""
    return positions.masked_fill(positions < 0, ABSENT).argsort(dim=-1, stable=True)


class Content(NamedTuple):
    """k (G, C, Dk), v (G, C, Dv), positions (G, C) int32; or pieces of them."""

    k: Tensor
    v: Tensor
    positions: Tensor

    @classmethod
    def empty(
        cls, lanes: int, capacity: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Content:
        """Uninitialised."""
        slots = (lanes, capacity)
        return cls(
            torch.empty((*slots, key_dim), dtype=dtype, device=device),
            torch.empty((*slots, value_dim), dtype=dtype, device=device),
            torch.empty(slots, dtype=torch.int32, device=device),
        )

    def at(self, *where: slice | Tensor) -> Content:
        """The same place of all three. A copy when a tensor is among the indices, else views."""
        return Content(self.k[where], self.v[where], self.positions[where])

    def write(self, lane: slice | Tensor, slot: slice | Tensor, new: Content) -> None:
        """Put `new` at these lanes and slots, in place. `new` must not be a view of what is written."""
        self.k[lane, slot] = new.k
        self.v[lane, slot] = new.v
        self.positions[lane, slot] = new.positions.to(torch.int32)


class Group:
    """Lanes of one capacity. Lengths are known on the host and replaced, never changed, so they may be handed out.

    lanes (G,) long on the CPU, ascending: row · H + head. lanes_there, rows, heads, order (0 … G−1): the same
    on the device.
    hole: the slot below `longest` + 1 that holds no entry, of every lane (int) or, in a complete group, of each (G,) on
    the device; None = entries fill the slots below their lane's length. Only groups of one length have holes.
    ring (n, oldest): every lane's slots are in order of position, but that from slot n on they are a ring which begins
    at slot `oldest`; n = oldest: in order throughout. None = nothing is known.
    """

    def __init__(self, content: Content, lanes: Tensor, lengths: Tensor, heads: int, complete: bool) -> None:
        device = content.k.device
        self.content, self.lanes, self.complete, self.capacity = content, lanes, complete, content.k.shape[1]
        self.lanes_there = lanes.to(device, non_blocking=True)
        self.rows, self.heads = self.lanes_there // heads, self.lanes_there % heads
        self.order = torch.arange(len(lanes), device=device)
        self._shape = (len(lanes) // heads, heads, self.capacity)
        self.hole: int | Tensor | None = None
        self.ring: tuple[int, int] | None = None
        self._by_row: Content | None = None
        self._flat: Content | None = None
        self._frames: tuple[tuple[Tensor, tuple[int, ...], int, int], ...] | None = None
        self._holders: WeakSet[Group] | None = None
        self.set_lengths(lengths)
        self._ahead: int | None = None  # free slots hold the position slot + this; None = not numbered yet

    def set_lengths(self, lengths: Tensor) -> None:
        """lengths (G,) long on the CPU."""
        self.shortest, self.longest = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
        self._lengths = (lengths, 0)
        self._lengths_there = (lengths.to(self.order.device, non_blocking=True), 0)
        self._ahead = NEVER  # other slots than the next ones may have been written to
        self.ring = None

    def grow(self, n: int) -> None:
        """Every lane is longer by n. Nothing is computed until a length is asked for: this runs at every token."""
        self.shortest, self.longest = self.shortest + n, self.longest + n
        (here, due), (there, due_there) = self._lengths, self._lengths_there
        self._lengths, self._lengths_there = (here, due + n), (there, due_there + n)

    @property
    def lengths(self) -> Tensor:
        """(G,) long, on the CPU."""
        here, due = self._lengths
        if due:
            self._lengths = (here + due, 0)
        return self._lengths[0]

    @property
    def lengths_there(self) -> Tensor:
        """(G,) long, on the device."""
        there, due = self._lengths_there
        if due:
            self._lengths_there = (self.lengths if there.device.type == "cpu" else there + due, 0)
        return self._lengths_there[0]

    @property
    def uniform(self) -> int | None:
        """The length of all lanes, if they have one."""
        return self.longest if self.longest == self.shortest else None

    @property
    def by_row(self) -> Content:
        """A complete group's content as (B, H, C, …), without a copy."""
        if self._by_row is None:
            with plain_tensors():
                self._by_row = Content(*(x.view(*self._shape, *x.shape[2:]) for x in self.content))
        return self._by_row

    @property
    def flat(self) -> Content:
        """The content as (G · C, …), without a copy."""
        if self._flat is None:
            with plain_tensors():
                self._flat = Content(*(x.view(-1, *x.shape[2:]) for x in self.content))
                self._starts = self.order * self.capacity
        return self._flat

    def cut(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        """k (B, H, n, Dk) and v (B, H, n, Dv) of a complete group's slots from `start` on, without a copy.

        Runs twice for every token: as_strided is one call into torch, narrow is three."""
        if self._frames is None:
            with plain_tensors():
                pair = self.by_row[:2]
                self._frames = tuple((x, x.stride(), int(x.storage_offset()), x.shape[3]) for x in pair)
        (k, k_strides, k_offset, k_width), (v, v_strides, v_offset, v_width) = self._frames
        batch, heads, _ = self._shape
        return (
            k.as_strided((batch, heads, n, k_width), k_strides, k_offset + start * k_strides[2]),
            v.as_strided((batch, heads, n, v_width), v_strides, v_offset + start * v_strides[2]),
        )

    def number(self, start: int, positions: Tensor, first: int | None) -> None:
        """Write the positions (B, n) of a complete group's slots from `start` on.

        first: that every row's are first, first + 1, … Then all free slots are numbered ahead, once for a page."""
        if first is not None and self._ahead == first - start:
            return
        held, new = self.by_row.positions, positions.shape[1]
        if first is not None and self._ahead is None and self.capacity > start + new:
            ahead = torch.arange(first, first + self.capacity - start, dtype=torch.int32, device=held.device)
            held.narrow(2, start, len(ahead)).copy_(ahead)
            self._ahead = first - start
            return
        self._ahead = NEVER
        held.narrow(2, start, new).copy_(positions.unsqueeze(1))

    def open(self, hole: int | Tensor) -> None:
        """These slots hold no entry from now on."""
        self.hole, self._ahead = hole, NEVER

    def fill(self, hole: Tensor, k: Tensor, v: Tensor, positions: Tensor, first: int | None) -> None:
        """Put a token into these slots (G,) of a complete group: k (B, H, 1, Dk), v (B, H, 1, Dv), positions (B, 1).

        first: that the position is this one in every row."""
        flat = self.flat
        slot = self._starts + hole
        flat.k.index_copy_(0, slot, k.reshape(-1, k.shape[3]))
        flat.v.index_copy_(0, slot, v.reshape(-1, v.shape[3]))
        if first is not None:
            flat.positions.index_fill_(0, slot, first)
        else:
            each = positions.to(torch.int32).expand(self._shape[:2])
            flat.positions.index_copy_(0, slot, each.reshape(-1))

    def absent(self) -> Tensor:
        """bool (G, longest): slots beyond their lane's length."""
        return torch.arange(self.longest, device=self.order.device) >= self.lengths_there[:, None]

    def fork(self) -> Group:
        """A second group on the same storage."""
        twin = Group.__new__(Group)
        twin.__dict__.update(self.__dict__)
        if self._holders is None:
            self._holders = WeakSet([self])
        twin._holders = self._holders
        self._holders.add(twin)
        return twin

    def own(self) -> None:
        """Before a change in place: copy the storage if another group shares it."""
        if self._holders is None:
            return
        if len(self._holders) > 1:
            self._holders.discard(self)
            with plain_tensors():
                self.content = Content(*(x.clone() for x in self.content))
            self._by_row = self._flat = self._frames = None
        self._holders = None


def carry(old: Group, content: Content, lanes: Tensor, lengths: Tensor, slots: Tensor | None) -> None:
    """Copy into `content`, which is to hold `lanes`, the entries of those lanes that live in `old`.

    lengths (all lanes,) on the CPU: how many entries each takes along; slots (all lanes, ≥ length): which of
    its slots, None = the first.
    """
    source = torch.isin(old.lanes, lanes).nonzero().view(-1)
    moving = old.lanes[source]
    length = min(int(lengths[moving].max()) if len(moving) else 0, content.k.shape[1], old.capacity)
    if length == 0:
        return
    device = content.k.device
    lane = source.to(device, non_blocking=True)
    if slots is not None:
        taken = old.content.at(lane[:, None], slots[moving.to(device), :length].clamp(0, old.capacity - 1))
    elif len(source) == len(old.lanes):
        taken = old.content.at(slice(None), slice(0, length))
    else:
        taken = old.content.at(lane, slice(0, length))
    target = torch.searchsorted(lanes, moving)
    whole = len(target) == len(lanes)
    content.write(slice(None) if whole else target.to(device, non_blocking=True), slice(0, length), taken)


def shape_of(x: Tensor) -> str:
    """For error messages."""
    return f"a shape {tuple(x.shape)}"


def check_state(state: Mapping[str, Tensor]) -> None:
    """StoreError unless these tensors are one layer's state."""
    missing = {"k", "v", "positions", "lengths"} - set(state)
    if missing:
        raise StoreError(f"the state of a layer lacks {', '.join(sorted(missing))}")
    k, v, positions, lengths = (state[name] for name in ("k", "v", "positions", "lengths"))
    fits = lengths.ndim == 2 and lengths.shape[1] >= 1 and lengths.dtype == positions.dtype == torch.long
    fits = fits and k.ndim == v.ndim == 2 and k.dtype == v.dtype and k.is_floating_point() and positions.ndim == 1
    fits = fits and bool((lengths >= 0).all()) and len(k) == len(v) == len(positions) == int(lengths.sum())
    if not fits or not bool(((positions >= 0) & (positions < ABSENT)).all()):
        shapes = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(state.items()))
        raise StoreError(f"the state of a layer does not fit together: {shapes}")
