"""SmolLM2 attached to the plan `full` against the same model on transformers' own sdpa: prefill of 4k tokens, decoding.

The two alternate, round by round, so that what else the machine does falls on both. Each figure is the median over
rounds
of attached ÷ plain, with the smallest and largest; beside it the same for plain ÷ plain (A/A), which says what a ratio
means on this machine. Tokens must be equal before a time is kept. Floor: 1 — the same operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from regard.evidence.record import machine, versions
from regard.inference.seam import attach
from regard.models.pretrained import load


def once(model: Any, prompt: torch.Tensor, steps: int, attached: bool) -> tuple[float, float, list[int]]:
    """Seconds of the prefill, seconds per decoded token, the tokens."""
    with attach(model, "full") if attached else nullcontext():
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        tokens, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
            tokens.append(int(out.logits[0, -1].argmax()))
    return prefill, statistics.median(times[1:]), tokens


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    loaded = load("smollm2")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    prompt = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : args.context]
    rows = []
    for number in range(args.rounds):
        row = {
            name: once(loaded.model, prompt, args.steps, name == "attached") for name in ("plain", "attached", "again")
        }
        assert row["plain"][2] == row["attached"][2] == row["again"][2], "other tokens: nothing is timed"
        rows.append({name: (prefill, step) for name, (prefill, step, _) in row.items()})
        print(number, {name: tuple(round(x, 4) for x in pair) for name, pair in rows[-1].items()}, flush=True)
    figures = {}
    for place, what in enumerate(("prefill", "decode step")):
        for title, over in (("attached ÷ plain", "attached"), ("plain ÷ plain", "again")):
            ratios = [row[over][place] / row["plain"][place] for row in rows]
            figures[f"{what}, {title}"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
    for name, (median, low, high) in figures.items():
        print(f"{name:32s} {median:.3f} [{low:.3f}, {high:.3f}]")
    result = {"context": args.context, "rounds": rows, "median, least, most": figures}
    result |= {"machine": machine(), "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
