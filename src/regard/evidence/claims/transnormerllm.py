"""TransNormerLLM: the recurrence that does not overflow."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.recurrence import DiagonalDecay, DiagonalInputs
from regard.recurrence.lightning_attention import PAPER, tiled

RATES = (0.5, 0.9, 0.99, 0.999)


@claim(
    "transnormerllm/robust-inference",
    paper=PAPER,
    statement="the robust inference algorithm, S ← λ S + k vᵀ, is numerically stable at any length; the equal form "
    "that accumulates λ^{−s} k vᵀ is not",
    figure="no number; the error is attributed to λ^{−s} at long sequences",
    measurement="float32, 16384 tokens, Dk = Dv = 16, one head for each λ in 0.5, 0.9, 0.99, 0.999: the recurrence "
    "token by token, and the library's chunked form, against the masked product in float64, relative to its largest "
    "entry; the first token at which the form with λ^{−s} is no number",
    unit="largest relative error of the robust recurrence",
    tolerance="robust and chunked errors ≤ 1e-5 at every λ, and the form with λ^{−s} not finite by the end for λ ≤ "
    "0.99; partly: the robust half holds",
    needs="cpu",
    minutes=0.5,
)
@torch.no_grad()
def robust(settings: Settings) -> Measured:
    n = settings.pick(16384, 64)
    draw = torch.Generator().manual_seed(settings.seed)
    q, k, v = (torch.randn(1, len(RATES), n, 16, generator=draw) for _ in range(3))
    decay = torch.tensor(RATES, dtype=torch.float64).log()
    want = tiled(q.double(), k.double(), v.double(), decay, block=min(1024, n))
    stepped, naive = torch.empty_like(v), torch.empty_like(v)
    s = torch.zeros(1, len(RATES), 16, 16)
    raw, rate = s.clone(), torch.tensor(RATES)[:, None, None]
    for t in range(n):
        outer = k[:, :, t, :, None] * v[:, :, t, None, :]
        s = rate * s + outer
        raw = raw + rate ** -float(t) * outer
        stepped[:, :, t] = (q[:, :, t, None] @ s)[:, :, 0]
        naive[:, :, t] = rate[..., 0] ** float(t) * (q[:, :, t, None] @ raw)[:, :, 0]
    chunked = DiagonalDecay().scan(DiagonalInputs(q, k, v, decay.float()))[0]
    rows = []
    for head, value in enumerate(RATES):
        broken = (~naive[0, head].isfinite().all(-1)).nonzero()
        rows.append(
            {
                "λ": value,
                "robust": _error(stepped[0, head], want[0, head]),
                "chunked": _error(chunked[0, head], want[0, head]),
                "λ^-s breaks at": int(broken[0]) if len(broken) else None,
            }
        )
    worst = max(row["robust"] or 0.0 for row in rows)
    sound = worst <= 1e-5 and max(row["chunked"] or 0.0 for row in rows) <= 1e-5
    breaks = all(row["λ^-s breaks at"] is not None for row in rows if (row["λ"] or 0.0) <= 0.99)
    word = verdict(reproduced=sound and breaks, partly=sound)
    why = "; ".join(
        f"λ = {row['λ']}: error {row['robust']:.0e} stepped, {row['chunked']:.0e} chunked, "
        + ("λ^−s holds" if row["λ^-s breaks at"] is None else f"λ^−s no number from token {row['λ^-s breaks at']}")
        for row in rows
    )
    return Measured(worst, word, why, {"rows": rows, "tokens": n})


def _error(x: Tensor, want: Tensor) -> float:
    return float((x.double() - want).abs().max() / want.abs().max())
