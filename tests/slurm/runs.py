"""Submit runs as a user does, and watch them. Ranks are slowed by a ``sitecustomize`` of the test, never by the product."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mimo_jobs import monitor, records
from mimo_jobs.records import RunRecord

NEMO_RUN = str(Path(sys.executable).parent / "nemo-run")
SMALL = ("layout.language.tp=2", "layout.images.tp=1")
SLOW = """
import os, sys, time
if "mimo_jobs.worker" in " ".join(sys.orig_argv):
    from mimo_jobs.conversion import journal
    from mimo_jobs.weights import transfer
    real, remaining = transfer.write_full, journal.Journal.remaining
    def slow(fd, data, offset):
        time.sleep(float(open(os.environ["SLOW"]).read()))
        real(fd, data, offset)
    def told(self, tasks):
        for task in remaining(self, tasks):
            yield lambda t=task: (t(), open(os.environ["SLOW"] + ".finished", "a").write("."))
    transfer.write_full, journal.Journal.remaining = slow, told
"""


def nemo_run(*words: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; ``code`` is what it must exit with, None for anything."""
    done = subprocess.run(
        [NEMO_RUN, *words], capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )
    assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def submit(home: Path, *words: str, recipe: str = "qwen35vl_pipeline", executor: str = "slurm") -> RunRecord:
    """Queue a recipe and return its record."""
    done = nemo_run(f"recipes.{recipe}", *words, "--executor", executor, "--force", "--json")
    return records.load(Path(json.loads(done.stdout)["record"]))


def slowed(work: Path, seconds: float) -> tuple[str, ...]:
    """Words that make every write of every rank take so long, until `hurry`."""
    place = work / "slow"
    place.mkdir(exist_ok=True)
    (place / "seconds").write_text(str(seconds))
    (place / "sitecustomize.py").write_text(SLOW)
    return (
        "executor.code=installed",
        f"executor.environment.PYTHONPATH={place}",
        f"executor.environment.SLOW={place}/seconds",
    )


def hurry(work: Path) -> None:
    """From here on at full speed."""
    if (work / "slow").exists():
        (work / "slow" / "seconds.new").write_text("0")
        os.replace(work / "slow" / "seconds.new", work / "slow" / "seconds")


def finished(work: Path) -> int:
    """How many tasks the ranks of `slowed` steps have finished; bytes move before the first one is."""
    place = work / "slow" / "seconds.finished"
    return place.stat().st_size if place.exists() else 0


def kinds(run: RunRecord, step: str = "import") -> list[str]:
    """What happened to a step, in order."""
    return [e["event"] for e in run.step(step).events()]


def states(run: RunRecord) -> list[str]:
    """The reconciled state of every step."""
    return [s.state.state for s in monitor.look([run])[0].steps]


def seen(run: RunRecord, step: str) -> monitor.Seen:
    return next(s for s in monitor.look([run])[0].steps if s.step.name == step)


def wait_for(run: RunRecord, *expected: str, seconds: float = 60) -> list[str]:
    """Until the steps are in these states."""
    deadline = time.monotonic() + seconds
    while (found := states(run)) != list(expected):
        assert time.monotonic() < deadline, f"{found}, expected {expected}\n{told(run)}"
        time.sleep(0.3)
    return found


def wait_until(condition: Any, seconds: float = 30, what: "str | RunRecord" = "it") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what if isinstance(what, str) else told(what)}")
        time.sleep(0.1)


def wait_writing(run: RunRecord, step: str = "import", seconds: float = 30) -> None:
    """Until ranks of a step are moving bytes."""
    moving = run.step(step)
    wait_until(lambda: (moving.progress() or {}).get("done", 0) > 0, seconds, run)


def ranks(run: RunRecord, step: str) -> list[int]:
    """pids of the rank processes of a step, on every node of this machine's cluster."""
    job = bytes(run.step(step).directory / "JOB.json")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if job in words and b"mimo_jobs.worker" in words and b"srun" not in words[0]:
            found.append(int(process.name))
    return sorted(found)


def told(run: RunRecord) -> str:
    """Everything about a run, for the message of a failing test."""
    parts = []
    for step in run.steps:
        for path in (step.directory / "events.jsonl", step.directory / "slurm.log", *step.directory.glob("logs/*.log")):
            if path.exists():
                parts.append(f"== {path.relative_to(run.root)}\n{path.read_text()[-1500:]}")
    return "\n".join(parts)


def same_files(a: Path, b: Path) -> bool:
    """Whether two HF directories hold the same weight files, byte for byte."""
    names = sorted(p.name for p in a.glob("*.safetensors"))
    assert names
    return names == sorted(p.name for p in b.glob("*.safetensors")) and all(
        (a / n).read_bytes() == (b / n).read_bytes() for n in names
    )


def slow_pipeline(home: Path, model: Path, work: Path, seconds: float, *more: str) -> RunRecord:
    """A pipeline whose import is moving bytes, slowly, when this returns."""
    run = submit(home, f"model={model}", f"workdir={work}/out", *SMALL, *slowed(work, seconds), *more)
    wait_writing(run)
    return run


def ended_well(run: RunRecord, model: Path, work: Path, seconds: float = 90) -> None:
    """The rest at full speed: every step ends well, the export is the source's bytes, and nothing is left beside it."""
    hurry(work)
    wait_until(lambda: set(states(run)) <= {"done", "skipped"}, seconds, run)
    assert same_files(model, work / "out" / "hf")
    assert not list((work / "out").glob(".*partial*"))
