"""Recurrences: a state instead of a cache. The contract, its executors, and the papers' recurrences that use them."""

from regard.recurrence.contract import Mixer, Recurrence, TokenInputs
from regard.recurrence.delta_rule import DeltaInputs, DeltaRule, DeltaState
from regard.recurrence.diagonal_decay import DiagonalDecay, DiagonalInputs, DiagonalState
from regard.recurrence.documents import scan_documents
from regard.recurrence.lightning_attention_2 import LightningAttention2, LightningInputs, tnl_log_decay
from regard.registry import import_all

__all__ = [
    "DeltaInputs",
    "DeltaRule",
    "DeltaState",
    "DiagonalDecay",
    "DiagonalInputs",
    "DiagonalState",
    "LightningAttention2",
    "LightningInputs",
    "Mixer",
    "Recurrence",
    "TokenInputs",
    "scan_documents",
    "tnl_log_decay",
]

import_all(__name__, __path__)
