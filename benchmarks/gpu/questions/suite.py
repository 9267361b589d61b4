"""Does this project's own test suite pass on this device?"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from gpu.bench import Bench, Case, Finished
from gpu.rows import Measure, Part, failed, figure
from rows.provenance import REPO

PART = Part("suite", 1, "Does the project's test suite pass on this device?", by_commit=True)


def cases(bench: Bench) -> Iterator[Case]:
    """All tests; at toy size only those of the architecture, which need no device."""
    target = bench.pick("tests", "tests/test_architecture.py")
    yield Case({"tests": target}, lambda: _measure(bench, target))


def _measure(bench: Bench, target: str) -> Iterator[Measure]:
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", target, f"--junitxml={xml}"]
        device = bench.device.type
        done = bench.run_limited(command, cwd=REPO, ZEPHYR_LITE_TEST_DEVICE=device)
        if done.code not in (0, 1) or not xml.exists():
            state = "killed at the time limit" if done.code is None else f"exit {done.code}"
            yield failed("pytest", f"{state}: {done.output[-1800:]}")
            return
        yield from count_tests(xml, done)


def count_tests(xml: Path, done: Finished) -> Iterator[Measure]:
    """Rows from pytest's JUnit report: counts, seconds, and `wrong` naming the tests that fail."""
    tests = list(ElementTree.parse(xml).getroot().iter("testcase"))
    by_outcome: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for test in tests:
        for outcome, names in by_outcome.items():
            if test.find(outcome) is not None:
                names.append(f"{test.get('classname')}::{test.get('name')}")
                break
    passed = len(tests) - sum(map(len, by_outcome.values()))
    broken = [*by_outcome["failure"], *by_outcome["error"]]
    yield figure("passed", "tests", passed)
    yield figure("failed", "tests", len(broken))
    yield figure("skipped", "tests", len(by_outcome["skipped"]))
    yield figure("seconds", "s", done.seconds)
    if broken:
        yield failed("failed_tests", ", ".join(broken[:30]), status="wrong")
    elif not passed:
        yield failed("passed_tests", "no test passed", status="wrong")
