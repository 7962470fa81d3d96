"""A pytest plugin: after a point in time what is left is skipped, and every result is on file.

`GPU_TESTS_END` is that point, in seconds since the epoch; `GPU_TESTS_FOLDER` gets `collected.txt`,
a line a test, and `results.jsonl`, an object a result, as they come: a run that hangs and is ended
from outside still says what it had done. With pytest-xdist each worker skips; one process writes.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

NOT_RUN = "not run: the time budget of the GPU tests"


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks."""
    config.pluginmanager.register(TimeBudget(config), "gpu-time-budget")


class TimeBudget:
    """The hooks, which need to know whether this process is a worker of pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        worker = getattr(config, "workerinput", {}).get("workerid")
        self._end = float(os.environ["GPU_TESTS_END"])
        self._folder = Path(os.environ["GPU_TESTS_FOLDER"])
        self._lists = worker in (None, "gw0")
        self._writes = worker is None

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Workers collect the same tests; their controller collects none."""
        if self._lists and session.items:
            names = "".join(f"{item.nodeid}\n" for item in session.items)
            (self._folder / "collected.txt").write_text(names, encoding="utf-8")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Before fixtures are made."""
        if time.time() >= self._end:
            pytest.skip(NOT_RUN)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The call of each test, and whatever else did not pass."""
        if not self._writes or (report.when != "call" and report.passed):
            return
        late = report.skipped and NOT_RUN in str(report.longrepr)
        entry = {"id": report.nodeid, "outcome": "not run" if late else report.outcome}
        with (self._folder / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
