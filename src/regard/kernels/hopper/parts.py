"""What the Hopper kernels share: layouts, the ring of tiles between the warps that load and those that compute.

Each kernel is one persistent program per multiprocessor with three roles: one warp that only loads (tensor memory
copies into a ring of tiles, announced by barriers), and two groups of four warps that compute 64 rows each. A slot of
the ring is `full` when its bytes have arrived and `free` when both groups have done with it.

What ptxas 12.8 has to be spared: a product in flight across the edge of a loop (it then waits for each single one, and
says "serialized"; `tests/kernels/compile_for_hopper.py` asks it), and arithmetic that could be moved below the wait for
a product beside which it should run (it is; a barrier's loop in between keeps it in place).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 64
"""Rows of one product of a group of four warps."""

# Names that Triton has changed: those before the `else` are the newer ones.
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""All warps of a role wait for one another."""
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.constexpr_function
def product(columns):
    """Layout of a result (64, columns) in the registers of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def operand(columns):
    """Layout of a left operand that stays in registers, of a product with `columns` columns."""
    return gl.DotOperandLayout(operand_index=0, parent=product(columns), k_width=2)


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """One barrier a slot, passed after that many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def following(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring and the parity of its barrier's phase."""
    slot += 1
    around = slot == SLOTS
    return gl.where(around, 0, slot), gl.where(around, phase ^ 1, phase)


@gluon.jit
def fetch(desc, at, full, smem):
    """Begin to copy a tile; `full` is told of its bytes."""
    mbarrier.expect(full, desc.block_type.nbytes)
    copy_in(desc, at, full, smem)


@gluon.jit
def fetch_pair(a_desc, b_desc, at, full, a_smem, b_smem):
    """The same rows of two tensors."""
    mbarrier.expect(full, a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    copy_in(a_desc, at, full, a_smem)
    copy_in(b_desc, at, full, b_smem)


@gluon.jit
def lists_of(Start, MaskOf, head, block, blocks):
    """Where the runs of FULL tiles and the PARTIAL tiles of a block begin and end (see `tile_lists`)."""
    entry = Start + (gl.load(MaskOf + head) * blocks + block) * 4
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """For copies of `rows` rows of x (B, H, N, D), whose last dimension is contiguous (see `aligned`)."""
    (batch, heads, n, dim), (sb, sh, sn, _) = x.shape, x.stride()
    # of a dimension of size 1 torch allows any stride; the hardware does not
    strides = [sb if batch > 1 else dim, sh if heads > 1 else dim, sn if n > 1 else dim, 1]
    return TensorDescriptor(x, [batch, heads, n, dim], strides, [1, 1, rows, dim], _layout((1, 1, rows, dim), x.dtype))


def line(x: Tensor, columns: int) -> TensorDescriptor:
    """For copies of `columns` neighbours of a row of x (R, N) float32."""
    layout = _layout((1, columns), x.dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, columns], layout)


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where tensor memory copies cannot read it: they want rows of 16 bytes, none of them twice."""
    unit = 16 // x.element_size()
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0
    fits = fits and all(n == 1 or (s > 0 and s % unit == 0) for s, n in zip(x.stride()[:3], x.shape, strict=False))
    return x if fits else x.contiguous()
