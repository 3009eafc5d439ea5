"""One process at a time writes the checkpoints of a run."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mimo_jobs.errors import UserError
from mimo_jobs.training import owner
from mimo_jobs.training.owner import LOCK, owned


def in_another_process(work: Callable[[], None]) -> int:
    """Fork, run ``work``, and end; the pid."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that owns the directory until it is killed."""

    def hold() -> None:
        with owned(tmp_path / "x.steps", "run-1", print):
            (tmp_path / "held").touch()
            time.sleep(60)

    pid = in_another_process(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    yield pid
    if pid in children():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path: Path, holder: int) -> None:
    told: list[str] = []
    with pytest.raises(UserError) as raised, owned(tmp_path / "x.steps", "run-2", told.append, patience=0.5):
        pass
    message = str(raised.value)
    assert f"run run-1 (process {holder} on {os.uname().nodename})" in message and "another target" in message
    assert len(told) == 1 and "waiting up to" in told[0]


def test_it_waits_for_one_that_ends_even_by_sigkill(tmp_path: Path, holder: int) -> None:
    killer = in_another_process(lambda: (time.sleep(0.5), os.kill(holder, signal.SIGKILL))[0])
    with owned(tmp_path / "x.steps", "run-2", lambda _: None, patience=20):
        assert "run-2" in (tmp_path / "x.steps" / LOCK).read_text()
    os.waitpid(killer, 0)
    os.waitpid(holder, 0)


def test_nothing_is_left_behind_but_what_was_put_there(tmp_path: Path) -> None:
    with owned(tmp_path / "a", "run", print):
        pass
    assert not (tmp_path / "a").exists()
    with owned(tmp_path / "b", "run", print):
        (tmp_path / "b" / "step-00000001").mkdir()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["step-00000001"]


def test_a_forked_data_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    def run() -> None:
        with owned(tmp_path / "x", "run-1", print):
            in_another_process(lambda: time.sleep(30))
            (tmp_path / "forked").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_another_process(run), 0)
    assert (tmp_path / "forked").exists()
    with owned(tmp_path / "x", "run-2", print, patience=0):
        pass


def test_many_at_once_take_turns(tmp_path: Path) -> None:
    def once() -> None:
        with owned(tmp_path / "x", "run", lambda _: None, patience=30):
            os.close(os.open(tmp_path / "alone", os.O_CREAT | os.O_EXCL))
            time.sleep(0.02)
            (tmp_path / "alone").unlink()
            os.close(os.open(tmp_path / f"done-{os.getpid()}", os.O_CREAT))

    pids = [in_another_process(once) for _ in range(8)]
    for pid in pids:
        os.waitpid(pid, 0)
    assert {f"done-{pid}" for pid in pids} == {p.name for p in tmp_path.glob("done-*")}


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(owner.fcntl, "lockf", no_locks)
    told: list[str] = []
    with owned(tmp_path / "x", "run", told.append):
        pass
    assert len(told) == 1 and "has no locks" in told[0]
