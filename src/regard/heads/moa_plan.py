"""MoA as one call: from an attached model and texts to a plan that frees memory head by head (Fu et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from regard.errors import require
from regard.heads.moa_influence import Sample, profile
from regard.heads.moa_search import search
from regard.inference.plan import Plan
from regard.inference.policies.moa import MoA
from regard.inference.seam import Attached
from regard.patterns.elastic import Rule


def moa_plan(
    attached: Attached,
    samples: Sequence[Sample],
    *,
    most: Mapping[int, float] | float = 0.5,
    validation: Sequence[Sample] = (),
    candidates: Sequence[Rule] | None = None,
    distinct: int = 2,
    block: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Profile a model attached to `full`, search a rule for every KV head, return the plan for `regard.attach`.

    samples: texts to calibrate on, of one or several lengths (see `profile`). most: bound on the mean density of the
    cache, at every profiled length or by length. validation: longer texts that were not profiled; of several plans
    none of which dominates another, the one that serves them best is taken (`served_loss`); without them, the one with
    the least predicted loss at the longest profiled length (ours). candidates, distinct, block, progress as in
    `search`, `profile`.

    Raises ArgumentError, and UnsupportedError where a layer cannot be profiled or scipy is missing.
    """
    found = search(
        profile(attached, samples, block=block, progress=progress), most=most, candidates=candidates, distinct=distinct
    )
    plans = [Plan(cache=MoA(each.rules, block)) for each in found]
    if len(plans) == 1:
        return plans[0]
    if validation:
        return min(plans, key=lambda plan: served_loss(attached, plan, validation))
    longest = max(found[0].losses)
    return plans[min(range(len(plans)), key=lambda n: found[n].losses[longest])]


@torch.no_grad()
def served_loss(attached: Attached, plan: Plan, samples: Sequence[Sample]) -> float:
    """Mean cross-entropy of the answers when the cache of their prompts is kept as `plan` says.

    The prompt attends densely. The answer's first token is not counted: it is predicted before anything is
    dropped. attached: to `full`, or to any plan that observes what `plan` needs. Raises ArgumentError without samples,
    or for answers of a single token.
    """
    require(len(samples) > 0, "samples", 0, "at least one")
    model: Any = attached.model
    total = 0.0
    for sample in samples:
        answer = sample.tokens[sample.answer_from :].to(attached.device)
        require(len(answer) >= 2, "samples", f"an answer of {len(answer)} token", "answers of two tokens or more")
        store = attached.new_store()
        model(input_ids=sample.tokens[None, : sample.answer_from].to(attached.device), past_key_values=store)
        kept = store.fork(plan)
        kept.seal()
        logits = model(input_ids=answer[None, :-1], past_key_values=kept).logits[0]
        total += float(nn.functional.cross_entropy(logits.float(), answer[1:]))
    return total / len(samples)
