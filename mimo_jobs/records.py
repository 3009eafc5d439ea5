"""The record of a run: one directory, plain JSON, readable without this package. Standard library only.

```
RUN/
  RUN.json         recipe, command line, executor, steps with their arguments, versions, commit      (docs/slurm.md says more)
  config.json      the resolved configuration: every field of every step
  code/ code.diff  what was shipped, and how it differs from the commit
  1-import/        one directory a step (a run of one step is its own step directory)
    events.jsonl   what happened, a line each, appended by whoever saw it: submitted, started, retry, requeued, done, failed ...
    JOB.json       what the ranks read; STEP.json sbatch.sh: what Slurm was given
    progress.json  result.json  slurm.log  logs/language.tp0.log
```

No path inside a record is needed to read it, so a record may be moved.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UserError, did_you_mean

SCHEMA = 2
RUN = "RUN.json"
EVENTS = "events.jsonl"
LOCK = ".lock"
SHORTEST = 4  # characters of an id's beginning: a slip of the finger must not name a run to cancel

# A step is waiting (not with Slurm yet), queued, running, or one of these.
ENDED = ("done", "skipped", "failed", "cancelled")
SUCCEEDED = ("done", "skipped")
_AFTER = {
    "submitting": "queued", "submitted": "queued", "started": "running", "retry": "running", "requeued": "queued", "done": "done",
    "skipped": "skipped", "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip


@dataclass
class StepState:
    """What the events of a step add up to.

    Attributes:
        job_id: the last Slurm job, None before one is known.
        attempts: times that ranks were started; ``seconds``: wall time of all attempts; ``gpu_seconds``: allocated.
        started, ended: epoch seconds of the present attempt.
        reason: why it is not simply going on.
        ran: whether its present submission has started ranks; known_jobs: Slurm jobs of all submissions.
    """

    state: str = "waiting"
    job_id: int | None = None
    nodes: str = ""
    attempts: int = 0
    requeues: int = 0
    started: float | None = None
    ended: float | None = None
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    gpus: int = 0
    reason: str = ""
    exit_code: int = 0
    last: float = 0.0
    title: str = ""
    after: int | None = None
    ran: bool = False
    known_jobs: frozenset[int] = frozenset()

    @property
    def elapsed(self) -> float:
        """Seconds that ranks ran, up to now."""
        running = time.time() - self.started if self.state == "running" and self.started else 0.0
        return self.seconds + max(0.0, running)


@dataclass(frozen=True)
class StepRecord:
    """A step of a recorded run: its name, the job it is, the arguments of that job, and the directory of its record."""

    name: str
    job: str
    arguments: Mapping[str, Any]
    directory: Path
    run_id: str

    def add(self, event: str, **fields: Any) -> None:
        """Append an event: one write, so that lines of several writers do not mix."""
        assert event in _AFTER or event in ("note", "hook"), event
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str) + "\n"
        add_line(self.directory / EVENTS, line)

    def events(self) -> list[dict[str, Any]]:
        """Every event, in the order written; a line cut short by a crash is left out."""
        try:
            text = (self.directory / EVENTS).read_text(errors="replace")
        except OSError:
            return []
        found = []
        for line in text.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and _is_event(event):
                found.append(event)
        return found

    def state(self) -> StepState:
        """See `folded`."""
        return folded(self.events())

    def progress(self) -> dict[str, Any] | None:
        return read_json(self.directory / "progress.json")

    def summary(self) -> dict[str, Any]:
        """What the job returned; empty when it did not succeed."""
        result = read_json(self.directory / "result.json") or {}
        return result.get("summary") or {} if result.get("status") == "ok" else {}


def _is_event(event: Mapping[str, Any]) -> bool:
    """Whether a line is what `StepRecord.add` writes: a disk or a hand may have damaged it."""
    numbers = [event.get(name) for name in ("job_id", "after", "exit_code", "gpus")]
    return (
        isinstance(event.get("event"), str)
        and isinstance(event.get("time"), int | float)
        and all(n is None or isinstance(n, int) for n in numbers)
    )


def add_line(path: Path, line: str) -> None:
    """Append a line durably enough to survive this process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # a writer that died, or a disk that was full
        data = (b"\n" if torn else b"") + line.encode()
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def folded(events: Iterable[Mapping[str, Any]]) -> StepState:
    """The state that a step's events lead to."""
    state = StepState()
    for event in events:
        kind, at = event["event"], event["time"]
        state.last = at
        if kind not in _AFTER or (event.get("seen_by") and state.state in ENDED):
            continue  # what others concluded does not count against the step's own word
        if state.started is not None and state.state == "running" and kind != "retry":
            state.seconds += max(0.0, at - state.started)
            state.gpu_seconds += max(0.0, at - state.started) * state.gpus
        state.state = _AFTER[kind]
        state.reason = str(event.get("reason") or "")
        if kind == "submitting":  # the id is known only once sbatch has answered
            state.title, state.job_id, state.ended, state.ran, state.exit_code = (
                str(event.get("title") or ""),
                None,
                None,
                False,
                0,
            )
        if event.get("job_id") is not None:
            state.job_id = event["job_id"]
            state.known_jobs |= {event["job_id"]}
        if kind == "submitted":
            state.after = event.get("after")
        if kind == "started":
            state.started, state.ended, state.nodes = at, None, str(event.get("nodes") or "")
            state.gpus = int(event.get("gpus") or 0)
            state.attempts += 1
            state.ran, state.exit_code = True, 0
        elif kind == "retry":
            state.attempts += 1
        elif kind == "requeued":
            state.requeues += 1
            state.started = None
        elif kind in ("done", "skipped", "failed", "cancelled"):
            state.ended, state.exit_code = at, int(event.get("exit_code") or 0)
    return state


@dataclass(frozen=True)
class RunRecord:
    """A recorded run. ``about`` is RUN.json without its steps."""

    root: Path
    steps: list[StepRecord]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        return str(self.about.get("run_id") or self.root.name)

    @property
    def executor(self) -> str:
        return str(self.about.get("executor") or "local")

    def step(self, name: str) -> StepRecord:
        """Raises `UserError` when the run has no such step."""
        for step in self.steps:
            if step.name == name:
                return step
        hint = (
            did_you_mean(name, [s.name for s in self.steps])
            or f"; its steps are {', '.join(s.name for s in self.steps)}"
        )
        raise UserError(f"{self.run_id} has no step {name!r}{hint}")

    def write(self) -> None:
        """RUN.json, whole or not at all."""
        steps = [
            {
                "name": s.name,
                "job": s.job,
                "directory": os.path.relpath(s.directory, self.root),
                "arguments": s.arguments,
            }
            for s in self.steps
        ]
        write_json(self.root / RUN, {"schema": SCHEMA, **self.about, "steps": steps})


def step_directory(root: Path, number: int, name: str, count: int) -> Path:
    """``RUN/2-export``; the run itself when it has one step."""
    return root if count == 1 else root / f"{number}-{name}"


def load(root: Path) -> RunRecord:
    """Read a run's record, wherever it lies now.

    Raises:
        UserError: not a record, or of another version.
    """
    text = read_json(root / RUN)
    if text is None or not isinstance(text.get("steps"), list):
        raise UserError(f"{root}: holds no readable {RUN}: not the record of a run")
    if text.get("schema") != SCHEMA:
        raise UserError(f"{root / RUN}: schema {text.get('schema')!r}; this version of mimo_jobs reads {SCHEMA}")
    about = {k: v for k, v in text.items() if k not in ("schema", "steps")}
    run_id = str(about.get("run_id") or root.name)
    try:
        steps = [
            StepRecord(s["name"], s["job"], s["arguments"], (root / s["directory"]).resolve(), step_run_id(run_id, i + 1, len(text["steps"])))
            for i, s in enumerate(text["steps"])
        ]  # fmt: skip
        for step in steps:
            if not isinstance(step.arguments, dict) or not isinstance(step.name, str) or not isinstance(step.job, str):
                raise TypeError(step)
    except (KeyError, TypeError) as error:
        raise UserError(f"{root / RUN}: damaged: {error!r}") from None
    return RunRecord(root, steps, about)


def step_run_id(run_id: str, number: int, count: int) -> str:
    """What names a step's staging directory: the same at every attempt."""
    return run_id if count == 1 else f"{run_id}-{number}"


@contextlib.contextmanager
def locked(run: RunRecord) -> Iterator[None]:
    """One command at a time that changes a run. Where the filesystem has no locks, none is held.

    Raises:
        UserError: another command is at it.
    """
    descriptor = os.open(run.root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{run.run_id}: another nemo-run is changing it (resume or cancel); wait for it, then try again"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def find(name: str, home: Path) -> RunRecord:
    """The run of an id, of the beginning of one, of ``latest``, or of a directory.

    Raises:
        UserError: none, or several.
    """
    if not name:
        raise UserError("an empty run id; nemo-run list shows them")
    if len(os.fsencode(name)) > 255 and os.sep not in name:
        raise UserError(f"no run {name[:40]!r}...; nemo-run list shows them")
    if os.sep in name or name in (".", "..") or (not (home / "runs" / name).is_dir() and (Path(name) / RUN).is_file()):
        return load(Path(name).absolute())
    runs = home / "runs"
    if name == "latest":
        newest = next(iter(all_runs(home)), None)
        if newest is None:
            raise UserError(f"there are no runs in {runs}")
        return load(newest)
    if (runs / name / RUN).is_file():
        return load(runs / name)
    known = [p.name for p in all_runs(home)]
    fitting = [n for n in known if n.startswith(name)] if len(name) >= SHORTEST else []
    if len(fitting) == 1:
        return load(runs / fitting[0])
    if fitting:
        raise UserError(f"{name!r} begins {len(fitting)} runs, e.g. {', '.join(fitting[:3])}; give more of it")
    raise UserError(f"no run {name!r} in {runs}{did_you_mean(name, known) or '; nemo-run list shows them'}")


def all_runs(home: Path) -> list[Path]:
    """The directories of every recorded run, newest first."""
    try:
        entries = [e for e in os.scandir(home / "runs") if e.is_dir()]
    except OSError:
        return []
    found = []
    for entry in entries:
        try:
            found.append((os.stat(os.path.join(entry.path, RUN)).st_mtime, entry.name, Path(entry.path)))
        except OSError:
            continue
    return [path for _, _, path in sorted(found, reverse=True)]


def read_json(path: Path) -> dict[str, Any] | None:
    """A record that others write; None when it is not there or not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(partial, path)
