"""A rank's entry: ``python -m mimo_jobs.worker JOB.json`` reads the job, calls its function of `mimo_jobs.jobs`, says how it ended.

Run by torchrun or srun for every rank; run by hand it repeats the job, or one rank of it, under a debugger. Writes
``result.json`` beside JOB.json: rank 0 when the job succeeded, the first rank that fails when it did not. Exit codes:
0 done, 1 failed, 2 a wrong JOB.json.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UsageError, UserError, did_you_mean

SCHEMA = 1
PATIENCE_SECONDS = 1.0
KEYS = ("schema", "job", "run_id", "world_size", "record", "arguments")


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    # A scheduler's or torchrun's SIGTERM ends a rank as Ctrl-C does: tidied up, and with a word to the others.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    record: Path | None = None
    world: Any = None
    try:
        if len(arguments) != 1:
            raise UsageError("usage: python -m mimo_jobs.worker JOB.json")
        job = read_job(Path(arguments[0]))
        record = Path(job["record"])
        from mimo_jobs.parallel.world import World

        with World.from_env(record=record, run_id=job["run_id"]) as world:
            if world.size != job["world_size"]:
                raise UsageError(
                    f"{arguments[0]} is for {job['world_size']} ranks, started with {world.size}: start it with "
                    f"torchrun --nproc-per-node {job['world_size']} -m mimo_jobs.worker, or set RANK and WORLD_SIZE"
                )
            summary = job["function"](**job["arguments"], world=world)
        if world.rank == 0:
            write_result(record, {"status": "ok", "summary": summary})
            print(json.dumps(summary, default=str))
        return 0
    except UserError as error:
        return _failed(record, world, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed(record, world, "interrupted", 1)
    except Exception as error:  # whatever it is, the record must say so
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        text = f"{type(error).__name__}: {error} (a defect, at {place}; the rank's log has the traceback)"
        return _failed(record, world, text, 1)


def read_job(path: Path) -> dict[str, Any]:
    """JOB.json with ``function`` looked up and ``arguments`` rebuilt as its signature wants them.

    Raises:
        UsageError: not readable, another schema, an unknown job, or a field that its function does not have.
    """
    from mimo_jobs.jobs import JOBS

    try:
        job = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if not isinstance(job, dict) or job.get("schema") != SCHEMA:
        raise UsageError(f"{path}: expected a job record of schema {SCHEMA}")
    if set(job) != set(KEYS):
        raise UsageError(f"{path}: expected the keys {', '.join(KEYS)}; found {', '.join(job)}")
    if job["job"] not in JOBS:
        raise UsageError(f"{path}: unknown job {job['job']!r}{did_you_mean(job['job'], JOBS)}")
    job["function"] = JOBS[job["job"]]
    job["arguments"] = _rebuilt(job["function"], job["arguments"], f"{path}: arguments")
    return job


def _rebuilt(owner: Any, values: Any, where: str) -> dict[str, Any]:
    """Plain JSON -> keyword arguments of ``owner``, with nested dataclasses made again; strict about names."""
    parameters = {n: p for n, p in inspect.signature(owner).parameters.items() if n != "world"}
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected an object, found {values!r}")
    for name in values:
        if name not in parameters:
            raise UsageError(f"{where}: unknown field {name!r}{did_you_mean(name, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in values:
            raise UsageError(f"{where}: {name} is missing")
    return {
        name: hint(**_rebuilt(hint, value, f"{where}.{name}"))
        if dataclasses.is_dataclass(hint := parameters[name].annotation) and isinstance(hint, type)
        else value
        for name, value in values.items()
    }


def write_result(record: Path, result: dict[str, Any]) -> bool:
    """Write result.json whole, unless a rank already did; true when this one was the first."""
    descriptor, partial = tempfile.mkstemp(dir=record, prefix=".result.")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(result, file, indent=2, default=str)
        os.link(partial, record / "result.json")  # fails when it exists: the first rank wins
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(partial)


def _failed(record: Path | None, world: Any, message: str, code: int) -> int:
    rank = world.rank if world else 0
    print(f"rank {rank}: {message}", file=sys.stderr, flush=True)
    if record is None or not record.is_dir():
        return code
    first = world.failure if world else None
    if first and first[0] != rank:
        # Another rank failed and this one only heard of it: leave the word to that rank if it still lives.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and not (record / "result.json").exists():
            time.sleep(0.05)
        rank = first[0]
    with contextlib.suppress(OSError):  # the message is in the log already
        write_result(record, {"status": "failed", "error": {"rank": rank, "message": message, "exit_code": code}})
    return code


if __name__ == "__main__":
    sys.exit(main())
