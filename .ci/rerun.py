"""The second try of .ci/run: failed tests with the marker `timing` run once more, alone; any other failure is final.

Usage: rerun.py RESULTS, the file that `pytest --junitxml` wrote. tests/conftest.py notes in it which failed tests are
marked, and which were skipped because what they share with a failed one, such as a launch of ranks, had failed.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

MOST = 6  # more failures than these are no bad luck, and a second try of each takes minutes


def failures(results: Path) -> tuple[list[str], list[str], list[str]]:
    """Failed tests with the marker, by node id, the names of all others that failed, and the tests skipped with one."""
    timing: dict[str, None] = {}
    others: dict[str, None] = {}
    again: dict[str, None] = {}
    for test in ElementTree.parse(results).iter("testcase"):
        marked = {one.get("name"): one.attrib["value"] for one in test.iterfind("properties/property")}
        if "again" in marked:
            again[marked["again"]] = None
        if test.find("failure") is None and test.find("error") is None:
            continue
        if "timing" in marked:
            timing[marked["timing"]] = None
        else:
            others[f"{test.get('classname')}.{test.get('name')}"] = None
    return list(timing), list(others), list(again)


def main(results: Path) -> int:
    """Pytest's exit code of the second try; 1 when there is none."""
    if not results.is_file():
        print("no second try: no test has run", file=sys.stderr)
        return 1
    timing, others, again = failures(results)
    if others:
        print(f"no second try: these failed without the marker `timing`: {', '.join(others)}", file=sys.stderr)
        return 1
    if not 0 < len(timing) <= MOST:
        print(f"no second try: {len(timing)} tests with the marker `timing` failed", file=sys.stderr)
        return 1
    print("these failed, have the marker `timing`, and run once more, alone:", *timing, sep="\n  ", flush=True)
    print(f"and {len(again)} tests that were skipped with them", flush=True)
    pytest = Path(sys.executable).with_name("pytest")
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as `make test-all` has it: ranks share the cores
    return subprocess.run([pytest, "-n", "0", *timing, *again], env=one_thread, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
