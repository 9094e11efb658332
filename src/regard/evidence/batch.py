"""Run all claims of one need, one after the other: `python -m regard.evidence.batch NEED OUT_DIR [ID …]`.

NEED is cpu, smollm2 or h100. A claim that fails does not keep the next from running; the exit status says whether
any did.
"""

from __future__ import annotations

import sys
import traceback
from typing import cast, get_args

import torch

from regard.errors import UnknownNameError
from regard.evidence.claim import Need, all_claims
from regard.evidence.record import run


def main(need: str, out: str, ids: list[str]) -> int:
    """Records go to the folder `out`. Returns how many failed. Raises UnknownNameError for an unknown need or id."""
    if need not in get_args(Need):
        raise UnknownNameError("need", need, get_args(Need))
    claims = {entry.id: entry for entry in all_claims(needs=cast(Need, need))}
    for id in ids:
        if id not in claims:
            raise UnknownNameError("claim", id, claims)
    failed = 0
    for id in ids or claims:
        print(f"{id} …", flush=True)
        try:
            record = run(id, out)
        except Exception:
            failed += 1
            traceback.print_exc()
        else:
            print(f"  {record.measured.verdict}: {record.measured.why} ({record.seconds:.0f} s)", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: python -m regard.evidence.batch {'|'.join(get_args(Need))} OUT_DIR [ID …]")
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
