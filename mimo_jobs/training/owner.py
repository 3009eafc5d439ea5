"""One process at a time writes the checkpoints of a run. Standard library only.

A lock of the system (fcntl(2), which NFS and Lustre pass on between hosts) ends with its process, however that ends, and is not
inherited by data workers.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mimo_jobs.errors import UserError

LOCK = ".owner"
PATIENCE_SECONDS = 20.0  # a run that was just ended may still be writing its last checkpoint
_HELD, _NO_LOCKS = (errno.EAGAIN, errno.EACCES), (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def owned(root: Path, run_id: str, warn: Callable[[str], None], patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Within, no other process owns ``root``, which is made if it is not there and removed again if nothing was put into it.

    Args:
        run_id: what others are told.
        warn: hears of a file system without locks, and of waiting.

    Raises:
        UserError: another run writes there, and goes on doing so for ``patience`` seconds.
    """
    path = root / LOCK
    deadline, told = time.monotonic() + patience, False
    while (descriptor := _locked(path, warn)) is None:
        holder = _holder(path)
        if time.monotonic() > deadline:
            raise UserError(
                f"{root}: {holder} writes its checkpoints there; wait for it to end or cancel it (nemo-run list), or give another "
                "target or saving.directory"
            )
        if not told:
            warn(f"{root}: {holder} still writes its checkpoints there; waiting up to {patience:.0f} s for it to end")
            told = True
        time.sleep(0.2)
    try:
        said = {
            "run": run_id,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(said).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is still locked; whoever waits for this file sees that it is gone
            path.unlink()
            root.rmdir()
        os.close(descriptor)


def _locked(path: Path, warn: Callable[[str], None]) -> int | None:
    """Descriptor of the file, locked; None while another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:  # the directory was removed between the two lines
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except OSError as error:
        if error.errno in _NO_LOCKS:
            warn(f"{path.parent}: this file system has no locks; see to it that no other run has the same target")
            return descriptor
        if error.errno not in (*_HELD, errno.ENOENT):
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    """Who holds the lock, for people."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = json.loads(path.read_text())
        job = f", job {said['job']}" if said["job"] else ""
        return f"run {said['run']} (process {said['pid']} on {said['host']}{job})"
    return "another run"
