"""Papers' headline claims, measured again: one function per claim, results as JSON, a table made from them.

    entries()          the claims
    postponed()        those that wait, for the training of a task's model or the like, and are not measured
    run(id, out)       measure one and write what came out, with the machine and the versions
    table(folder)      the recorded results as markdown

Results of ours lie in `results/` beside this file and travel with the package.
"""

from regard.evidence.claim import Claim, Later, Measured, Settings
from regard.evidence.claim import all_claims as entries
from regard.evidence.claim import all_later as postponed
from regard.evidence.record import Record, read, run
from regard.evidence.report import table

__all__ = ["Claim", "Later", "Measured", "Record", "Settings", "entries", "postponed", "read", "run", "table"]
