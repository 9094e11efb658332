"""A tiny Llama and what tests of the store and the seam ask of it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def llama(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    """Two layers, four query heads over two KV heads, logits far enough apart to tell tokens from each other."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 512,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.1, **settings)).eval()


def ids(batch: int, n: int, seed: int = 1) -> Tensor:
    """Token ids (B, N), none of them 0."""
    return torch.randint(1, 64, (batch, n), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, longest), padding on the left."""
    n = max(lengths)
    tokens = ids(len(lengths), n, seed)
    mask = torch.arange(n) >= n - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask.long()
