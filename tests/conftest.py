"""Suites that must not be skipped: ``MIMO_JOBS_NO_SKIPS=gloo,slurm`` turns their skips into failures (.ci/run)."""

import os

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    required = {name for name in os.environ.get("MIMO_JOBS_NO_SKIPS", "").split(",") if name}
    if report.skipped and not hasattr(report, "wasxfail") and required & {m.name for m in item.iter_markers()}:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but this suite must run here: {report.longrepr}"
