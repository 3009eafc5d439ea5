"""A rank's entry: ``python -m mimo_jobs.worker JOB.json`` reads the job, calls its function of `mimo_jobs.jobs`, says how it ended.

Run by torchrun or srun for every rank; run by hand it repeats the job, or one rank of it, under a debugger. Writes
``result.json`` beside JOB.json: rank 0 when the job succeeded, the first rank that fails when it did not. Exit codes:
0 done, 1 failed, 2 a wrong JOB.json. ``transient`` in result.json: ended by what may not happen again, a rank that died or an
interruption; ``attempt``: whose result it is, as the launcher names it.
"""

import signal

if __name__ == "__main__":  # before the slow imports, so that an early Ctrl-C is no traceback of one of them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import ctypes
import dataclasses
import inspect
import json
import os
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

from mimo_jobs.errors import UsageError, UserError, did_you_mean
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.parallel import attempt
from mimo_jobs.records import read_json

SCHEMA = 1
PATIENCE_SECONDS = 1.0
OWNER_SECONDS = 1.0
KEYS = {"schema": int, "job": str, "run_id": str, "world_size": int, "record": str, "arguments": dict}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    record: Path | None = None
    world: Any = None
    try:
        # A scheduler's or torchrun's SIGTERM ends a rank as Ctrl-C does: tidied up, and with a word to the others.
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGUSR1, _interrupt)  # Slurm's word that the time limit is near
        if os.environ.get("SLURM_NTASKS", "1") != "1":  # as torchrun does: ranks share the node's cores
            os.environ.setdefault("OMP_NUM_THREADS", "1")
        _end_with_torchrun()
        _end_with_owner()
        if len(arguments) != 1:
            raise UsageError("usage: python -m mimo_jobs.worker JOB.json")
        job = read_job(Path(arguments[0]))
        record = Path(job["record"])
        world = _world(arguments[0], job)
        _log_to_own_file(job, world.rank)
        if world.rank == 0:
            _remove_stale(record, alone=world.size == 1, spread=0.0)
            (record / "progress.json").unlink(missing_ok=True)
        with world:
            try:
                summary = job["function"](**job["arguments"], world=world)
            finally:
                _ignore_signals()  # it is published, or failing already: only the word to the others is left
        if world.rank == 0:
            write_result(record, {"status": "ok", "summary": summary})
            print(json.dumps({k: v for k, v in summary.items() if k != "digests"}, default=str))
        return 0
    except UserError as error:
        return _failed(record, world, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed(record, world, "interrupted", 1)
    except OSError as error:  # a full disk, a directory without permission
        text = error.strerror or str(error)
        return _failed(record, world, f"{error.filename}: {text}" if error.filename else text, 1)
    except Exception as error:  # whatever it is, the record must say so
        _ignore_signals()
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        text = f"{type(error).__name__}: {error} (a defect, at {place}; the rank's log has the traceback)"
        return _failed(record, world, text, 1)


def _interrupt(signum: int, frame: object) -> NoReturn:
    _ignore_signals()  # torchrun and Slurm repeat themselves; a second one would cut off the last word of the first
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def _log_to_own_file(job: dict[str, Any], rank: int) -> None:
    """Send what this rank says to ``$MIMO_JOBS_LOGS/language.tp0.pp1.log``, after what an earlier attempt said there."""
    directory = os.environ.get("MIMO_JOBS_LOGS")
    if not directory:
        return
    layout = job["arguments"].get("layout")
    name = log_name(layout.resolve() if layout is not None else None, rank, job["job"])
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(Path(directory) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    print(
        f"# {time.strftime('%F %T')} rank {rank} of {job['world_size']} on {os.uname().nodename}, attempt {attempt.name() or 0}, "
        f"pid {os.getpid()}",
        flush=True,
    )


def log_name(layout: ResolvedLayout | None, rank: int, job: str) -> str:
    """A rank's log: ``language.tp0.pp1.log``, ``language.tp1+images.tp0.dp1.log`` where components share the rank, ``verify.log``."""
    if layout is None:
        return f"{job}.log"
    parts = []
    for component in layout.components_of(rank):
        at = component.coordinates(rank)
        named = [f"{n}{at[n]}" for n in ("tp", "pp", "dp", "cp") if n == "tp" or getattr(component, n) > 1]
        parts.append(".".join([component.name, *named]))
    return "+".join(parts) + ".log"


def _end_with_torchrun() -> None:
    """Have this rank interrupted when its torchrun dies, even of SIGKILL: nobody would hear of what it publishes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():  # in a container torchrun may be 1
        raise KeyboardInterrupt  # it died before the call above


def _end_with_owner() -> None:
    """Have this rank interrupted when the command that runs it is gone: torchrun would go on without anybody to hear of it."""
    owner = int(os.environ.get("MIMO_JOBS_OWNER") or 0)
    if not owner:
        return

    def watch() -> None:
        while Path(f"/proc/{owner}").exists():
            time.sleep(OWNER_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _world(file: str, job: dict[str, Any]) -> Any:
    from mimo_jobs.parallel.world import World

    try:
        world = World.from_env(record=job["record"], run_id=job["run_id"])
    except ValueError:
        names = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")
        given = ", ".join(f"{n}={os.environ[n]!r}" for n in names if n in os.environ)
        raise UsageError(f"{given}: expected integers") from None
    if world.size != job["world_size"]:
        raise UsageError(
            f"{file} is for {job['world_size']} ranks, started with {world.size}: start it with "
            f"torchrun --nproc-per-node {job['world_size']} -m mimo_jobs.worker, or set RANK and WORLD_SIZE"
        )
    if not 0 <= world.rank < world.size:
        raise UsageError(f"rank {world.rank} is not among the {world.size} ranks of {file}; set RANK and WORLD_SIZE")
    return world


def _remove_stale(record: Path, alone: bool = False, spread: float = attempt.SPREAD_SECONDS) -> None:
    """Remove the result of an earlier attempt, but not what another rank of this one may have written already."""
    path = record / "result.json"
    with contextlib.suppress(FileNotFoundError):
        if alone or attempt.is_earlier(path, (read_json(path) or {}).get("attempt"), spread):
            path.unlink()


def read_job(path: Path) -> dict[str, Any]:
    """JOB.json with ``function`` looked up and ``arguments`` rebuilt as its signature wants them.

    Raises:
        UsageError: not readable, another schema, an unknown job, or a field that its function does not have or
            that is of another type.
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
    for key, hint in KEYS.items():
        if not _fits(hint, job[key]):
            raise UsageError(f"{path}: {key}={job[key]!r}: expected {hint.__name__}")
    if job["job"] not in JOBS:
        raise UsageError(f"{path}: unknown job {job['job']!r}{did_you_mean(job['job'], JOBS)}")
    job["function"] = JOBS[job["job"]]
    job["arguments"] = rebuilt(job["function"], job["arguments"], f"{path}: arguments")
    return job


def rebuilt(owner: Any, values: Any, where: str) -> dict[str, Any]:
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
    made = {}
    for name, value in values.items():
        hint = parameters[name].annotation
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            made[name] = hint(**rebuilt(hint, value, f"{where}.{name}"))
        elif _fits(hint, value):
            made[name] = float(value) if _takes(float, hint) and not _takes(int, hint) and type(value) is int else value
        else:
            plain = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
            expected = plain.__name__ if isinstance(plain, type) else str(plain).replace("typing.", "")
            raise UsageError(f"{where}.{name}={value!r}: expected {expected}")
    return made


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value is of a field's type; true is no integer."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(m, value) for m in members)
    if origin is typing.Literal:
        return value in members
    wanted = members[0] if origin is typing.Annotated else hint
    return type(value) is wanted or (wanted is float and type(value) is int)


def _takes(kind: type, hint: Any) -> bool:
    return hint is kind or kind in typing.get_args(hint)


def write_result(record: Path, result: dict[str, Any]) -> bool:
    """Write result.json whole; false when another rank of this attempt failed before.

    Success is rank 0's to say, once every rank has done its part and the output is there: it replaces whatever came late.
    """
    descriptor, partial = tempfile.mkstemp(dir=record, prefix=".result.")
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(result | {"attempt": attempt.name()}, file, indent=2, default=str)
        if result["status"] == "ok":
            os.replace(partial, record / "result.json")
            return True
        _remove_stale(record)  # rank 0 may not have come yet
        os.link(partial, record / "result.json")  # fails when it exists: the first rank wins
        return True
    except FileExistsError:
        return False
    finally:
        Path(partial).unlink(missing_ok=True)


def _failed(record: Path | None, world: Any, message: str, code: int) -> int:
    _ignore_signals()
    rank = world.rank if world else 0
    with contextlib.suppress(OSError):  # a full disk: the record may still take it
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
    transient = message == "interrupted" or (world is not None and world.lost)
    error = {"rank": rank, "message": message, "exit_code": code, "transient": transient}
    with contextlib.suppress(OSError):  # the message is in the log already
        write_result(record, {"status": "failed", "error": error})
    return code


def _leave(code: int) -> NoReturn:
    """End the process; after a failure without what CUDA and NCCL tidy up at the end, which may wait for ranks that are gone.

    Processes that read data see it (``training/data/workers.py``).
    """
    torch = sys.modules.get("torch")
    if code and torch is not None and torch.cuda.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk, a reader that is gone
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _leave(main())
