"""What the seam costs per attention call, kernels taken out: decoding one token, by cache policy.

Each layer's `update` and attention function are called as the model calls them, with a kernel that returns at once,
for as many tokens as a page of the store holds, so that its share of making pages is in. The figures are processor time
per call, least and median of the rounds; the full plan is measured first and last (A/A). transformers' own cache, of
the same length, stands beside it. Floor: 0. Asked: 50 µs. tova and h2o go by the weights of every token: their
attention is computed, and counted in.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import regard.inference.cache as cache_module
from regard.evidence.record import machine, versions
from regard.inference.call import MaskRecipe
from regard.inference.interface import attention
from regard.inference.lanes import PAGE
from regard.inference.seam import attach

PLANS = (
    "full",
    "snapkv(budget=256)",
    "keydiff(budget=256)",
    "streaming(budget=256)",
    "tova(budget=256)",
    "h2o(budget=256)",
)
LAYERS, STEPS, ROUNDS, PROMPT = 30, PAGE, 9, 512
HALF = f"[{','.join(['[1,0]'] * LAYERS)}]"  # a head table by which one of two KV heads keeps everything


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


Figures = dict[str, float]


def timed(one_round: Callable[[], None]) -> Figures:
    """µs of processor time per attention call."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        one_round()
        times.append(time.process_time() - start)
    unit = 1e6 / (STEPS * LAYERS)
    return {"least": round(min(times) * unit, 1), "median": round(statistics.median(times) * unit, 1)}


@torch.no_grad()
def seam(plan: str) -> Figures:
    """A token decoded under a plan, `begin` and `end` of the forward included."""
    net = model()
    modules = [layer.self_attn for layer in net.model.layers]
    q = torch.randn(1, 8, 1, 16)
    k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
    out = torch.zeros(1, 8, 1, 16)
    tokens = torch.ones(1, 1, dtype=torch.long)
    recipe = MaskRecipe(lambda b, h, i, j: j <= i, causal=True)
    with attach(net, plan) as attached:
        start = attached.new_store()
        net(torch.randint(0, 128, (1, PROMPT)), past_key_values=start)
        start.seal()
        root = attached.model

        def one_round() -> None:
            store = start.fork()
            for _ in range(STEPS):
                attached._before(root, (), {"input_ids": tokens, "past_key_values": store})
                for layer, module in zip(store.kv_layers, modules, strict=True):
                    keys, values = layer.update(k, v)
                    attention(module, q, keys, values, recipe, scaling=0.25, dropout=0.0)
                attached._after(root, (), out)

        real = cache_module.ragged_attend, cache_module.over_cache
        cache_module.ragged_attend = lambda *_, **__: out
        cache_module.over_cache = lambda *_, **__: out
        try:
            return timed(one_round)
        finally:
            cache_module.ragged_attend, cache_module.over_cache = real


@torch.no_grad()
def plain() -> Figures:
    """transformers' DynamicCache, which copies what it holds for each token, and no kernel."""
    k, v = torch.randn(1, 2, PROMPT, 16), torch.randn(1, 2, PROMPT, 16)
    new_k, new_v = k[:, :, :1], v[:, :, :1]

    def one_round() -> None:
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(k, v, layer)
        for _ in range(STEPS):
            for layer in range(LAYERS):
                cache.update(new_k, new_v, layer)

    return timed(one_round)


def main() -> None:
    torch.set_num_threads(1)
    figures = {plan: seam(plan) for plan in PLANS}
    figures["duoattention, half of the heads"] = seam(f"duoattention(table={HALF},sparsity=0.5,sinks=64,recent=192)")
    figures |= {"full again": seam("full"), "transformers DynamicCache.update": plain()}
    for name, value in figures.items():
        print(f"{name:36s} {value['least']:7.1f} … {value['median']:7.1f} µs per call")
    result = {
        "unit": "µs of processor time per attention call, no kernel",
        "figures": figures,
        "load": os.getloadavg()[0],
        "machine": machine(),
        "versions": versions(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
