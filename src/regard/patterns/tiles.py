"""What can be said of a whole tile: nobody may attend, somebody may, everybody may.

The three answers are ordered, EMPTY < PARTIAL < FULL, so that `and` is min, `or` is max and `not` is 2 − x.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY, PARTIAL, FULL = 0, 1, 2


def answer(some: Tensor, every: Tensor) -> Tensor:
    """uint8 tile answers from two bool tensors: is some entry of the tile allowed, is every one?

    `every` must imply `some`. Both may be bounds: `some` may say True too often and `every` False too often.

    >>> answer(torch.tensor([False, True, True]), torch.tensor([False, False, True])).tolist()
    [0, 1, 2]
    """
    return some.to(torch.uint8) + every.to(torch.uint8)
