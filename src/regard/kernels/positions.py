"""Where each query and key stands among its row's real tokens, and which slots hold a key at all."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.errors import ArgumentError, require
from regard.patterns.algebra import Pattern
from regard.patterns.cuts import cut_off
from regard.shapes import check_range, check_tensor


def existing(q: Tensor, k: Tensor, key_padding: Tensor | None, kv_lengths: Tensor | None, look: bool) -> Tensor | None:
    """(B, 1 or Hkv, M) bool: which slots hold a key; None when all do."""
    batch, kv_heads, m, _ = k.shape
    exists = None
    if key_padding is not None:
        check_tensor("key_padding", key_padding, ((batch, m),), "bool", q)
        if key_padding.is_cuda or not bool(key_padding.all()):
            exists = key_padding[:, None, :]
    if kv_lengths is not None:
        check_tensor("kv_lengths", kv_lengths, ((batch, kv_heads),), "int", q)
        if look:
            check_range("kv_lengths", kv_lengths, 0, m)
        held = torch.arange(m, device=q.device) < kv_lengths[:, :, None]
        exists = held if exists is None else exists & held
    return exists


def positions(
    q: Tensor,
    k: Tensor,
    key_padding: Tensor | None,
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    kv_lengths: Tensor | None,
    exists: Tensor | None,
    needed: bool,
    look: bool,
) -> tuple[Tensor, Tensor, bool]:
    """(B or 1, N) and (B or 1, 1 or Hkv, M) long, and whether they are plain: one unbroken sequence without padding.

    needed: a pattern or score asks for them. look: check values too, which waits for a GPU.
    """
    batch, kv_heads, m, _ = k.shape
    n = q.shape[2]
    if kv_positions is not None:
        check_tensor("kv_positions", kv_positions, ((batch, m), (batch, kv_heads, m)), "int", q)
        j = (kv_positions if kv_positions.ndim == 3 else kv_positions[:, None]).long()
        if look:
            check_range("kv_positions", j, 0, where=_somewhere(exists, j))
        if exists is not None:
            j = j.clamp(min=0)  # where no key exists the answer is not used, but the question must be legal
    elif exists is not None and key_padding is not None:
        j = (key_padding.long().cumsum(-1) - 1).clamp(min=0)[:, None]
    else:
        j = torch.arange(m, device=q.device)[None, None]
    if q_positions is not None:
        check_tensor("q_positions", q_positions, ((batch, n),), "int", q)
        if look:
            check_range("q_positions", q_positions, 0)
        return q_positions.long(), j, False
    if not needed:
        return torch.arange(n, device=q.device)[None], j, False
    for reason, stated in (
        (f"None with more queries ({n}) than keys ({m})", n > m),
        ("None with kv_lengths", kv_lengths is not None),
        ("None with positions per key head", j.shape[1] > 1),
    ):
        if stated:
            raise ArgumentError("q_positions", reason, f"({batch}, {n}) integers: a pattern or score needs them here")
    return j[:, 0, m - n :], j, kv_positions is None and exists is None


def _somewhere(exists: Tensor | None, positions: Tensor) -> Tensor | None:
    """`exists` in the shape of positions; where rows or heads share them, a slot counts if any holds a key in it."""
    if exists is None:
        return None
    for dim in (0, 1):
        if positions.shape[dim] < exists.shape[dim]:
            exists = exists.any(dim, keepdim=True)
    return exists.expand(positions.shape)


def check_extent(pattern: Pattern, i: Tensor, j: Tensor, exists: Tensor | None, aligned: bool) -> None:
    """Raise ArgumentError where a pattern with ids for so many positions is asked about more, or one that is laid out
    for so many about fewer plain positions whose queries would see the others.

    Waits for a GPU unless positions are plain, and as many as it is for.
    """
    extent, laid_for = pattern.facts.extent, pattern.facts.laid_for
    assert extent is not None
    if aligned:
        count = j.shape[-1]
        require(count <= extent, "pattern", f"one with ids for {extent} positions", f"one with ids for {count}")
        if laid_for not in (None, count) and not torch.compiler.is_compiling():  # looking would break the graph
            whole = not cut_off(pattern, laid_for, count)
            require(whole, "pattern", f"one laid out for {laid_for} tokens", f"one for the {count} of k")
        return
    check_range("q_positions", i, 0, extent - 1)
    check_range("kv_positions", j, 0, extent - 1, _somewhere(exists, j))
