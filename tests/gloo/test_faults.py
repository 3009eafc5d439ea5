"""Killed ranks, killed jobs, a full disk: all ranks end, the first error is what one sees, nothing published is lost."""

import json
import os
import signal
import socket
import time

import pytest

from tests.conversion_ranks import result, start_worker
from tests.hf_files import config_of, make_hf
from tests.unit.test_conversion import assert_same_directory

pytestmark = pytest.mark.gloo
LAYOUT = {"language": {"tp": 2}, "images": {}}
OTHER = {"language": {"pp": 2}, "images": {}}


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A source of 0.3 GB, so that a job can be hit while it moves bytes, and its import."""
    work = tmp_path_factory.mktemp("big")
    source = make_hf(work / "hf", config_of(vocab=300_000, hidden=256, ffn=64))
    assert wait(start_worker(work / "r", "import_hf", LAYOUT, model=source, fsync=False, target=work / "mimo")) == [
        0,
        0,
        0,
    ]
    return source, work / "mimo"


def wait(ranks, seconds=60):
    deadline = time.monotonic() + seconds
    return [r.wait(max(0.1, deadline - time.monotonic())) for r in ranks]


def when_staged(target, ranks):
    """Return the moment that the job has begun to write."""
    while not list(target.parent.glob(f".{target.name}.partial-*/*.safetensors")) and all(
        r.poll() is None for r in ranks
    ):
        pass
    assert all(r.poll() is None for r in ranks)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_all_within_seconds_and_is_named(tmp_path, big, victim):
    _, mimo = big
    ranks = start_worker(tmp_path / "r", "export_hf", LAYOUT, source=mimo, fsync=False, target=tmp_path / "out")
    when_staged(tmp_path / "out", ranks)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    started = time.monotonic()
    codes = wait(ranks, 20)
    assert time.monotonic() - started < 8
    assert codes[victim] == -signal.SIGKILL and all(c == 1 for i, c in enumerate(codes) if i != victim)
    failed = result(tmp_path / "r")
    assert failed["status"] == "failed" and failed["error"]["rank"] == victim
    assert f"rank {victim} ended unexpectedly" in failed["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_launcher_that_interrupts_the_others_does_not_hide_who_died(tmp_path, big):
    _, mimo = big
    ranks = start_worker(tmp_path / "r", "export_hf", LAYOUT, source=mimo, fsync=False, target=tmp_path / "out")
    when_staged(tmp_path / "out", ranks)
    os.kill(ranks[1].pid, signal.SIGKILL)
    for survivor in (ranks[0], ranks[2]):
        survivor.terminate()
    assert wait(ranks, 20) == [1, -signal.SIGKILL, 1]
    assert "rank 1 ended unexpectedly" in result(tmp_path / "r")["error"]["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_others_start_is_noticed(tmp_path, big, victim):
    """The last rank is held back, so that the others wait for it when the victim dies."""
    _, mimo = big
    ranks = start_worker(tmp_path / "r", "export_hf", LAYOUT, source=mimo, fsync=False, target=tmp_path / "out")
    os.kill(ranks[2].pid, signal.SIGSTOP)
    while not list((tmp_path / "r").glob(".rank0-address*.json")):
        time.sleep(0.01)
    time.sleep(1)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    os.kill(ranks[2].pid, signal.SIGCONT)
    codes = wait(ranks, 20)
    assert codes[victim] == -signal.SIGKILL and all(c == 1 for i, c in enumerate(codes) if i != victim)
    assert not (tmp_path / "out").exists()


def test_a_killed_job_publishes_nothing_and_the_next_one_clears_up(tmp_path, big):
    source, mimo = big
    ranks = start_worker(tmp_path / "r1", "export_hf", LAYOUT, source=mimo, fsync=False, target=tmp_path / "out")
    when_staged(tmp_path / "out", ranks)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    wait(ranks)
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.partial-*"))
    assert wait(
        start_worker(tmp_path / "r2", "export_hf", OTHER, source=mimo, fsync=False, target=tmp_path / "out")
    ) == [0, 0, 0]
    assert_same_directory(source, tmp_path / "out")
    assert not list(tmp_path.glob(".out.partial-*"))


LEFT = [
    {},
    {"failed": "the word of an earlier rank 0"},
    {"port": 1, "token": "x", "hosts": [socket.gethostname()], "pid": 1 << 22},  # killed
]


@pytest.mark.parametrize("left", LEFT, ids=["nothing", "a word", "a dead rank 0"])
def test_a_repetition_right_after_a_failure_takes_nothing_that_it_left_for_its_own(tmp_path, left):
    record, target = tmp_path / "r", tmp_path / "place" / "mimo"
    arguments = {"model": make_hf(tmp_path / "hf"), "fsync": False, "target": target}
    target.parent.write_text("in the way")
    assert wait(start_worker(record, "import_hf", LAYOUT, **arguments)) == [1, 1, 1]
    assert "is a file" in result(record)["error"]["message"]
    target.parent.unlink()
    if left:
        (record / ".rank0-address-0.json").write_text(json.dumps(left))
        os.utime(record / ".rank0-address-0.json", (time.time() - 2,) * 2)
    assert wait(start_worker(record, "import_hf", LAYOUT, **arguments)) == [0, 0, 0]
    assert result(record)["status"] == "ok" and result(record)["summary"]["target"] == str(target)
    assert wait(start_worker(record, "import_hf", LAYOUT, **arguments)) == [1, 1, 1]
    assert "exists; choose another target" in result(record)["error"]["message"]


def test_a_terminated_job_tidies_up(tmp_path, big):
    _, mimo = big
    ranks = start_worker(tmp_path / "r", "export_hf", LAYOUT, source=mimo, fsync=False, target=tmp_path / "out")
    when_staged(tmp_path / "out", ranks)
    for rank in ranks:
        rank.terminate()
    assert wait(ranks, 20) == [1, 1, 1]
    assert "interrupted" in result(tmp_path / "r")["error"]["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_job_killed_while_it_replaces_leaves_the_old_one_whole(tmp_path, big):
    source, mimo = big
    target = tmp_path / "out"
    assert wait(start_worker(tmp_path / "r1", "export_hf", LAYOUT, source=mimo, fsync=False, target=target)) == [
        0,
        0,
        0,
    ]
    ranks = start_worker(tmp_path / "r2", "export_hf", OTHER, source=mimo, fsync=False, target=target, overwrite=True)
    when_staged(target, ranks)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    wait(ranks)
    assert_same_directory(source, target)


@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_on_a_full_disk_stops_all_with_its_error(tmp_path, big, full):
    source, _ = big
    ranks = start_worker(
        tmp_path / "r", "import_hf", LAYOUT, file_limit={full: 10_000_000}, model=source, target=tmp_path / "mimo"
    )
    assert wait(ranks, 20) == [1, 1, 1]
    error = result(tmp_path / "r")["error"]
    assert error["rank"] == full and "File too large" in error["message"] and f"__{full}_0.distcp" in error["message"]
    for rank in ranks:
        said = rank.stderr.read()
        assert "File too large" in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_source_truncated_under_a_running_import_is_an_error(tmp_path):
    source = make_hf(tmp_path / "hf", config_of(vocab=200_000, hidden=256, ffn=64), single=True)
    ranks = start_worker(tmp_path / "r", "import_hf", LAYOUT, model=source, fsync=False, target=tmp_path / "mimo")
    while not list(tmp_path.glob(".mimo.partial-*/*.distcp")) and all(r.poll() is None for r in ranks):
        pass
    os.truncate(source / "model.safetensors", 1_000_000)
    assert wait(ranks, 20) == [1, 1, 1]
    assert "bytes early" in result(tmp_path / "r")["error"]["message"]
    assert not (tmp_path / "mimo").exists()
