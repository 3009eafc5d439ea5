"""Outputs appear whole or not at all: written beside the target, renamed at the end."""

import ctypes
import json
import os
import shutil
import socket
import time
from pathlib import Path

from mimo_jobs.conversion import journal
from mimo_jobs.errors import UsageError, UserError

_OWNER = ".owner.json"
OWNER_SECONDS = 15.0
_CHECKPOINT_FILES = ("mimo.json", "model.safetensors.index.json", "model.safetensors", "adapter_config.json")
MAX_NAME = 180  # bytes; the name of the staging directory, with its run id, is at most 255 (ext4, xfs, NFS, Lustre)
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2  # linux/fs.h


def check_target(target: Path, overwrite: bool, *sources: Path | None) -> None:
    """Whether ``target`` can be written.

    Raises:
        UserError: it exists (unless ``overwrite``, and it is a checkpoint or empty), it lies in one of ``sources`` or the
            other way round, or its parent cannot be written.
    """
    real = target.resolve()
    for source in filter(None, sources):
        if real.is_relative_to(source.resolve()) or source.resolve().is_relative_to(real):
            raise UsageError(f"target={target} and the source {source} lie in one another; give another target")
    if len(os.fsencode(target.name)) > MAX_NAME:
        raise UserError(f"{target}: the last part of the name is too long; use at most {MAX_NAME} bytes")
    if (target.exists() or target.is_symlink()) and not overwrite:
        raise UserError(
            f"{target}: exists; choose another target, or give overwrite=true to replace it when the new one is complete"
        )
    if target.is_symlink():
        raise UserError(f"{target}: is a symbolic link; give the directory itself: {real}")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; give a directory")
    if target.exists() and not any((target / name).exists() for name in _CHECKPOINT_FILES) and any(target.iterdir()):
        raise UserError(
            f"{target}: holds neither {' nor '.join(_CHECKPOINT_FILES)}, so it is no checkpoint; overwrite=true replaces "
            "only checkpoints: give another target, or remove it yourself"
        )
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
        raise UserError(f"{target}: cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{target}: cannot be made: no permission to write to {parent}")


def check_space(target: Path, needed: int, staging: Path | None = None) -> int:
    """Free bytes where ``target`` goes, with those that an earlier attempt left in ``staging`` counted as free.

    Raises:
        UserError: ``needed`` do not fit.
    """
    parent = next(p for p in target.parents if p.exists())
    free = shutil.disk_usage(parent).free
    if staging is not None and staging.is_dir():
        free += sum(p.stat().st_blocks * 512 for p in staging.iterdir())
    if needed > free:
        unit, name = (1e9, "GB") if needed > 1e8 else (1e6, "MB")
        raise UserError(f"{target}: needs {needed / unit:.3g} {name}, but {parent} has {free / unit:.3g} {name} free")
    return free


def staging_of(target: Path, run_id: str) -> Path:
    """Where a run writes before it is published; on the target's own filesystem."""
    return target.parent / f".{target.name}.partial-{run_id}"


def open_staging(target: Path, run_id: str, plan: str) -> bool:
    """Make this run's staging directory, after clearing those that dead runs on this host left for the same target.

    Returns whether it is there already, left by an earlier attempt at the same ``plan`` (`journal.plan_digest`) to go on with;
    else the caller says `journal.begin` once what every attempt needs is there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = staging_of(target, run_id)
    _wait_for_owner(staging)
    resumed = journal.belongs(staging, plan)
    for old in target.parent.glob(f".{_escaped(target.name)}.partial-*"):
        if not resumed if old.name == staging.name else _abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    staging.mkdir(exist_ok=resumed)
    (staging / _OWNER).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    return resumed


def _wait_for_owner(staging: Path) -> None:
    """Ranks of an attempt that was killed may still be ending. Raises `UserError` when they do not."""
    deadline = time.monotonic() + OWNER_SECONDS
    while (owner := _live_owner(staging)) is not None:
        if time.monotonic() > deadline:
            raise UserError(
                f"{staging}: process {owner} of an earlier attempt still writes there; end it, then try again"
            )
        time.sleep(0.2)


def _live_owner(staging: Path) -> int | None:
    """The rank on this host that writes there now, other than this one."""
    try:
        owner = json.loads((staging / _OWNER).read_text())
        words = Path(f"/proc/{int(owner['pid'])}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = owner.get("host") == socket.gethostname() and b"mimo_jobs.worker" in words and owner["pid"] != os.getpid()
    return int(owner["pid"]) if same else None


def remove_staging(target: Path, run_id: str) -> None:
    """Remove what a run that has ended was writing."""
    shutil.rmtree(staging_of(target, run_id), ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _abandoned(staging: Path) -> bool:
    try:
        owner = json.loads((staging / _OWNER).read_text())
        return owner["host"] == socket.gethostname() and not Path(f"/proc/{owner['pid']}").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def publish(staging: Path, target: Path, overwrite: bool, fsync: bool = True) -> None:
    """Rename a complete directory to its target. With ``overwrite`` the old one is exchanged atomically, then removed.

    Args:
        fsync: flush every file in it before, so that a power cut after leaves no empty one behind a finished name.

    Raises:
        UserError: the target appeared meanwhile.
    """
    (staging / _OWNER).unlink(missing_ok=True)
    journal.clear(staging)
    if fsync:
        sync_tree(staging)
    if _rename(staging, target, _RENAME_NOREPLACE):
        pass
    elif not overwrite:
        raise UserError(f"{target}: appeared while this job ran; it was left as it is, and nothing was published")
    elif _rename(staging, target, _RENAME_EXCHANGE):
        shutil.rmtree(staging, ignore_errors=True)  # now the old one
    else:
        # A filesystem without RENAME_EXCHANGE: between these two renames the old one is whole under its other name.
        old = staging.with_name(staging.name + ".old")
        os.rename(target, old)
        os.rename(staging, target)
        shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2(2). False when the flag's condition does not hold or the filesystem does not know it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    error = ctypes.get_errno()
    if flag == _RENAME_NOREPLACE and error in (22, 38):  # EINVAL, ENOSYS: unknown here
        if target.exists():
            return False
        os.rename(source, target)
        return True
    if error in (17, 22, 38):
        return False
    raise OSError(error, os.strerror(error), str(target))


def sync_tree(directory: Path) -> None:
    """fsync every file below a directory, and every directory after what it holds."""
    for place, _, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(place, name))
        sync(Path(place))


def sync(path: Path) -> None:
    """fsync a file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
