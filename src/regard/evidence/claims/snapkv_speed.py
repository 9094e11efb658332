"""SnapKV: decoding from the compressed cache takes the same time whatever the prompt's length."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.timing import milliseconds
from regard.inference.seam import attach
from regard.registry import Paper

PAPER = Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "Li et al.", 2024, "2404.14469")
BUDGET, BATCH = 1024, 4
PLANS = {"full": "full", "snapkv": f"snapkv(budget={BUDGET})"}


@claim(
    "snapkv/decode-speed",
    paper=PAPER,
    statement="decoding is constant in the length of the prompt; faster and far smaller than with the whole cache",
    figure="at 16k tokens of input 3.6 × faster generation and 8.2 × less memory",
    measurement="time per decoded token of a model of Llama-3-8B's shape with random weights in bf16, 4 prompts of 4k, "
    f"16k and 32k random tokens, under full and under a budget of {BUDGET}; bytes of K and V held after the prompt",
    unit="× faster at 16k",
    tolerance="snapkv's slowest length within 10 % of its fastest, and ≥ 3.2 × faster than full at 16k with ≥ 8 × less "
    "K and V; partly: flat and not slower than full",
    needs="h100",
    minutes=3,
)
def decode_speed(settings: Settings) -> Measured:
    model = _model(settings.quick)
    lengths = settings.pick([4096, 16384, 32768], [256, 512])
    rows = [{"length": n, **_at(model, n)} for n in lengths]
    snap = [row["snapkv_ms"] for row in rows]
    at = rows[1]
    faster, smaller = at["full_ms"] / at["snapkv_ms"], at["full_bytes"] / at["snapkv_bytes"]
    flat = max(snap) <= 1.1 * min(snap)
    word = verdict(reproduced=flat and faster >= 3.2 and smaller >= 8, partly=flat and faster >= 1)
    why = (
        f"{min(snap):.1f} to {max(snap):.1f} ms per token under snapkv from {lengths[0]} to {lengths[-1]} tokens, full "
        f"{rows[0]['full_ms']:.1f} to {rows[-1]['full_ms']:.1f} ms; at {at['length']}: {faster:.2f} × faster, "
        f"{smaller:.1f} × fewer bytes of K and V"
    )
    return Measured(faster, word, why, {"rows": rows, "batch": BATCH, "budget": BUDGET})


def _model(quick: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2 if quick else 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=65536,
    )
    torch.set_default_dtype(torch.bfloat16)  # made in bfloat16: a float32 copy of 8 B weights would take 32 GB first
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def _at(model: LlamaForCausalLM, length: int) -> dict[str, float]:
    """Milliseconds per decoded token and bytes held, under each plan."""
    found: dict[str, float] = {}
    ids = torch.randint(0, 32000, (BATCH, length), device="cuda")
    for name, plan in PLANS.items():
        with attach(model, plan) as attached:
            store = attached.new_store()
            model(ids, past_key_values=store, logits_to_keep=1)
            store.seal()
            found[f"{name}_bytes"] = store.held_bytes
            found[f"{name}_ms"] = milliseconds(partial(model, ids[:, :1], past_key_values=store), rounds=20)
        del store
        torch.cuda.empty_cache()
    return found
