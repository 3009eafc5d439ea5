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
from mimo_jobs.records import read_json

SCHEMA = 1
RESULTS = ("result.json", "progress.json")
LOGS = "logs"  # of a record: one file a rank (mimo_jobs.worker.log_name)
LAUNCHERS = {"local": "launchers.local", "slurm": "launchers.slurm"}

# torchx quotes the arguments of torchrun for a shell and then runs it without one, and expands ${...} in them.
SAFE_PATH = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
SLURM_PATH = re.compile(r"[^'\"\\\x00-\x1f]+")  # what can stand between the quotes of an #SBATCH line

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
    record_names: re.Pattern[str] = SAFE_PATH

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
        make_record(self.record, self.record_names)
        self.file.write_text(json.dumps(text, indent=2) + "\n")


def make_record(record: Path, names: re.Pattern[str] = SAFE_PATH) -> None:
    """Create a directory for records.

    Raises:
        UserError: its path has characters that a launcher cannot carry, or it cannot be created.
    """
    if not names.fullmatch(str(record)):
        who, only = (
            ("NeMo-Run", "letters, digits and _ @ % + = : , . / - only")
            if names is SAFE_PATH
            else ("Slurm", "no quote or backslash")
        )
        raise UserError(
            f"the run directory {str(record)!r} has characters that {who} cannot pass on; set MIMO_JOBS_HOME to a directory named with {only}"
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
    """What result.json says; ``error`` is None when the job succeeded, ``transient`` when it may succeed if repeated."""

    summary: dict[str, Any]
    error: str | None = None
    exit_code: int = 0
    transient: bool = False


def load(name: str) -> ModuleType:
    """The launcher module of an executor's name, ``slurm:eos`` included.

    Raises:
        UsageError: no such executor.
    """
    return importlib.import_module(LAUNCHERS[check(name)])


def check(name: str) -> str:
    """The kind of an executor: ``slurm`` of ``slurm:eos``. Raises a `UsageError` unless there is one; imports nothing."""
    kind, colon, cluster = name.partition(":")
    if kind not in LAUNCHERS:
        hint = did_you_mean(kind, LAUNCHERS) or f"; there are {', '.join(LAUNCHERS)}"
        raise UsageError(f"unknown executor {name!r}{hint}")
    if colon and (kind == "local" or not cluster):
        raise UsageError(f"unknown executor {name!r}; named clusters are slurm:NAME, of executors.toml")
    return kind


def clear(record: Path) -> None:
    """Remove what an earlier attempt left, before any rank of a new one lives."""
    for name in RESULTS:
        (record / name).unlink(missing_ok=True)


def result(record: Path, attempt: str | None = None) -> dict[str, Any] | None:
    """result.json; None when there is none, or it says that it is not of the ``attempt``: a rank of an earlier one may wake up late."""
    found = read_json(record / "result.json")
    return found if attempt is None or not found or found.get("attempt", attempt) == attempt else None


def outcome(job: Job, attempt: str | None = None) -> Outcome:
    """How the job ended, from its `result`; without one it failed, and the end of its logs says why."""
    found = result(job.record, attempt)
    if found is None:
        tail = log_tail(job.record)
        death = _death(job.record)
        how = death[1] if death else f"{job.name} ended without a result: killed, or out of memory"
        return Outcome({}, f"{how}\n{tail}" if tail else how, 1, transient=True)
    if found.get("status") == "ok":
        return Outcome(found.get("summary") or {})
    error = found.get("error") or {}
    message = str(error.get("message") or "failed without a message")
    if message == "interrupted":  # by torchrun, perhaps, because another rank died that could not say so itself
        death = _death(job.record)
        if death and death[0] != error.get("rank"):
            message = death[1]
    return Outcome({}, message, 1, bool(error.get("transient")))


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


def logs(record: Path, rank: int | None = None) -> list[Path]:
    """The ranks' own logs, then what torchrun kept of them (standard error first), then what the launcher itself printed.

    ``rank``: only that rank's, where the logs say whose they are.
    """
    own = sorted(record.glob(f"{LOGS}/*.log"))
    if rank is not None and (named := [p for p in own if f" rank {rank} of " in _head(p)]):
        return named
    roots = sorted(record.glob("**/torchelastic")) or [record]
    teed = [p for name in ("stderr.log", "stdout.log") for root in roots for p in sorted(root.glob(f"**/{name}"))]
    return own + teed + [p for p in (record / "slurm.log", record / "launcher.log") if p.exists()]


def _head(path: Path) -> str:
    with path.open(errors="replace") as file:
        return file.readline(400)


def log_tail(record: Path, lines: int = 12, rank: int | None = None) -> str:
    """The last lines of the first log that has any beyond the headings of its attempts."""
    for path in logs(record, rank):
        text = [line for line in path.read_text(errors="replace").rstrip().splitlines() if not line.startswith("# ")]
        if text:
            return f"{os.path.relpath(path, record)}:\n" + "\n".join(f"  {line}" for line in text[-lines:])
    return ""
