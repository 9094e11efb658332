"""Attention of a decoded token that also tells its weights, for policies that go by them at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.inference.observed import Logits


def attend_weighed(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """q (B, Hq, 1, D) over all of k (B, Hkv, L, D), v (B, Hkv, L, Dv): out (B, 1, Hq, Dv), weights (B, Hkv, G, L).

    The weights, without a gradient, are the softmax in float32 (float64 for float64 keys) of scaled, soft-capped
    logits, sinks having their share of it: what `LayerView.weights` computes where nothing is hidden from the query.
    """
    batch, heads, _, width = q.shape
    kv_heads, held = k.shape[1], v.dtype
    lanes = batch * kv_heads  # bmm over lanes: matmul would find them out anew for each token
    q, k, v = q.reshape(lanes, heads // kv_heads, width), k.flatten(0, 1), v.flatten(0, 1)
    if held not in (torch.float32, torch.float64):
        q, k = q.float(), k.float()
    products = torch.bmm(q * logits.scale, k.mT)
    if logits.softcap is not None:
        products = logits.softcap * torch.tanh(products / logits.softcap)
    if logits.sinks is None:
        weights = products.softmax(-1)
    else:
        sinks = logits.sinks.to(products.dtype).view(kv_heads, -1, 1).repeat(batch, 1, 1)
        weights = torch.cat([products, sinks], -1).softmax(-1)[..., :-1]
    out = torch.bmm(weights if weights.dtype == held else weights.to(held), v)
    if weights.requires_grad:
        weights = weights.detach()
    return out.view(batch, 1, heads, v.shape[2]), weights.view(batch, kv_heads, -1, weights.shape[2])
