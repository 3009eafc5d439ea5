"""Tests against a real Slurm cluster of their own (cluster.py): one for the session, as new before every test."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.hf_files import config_of, make_hf
from tests.slurm.cluster import Cluster, missing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def short_path():
    """A directory whose path leaves room for the names of Unix sockets (108 bytes, unix(7)), wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as place:
        yield Path(place)


@pytest.fixture(scope="session")
def cluster(short_path):
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(short_path / "s").start()
    before = os.environ.get("SLURM_CONF")
    os.environ |= cluster.environment()
    try:
        yield cluster
    finally:
        cluster.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def home(tmp_path, monkeypatch, cluster):
    """Where the test's records go; its working directory and profiles are its own too."""
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Hugging Face checkpoint."""
    return make_hf(tmp_path_factory.mktemp("model") / "hf", config_of())


@pytest.fixture(autouse=True)
def repaired(cluster):
    yield
    cluster.repair()
