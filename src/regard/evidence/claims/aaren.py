"""Aaren: softmax attention that streams from a state of constant size."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.layers import create
from regard.layers.aaren import Aaren
from regard.layers.multi_head_attention import KVState
from regard.layers.recurrent import RecurrentState
from regard.models.causal_lm import held_bytes
from regard.patterns import causal
from regard.recurrence.prefix_softmax import PAPER, PrefixInputs, PrefixSoftmax, SoftmaxState

DIM, HEADS = 256, 4


@claim(
    "aaren/constant-memory-streaming",
    paper=PAPER,
    statement="Aaren is updated with new tokens in constant memory and constant time, while a Transformer's cache "
    "and time per token grow with the stream; its output is that of softmax attention with a constant query",
    figure="memory flat and cumulative time linear in the number of tokens, against linear and quadratic",
    measurement="one layer of width 256, 4 heads, float32, one CPU thread: bytes of the state and median time of one "
    "more token after 256 … 65536 tokens, beside multi-head attention with its cache, which it copies to append; in "
    "float64 the layer's scan and its token-by-token outputs against torch's causal softmax attention with the same "
    "query at 2000 tokens, scores up to about ±300",
    unit="× the time per token at the longest stream over the shortest",
    tolerance="the same bytes at every length, time per token within 1.5 ×, the largest error ≤ 1e-12; partly: "
    "equality and the bytes hold",
    needs="cpu",
    minutes=0.3,
)
@torch.no_grad()
def streaming(settings: Settings) -> Measured:
    lengths = settings.pick((256, 1024, 4096, 16384, 65536), (16, 32))
    torch.manual_seed(settings.seed)
    aaren = create("aaren", dim=DIM, heads=HEADS)
    attention = create("multi-head-attention", dim=DIM, heads=HEADS)
    rows = []
    for length in lengths:
        x = torch.randn(1, length, DIM)
        state = aaren(x).state
        k, v = (torch.randn(1, HEADS, length, DIM // HEADS) for _ in range(2))
        cache = KVState(k, v, None)
        token = torch.randn(1, 1, DIM)

        def aaren_step(state: RecurrentState = state, token: Tensor = token) -> object:
            return aaren(token, state=state)

        def attention_step(cache: KVState = cache, token: Tensor = token) -> object:
            return attention(token, pattern=causal(), state=cache)

        rows.append(
            {
                "tokens": length,
                "bytes": held_bytes(state.inner),
                "ms": _ms(aaren_step, settings.pick(200, 3)),
                "cache bytes": held_bytes(cache),
                "cache ms": _ms(attention_step, settings.pick(30, 3)),
            }
        )
    error = _error(settings.pick(2000, 20))
    first, last = rows[0], rows[-1]
    ratio, cache_ratio = last["ms"] / first["ms"], last["cache ms"] / first["cache ms"]
    times = [row["ms"] for row in rows]
    flat = len({row["bytes"] for row in rows}) == 1
    word = verdict(
        reproduced=flat and max(times) <= 1.5 * min(times) and error <= 1e-12, partly=flat and error <= 1e-12
    )
    why = (
        f"{first['bytes']} to {last['bytes']} bytes and {first['ms']:.2f} to {last['ms']:.2f} ms a token from "
        f"{first['tokens']} to {last['tokens']} tokens; with a cache {first['cache bytes'] / 2**20:.1f} to "
        f"{last['cache bytes'] / 2**20:.0f} MiB and {first['cache ms']:.2f} to {last['cache ms']:.2f} ms "
        f"(× {cache_ratio:.0f}); largest error {error:.1e}"
    )
    return Measured(ratio, word, why, {"rows": rows, "error": error, "dim": DIM, "heads": HEADS})


def _ms(work: Callable[[], object], rounds: int) -> float:
    """Median of one call, in milliseconds."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1000 * median(times)


def _error(n: int) -> float:
    """Of the scan and of the RNN cell against softmax under a causal mask, over the layer's own keys and query."""
    layer = Aaren(DIM, HEADS).double()
    layer.token.data.normal_(std=100.0)
    x = torch.randn(1, n, DIM, dtype=torch.float64)
    k, v = (project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for project in (layer.k_proj, layer.v_proj))
    q = (layer.query() * (DIM / HEADS) ** 0.5)[None, :, None].expand_as(k)
    want = scaled_dot_product_attention(q, k, v, is_causal=True)
    mixer, scores = PrefixSoftmax(), (layer.query()[:, None] * k).sum(-1)
    inputs = PrefixInputs(scores, v)
    scanned = mixer.scan(inputs)[0]
    state: SoftmaxState = mixer.init(inputs)
    stepped = []
    for t in range(n):
        state, out = mixer.step(state, inputs.tokens(t, t + 1))
        stepped.append(out)
    return max(float((each - want).abs().max()) for each in (scanned, torch.cat(stepped, 2)))
