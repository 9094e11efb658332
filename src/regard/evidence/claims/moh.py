"""MoH: fewer heads per token, the same accuracy."""

from __future__ import annotations

from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regard.errors import UnsupportedError
from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.timing import milliseconds
from regard.layers import create
from regard.layers.moh import PAPER

DIM, HEADS, SHARED, LAYERS, BATCH = 128, 8, 2, 4, 64
BALANCE = 0.01
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MHA, 100 %": ("multi-head-attention", {}),
    "MoH, 75 %": ("moh", {"shared_heads": SHARED, "top_k": 4}),
    "MoH, 50 %": ("moh", {"shared_heads": SHARED, "top_k": 2}),
}


@claim(
    "moh/digits",
    paper=PAPER,
    statement="MoH matches or beats multi-head attention with only 50 to 90 % of the heads active",
    figure="LLaMA3-8B continue-tuned: 64.0 % over 14 benchmarks, 2.4 points above the original, with 75 % of the heads",
    measurement="test accuracy on scikit-learn's 8×8 digits (2×2 patches, 500 held out) of a 4-layer encoder, width "
    "128, 8 heads of which 2 shared, trained from scratch for 400 steps of 64, three seeds",
    unit="points, MoH at 50 % minus MHA",
    tolerance="mean accuracy at 75 % and at 50 % each no more than 0.5 points below MHA's; partly: at 75 % only",
    needs="cpu",
    minutes=12,
)
def digits(settings: Settings) -> Measured:
    seeds, steps, images = settings.pick(([0, 1, 2], 400, None), ([0], 2, 64))
    data = _digits(images)
    accuracy: dict[str, list[float]] = {name: [] for name in MODELS}
    for seed, name in product(seeds, MODELS):
        accuracy[name].append(_train(*MODELS[name], data, steps, settings.seed * 100 + seed))
    means = {name: mean(values) for name, values in accuracy.items()}
    dense, most, half = means.values()
    word = verdict(reproduced=min(most, half) >= dense - 0.5, partly=most >= dense - 0.5)
    listed = "; ".join(f"{name} of the heads: {value:.2f} %" for name, value in means.items())
    why = f"mean of {len(seeds)} seeds — {listed}"
    return Measured(half - dense, word, why, {"accuracy": accuracy, "steps": steps, "seeds": seeds})


class _Block(nn.Module):
    def __init__(self, key: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = create(key, dim=DIM, heads=HEADS, **options)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, _, aux = self.attention(self.before(x))
        x = x + out
        balance = x.new_zeros(()) if aux is None else aux.load_balance
        return x + self.mlp(self.between(x)), balance


class _Encoder(nn.Module):
    def __init__(self, key: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, DIM)
        self.place = nn.Parameter(0.02 * torch.randn(16, DIM))
        self.blocks = nn.ModuleList(_Block(key, options) for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 10))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """patches (B, 16, 4) → logits (B, 10), sum of the load-balance losses."""
        x, total = self.embed(patches) + self.place, patches.new_zeros(())
        for block in self.blocks:
            x, balance = block(x)
            total = total + balance
        return self.head(x.mean(1)), total


def _digits(most: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches (n, 16, 4) in [0, 1] and labels: 1297 to train on, 500 to test, or `most`; always the same split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnsupportedError("this claim needs scikit-learn: pip install 'regard[evidence]'") from error
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).div(16).view(-1, 4, 2, 4, 2)
    patches = pixels.transpose(2, 3).reshape(-1, 16, 4)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    patches, targets = patches[order], torch.tensor(labels)[order]
    test, train = slice(0, most or 500), slice(500, most and 500 + most)
    return patches[train], targets[train], patches[test], targets[test]


def _train(
    key: str, options: dict[str, Any], data: tuple[Tensor, Tensor, Tensor, Tensor], steps: int, seed: int
) -> float:
    """Test accuracy in per cent after `steps` steps."""
    torch.manual_seed(seed)
    model = _Encoder(key, options)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(seed)  # the same batches for every model of a seed
    patches, targets, test, answers = data
    for _ in range(steps):
        rows = torch.randint(len(patches), (BATCH,), generator=draw)
        logits, balance = model(patches[rows])
        loss = cross_entropy(logits, targets[rows]) + BALANCE * balance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return 100 * float((model(test)[0].argmax(-1) == answers).float().mean())


@claim(
    "moh/gathered-speed",
    paper=PAPER,
    statement="activating fewer heads saves inference time",
    figure="not given as a time of the attention itself",
    measurement="forward of the layer at 4096 tokens, width 2048, 16 heads, causal, bf16, batch 4, 50 % of the heads "
    "active and gathered, against multi-head attention of the same size",
    unit="× the time of multi-head attention",
    tolerance="at most 0.8 × the time of multi-head attention; partly: at most 1 ×",
    needs="h100",
    minutes=1,
)
@torch.no_grad()
def gathered_speed(settings: Settings) -> Measured:
    from regard.patterns import causal

    tokens, dim, heads = settings.pick((4096, 2048, 16), (256, 128, 4))
    shared = heads // 8
    sizes = {"dim": dim, "heads": heads}
    routed = {"shared_heads": shared, "top_k": heads // 2 - shared}
    models = {
        "multi-head attention": create("multi-head-attention", **sizes),
        "MoH gathered": create("moh", **sizes, **routed, gathered=True),
        "MoH masked": create("moh", **sizes, **routed),
    }
    x = torch.randn(4, tokens, dim, device="cuda", dtype=torch.bfloat16)
    times = {}
    for name, model in models.items():
        model.to("cuda", torch.bfloat16)
        times[name] = milliseconds(partial(model, x, pattern=causal()))
    ratio = times["MoH gathered"] / times["multi-head attention"]
    word = verdict(reproduced=ratio <= 0.8, partly=ratio <= 1)
    why = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    return Measured(ratio, word, why, {"ms": times, **sizes, **routed, "tokens": tokens, "batch": 4})
