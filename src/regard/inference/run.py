"""Execute one AttentionCall: the fused kernel where the call is plain, `attend` everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.attend import attend
from regard.inference.call import AttentionCall, CallPattern


def run_call(call: AttentionCall) -> Tensor:
    """(B, Hq, N, Dv) in q's dtype.

    Masks of transformers are new functions in every forward, which a compiled kernel would be compiled for each time; so
    they are drawn, by strips: torch's fused attention where it can, the reference for soft-caps and sinks.

    A padding query that sees nothing gets the plain mean of the values, as transformers' eager attention gives it
    (it adds the smallest float to every logit); recurrent layers of hybrids read such rows.
    """
    if call.plainly_causal and call.softcap is None and call.sinks is None:
        grouped = call.q.shape[1] != call.k.shape[1]
        return scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.q.shape[2] > 1, scale=call.scale, enable_gqa=grouped
        )
    batch = call.q.shape[0]
    q_columns = call.q_columns.expand(batch, -1)
    k_columns, padding, lengths = call.k_columns, call.k_real, None
    if k_columns.ndim == 1:
        k_columns = k_columns.expand(batch, -1)
    if padding is not None and padding.ndim == 3:  # ragged lanes, each filled from the front
        lengths, padding = padding.sum(-1), None
    padded_queries = call.fresh and call.q_real is not None and call.sinks is None
    result = attend(
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
        return_lse=padded_queries,
        backend="sdpa" if call.softcap is None and call.sinks is None else "reference",
    )
    if not padded_queries:
        return result
    out, lse = result
    blind = (lse == -torch.inf)[..., None]
    mean = call.v.float().mean(2, keepdim=True).to(out.dtype)
    return torch.where(blind, mean.repeat_interleave(out.shape[1] // call.v.shape[1], 1), out)
