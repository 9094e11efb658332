"""PowerAttention: a field that doubles with every layer, and three times the speed of full attention at 128K."""

from __future__ import annotations

from regard.evidence.causal_speed import beside_dense, said
from regard.evidence.claim import Measured, Settings, claim, later, verdict
from regard.patterns import Pattern, power_attention, sliding_window
from regard.patterns.powers import PAPER, receptive_field


@claim(
    "power-attention/speed",
    paper=PAPER,
    statement="attention under the power pattern is 3 × faster than full attention at 128K",
    figure="3.0 × faster prefill at 128K on Qwen2-7B (block, window and sink sizes not given)",
    measurement="time of dense causal attention over ours, one forward in bf16, 32 query heads over 8, width 128, at "
    "64K and 128K tokens; blocks of 64, a window of 8, 1 sink",
    unit="× faster at 128K",
    tolerance="at least 3 × at both lengths; partly: at 128K only",
    needs="h100",
    minutes=2,
)
def speed(settings: Settings) -> Measured:
    rows = [beside_dense(power_attention(), n) for n in settings.pick((65_536, 131_072), (1024, 2048))]
    gains = [row["speed-up"] for row in rows]
    word = verdict(reproduced=min(gains) >= 3, partly=gains[-1] >= 3)
    return Measured(gains[-1], word, "; ".join(map(said, rows)), {"rows": rows})


@claim(
    "power-attention/reach",
    paper=PAPER,
    statement="the receptive field grows exponentially with depth, complete and without holes, where that of a sliding "
    "window of as many keys grows linearly",
    figure="2^d tokens after d layers",
    measurement="the tokens just before and at the last of 4096 that it has learned of after 1 to 11 layers, counted "
    "until the first hole; the token form without window and sinks, and a sliding window of 13 keys, as many as a row "
    "of the pattern has at most",
    unit="tokens after 11 layers",
    tolerance="at least 2^d tokens after every number d of layers, and more than the window from 4 layers on; partly: "
    "exponential, at least 1.5^d",
    needs="cpu",
    minutes=0.2,
)
def reach(settings: Settings) -> Measured:
    n, deepest = settings.pick((4096, 11), (64, 5))
    row = n.bit_length()  # the query itself and a key for each power of two before it
    depths = range(1, deepest + 1)
    ours = [_unbroken(power_attention(1, 0, block=1), n, d) for d in depths]
    window = [_unbroken(sliding_window(row), n, d) for d in depths]
    doubled = all(x >= min(n, 2**d) for x, d in zip(ours, depths, strict=True))
    ahead = all(x > y for x, y, d in zip(ours, window, depths, strict=True) if d >= 4)
    grows = all(x >= min(n, 1.5**d) for x, d in zip(ours, depths, strict=True))
    word = verdict(reproduced=doubled and ahead, partly=grows)
    why = f"after 1 to {deepest} layers {', '.join(map(str, ours))} tokens; a window {', '.join(map(str, window))}"
    return Measured(float(ours[-1]), word, why, {"power": ours, "window": window, "keys": row})


def _unbroken(pattern: Pattern, n: int, layers: int) -> int:
    """How many tokens up to the last it has learned of, counted back to the first that it has not."""
    back = receptive_field([pattern] * layers, n, query=n - 1).flip(0)
    return n if bool(back.all()) else int((~back).long().argmax())


later(
    "power-attention/passkey",
    paper=PAPER,
    statement="after light training a model under the power pattern retrieves over the whole context, where other "
    "static patterns do not",
    figure="5 % to 40 % better than static patterns on passkey retrieval and RULER",
    needs="training of a model of 4 layers and width 64 to copy a value from up to 200 tokens before, under the power "
    "pattern and under a window of as many keys",
)
