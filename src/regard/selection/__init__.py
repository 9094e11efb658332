"""Selection: who attends to whom, decided from content. The contract, its reference executor, and the papers' rules."""

from regard.registry import import_all
from regard.selection.contract import BlockIndex, Selection
from regard.selection.executor import attend_selected
from regard.selection.kinetics import BlockTopK, mean_keys

__all__ = ["BlockIndex", "BlockTopK", "Selection", "attend_selected", "mean_keys"]

import_all(__name__, __path__)
