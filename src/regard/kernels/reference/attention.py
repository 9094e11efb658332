"""The truth: attention in plain torch, differentiable, on any device, a strip of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.kernels.reference.softmax import softmax_with_lse
from regard.kernels.request import Keys, Request
from regard.kernels.strips import Strip, height_for, over_strips, take


def refuses(request: Request) -> str | None:
    """None: it serves everything, but a normaliser of one's own has no log-sum-exp and knows no sinks."""
    if request.normalizer is not None and request.return_lse:
        return "a normalizer other than softmax has no log-sum-exp"
    if request.normalizer is not None and request.sinks is not None:
        return "sinks are a part of softmax; a normalizer of one's own must bring its own"
    return None


def run(request: Request) -> tuple[Tensor, Tensor]:
    """out (B, Hq, N, Dv) in the input dtype, lse (B, Hq, N) in float32 or float64."""
    held = request.statistics
    k, v = (x.to(held) for x in request.clean_kv())
    q = request.q.to(held)

    def strip(one: Strip) -> tuple[Tensor, Tensor]:
        logits = logits_of(request, q[:, :, one.rows], take(k, one.keys), one.rows, one.keys)
        visible = request.visible(one.rows, one.keys) if one.masked else None
        if request.normalizer is None:
            weights, lse = softmax_with_lse(logits, visible, request.sinks)
        else:
            everywhere = torch.ones((), dtype=torch.bool, device=q.device) if visible is None else visible
            everywhere = everywhere.expand_as(logits)
            weights = request.normalizer(logits, everywhere).masked_fill(~everywhere, 0)
            lse = logits.new_full(logits.shape[:-1], torch.nan)
        return grouped_matmul(weights, take(v, one.keys)).to(request.q.dtype), lse

    # a normaliser of one's own may count keys, so it is shown all of them
    return over_strips(
        request, height_for(request, request.q.shape[0] * request.q.shape[1]), strip, crop=request.normalizer is None
    )


def logits_of(request: Request, q: Tensor, k: Tensor, rows: slice, keys: Keys) -> Tensor:
    """(B, Hq, n, m): score(softcap(scale · q·kᵀ)), not yet masked."""
    logits = grouped_matmul(q, k.mT) * request.scale
    if request.softcap is not None:
        logits = request.softcap * torch.tanh(logits / request.softcap)
    if request.score is not None:
        logits = request.score(logits, *request.indices(rows, keys))
    return logits


def grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """(B, Hq, n, x) @ (B, Hkv, x, y) → (B, Hq, n, y), each b serving its group of heads without being repeated."""
    batch, heads, n, width = a.shape
    stacked = a.reshape(batch, b.shape[1], -1, width)
    return (stacked @ b).view(batch, heads, n, b.shape[-1])
