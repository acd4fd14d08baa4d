"""Write the golden results anew; run it from the project's root::

    python -m tests.golden [CASE...] [--numbers] [--folder FOLDER]

Without ``--numbers`` it refuses to change a number, and rewrites texts: names of attributes, notes,
listings, plans. That is allowed in a commit that means to change those. ``--numbers`` is allowed
only in a commit that says which numbers change and why; never to make a test pass.

Records were made on one machine, and on another one the tests allow for rounding. To compare to the
bit there, record the code of before and test that of after::

    git switch --detach BEFORE && python -m tests.golden --numbers --folder /tmp/golden
    git switch - && NCBATCH_GOLDEN=/tmp/golden python -m pytest tests/golden
"""  # noqa: D400  (a summary that the command follows)

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.golden import records
from tests.golden.cases import CASES, Stores, pinned
from tests.golden.records import Record, changed_numbers, changed_texts, machine


def main() -> int:
    """Run the cases, say what changed, and write it if that is allowed."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--numbers", action="store_true", help="numbers may change")
    parser.add_argument("--folder", type=Path, default=records.FOLDER, help="where records are")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    place = given.folder / records.MACHINE
    same_machine = place.exists() and json.loads(place.read_text()) == machine()
    if given.numbers and given.cases and not same_machine:
        parser.error("records of two machines cannot be mixed: name no cases")
    refused = False
    with tempfile.TemporaryDirectory() as folder, pinned():
        made = Stores(Path(folder))
        for name in given.cases or CASES:
            found, path = Record.of(CASES[name](made)), given.folder / f"{name}.json"
            old = Record.read(path) if path.exists() else Record({}, {})
            numbers = changed_numbers(
                found, old, exact=same_machine or given.numbers, float32=name == "many"
            )
            texts = changed_texts(found, old)
            print(f"{name}: {len(numbers)} numbers and {len(texts)} texts differ")
            for line in numbers[:20]:
                print(f"  {line}")
            if numbers and not given.numbers:
                refused = True
                continue
            # Bits that this machine rounds otherwise stay as recorded.
            Record(found.numbers if numbers else old.numbers, found.texts).write(path)
    if given.numbers and not same_machine:
        place.write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    if refused:
        print("numbers changed: their cases are not written without --numbers", file=sys.stderr)
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
