"""How far real runs come apart from the oracle, an independent trainer (tests/support/oracle.py): a Markdown table,
spec by spec.

    python tools/oracle_table.py [NAME ...] [--seed 7]

Runs what tests/integration/test_oracle.py runs, all 28 specs where none is named (three minutes), and measures with the
same code (tests/support/oracle_compare.py). Each cell is the largest difference found / the tolerance. Exit code 1 if
one is above its tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.support import oracle_compare
from tests.support.house import House

COLUMNS = {"loss": "loss", "lr": "learning rate", "norm": "gradient norm", "weights": "weights"}


def row(name: str, seed: int) -> tuple[str, list[str]]:
    """The table's row, and what is too far apart."""
    near = oracle_compare.near_of(name)
    # what libraries print is no part of the table
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder, contextlib.redirect_stdout(sys.stderr):
        run, expected, start = oracle_compare.both(House(Path(folder)), {**oracle_compare.SPECS[name], "seed": seed})
        found = list(oracle_compare.differences(run, expected, start))
    cells = [name, f"{oracle_compare.compared_steps(expected)} of {len(expected.steps)}"]
    for what in COLUMNS:
        largest = max(one.size for one in found if one.what == what)
        cells.append(f"{largest:.1e} / {getattr(near, what):.0e}")
    return f"| {' | '.join(cells)} |", oracle_compare.too_far(found, near)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these specs")
    parser.add_argument(
        "--seed", type=int, default=oracle_compare.BASIC["seed"], help="the specs' seed (the tests' is 7)"
    )
    given = parser.parse_args()
    names = given.names or list(oracle_compare.SPECS)
    if unknown := [name for name in names if name not in oracle_compare.SPECS]:
        parser.error(f"no such spec: {', '.join(unknown)}; there are: {', '.join(oracle_compare.SPECS)}")
    print(f"| spec | steps compared | {' | '.join(COLUMNS.values())} |")
    print(f"|---|---|{'---|' * len(COLUMNS)}", flush=True)
    wrong = []
    for name in names:
        line, far = row(name, given.seed)
        print(line, flush=True)
        wrong += [f"{name}: {one}" for one in far]
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
