"""Hedgehog: learned feature maps are spiky and monotonic like softmax, fixed ones are not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from regard.evidence.claim import Measured, Settings, claim, verdict
from regard.evidence.language import passages, smollm2
from regard.layers.hedgehog import PAPER, HeadMap
from regard.layers.rotary import rotate
from regard.recurrence.feature_maps import elu_plus_one, hedgehog_exp, hedgehog_softmax_halves, relu, taylor

LAYER = 10
Map = Callable[[Tensor], Tensor]
FIXED: dict[str, Map] = {"elu+1": elu_plus_one, "ReLU": relu, "Taylor 2": taylor}
LEARNED: dict[str, Map] = {"Hedgehog exp": hedgehog_exp, "Hedgehog softmax": hedgehog_softmax_halves}
FROM = 32  # rows before this one see too few keys to rank


@claim(
    "hedgehog/spikiness",
    paper=PAPER,
    statement="softmax's weights are of low entropy and monotonic in q·k; fixed feature maps lose both, Hedgehog's "
    "learned ones recover them",
    figure="GPT-2 and BERT layers: Hedgehog's entropy and monotonicity nearest to softmax's, shown as plots",
    measurement=f"SmolLM2-135M-Instruct, layer {LAYER}, q and k after the rotation, causal rows from 32 on of "
    f"passages of 128 tokens; mean entropy of a row (nats) and mean Spearman correlation of a row's weights with q·k; "
    f"the maps of Hedgehog learned on 8 passages for 150 steps of Adam (cross-entropy to the softmax weights), all "
    f"measured on 4 others",
    unit="nats between the nearer Hedgehog map's entropy and softmax's",
    tolerance="both learned maps nearer to softmax's entropy than every fixed map, and with a higher Spearman "
    "correlation than elu+1 and ReLU; partly: one learned map nearer in entropy than every fixed one",
    needs="smollm2",
    minutes=1.5,
)
def spikiness(settings: Settings) -> Measured:
    length, steps = settings.pick((128, 150), (48, 3))
    train_count, test_count = settings.pick((8, 4), (1, 1))
    q, k = _queries_and_keys(train_count + test_count, length)
    learn, test = slice(0, train_count), slice(train_count, None)
    torch.manual_seed(settings.seed)
    rows = {"softmax": _measure((q @ k.mT)[test], (q @ k.mT)[test].exp())}
    for name, features in FIXED.items():
        # Taylor's map scales by itself; the others get q and k of which q·k is the logit.
        scale = q.shape[-1] ** 0.25 if features is taylor else 1.0
        weight = features(scale * q[test]) @ features(scale * k[test]).mT
        rows[name] = _measure((q @ k.mT)[test], weight)
    for name, features in LEARNED.items():
        of_q, of_k = _learn(features, q[learn], k[learn], steps)
        with torch.no_grad():
            weight = features(of_q(q[test])) @ features(of_k(k[test])).mT
        rows[name] = _measure((q @ k.mT)[test], weight)
    target = rows["softmax"]["entropy"]
    apart = {name: abs(row["entropy"] - target) for name, row in rows.items()}
    nearest = min(apart[name] for name in FIXED)
    better = [apart[name] < nearest for name in LEARNED]
    ranked = all(rows[a]["spearman"] > rows[b]["spearman"] for a in LEARNED for b in ("elu+1", "ReLU"))
    word = verdict(reproduced=all(better) and ranked, partly=any(better))
    why = "; ".join(f"{name} {row['entropy']:.2f} nats, ρ {row['spearman']:.2f}" for name, row in rows.items())
    return Measured(min(apart[n] for n in LEARNED), word, why, {"rows": rows, "layer": LAYER, "steps": steps})


@torch.no_grad()
def _queries_and_keys(count: int, length: int) -> tuple[Tensor, Tensor]:
    """(passages, H, N, D) each, float32, rotated, keys repeated for their query heads, both over D^{1/4}."""
    model = smollm2().model
    attention = model.model.layers[min(LAYER, len(model.model.layers) - 1)].self_attn
    held: dict[str, list[Tensor]] = {"q": [], "k": []}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: held[name].append(out.float()))
        for name, module in (("q", attention.q_proj), ("k", attention.k_proj))
    ]
    try:
        for ids in passages(count, length):
            model(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    base = float(model.config.rope_parameters["rope_theta"])
    dim = attention.head_dim
    found = []
    for name in ("q", "k"):
        x = torch.cat(held[name]).unflatten(-1, (-1, dim)).transpose(1, 2).cpu()
        found.append(rotate(x, torch.arange(x.shape[2])[None], base) / dim**0.25)
    q, k = found
    return q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)


def _learn(features: Map, q: Tensor, k: Tensor, steps: int) -> tuple[nn.Module, nn.Module]:
    """A linear map a head for q and for k, so that the features' weights are near softmax's."""
    of_q, of_k = HeadMap(q.shape[1], q.shape[3]), HeadMap(q.shape[1], q.shape[3])
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    target = (q @ k.mT).masked_fill(later, -torch.inf).softmax(-1)
    optimizer = torch.optim.Adam([*of_q.parameters(), *of_k.parameters()], lr=1e-2)
    for _ in range(steps):
        weight = (features(of_q(q)) @ features(of_k(k)).mT).masked_fill(later, 0.0)
        share = weight / weight.sum(-1, keepdim=True)
        loss = -(target * share.clamp(min=1e-9).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return of_q, of_k


@torch.no_grad()
def _measure(logits: Tensor, weight: Tensor) -> dict[str, float]:
    """Over all rows from FROM on: entropy of the normalised weights, and Spearman's ρ with the logits."""
    entropies, correlations = [], []
    for i in range(min(FROM, logits.shape[2] - 1), logits.shape[2]):
        w, s = weight[:, :, i, : i + 1].double(), logits[:, :, i, : i + 1].double()
        share = w / w.sum(-1, keepdim=True).clamp(min=1e-30)
        entropies.append(-(share * share.clamp(min=1e-30).log()).sum(-1))
        correlations.append(_correlation(_ranks(w), _ranks(s)))
    return {"entropy": float(torch.stack(entropies).mean()), "spearman": float(torch.stack(correlations).mean())}


def _ranks(x: Tensor) -> Tensor:
    """Mean ranks: equal entries (ReLU has many) share theirs."""
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return below + (equal - 1) / 2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the last axis; 0 where one does not vary."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale.clamp(min=1e-30), 0.0)
