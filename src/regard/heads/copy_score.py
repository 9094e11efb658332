"""How much each KV head looks up what should be copied: a head table from a plain forward, no training.

A passage is planted in a long text and repeated at its end. A head that copies attends, from each token of the
repetition,
to the token that *followed* the same token in the planted passage. Its score is that weight, averaged over the
repetition
and over several plantings; a KV head's is the largest among its query heads, since the cache is kept for the group.

The idea is that of induction heads (Olsson et al. 2022, arXiv 2209.11895) and retrieval heads (Wu et al. 2024, arXiv
2404.15574). It is simpler than DuoAttention's trained gates (Xiao et al. 2024), which ask for a backward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from regard.errors import ArgumentError, require
from regard.inference import observe
from regard.inference.call import AttentionCall
from regard.inference.head_table import HeadTable
from regard.inference.seam import attach


def read_haystack(path: Path | None) -> str:
    """A text to cut prompts from: the file, or a module of Python's standard library. ArgumentError when unreadable."""
    source = Path(argparse.__file__) if path is None else path
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("text", source, f"a readable UTF-8 text file ({error})") from error


def score_model(
    name: str,
    haystack: str,
    *,
    length: int,
    plantings: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> HeadTable:
    """`copy_scores` of a model by alias, folder or hub id, on a text. The tables that ship were made by this."""
    from regard.models.pretrained import load

    loaded = load(name)
    tokens = loaded.tokenizer(haystack, return_tensors="pt").input_ids[0]
    return copy_scores(
        loaded.model, tokens, length=length, plantings=plantings, seed=seed, name=name, progress=progress
    )


@torch.no_grad()
def copy_scores(
    model: nn.Module,
    haystack: Tensor,
    *,
    length: int = 1024,
    passage: int = 32,
    plantings: int = 8,
    seed: int = 0,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> HeadTable:
    """Score every KV head of a pretrained model.

    haystack (tokens,) long: text the prompts are cut from, at least `length` tokens. Each of `plantings` prompts has
    `length` tokens, with a passage of `passage` tokens, drawn at random from the haystack's own, at another depth.
    progress is told (done, of) after each prompt. Raises ArgumentError when the haystack is too short.
    """
    require(passage >= 2 and length > 3 * passage, "passage", passage, f"2 … {(length - 1) // 3} for length {length}")
    require(plantings >= 1, "plantings", plantings, "an int ≥ 1")
    require(haystack.ndim == 1 and len(haystack) >= length, "haystack", tuple(haystack.shape), f"(at least {length},)")
    draw = torch.Generator().manual_seed(seed)
    totals: list[Tensor] = []
    with attach(model, "full") as attached:
        found: dict[int, Tensor] = {}
        target = 0

        def listen(call: AttentionCall) -> None:
            rows = slice(length - passage, length - 1)
            weights = observe.weights(call, rows)[0]  # (Hkv, G, passage − 1, M)
            wanted = torch.arange(target + 1, target + passage, device=weights.device)
            on_target = weights.gather(-1, wanted.expand(*weights.shape[:2], -1)[..., None])[..., 0]
            found[call.layer] = on_target.mean(-1).amax(-1).cpu()

        attached.listeners.append(listen)
        for number in range(plantings):
            start = int(torch.randint(0, len(haystack) - length + 1, (1,), generator=draw))
            prompt = haystack[start : start + length].clone()
            words = haystack[torch.randint(0, len(haystack), (passage,), generator=draw)]
            target = 1 + (number * (length - 2 * passage - 2)) // plantings
            prompt[target : target + passage] = words
            prompt[length - passage :] = words
            model(input_ids=prompt[None].to(attached.device), use_cache=True)
            totals.append(torch.stack([found[layer] for layer in sorted(found)]))
            if progress is not None:
                progress(number + 1, plantings)
    scores = torch.stack(totals).mean(0)
    how = f"copy_scores(length={length}, passage={passage}, plantings={plantings}, seed={seed})"
    return HeadTable(tuple(tuple(round(float(x), 6) for x in row) for row in scores), model=name, made_by=how)
