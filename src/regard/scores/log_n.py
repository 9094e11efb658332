"""LogN scaling: logits of some queries grow with the logarithm of the length, so that long rows stay as sharp.

Su 2021 and Chiang & Cholak 2022 (arXiv 2202.12172); SeNER (Chen et al. 2025, arXiv 2502.07286) uses it for [CLS] alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

from regard.errors import require


def log_n(n: int, *, first: int = 1, trained: int = 512) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A `score` for `attend`: logits of the `first` queries times ln n / ln trained; those of others stay.

    n: the length of the sequence. trained: the length the model was pretrained at, where the factor is 1.
    Raises ArgumentError for n < 1, first < 0 or trained < 2.

    >>> round(float(log_n(4096)(torch.ones(()), *[torch.zeros((), dtype=torch.long)] * 4)), 4)
    1.3333
    """
    require(isinstance(n, int) and n >= 1, "n", n, "an int ≥ 1")
    require(isinstance(first, int) and first >= 0, "first", first, "an int ≥ 0")
    require(isinstance(trained, int) and trained >= 2, "trained", trained, "an int ≥ 2")
    factor = log(n) / log(trained)

    def score(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i < first, logits * factor, logits)

    return score
