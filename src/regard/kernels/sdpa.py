"""torch's scaled_dot_product_attention: dense and causal at full speed, anything else under masks built in strips."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.kernels.request import Request
from regard.kernels.strips import Strip, height_for, over_strips, take

_WORTH_WIDENING = 128  # queries from which the fused kernels' need for D = Dv is worth a padded copy


def refuses(request: Request) -> str | None:
    """Why torch's kernels cannot do this exactly, or None."""
    for name in ("score", "normalizer", "softcap", "sinks"):
        if getattr(request, name) is not None:
            return f"scaled_dot_product_attention has no {name}"
    if request.return_lse:
        return "scaled_dot_product_attention returns no log-sum-exp"
    return None


def fused(request: Request) -> bool:
    """Whether no mask has to be drawn: everything visible, or plain causal over aligned positions.

    Where queries are the last of more positions, FlashAttention's kernel has to serve."""
    return request.exists is None and (request.pattern is None or _plainly_causal(request))


def run(request: Request) -> tuple[Tensor, None]:
    """out (B, Hq, N, Dv); there is no log-sum-exp."""
    k, v = request.clean_kv()
    q, scale = _with_positive_scale(request)
    width = v.shape[3]
    if q.shape[3] != width and q.shape[2] >= _WORTH_WIDENING:  # zeros add nothing to q·k; the output's are cut off
        q, k, v = (F.pad(x, (0, max(q.shape[3], width) - x.shape[3])) for x in (q, k, v))
    if fused(request):
        causal = request.pattern is not None and q.shape[2] > 1
        if causal and q.shape[2] < k.shape[2]:  # is_causal counts queries from the first key, this op from the last
            return _flash(q, k, v, scale, causal=True), None
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out[..., :width], None

    def strip(one: Strip) -> tuple[Tensor, Tensor]:
        visible = request.visible(one.rows, one.keys) if one.masked else None
        out = _masked(q[:, :, one.rows], take(k, one.keys), take(v, one.keys), visible, scale, one.blind)
        return out, out.new_empty((*out.shape[:3], 0))

    return over_strips(request, height_for(request, _mask_lanes(request)), strip)[0][..., :width], None


def _with_positive_scale(request: Request) -> tuple[Tensor, float]:
    """FlashAttention's kernels take the largest product for the largest logit: a sign goes into q, exactly."""
    q, scale = request.q, request.scale
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def over_cache(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A few queries q (B, H, n, D) over all keys k, v (B, H, M, …) of a cache that grows, without gradients.

    torch's own choice on a Hopper GPU, cuDNN, builds a plan for every M that it has not met: 17 to 70 ms for each
    decoded token. FlashAttention's kernel, which splits the keys among multiprocessors, needs none.
    """
    if _flash_takes(q, v) and not _wants_gradient(q, k, v):
        return _flash(q, k, v, scale, causal=False)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)[0]
    return out


def _flash_takes(q: Tensor, v: Tensor) -> bool:
    width = q.shape[3]
    fits = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and width == v.shape[3]
    return fits and width % 8 == 0 and width <= 256 and _has_flash(q.device)


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _plainly_causal(request: Request) -> bool:
    from regard.patterns import causal

    n, m = request.q.shape[2], request.k.shape[2]
    served = n in (1, m) or (n < m and _flash_takes(request.q, request.v))
    return request.aligned and served and request.pattern == causal()


def _mask_lanes(request: Request) -> int:
    """Entries of the mask per query and key, as `_masked` lays it out."""
    pattern, exists = request.pattern, request.exists
    places = [x for x in (request.kv_positions, exists) if x is not None]
    rows = max(pattern.rows or 1 if pattern is not None else 1, *(x.shape[0] for x in places))
    by_head = (pattern is not None and pattern.heads is not None) or any(x.shape[1] > 1 for x in places)
    return rows * (request.q.shape[1] if by_head else request.group)


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, blind: bool) -> Tensor:
    """Attention under a mask (B or 1, Hq or 1, n, m); rows that see nothing come out as zeros, with zero gradients.

    blind: there may be such rows. The heads of a group are laid below one another as queries of their key head, since
    not every fused kernel serves groups under a mask without repeating the keys.
    """
    batch, heads, n, width = q.shape
    group = heads // k.shape[1]
    stacked = q.reshape(batch, k.shape[1], group * n, width)
    if visible is None:
        return F.scaled_dot_product_attention(stacked, k, v, scale=scale).reshape(batch, heads, n, -1)
    mask, something = visible, None
    if blind:  # torch leaves rows without a key undefined: let them see all, then drop what they saw
        something = visible.any(-1, keepdim=True)
        mask = visible | ~something
    if group > 1:
        mask = (
            mask.unflatten(1, (-1, group)) if mask.shape[1] == heads else mask[:, :, None].expand(-1, -1, group, -1, -1)
        )
        mask = mask.flatten(2, 3)
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=mask, scale=scale).reshape(batch, heads, n, -1)
    return (
        out if something is None else torch.where(something, out, torch.zeros((), dtype=out.dtype, device=out.device))
    )
