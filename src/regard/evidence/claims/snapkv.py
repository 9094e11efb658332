"""SnapKV: what the end of a prompt looks at is what the answer will look at."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.language import per_cent, right_answers, samples, smollm2
from regard.inference.seam import attach
from regard.registry import lookup
from regard.tasks import Sample

PAPER = lookup("cache", "snapkv").paper
BUDGETS = (256, 512, 1024)


@cache
def _needles(settings: Settings) -> tuple[list[Sample], dict[str, list[bool]]]:
    """4k prompts whose needle lies before any window that is compared, and which answers were right."""
    count, length, budgets = settings.pick((16, 4096, BUDGETS), (1, 512, (128,)))
    outside = length - 1.25 * max(budgets)
    prompts = [
        p
        for p in samples("needle", count=2 * count, length=length, seed=settings.seed)
        if p.depth is not None and p.depth * len(p.context) < outside
    ][:count]
    plans = {"full": "full"}
    for budget in budgets:
        plans[f"snapkv {budget}"] = f"snapkv(budget={budget})"
        plans[f"no pooling {budget}"] = f"snapkv(budget={budget},kernel=1)"
        plans[f"streaming {budget}"] = f"streaming(budget={budget})"
    return prompts, right_answers(prompts, plans)


@claim(
    "snapkv/needle",
    paper=PAPER,
    statement="with a small cache chosen by the prompt's last queries, the needle is found nearly as often as with all "
    "of it; keeping the start and the most recent tokens fails when the needle lies elsewhere",
    figure="needle in a haystack to 380k tokens at 1024 entries, 'almost negligible' accuracy loss",
    measurement="SmolLM2-135M, 16 prompts of 4096 tokens, a six-digit number outside every window compared; greedy "
    "answers at 256, 512 and 1024 entries, observation window 16, pooling over 7",
    unit="points below full, mean of the budgets",
    tolerance="snapkv at most 15 points below full at each budget, streaming at most 15 % right; partly: at 1024 only",
    needs="smollm2",
    minutes=6,
)
def needle(settings: Settings) -> Measured:
    prompts, right = _needles(settings)
    found = {name: per_cent(values) for name, values in right.items()}
    budgets = [int(name.split()[1]) for name in found if name.startswith("snapkv")]
    good = [b for b in budgets if found[f"snapkv {b}"] >= found["full"] - 15 and found[f"streaming {b}"] <= 15]
    word = verdict(reproduced=good == budgets, partly=budgets[-1] in good)
    loss = sum(found["full"] - found[f"snapkv {b}"] for b in budgets) / len(budgets)
    named = [f"{name} {value:.0f} %" for name, value in found.items() if "pooling" not in name]
    why = f"right of {len(prompts)} prompts: " + ", ".join(named)
    return Measured(loss, word, why, {"right": right, "depths": [p.depth for p in prompts]})


@claim(
    "snapkv/pooling",
    paper=PAPER,
    statement="without pooling the votes, parts of a needle are lost: clustering keeps its neighbours too",
    figure="shown as a figure of retrieval accuracy with and without pooling, without a number",
    measurement="the prompts of snapkv/needle, votes pooled over 7 entries against none",
    unit="points gained by pooling, mean of the budgets",
    tolerance="pooling better at every budget; partly: better in the mean",
    needs="smollm2",
    minutes=6,
)
def pooling(settings: Settings) -> Measured:
    prompts, right = _needles(settings)
    found = {name: per_cent(values) for name, values in right.items()}
    budgets = [int(name.split()[1]) for name in found if name.startswith("snapkv")]
    gains = [found[f"snapkv {b}"] - found[f"no pooling {b}"] for b in budgets]
    gain = sum(gains) / len(gains)
    word = verdict(reproduced=min(gains) > 0, partly=gain > 0)
    named = [f"{found[f'snapkv {b}']:.0f} against {found[f'no pooling {b}']:.0f} % at {b}" for b in budgets]
    why = f"right of {len(prompts)} prompts, pooled against not: " + ", ".join(named)
    return Measured(gain, word, why, {"right": right})


@claim(
    "snapkv/hit-rate",
    paper=PAPER,
    statement="the positions that the prompt's last queries pick are those that the answer's queries attend to",
    figure="shown per layer as a hit rate, high throughout, without one number",
    measurement="SmolLM2-135M, 4 needle prompts of 2048 tokens: of the positions before the window that 16 generated "
    "tokens attend to most, per layer and KV head, the share that snapkv kept at 256 entries (eager weights)",
    unit="% kept, mean of layers",
    tolerance="mean ≥ 50 % and every layer ≥ 2 × chance; partly: mean ≥ 2 × chance",
    needs="smollm2",
    minutes=2,
)
def hit_rate(settings: Settings) -> Measured:
    count, length, budget, steps = settings.pick((4, 2048, 256, 16), (1, 256, 64, 2))
    prompts = samples("needle", count=count, length=length, seed=settings.seed)
    rates = torch.stack([_overlap(prompt, budget, steps) for prompt in prompts]).mean((0, 2))  # (layers,)
    chance = (budget - 16) / (length - 16)
    hit = float(rates.mean())
    word = verdict(reproduced=hit >= 0.5 and float(rates.min()) >= 2 * chance, partly=hit >= 2 * chance)
    why = (
        f"{100 * hit:.0f} % of the most attended positions were kept, {100 * rates.min():.0f} to "
        f"{100 * rates.max():.0f} % by layer; by chance {100 * chance:.0f} %"
    )
    return Measured(100 * hit, word, why, {"by_layer": [round(float(r), 4) for r in rates], "chance": chance})


@torch.no_grad()
def _overlap(prompt: Sample, budget: int, steps: int, window: int = 16) -> Tensor:
    """(layers, KV heads): share of the positions most attended to while generating that the plan kept."""
    model = smollm2().model
    ids = torch.tensor([prompt.context + prompt.question], device=model.device)
    before = ids.shape[1] - window
    with attach(model, f"snapkv(budget={budget},window={window})") as attached:
        store = attached.new_store()
        model(ids, past_key_values=store, logits_to_keep=1)
        store.seal()
        kept = [store.kept(layer)[0] for layer in range(store.caching_layers)]
    attended = _attention_while_generating(ids, steps)[..., :before]
    top = attended.topk(budget - window, -1).indices.cpu()
    return torch.stack(
        [
            torch.stack([torch.isin(top[i, h], lane).float().mean() for h, lane in enumerate(lanes)])
            for i, lanes in enumerate(kept)
        ]
    )


def _attention_while_generating(ids: Tensor, steps: int) -> Tensor:
    """(layers, KV heads, N): weights on the prompt, summed over generated tokens and the heads of a group, by eager."""
    model = smollm2().model
    past, own = DynamicCache(config=model.config), model.config._attn_implementation
    token = model(ids, past_key_values=past, logits_to_keep=1).logits.argmax(-1)
    kv_heads, total = model.config.num_key_value_heads, None
    model.set_attn_implementation("eager")
    try:
        for _ in range(steps):
            out = model(token, past_key_values=past, output_attentions=True)
            now = torch.stack([w[0, :, 0, : ids.shape[1]] for w in out.attentions])  # (layers, heads, N)
            total = now if total is None else total + now
            token = out.logits.argmax(-1)
    finally:
        model.set_attn_implementation(own)
    assert total is not None
    return total.unflatten(1, (kv_heads, -1)).sum(2)
