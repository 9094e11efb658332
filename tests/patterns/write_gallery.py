"""Writes docs/gallery.md and docs/images/gallery/: `python -m tests.patterns.write_gallery` (part of `make docs`).

Every registered static pattern is drawn from the call that stands beside it on the page, or, where none was chosen for
it here, from the instance that it is registered with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import regard.patterns as patterns
from regard.registry import Entry, entries

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "gallery.md"
IMAGES = DOCS / "images" / "gallery"
LENGTH, BLOCK, DPI = 64, 8, 72

CALLS = {
    "aki-modality-mutual-attention": (
        "aki_modality_mutual_attention(torch.tensor([-1] * 4 + [0] * 20 + [1] * 12 + [-1] * 8 + [0] * 12 + [1] * 8))"
    ),
    "attention-sink": "causal() & (attention_sink(4) | sliding_window(16))",
    "bamm": "bamm(torch.arange(64) % 16 > 12)",
    "bico": "bico(torch.arange(64) % 8 == 5)",
    "causal": "causal()",
    "clear": "clear((7, 8), radius=3, text=8)",
    "croc": "croc(torch.tensor([-1] * 6 + [0] * 18 + [-1] * 8 + [1] * 16 + [-1] * 16))",
    "dilated-window": "dilated_window(8, dilation=3)",
    "documents": "causal() & documents(torch.tensor([0] * 10 + [1] * 30 + [2] * 24))",
    "ee-mllm": "ee_mllm((torch.arange(64) >= 8) & (torch.arange(64) < 40))",
    "enerverse": "enerverse(frames=16, chunk=4, memory=[3, 7, 11], tokens=4)",
    "faster-neighborhood-attention": "faster_neighborhood_attention((8, 8), window=5)",
    "flashattention": "flashattention(butterfly_layout(16), block=4)",
    "full": "full()",
    "generalized-neighborhood-attention": "generalized_neighborhood_attention((8, 8), window=4, stride=4)",
    "halonet": "halonet((8, 8), block=4, halo=1)",
    "longlora": "longlora(heads=2, group=16, length=64)",
    "m-var": "m_var((1, 2, 3, 5, 5), across=True)",
    "moa-mixture-of-sparse-attention": "moa_mixture_of_sparse_attention([(12, 0.0), (4, 0.5)], block=4).bind(64)",
    "neighborhood": "neighborhood((8, 8), window=(5, 4), stride=(1, 2), causal=(True, False))",
    "next-block-prediction": "next_block_prediction(block=10, condition=4, length=64)",
    "per-head": "per_head([causal(), causal() & sliding_window(12)])",
    "power-attention": "power_attention(window=2, sinks=1, block=4)",
    "prefix": "causal() | prefix(20)",
    "radial-attention": "radial_attention(frames=8, tokens=8)",
    "s2-attention": "s2_attention(heads=3, local=2, stride=3, block=4)",
    "segments": "segments([10, 30, 24])",
    "sener": "sener(window=6, first=3)",
    "sinklora": "sinklora(heads=4, group=16, sinks=4, length=64)",
    "sliding-window": "causal() & (sliding_window(16) | attention_sink(4))",
    "tokens": "causal() & (sliding_window(8) | tokens(torch.arange(64) % 16 == 3))",
}
"""What to draw of each; a pattern that is not named here is drawn from its registered instance."""

HEAD = """# Gallery

Every static pattern of the library, drawn. This page is generated (`make docs`). Queries go downwards, keys to the
right; thin lines part tiles of 8 × 8. Blue: allowed, in a tile that the pattern calls FULL without looking inside, so
that no mask is drawn there. Orange: allowed, in a PARTIAL tile, whose rule a kernel applies entry by entry; pale orange
is computed there and masked. Grey: an EMPTY tile, never visited. What the rules are: [Patterns](patterns.md). A picture
of your own: `pattern.show(64, path="pattern.png")`, or `regard show sliding-window --out pattern.png`.
"""


def drawn() -> list[Entry]:
    """The entries of the gallery."""
    return entries("pattern", family="static-pattern")


def made(entry: Entry) -> patterns.Pattern:
    """The instance that is drawn."""
    if entry.key not in CALLS:
        instance: patterns.Pattern = (entry.example or entry.factory)()
        return instance
    from regard.patterns.block_layouts import butterfly_layout

    names: dict[str, Any] = {"torch": torch, "butterfly_layout": butterfly_layout}
    names |= {other.key.replace("-", "_"): other.factory for other in entries("pattern")}
    instance = eval(CALLS[entry.key], names)
    return instance


def section(entry: Entry) -> str:
    """The part of the page about one pattern: no drawing."""
    pattern = made(entry)
    n = pattern.extent or LENGTH
    share = pattern.block_map(n, block=BLOCK).density
    lines = [f"## {entry.key}", "", entry.summary]
    if entry.key in CALLS:
        lines += ["", "```python", *_folded(CALLS[entry.key]), "```"]
    lines += ["", f"![{entry.key}](images/gallery/{entry.key}.png)", ""]
    lines += [f"{n} tokens; {share:.0%} of the tiles are visited. Cost: {entry.cost}."]
    if entry.paper is not None:
        lines += ["", f"{entry.paper}"]
    return "\n".join(lines) + "\n"


def page() -> str:
    """All of docs/gallery.md."""
    return "\n".join([HEAD, *(section(entry) for entry in drawn())])


def picture(entry: Entry) -> None:
    """Draw one. The call stands on the page, so that a title says no more than which heads a panel is of."""
    pattern = made(entry)
    figure = pattern.show(pattern.extent or LENGTH, block=BLOCK)
    for axes in figure.axes:
        axes.set_title(axes.get_title().partition(":")[0] if pattern.heads else "", fontsize=10)
    figure.savefig(IMAGES / f"{entry.key}.png", dpi=DPI, bbox_inches="tight")


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for old in IMAGES.glob("*.png"):
        old.unlink()
    for entry in drawn():
        picture(entry)
    PAGE.write_text(page())
    print(f"{len(drawn())} pictures, {sum(p.stat().st_size for p in IMAGES.glob('*.png')):,} bytes")


def _folded(call: str) -> list[str]:
    """A long call on several lines."""
    if len(call) <= 100:
        return [call]
    name, _, rest = call.partition("(")
    return [f"{name}(", f"    {rest[:-1]}", ")"]


if __name__ == "__main__":
    main()
