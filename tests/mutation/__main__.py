"""Print who sees each slip: `python tests/mutation [WORDS]`, of those whose name has the words."""

from __future__ import annotations

import sys
import time
from collections import Counter

from harness import MutantError, Workshop
from mutants import MUTANTS


def main(words: str) -> int:
    """Ask for each mutant; returns how many nobody saw, or that could not be made."""
    chosen = [mutant for mutant in MUTANTS if words in mutant.name]
    counts: Counter[str] = Counter()
    begin = time.perf_counter()
    with Workshop() as workshop:
        for mutant in chosen:
            try:
                findings = workshop.ask(mutant.killers, mutant)
            except MutantError as error:
                counts["cannot be made"] += 1
                print(f"    {error}")
                continue
            caught = [finding for finding in findings if finding.failed is not None]
            kinds = sorted({finding.kind for finding in caught})
            counts[" and ".join(kinds) or "nobody"] += 1
            print(f"{mutant.name} ({mutant.module.removeprefix('upslope.')}): {mutant.breaks}")
            for finding in caught:
                crashed = " CRASHED" if finding.crashed else ""
                print(f"    {finding.kind}{crashed}: {finding.killer} [{finding.failed}] {finding.detail}")
            if not caught:
                print("    SURVIVED")
    print(f"\n{len(chosen)} mutants in {time.perf_counter() - begin:.0f} s; seen by")
    for who, count in counts.most_common():
        print(f"    {who}: {count}")
    return counts["nobody"] + counts["cannot be made"]


if __name__ == "__main__":
    sys.exit(min(main(" ".join(sys.argv[1:])), 1))
