"""A pytest plugin that keeps outcomes in a JSON file while the tests run.

    pytest -p tests.outcome_log      with OUTCOME_LOG naming the file

Tests that passed before on the same sources (of the package and of the tests) are not run again,
and tests marked ``gpu`` run first, so that a run that is stopped can go on later.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import environment
from benchmarks.store import code_version

# Not SEGMOE_...: the tests' conftest takes those away, which are settings of the package.
VARIABLE = "OUTCOME_LOG"
SAVE_SECONDS = 2.0


def _version() -> str:
    digest = hashlib.sha256(code_version().encode())
    for path in sorted(Path("tests").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class _Log:
    def __init__(self, path: Path) -> None:
        self.path, self.version, self.saved = path, _version(), 0.0
        self.tests: dict[str, dict[str, Any]] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["version"] == self.version:
                self.tests = kept["tests"]
        self.passed = {name for name, test in self.tests.items() if test["outcome"] == "passed"}

    def save(self) -> None:
        counts: dict[str, int] = {}
        for test in self.tests.values():
            counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
        text = json.dumps(
            {
                "environment": environment(),
                "version": self.version,
                "counts": counts,
                "tests": self.tests,
            },
            indent=1,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.path)
        self.saved = time.monotonic()

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        done = [item for item in items if item.nodeid in self.passed]
        items[:] = [item for item in items if item.nodeid not in self.passed]
        items.sort(key=lambda item: item.get_closest_marker("gpu") is None)
        if done:
            config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        test: dict[str, Any] = {"outcome": report.outcome, "time_s": report.duration}
        if report.failed:
            test["message"] = report.longreprtext[-4000:]
        self.tests[report.nodeid] = test
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def pytest_sessionfinish(self) -> None:
        self.save()


def pytest_configure(config: pytest.Config) -> None:
    """Register the log; in a worker of pytest-xdist only its choice of tests."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    log = _Log(Path(name))
    if hasattr(config, "workerinput"):
        log.save = lambda: None  # type: ignore[method-assign]  # the controller writes
    config.pluginmanager.register(log, "segmoe-outcome-log")
