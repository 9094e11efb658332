"""Execute one AttentionCall: the fused kernel where the call is plain, `attend` everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.inference.call import AttentionCall, CallPattern

STRIP = 1 << 24
"""Entries of a mask drawn at a time."""


def run_call(call: AttentionCall) -> Tensor:
    """(B, Hq, N, Dv) in q's dtype.

    What the plan's prefill part allows of a causal prompt without padding is a pattern: its tiles are skipped. Masks of
    transformers are new functions in every forward, which a compiled kernel would be compiled for each time; so they
    are drawn, by strips: torch's fused attention where it can, the reference for soft-caps and sinks.

    A padding query that sees nothing gets the plain mean of the values, as transformers' eager attention gives it
    (it adds the smallest float to every logit); recurrent layers of hybrids read such rows.
    """
    if call.plainly_causal and call.softcap is None and call.sinks is None:
        grouped = call.q.shape[1] != call.k.shape[1]
        return scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.q.shape[2] > 1, scale=call.scale, enable_gqa=grouped
        )
    sparse = call.plain_pattern
    if sparse is not None:
        return attend(
            call.q,
            call.k,
            call.v,
            pattern=sparse,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            backend="auto" if call.softcap is None else "reference",
        )
    batch = call.q.shape[0]
    q_columns = call.q_columns.expand(batch, -1)
    k_columns, padding, lengths = call.k_columns, call.k_real, None
    if k_columns.ndim == 1:
        k_columns = k_columns.expand(batch, -1)
    if padding is not None and padding.ndim == 3:  # ragged lanes, each filled from the front
        lengths, padding = padding.sum(-1), None
    out = attend(
        call.q,
        call.k,
        call.v,
        pattern=CallPattern(call),
        scale=call.scale,
        softcap=call.softcap,
        sinks=call.sinks,
        key_padding=padding,
        q_positions=q_columns,
        kv_positions=k_columns.clamp_min(0),
        kv_lengths=lengths,
        backend="sdpa" if call.softcap is None and call.sinks is None else "reference",
    )
    if not call.fresh or call.q_real is None or call.sinks is not None:
        return out
    mean = call.v.float().mean(2, keepdim=True).to(out.dtype).repeat_interleave(out.shape[1] // call.v.shape[1], 1)
    return torch.where(_blind(call)[..., None], mean, out)


def _blind(call: AttentionCall) -> Tensor:
    """(B, Hq or 1, N) bool: queries that see nothing. Asked strip by strip, and only where there is padding."""
    n, m = call.q.shape[2], call.k.shape[2]
    strip = max(1, STRIP // m)
    return torch.cat([~call.visible(slice(i, i + strip)).any(-1) for i in range(0, n, strip)], 2).expand(
        call.q.shape[0], -1, n
    )
