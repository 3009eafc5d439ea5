"""Suites that must not be skipped: ``MIMO_JOBS_NO_SKIPS=gloo,slurm`` turns their skips into failures (.ci/run)."""

import os

import pytest


def pytest_ignore_collect(collection_path, config):
    """``-m "not gloo"`` need not even import what those tests import (megatron-core: 10 s)."""
    wanted = config.option.markexpr or ""
    name = collection_path.name
    return True if name in ("gloo", "slurm") and f"not {name}" in wanted else None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    required = {name for name in os.environ.get("MIMO_JOBS_NO_SKIPS", "").split(",") if name}
    if report.skipped and not hasattr(report, "wasxfail") and required & {m.name for m in item.iter_markers()}:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but this suite must run here: {report.longrepr}"
