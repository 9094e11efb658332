"""Run every claim that needs the GPU, one after the other: `python -m regard.evidence.gpu_batch OUT_DIR [ID …]`.

A claim that fails does not keep the next from running; the exit status says whether any failed.
"""

from __future__ import annotations

import sys
import traceback

import torch

from regard.evidence.claim import all_claims
from regard.evidence.record import run


def main(out: str, ids: list[str]) -> int:
    """Records go to the folder `out`. Returns how many claims failed."""
    failed = 0
    for entry in all_claims(needs="h100"):
        if ids and entry.id not in ids:
            continue
        print(f"{entry.id} …", flush=True)
        try:
            record = run(entry.id, out)
        except Exception:
            failed += 1
            traceback.print_exc()
        else:
            print(f"  {record.measured.verdict}: {record.measured.why} ({record.seconds:.0f} s)", flush=True)
        torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m regard.evidence.gpu_batch OUT_DIR [ID …]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
