"""What a launcher is given, what it gives back, and the table of launchers. Standard library only.

A launcher is a module with two functions:

* ``commands(job) -> list[RankGroup]``: the exact command of each rank group; imports nothing slow.
* ``launch(job, watch) -> None``: run the job to its end, calling ``watch(phase_or_progress)`` meanwhile; whether it
  succeeded is read from the record by `outcome`, never from the library's exit code (NeMo-Run exits 0 when jobs fail).
"""

import importlib
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mimo_jobs.errors import UsageError, UserError, did_you_mean

SCHEMA = 1
LAUNCHERS = {"local": "launchers.local"}
NOT_BUILT = {"slurm": "the Slurm executor is not built yet; only --executor local is"}

# torchx quotes the arguments of torchrun for a shell and then runs it without one, and expands ${...} in them.
SAFE_PATH = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")

# torch.distributed.elastic.multiprocessing.errors.ChildFailedError.format_msg
ROOT_CAUSE = re.compile(r"Root Cause.*?rank +: (?P<rank>\d+).*?exitcode +: (?P<code>-?\d+)", re.DOTALL)

Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """One job to launch. ``arguments`` is plain JSON; ``record`` is its directory, which holds everything about it."""

    name: str
    arguments: dict[str, Any]
    world_size: int
    record: Path
    run_id: str

    @property
    def file(self) -> Path:
        return self.record / "JOB.json"

    def write(self) -> None:
        """Create the record with its JOB.json.

        Raises:
            UserError: see `make_record`.
        """
        text = {
            "schema": SCHEMA,
            "job": self.name,
            "run_id": self.run_id,
            "world_size": self.world_size,
            "record": str(self.record),
            "arguments": self.arguments,
        }
        make_record(self.record)
        self.file.write_text(json.dumps(text, indent=2) + "\n")


def make_record(record: Path) -> None:
    """Create a directory for records.

    Raises:
        UserError: its path has characters that a launcher cannot carry, or it cannot be created.
    """
    if not SAFE_PATH.fullmatch(str(record)):
        raise UserError(
            f"the run directory {str(record)!r} has characters that NeMo-Run cannot pass on; "
            "set MIMO_JOBS_HOME to a directory named with letters, digits and _ @ % + = : , . / - only"
        )
    try:
        record.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the run record: {error}; set MIMO_JOBS_HOME to a writable directory") from error


@dataclass(frozen=True)
class RankGroup:
    """Ranks that one command starts."""

    ranks: range
    host: str
    command: list[str]


@dataclass(frozen=True)
class Outcome:
    """What result.json says; ``error`` is None when the job succeeded."""

    summary: dict[str, Any]
    error: str | None = None
    exit_code: int = 0


def load(name: str) -> ModuleType:
    """The launcher module of an executor's name.

    Raises:
        UsageError: no such executor.
    """
    check(name)
    return importlib.import_module(LAUNCHERS[name])


def check(name: str) -> None:
    """Raise a `UsageError` unless there is a launcher of this name; imports nothing."""
    if name in NOT_BUILT:
        raise UsageError(f"--executor {name}: {NOT_BUILT[name]}")
    if name not in LAUNCHERS:
        hint = did_you_mean(name, LAUNCHERS) or f"; there are {', '.join(LAUNCHERS)}"
        raise UsageError(f"unknown executor {name!r}{hint}")


def read_json(path: Path) -> dict[str, Any] | None:
    """A record that others write; None when it is not there or not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def outcome(job: Job) -> Outcome:
    """How the job ended, from its result.json; without one it failed, and the end of its logs says why."""
    result = read_json(job.record / "result.json")
    if result is None:
        tail = log_tail(job.record)
        death = _death(job.record)
        how = death[1] if death else f"{job.name} ended without a result: killed, or out of memory"
        return Outcome({}, f"{how}\n{tail}" if tail else how, 1)
    if result.get("status") == "ok":
        return Outcome(result.get("summary") or {})
    error = result.get("error") or {}
    message = str(error.get("message") or "failed without a message")
    if message == "interrupted":  # by torchrun, perhaps, because another rank died that could not say so itself
        death = _death(job.record)
        if death and death[0] != error.get("rank"):
            message = death[1]
    return Outcome({}, message, 1)


def _death(record: Path) -> tuple[int, str] | None:
    """The rank that died first, and how, from torchrun's own report; None when there is none."""
    for path in record.glob("**/stderr.log"):
        found = ROOT_CAUSE.search(path.read_text(errors="replace"))
        if found:
            rank, code = int(found["rank"]), int(found["code"])
            if code >= 0:
                return rank, f"rank {rank} ended with exit code {code}"
            guess = "; out of memory?" if code == -9 else ""
            return rank, f"rank {rank} was killed by {signal.Signals(-code).name}{guess}"
    return None


def logs(record: Path) -> list[Path]:
    """The ranks' own logs, standard error first, rank by rank; then what the launcher itself printed."""
    roots = sorted(record.glob("**/torchelastic")) or [record]
    ranks = [p for name in ("stderr.log", "stdout.log") for root in roots for p in sorted(root.glob(f"**/{name}"))]
    return ranks + [p for p in (record / "launcher.log",) if p.exists()]


def log_tail(record: Path, lines: int = 12) -> str:
    """The last lines of the first log that has any."""
    for path in logs(record):
        text = path.read_text(errors="replace").rstrip()
        if text:
            return f"{os.path.relpath(path, record)}:\n" + "\n".join(f"  {line}" for line in text.splitlines()[-lines:])
    return ""
