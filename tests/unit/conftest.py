"""Unit tests see no Slurm cluster, also on a machine that belongs to one."""

import pytest


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/dev/null")
