"""S2-Attention: sharding the context over heads makes attention many times faster."""

from __future__ import annotations

from regard.evidence.causal_speed import beside_dense, said
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.patterns import s2_attention
from regard.patterns.sharded import PAPER


@claim(
    "s2-attention/speed",
    paper=PAPER,
    statement="sharded attention is up to 25 × faster than FlashAttention-2 in wall-clock time",
    figure="25.3 × over FlashAttention-2 at most",
    measurement="time of dense causal attention over ours, one forward in bf16, 32 query heads over 8, width 128, at "
    "64K and 128K tokens; blocks of 64, 16 of them local, stride 16",
    unit="× faster at 64K",
    tolerance="at least 5 × at 64K, and more at 128K; partly: at least 3 × at 64K",
    needs="h100",
    minutes=2,
)
def speed(settings: Settings) -> Measured:
    rows = [
        beside_dense(s2_attention(32, kv_heads=8, local=16, stride=16), n)
        for n in settings.pick((65_536, 131_072), (2048, 4096))
    ]
    gains = [row["speed-up"] for row in rows]
    word = verdict(reproduced=gains[0] >= 5 and gains[1] > gains[0], partly=gains[0] >= 3)
    return Measured(gains[0], word, "; ".join(map(said, rows)), {"rows": rows})


later(
    "s2-attention/retrieval",
    paper=PAPER,
    statement="heads with shards of their own lose no quality, where the same shard for all heads does",
    figure="on par with dense attention; perfect retrieval at 32K",
    needs="training of language models on key-value retrieval over 512 tokens (4 layers): dense, with a shard for each "
    "head, and with one shard for all",
)
