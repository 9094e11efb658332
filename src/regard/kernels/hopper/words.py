"""Which entries of a PARTIAL tile are allowed, as the warps that multiply it hold them: one word a row and lane.

Of a result (64, columns) a thread holds, in two rows, two neighbouring columns of every eight: lane l has columns
8 j + 2 l and 8 j + 2 l + 1. Its word of a row has bits 2 j and 2 j + 1 for them, so that what is left in the loop is a
test of fixed bits.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from regard.kernels.hopper.parts import product
from regard.kernels.triton.tile_lists import ENTRIES, Tiles

MINUS_INFINITY, ZERO = gl.constexpr("0fFF800000"), gl.constexpr("0f00000000")
"""As PTX writes them."""

LANES = 4
"""Threads of a warp that share a row."""

_by_query: WeakKeyDictionary[Tiles, Tensor] = WeakKeyDictionary()
_by_key: WeakKeyDictionary[Tiles, Tensor] = WeakKeyDictionary()


def words_by_query(tiles: Tiles) -> Tensor:
    """Words of queries' rows, of the PARTIAL tiles in the order in which `tiles.by_query` lists them."""
    if tiles not in _by_query:
        _by_query[tiles] = lane_words(tiles.bits)
    return _by_query[tiles]


def words_by_key(tiles: Tiles) -> Tensor:
    """Words of keys' rows, of the PARTIAL tiles in the order in which `tiles.by_key` lists them."""
    if tiles not in _by_key:
        _by_key[tiles] = lane_words(tiles.bits_by_key)
    return _by_key[tiles]


def lane_words(bits: Tensor) -> Tensor:
    """(P, rows, 4) int16 for 64 columns, int32 for 128, from uint8 (P, rows, columns / 8), the first column lowest."""
    two = 2 * torch.arange(LANES, dtype=torch.uint8, device=bits.device)
    tiles, rows, eights = bits.shape
    dtype = torch.int16 if eights == 8 else torch.int32
    out = torch.zeros(
        max(1, tiles), rows, LANES, dtype=dtype, device=bits.device
    )  # never empty: a pointer to something
    step = max(1, ENTRIES // (rows * eights * 8))
    for s in range(0, tiles, step):
        part = bits[s : s + step]
        words = torch.zeros(len(part), rows, LANES, dtype=torch.int32, device=bits.device)
        for j in range(eights):
            words |= ((part[..., j, None] >> two) & 3).int() << (2 * j)
        out[s : s + step] = words
    return out


@gluon.constexpr_function
def by_lanes(columns):
    """`product(columns)` seen as (64 rows, 4 lanes, columns / 8, 2)."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 1], [8, 0, 0, 0], *([0, 0, 1 << i, 0] for i in range((columns // 8).bit_length() - 1))],
        lane_bases=[[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        warp_bases=[[16, 0, 0, 0], [32, 0, 0, 0]],
        block_bases=[],
        shape=[64, 4, columns // 8, 2],
    )


@gluon.constexpr_function
def word_layout(columns):
    return gl.SliceLayout(2, gl.SliceLayout(3, by_lanes(columns)))


@gluon.jit
def load_words(Words, tile, half, ROWS_OF_TILE: gl.constexpr, COLUMNS: gl.constexpr):
    """int32 (64, 4): the words of 64 rows of a PARTIAL tile."""
    row = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, word_layout(COLUMNS)))
    lane = gl.arange(0, 4, gl.SliceLayout(0, word_layout(COLUMNS)))
    base = Words + tile.to(gl.int64) * (ROWS_OF_TILE * 4)
    return gl.load(base + row[:, None] * 4 + lane[None, :]).to(gl.int32)


@gluon.jit
def all_allowed(COLUMNS: gl.constexpr):
    """The words of a FULL tile."""
    return gl.full([64, 4], -1, gl.int32, word_layout(COLUMNS))


@gluon.jit
def keep_allowed(x, words, FILL: gl.constexpr, COLUMNS: gl.constexpr):
    """x (64, COLUMNS) float32 where those words allow it, elsewhere FILL, as PTX writes a number.

    In PTX, since LLVM gathers such tests into vectors of bits and takes them apart again."""
    layout: gl.constexpr = by_lanes(COLUMNS)
    of_eight = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    of_two = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    of_eight = gl.expand_dims(gl.expand_dims(gl.expand_dims(of_eight, 0), 1), 3)
    of_two = gl.expand_dims(gl.expand_dims(gl.expand_dims(of_two, 0), 1), 2)
    words, bit = gl.broadcast(gl.expand_dims(gl.expand_dims(words, 2), 3), 1 << (2 * of_eight + of_two))
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, " + FILL + ", p; }",
        "=f,f,r,r",
        [x, _as_product(words, COLUMNS), _as_product(bit, COLUMNS)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _as_product(x, COLUMNS: gl.constexpr):
    """(64, 4, COLUMNS / 8, 2) → (64, COLUMNS); nothing moves."""
    x = gl.reshape(gl.permute(x, (0, 2, 1, 3)), [64, COLUMNS])
    return gl.convert_layout(x, product(COLUMNS), assert_trivial=True)
