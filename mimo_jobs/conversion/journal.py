"""Going on where a stopped job was: which of its tasks a rank had finished, kept beside what they wrote.

A job that is asked to stop (time limit, preemption), or whose other rank died, leaves its staging directory with a journal for each
rank that could still write one: what it names is on disk. The same job, started again, does the rest. A rank without a journal does
all of its tasks again: writing the same bytes to the same places twice changes nothing.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mimo_jobs.checkpoint.manifest import write_json
from mimo_jobs.parallel import attempt
from mimo_jobs.parallel.world import World
from mimo_jobs.weights.json_files import read_object
from mimo_jobs.weights.transfer import Files

PLAN = ".plan"
PREFIX = ".done-"


def is_enabled() -> bool:
    """Whether somebody starts this job again; without that nobody comes back to a staging directory."""
    return bool(attempt.name())


def belongs(staging: Path, plan: str) -> bool:
    """Whether a staging directory is of this very plan: the same tasks, in the same order, with the same bytes."""
    try:
        return is_enabled() and (staging / PLAN).read_text() == plan
    except OSError:
        return False


def begin(staging: Path, plan: str) -> None:
    """Say whose staging directory this is."""
    if is_enabled():
        (staging / PLAN).write_text(plan)


def finished_tasks(staging: Path) -> int:
    """How many tasks of all ranks the journals name."""
    count = 0
    for path in staging.glob(f"{PREFIX}*"):
        with contextlib.suppress(Exception):
            count += len(read_object(path)["tasks"])
    return count


def clear(staging: Path) -> None:
    """Remove plan and journals from a complete directory."""
    for path in (*staging.glob(f"{PREFIX}*"), *staging.glob(f".{PREFIX}*"), staging / PLAN):
        path.unlink(missing_ok=True)


class Journal:
    """This rank's tasks: those that an earlier attempt finished, and those finished now."""

    def __init__(self, staging: Path, world: World) -> None:
        self.path, self.world = staging / f"{PREFIX}{world.rank}", world
        self._done: set[int] = set()
        self._bytes, self._lock, self._task = 0, threading.Lock(), threading.local()
        if is_enabled():
            with contextlib.suppress(Exception):  # none, or cut short: everything is done again
                found = read_object(self.path)
                self._bytes, self._done = int(found["bytes"]), set(found["tasks"])

    def counted(self, moved: Callable[[int], None]) -> Callable[[int], None]:
        """``moved``, told first what earlier attempts moved, and keeping count of what this one does."""
        moved(self._bytes)

        def also(count: int) -> None:
            self._task.bytes = getattr(self._task, "bytes", 0) + count
            moved(count)

        return also

    def remaining(self, tasks: Iterable[Callable[[], None]]) -> Iterator[Callable[[], None]]:
        """The tasks that are still to do; each is noted when it has ended well."""
        for number, task in enumerate(tasks):
            if number not in self._done:
                yield lambda n=number, t=task: self._run(n, t)

    def _run(self, number: int, task: Callable[[], None]) -> None:
        self._task.bytes = 0
        task()
        with self._lock:
            self._done.add(number)
            self._bytes += self._task.bytes

    @contextlib.contextmanager
    def kept(self, files: Files) -> Iterator[None]:
        """If the work inside ends early, flush what was written, then write down which tasks it was."""
        try:
            yield
        except BaseException:
            if is_enabled():
                with contextlib.suppress(OSError):
                    files.sync()
                    write_json(self.path, {"bytes": self._bytes, "tasks": sorted(self._done)})
            raise


def discard_unless_resumable(world: World, remove: Callable[[], None]) -> Callable[[], None]:
    """A clean-up for `World.on_failure`: keeps the staging directory of a job that somebody will start again."""

    def clean_up() -> None:
        if not (is_enabled() and world.lost):
            remove()

    return clean_up


def plan_digest(*parts: object) -> str:
    """One string for everything that decides which tasks there are and what they write."""
    from mimo_jobs.checkpoint.manifest import file_digest

    return file_digest(json.dumps(parts, sort_keys=True, default=str).encode())
