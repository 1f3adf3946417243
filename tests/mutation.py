"""`python -m tests.mutation [PATTERN]`: how many small faults in the core do its tests notice?

Changes the core in thousands of small ways, one at a time, and counts the changes (mutants) that
the tests notice, by module. The default pattern takes every third or so: an hour on two cores.
Quote a pattern: `'*'` is all of them, `'disha.functional.bat.*'` those of one module.
"""

import argparse
import os
import subprocess
import sys
from collections import Counter

THIRD = "*__mutmut_*[147]"


def main() -> int:
    """Run the mutants, and print a count for each module and outcome."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("pattern", nargs="?", default=THIRD, help="names of mutants")
    command = [sys.executable, "-m", "mutmut"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "run", parser.parse_args().pattern], env=environment, check=True)
    results = subprocess.run(
        [*command, "results", "--all", "true"], capture_output=True, text=True, check=True
    )
    for (module, outcome), count in sorted(counts(results.stdout).items()):
        print(f"{count:5} {module}: {outcome}")
    return 0


def counts(results: str) -> Counter[tuple[str, str]]:
    """Return (module, outcome) -> number of mutants, from what `mutmut results` prints.

    A line is `disha.model.inject.x_name__mutmut_3: killed`: module, mutant, outcome.
    """
    found: Counter[tuple[str, str]] = Counter()
    for line in filter(None, map(str.strip, results.splitlines())):
        mutant, _, outcome = line.rpartition(": ")
        found[mutant.partition(".x")[0], outcome] += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
