"""Exact attention over a selected set of key blocks, in plain torch: the truth for block-sparse kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.attend import attend
from regard.errors import require
from regard.patterns import Pattern
from regard.selection.contract import BlockIndex
from regard.selection.rows import moved_to_front, query_positions, real_lengths
from regard.shapes import check_qkv

_STRIP = 1 << 24  # numbers of gathered keys and values held at a time


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> Tensor:
    """`attend` with every query shown only the key blocks that its block selected, and of those what `pattern` allows.

    q (B, Hq, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv); index over Hkv or Hq heads. Other arguments as in `attend`.
    Returns (B, Hq, N, Dv); gradients flow through what was selected, not through the choice. With every block selected
    it equals `attend`. Cost: attention over the selected keys, which are gathered a strip of query blocks at a time.
    Raises ArgumentError, also for an index whose blocks do not exist or do not ascend.
    """
    check_qkv(q, k, v)
    positions = query_positions(q, k, key_padding, q_positions)
    lengths = real_lengths(k, key_padding)
    _check(q, k, index)
    k, v = moved_to_front(key_padding, k, v)
    size, (batch, heads, n, _) = index.query_block, q.shape
    gathered = index.blocks.shape[1] * index.blocks.shape[3] * index.key_block * (k.shape[3] + v.shape[3])
    # Query blocks become batch rows, many to a call; a pattern that differs by row must see the rows as they are.
    strip = 1 if pattern is not None and pattern.rows is not None else max(1, _STRIP // max(1, batch * gathered))
    outs = []
    for start in range(0, index.blocks.shape[2], strip):
        stop = min(start + strip, index.blocks.shape[2])
        queries = q[:, :, start * size : stop * size]
        short = (stop - start) * size - queries.shape[2]  # the last block may be shorter: filled up, and cut off again
        queries = torch.nn.functional.pad(queries, (0, 0, 0, short))
        where = torch.nn.functional.pad(positions[:, start * size : stop * size], (0, short))
        tokens, held = _tokens(index, start, stop, lengths)
        rows = torch.arange(batch, device=q.device).repeat_interleave(stop - start)
        keys, values = (_gather(x, rows, tokens) for x in (k, v))
        out = attend(
            queries.unflatten(2, (stop - start, size)).transpose(1, 2).flatten(0, 1),
            keys,
            values,
            pattern=pattern,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            q_positions=where.reshape(-1, size),
            kv_positions=tokens,
            kv_lengths=held,
        )
        out = out.unflatten(0, (batch, stop - start)).transpose(1, 2).flatten(2, 3)
        outs.append(out[:, :, : out.shape[2] - short])
    return torch.cat(outs, 2) if outs else q.new_zeros((batch, heads, n, v.shape[3]))


def _tokens(index: BlockIndex, start: int, stop: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of query blocks start … stop: tokens (B·blocks, H, L) long, and how many of them exist, (B·blocks, H) long.

    Blocks ascend and only the last of a row is incomplete, so what exists comes first."""
    blocks = index.blocks[:, :, start:stop].transpose(1, 2)  # (B, blocks, H, K)
    tokens = blocks[..., None] * index.key_block + torch.arange(index.key_block, device=blocks.device)
    meant = (
        torch.arange(blocks.shape[-1], device=blocks.device) < index.count[:, :, start:stop].transpose(1, 2)[..., None]
    )
    exists = meant[..., None] & (tokens < lengths[:, None, None, None, None])
    tokens = tokens.masked_fill(~exists, 0)
    return tokens.flatten(3).flatten(0, 1), exists.flatten(3).sum(-1).flatten(0, 1)


def _gather(x: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """x (B, Hkv, M, D) → (R, H, L, D): the tokens (R, H, L) of rows (R,), each head of its key/value head."""
    heads = torch.arange(tokens.shape[1], device=x.device) // (tokens.shape[1] // x.shape[1])
    return x[rows[:, None, None], heads[None, :, None], tokens]


def _check(q: Tensor, k: Tensor, index: BlockIndex) -> None:
    batch, heads, n, _ = q.shape
    wanted = -(-n // index.query_block)
    shape = tuple(index.blocks.shape[:3])
    allowed = f"({batch}, {k.shape[1]} or {heads}, {wanted}, K)"
    require(shape in {(batch, h, wanted) for h in (k.shape[1], heads)}, "index", shape, allowed)
    blocks, count = index.blocks, index.count
    most = -(-k.shape[2] // index.key_block)
    meant = torch.arange(blocks.shape[-1], device=blocks.device) < count[..., None]
    legal = ((blocks >= 0) & (blocks < most) | ~meant).all() & (count <= blocks.shape[-1]).all() & (count >= 0).all()
    ascend = ((blocks[..., 1:] > blocks[..., :-1]) | ~meant[..., 1:]).all()
    require(
        bool(legal), "index", "a block or count out of range", f"blocks 0 … {most - 1}, counts 0 … {blocks.shape[-1]}"
    )
    require(bool(ascend), "index", "blocks that do not ascend", "ascending blocks, each once")
