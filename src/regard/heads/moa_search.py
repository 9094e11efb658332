"""MoA's search: one rule per KV head, so that the loss is least and the density within its bound (Fu et al. 2024).

A mixed-integer linear program, solved exactly. With several profiled lengths there are several losses: each is
minimised while the others lie in parts of their range (the ε-constraint method), and what nothing dominates is kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch

from regard.errors import ArgumentError, UnsupportedError, require
from regard.heads.moa_influence import Influence
from regard.inference.policies.moa import Rules
from regard.patterns.checks import at_least, is_number
from regard.patterns.elastic import Rule, window_blocks

INTERVALS = 4


@dataclass(frozen=True)
class Found:
    """A choice of rules by layer and KV head, and the loss it is predicted to add at each profiled length."""

    rules: Rules
    losses: dict[int, float]


def candidate_rules(lengths: Sequence[int]) -> list[Rule]:
    """The paper's grid: α in 6 steps from −2048 to 8192, β in 9 from 0 to 1, with 0 < α + β · N ≤ N at all lengths."""
    grid = product(np.linspace(-2048, 8192, 6).tolist(), np.linspace(0, 1, 9).tolist())
    return [(a, b) for a, b in grid if all(0 < a + b * n <= n for n in (min(lengths), max(lengths)))]


def density(rule: Rule, n: int, block: int = 64) -> float:
    """Share of a prompt of n tokens that a head with this rule keeps, the first block included; at most 1."""
    return min(window_blocks(rule, n, block) + 1, n / block) * block / n


def search(
    influence: Influence,
    *,
    most: Mapping[int, float] | float = 0.5,
    candidates: Sequence[Rule] | None = None,
    distinct: int = 2,
) -> list[Found]:
    """The Pareto set over the losses at all profiled lengths; one choice where one length was profiled.

    most: the bound on the density, the mean over all heads, at each length; a number means that at every profiled
    length. candidates: rules to choose from, `candidate_rules` of all these lengths by default. distinct: different
    rules per layer at most. Raises ArgumentError where no choice keeps to the bound, UnsupportedError without scipy.
    """
    given = most if isinstance(most, Mapping) else dict.fromkeys(influence.lengths, most)
    shares = len(given) > 0 and all(is_number(d) and 0 < d <= 1 for d in given.values())
    require(shares, "most", repr(most), "a density in (0, 1], or one for each length")
    bounds = dict(given)
    for n in bounds:
        at_least("most", n, 1)
    at_least("distinct", distinct, 1)
    pairs = candidates is None or all(
        isinstance(r, tuple) and len(r) == 2 and all(map(is_number, r)) for r in candidates
    )
    require(pairs, "candidates", repr(candidates), "pairs (α, β) of numbers")
    lengths = sorted({*influence.lengths, *bounds})
    rules = list(dict.fromkeys(candidate_rules(lengths) if candidates is None else candidates))
    alike = {tuple(window_blocks(rule, n, influence.block) for n in lengths): rule for rule in reversed(rules)}
    rules = [rule for rule in rules if rule in alike.values()]
    require(len(rules) > 0, "candidates", candidates, "at least one rule; the paper's grid is for prompts of thousands")
    program = _Program(influence, rules, bounds, distinct)
    ends = [program.solve(k, {}) for k in range(len(influence.lengths))]
    known = [end for end in ends if end is not None]
    if not known:
        least = min(max(density(r, n, influence.block) - d for n, d in bounds.items()) for r in rules)
        raise ArgumentError(
            "most", most, f"a bound that some candidate keeps to (the sparsest is {least:.3f} above it)"
        )
    table = np.array([program.losses(x) for x in known])
    low, high = table.min(0), table.max(0)
    for k in range(len(low)) if len(low) > 1 else ():
        others = [o for o in range(len(low)) if o != k]
        for parts in product(range(INTERVALS), repeat=len(others)):
            step = (high - low) / INTERVALS
            within = {o: (low[o] + p * step[o], low[o] + (p + 1) * step[o]) for o, p in zip(others, parts, strict=True)}
            if (x := program.solve(k, within)) is not None:
                known.append(x)
    return program.pareto(known)


class _Program:
    """The program of one search. Variables: x[head, rule], and y[layer, rule] ≥ x of every head of the layer."""

    def __init__(self, influence: Influence, rules: list[Rule], bounds: Mapping[int, float], distinct: int) -> None:
        try:
            self._optimize: Any = importlib.import_module("scipy.optimize")  # comes with scikit-learn: regard[evidence]
            self._sparse: Any = importlib.import_module("scipy.sparse")
        except ImportError:
            raise UnsupportedError("the search for a plan needs the package scipy: pip install scipy") from None
        self.rules, self.layers = rules, influence.heads
        self.lengths, block = influence.lengths, influence.block
        columns = [
            [torch.cat(influence.loss(n, window_blocks(rule, n, block))) for rule in rules] for n in self.lengths
        ]
        self.loss = np.stack([torch.stack(c, 1).numpy() for c in columns])  # (lengths, heads, rules)
        heads, p = self.loss.shape[1:]
        layer_of = np.repeat(np.arange(len(self.layers)), self.layers)
        self.heads, self.size = heads, heads * p + len(self.layers) * p
        one = self._sparse.kron(self._sparse.eye(heads), np.ones((1, p)))
        y_of_x = self._sparse.kron(
            self._sparse.csr_matrix((np.ones(heads), (np.arange(heads), layer_of))), self._sparse.eye(p)
        )
        few = self._sparse.kron(self._sparse.eye(len(self.layers)), np.ones((1, p)))
        dense = np.array([[density(rule, n, block) for rule in rules] for n in bounds])
        zero = self._sparse.csr_matrix
        limit = self._optimize.LinearConstraint
        self.constraints = [
            limit(self._sparse.hstack([one, zero((heads, len(self.layers) * p))]).tocsr(), 1, 1),
            limit(self._sparse.hstack([self._sparse.eye(heads * p), -y_of_x]).tocsr(), -np.inf, 0),
            limit(self._sparse.hstack([zero((len(self.layers), heads * p)), few]).tocsr(), 0, distinct),
            limit(
                self._sparse.hstack(
                    [zero(np.tile(dense / heads, (1, heads))), zero((len(bounds), len(self.layers) * p))]
                ).tocsr(),
                0,
                np.array(list(bounds.values())) + 1e-9,
            ),
        ]

    def solve(self, objective: int, within: Mapping[int, tuple[float, float]]) -> np.ndarray | None:
        """(heads,) rule numbers of least loss at one length, the losses at others within these ranges; None if none."""
        unit = np.abs(self.loss).max((1, 2)) + 1e-300  # the solver's tolerances are absolute
        rest = np.zeros(self.size - self.loss[0].size)
        constraints = list(self.constraints)
        for o, (low, high) in within.items():
            slack = 1e-9 * unit[o]
            row = np.concatenate([self.loss[o].ravel() / unit[o], rest])[None]
            constraints.append(self._optimize.LinearConstraint(row, (low - slack) / unit[o], (high + slack) / unit[o]))
        whole = np.concatenate([np.ones(self.loss[0].size), rest])  # y follows x, and need not be whole
        found = self._optimize.milp(
            np.concatenate([self.loss[objective].ravel() / unit[objective], rest]),
            constraints=constraints,
            integrality=whole,
            bounds=self._optimize.Bounds(0, 1),
        )
        if found.x is None:
            return None
        chosen: np.ndarray = found.x[: self.loss[0].size].reshape(self.heads, -1).argmax(1)
        return chosen

    def losses(self, chosen: np.ndarray) -> np.ndarray:
        """(lengths,) predicted loss of a choice."""
        total: np.ndarray = self.loss[:, np.arange(self.heads), chosen].sum(1)
        return total

    def pareto(self, choices: list[np.ndarray]) -> list[Found]:
        """Those that no other one matches at all lengths and beats at one; once each."""
        scored = {tuple(self.losses(x)): x for x in choices}
        out = []
        for losses, x in sorted(scored.items()):
            if not any(o != losses and all(a <= b for a, b in zip(o, losses, strict=True)) for o in scored):
                rules = [self.rules[p] for p in x]
                ends = np.cumsum([0, *self.layers])
                by_layer = tuple(tuple(rules[a:b]) for a, b in pairwise(ends))
                out.append(Found(by_layer, dict(zip(self.lengths, map(float, losses), strict=True))))
        return out
