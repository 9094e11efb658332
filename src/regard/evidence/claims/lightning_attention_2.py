"""Lightning Attention-2: training speed does not depend on the length."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.timing import milliseconds
from regard.recurrence.lightning_attention_2 import PAPER, LightningAttention2, LightningInputs, tnl_log_decay

HEADS, DIM = 8, 128


@claim(
    "lightning-attention-2/constant-speed",
    paper=PAPER,
    statement="training speed in tokens per second stays constant as sequences grow, at equal tokens per batch",
    figure="no number: a flat curve of training speed over the length",
    measurement="forward and backward of the mixer alone, 8 heads of 128, bf16 inputs, 131072 tokens a batch in "
    "sequences of 1k to 128k, the slopes of TransNormerLLM's first layer, the library's kernels, calls queued one "
    "after the other; one head of each length is held against float64 first; causal SDPA in the same run",
    unit="× (slowest ÷ fastest tokens/s)",
    tolerance="slowest ≥ 0.9 × mean and fastest ≤ 1.1 × mean over the lengths, and peak memory within 10 %; "
    "partly: the slowest ≥ 0.5 × the fastest while dense attention loses more than 10×",
    needs="h100",
    minutes=2,
)
def constant_speed(settings: Settings) -> Measured:
    tokens = settings.pick(131072, 2048)
    lengths = [n for n in (1024, 4096, 16384, 65536, 131072) if n <= tokens]
    rows = [_at(n, tokens) for n in lengths]
    linear = torch.tensor([row["linear_tokens_per_s"] for row in rows])
    dense = torch.tensor([row["dense_tokens_per_s"] for row in rows])
    memory = torch.tensor([row["linear_peak_bytes"] for row in rows], dtype=torch.float64)
    mean = linear.mean()
    flat = bool(linear.min() >= 0.9 * mean and linear.max() <= 1.1 * mean)
    flat_memory = bool(memory.max() <= 1.1 * memory.min())
    ratio, falls = float(linear.min() / linear.max()), float(dense[0] / dense[-1])
    word = verdict(reproduced=flat and flat_memory, partly=ratio >= 0.5 and falls > 10)
    why = (
        f"{linear.min() / 1e6:.2f} to {linear.max() / 1e6:.2f} M tokens/s from {lengths[0]} to {lengths[-1]} tokens "
        f"({(linear.min() / mean - 1) * 100:+.0f} % … {(linear.max() / mean - 1) * 100:+.0f} % of the mean), "
        f"peak memory × {memory.max() / memory.min():.2f}; dense attention becomes {falls:.0f} times slower meanwhile"
    )
    return Measured(ratio, word, why, {"rows": rows, "heads": HEADS, "dim": DIM})


def _at(length: int, tokens: int) -> dict[str, float]:
    shape = (tokens // length, HEADS, length, DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    decay = tnl_log_decay(HEADS, layer=0, layers=12).tolist()
    mixer = LightningAttention2(tuple(decay))
    with torch.no_grad():
        one = LightningInputs(*(x[:1, :1].double() for x in (q, k, v)))
        truth = LightningAttention2((decay[0],)).scan(one)[0]
        wrong = (mixer.scan(LightningInputs(q, k, v))[0][:1, :1].double() - truth).norm() / truth.norm()
    if not wrong < 0.02:
        raise AssertionError(f"wrong by {float(wrong)} at {length} tokens")

    def backward(out: Tensor) -> None:
        out.backward(gradient)
        q.grad = k.grad = v.grad = None

    torch.cuda.reset_peak_memory_stats()
    linear = milliseconds(lambda: backward(mixer.scan(LightningInputs(q, k, v))[0]))
    peak = torch.cuda.max_memory_allocated()
    dense = milliseconds(lambda: backward(scaled_dot_product_attention(q, k, v, is_causal=True)))
    return {
        "length": length,
        "linear_tokens_per_s": tokens / linear * 1000,
        "dense_tokens_per_s": tokens / dense * 1000,
        "linear_peak_bytes": peak,
    }
