"""Job arrays on CPU nodes, with submitit: the tensors of big checkpoints compared or hashed in parts; results are Python values.

A part keeps what it has found in a file of its own, so that it goes on where it was: after its time limit (submitit requeues it)
and after a preemption or a lost node (Slurm starts it anew). Paths reach the parts as pickled data. What submitit writes into
shell text (interpreter, folder, setup) is quoted or refused here. docs/slurm.md
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launchers import slurm, slurm_commands
from launchers.profiles import Profile, seconds
from launchers.slurm_commands import QueuedJob, SlurmError, SlurmSilent
from mimo_jobs import paths
from mimo_jobs.conversion import identity
from mimo_jobs.conversion.digests import file_blocks
from mimo_jobs.conversion.verify import verify_hf
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.records import add_line
from mimo_jobs.weights import transfer
from mimo_jobs.weights.safetensors_io import HfCheckpoint, TensorInfo, open_hf

Progress = Callable[[int, int], None]

TASK_BYTES, MOST_TASKS = 8_000_000_000, 64
BATCH_BYTES, BATCHES = 256_000_000, 8  # what is lost when a part is cut short: that, or an eighth of a larger part
MINUTES, CPUS = 60, 4
SIGNAL_SECONDS = 60  # from submitit's USR2 to the time limit: it only has to requeue itself
MOST_TIMEOUTS, MOST_IDLE = 100, 3  # requeues in all, and those in a row that found nothing
POLL_SECONDS, STATE_SECONDS = 1.0, 5.0
RESULT_SECONDS = 15.0  # a network filesystem may show a result this long after Slurm shows the job's end
CODE = Path(__file__).resolve().parent.parent  # so that the jobs run this very code, installed or not
# Slurm expands % in the names of logs, and submitit pastes the folder into options of sbatch and srun.
SAFE_FOLDER = re.compile(r"[A-Za-z0-9_@+=,./-]+")
# Why squeue says that a job waits when nothing but a new request would start it; most clusters accept such jobs.
FOR_EVER = re.compile(
    r"PartitionConfig|Partition(Time|Node)Limit|BadConstraints|(Account|QOS)NotAllowed|Invalid(Account|QOS)"
    r"|\w*Max\w*PerJob\w*|JobHoldMaxRequeue|launch.failed.requeued.held"
)


# ------------------------------------------------------------------------------------------------------ what the user calls


def verify(
    left: Path, right: Path, profile: Profile, *, tasks: int | None = None, progress: Progress | None = None,
    dtype: str | None = None, mtp: str = "keep",
) -> dict[str, Any]:  # fmt: skip
    """`mimo_jobs.conversion.verify.verify_hf` as a job array; the same certificate.

    Args:
        tasks: parts of about equal bytes; by default one per 8 GB, at most 64.
        progress: called with (bytes compared so far, bytes in all).

    Raises:
        UserError: a side is no readable checkpoint, Slurm refuses the jobs, or a part failed; the others are cancelled.
    """
    certificate = verify_hf(left, right, dtype=dtype, mtp=mtp, only=())  # all but the tensors
    a, b = (open_hf(Path(side).absolute()) for side in (left, right))
    common = [t for name, t in a.tensors.items() if name in b.tensors]
    rows = _rows(VerifyPart, "verify", common, (a, b), dtype, profile, tasks, progress)
    different = {name: row["different"] for name, row in rows.items() if row["different"]}
    digests = {name: row["digest"] for name, row in rows.items() if row["digest"]}
    return certificate | {
        "equal": certificate["equal"] and not different, "tensors": len(rows), "bytes": sum(t.nbytes for t in common),
        "bit_exact": len(rows) - len(different), "different": different, "digests": digests,
    }  # fmt: skip


def hash_files(
    directory: Path, profile: Profile | None, *, tasks: int | None = None, progress: Progress | None = None
) -> dict[str, dict[str, Any]]:
    """blake3 digests of a checkpoint's tensors, as a job array, or on this machine without a ``profile``.

    Returns:
        ``tensors``: name -> digest, dtype, shape and file; ``total``: a digest over names, dtypes, shapes and digests, the same
        however the tensors are laid out in files, with the number of tensors and bytes.

    Raises:
        UserError: no readable checkpoint, Slurm refuses the jobs, or a part failed; the others are cancelled.
    """
    hf = open_hf(Path(directory).absolute())
    if profile is None:
        digests = _digests(hf, hf.tensors, progress)
    else:
        rows = _rows(HashPart, "hash", hf.tensors.values(), (hf,), None, profile, tasks, progress)
        digests = {name: row["digest"] for name, row in rows.items()}
    tensors = {
        name: {"digest": digests[name], "dtype": t.dtype, "shape": list(t.shape), "file": t.file}
        for name, t in sorted(hf.tensors.items())
    }
    total = identity.digest({name: [t["dtype"], t["shape"], t["digest"]] for name, t in tensors.items()})
    return {"tensors": tensors, "total": {"digest": total, "tensors": len(tensors), "bytes": hf.nbytes}}


def split(tensors: Iterable[TensorInfo], tasks: int | None = None) -> list[list[TensorInfo]]:
    """Tensors in parts of about equal bytes, each contiguous in the files; see `verify` for ``tasks``."""
    ordered = sorted(tensors, key=lambda t: (t.file, t.offset))
    total = sum(t.nbytes + 1 for t in ordered)
    if tasks is None:
        tasks = min(MOST_TASKS, -(-total // TASK_BYTES))
    elif tasks < 1:
        raise UsageError(f"tasks={tasks}: expected an integer of at least 1")
    parts: list[list[TensorInfo]] = [[] for _ in range(tasks)]
    at = 0
    for t in ordered:
        parts[(2 * at + t.nbytes + 1) * tasks // (2 * total)].append(t)  # where its middle lies
        at += t.nbytes + 1
    return [p for p in parts if p]


def _digests(hf: HfCheckpoint, names: Collection[str], progress: Progress | None = None) -> dict[str, str]:
    from blake3 import blake3

    found: dict[str, str] = {}
    total, done = sum(hf.tensors[n].nbytes for n in names), 0

    def one(name: str, files: transfer.Files) -> None:
        nonlocal done
        digest = blake3()
        for block in file_blocks(files, hf.directory, hf.tensors[name])():
            digest.update(block)
            done += len(block)
            if progress:
                progress(done, total)
        found[name] = digest.hexdigest()

    with transfer.Files() as files:
        ordered = sorted(names, key=lambda n: -hf.tensors[n].nbytes)
        transfer.run_all([lambda n=n: one(n, files) for n in ordered], _threads())
    return found


def _threads() -> int:
    """The CPUs that are ours; where Slurm does not bind, sched_getaffinity has the whole node."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or min(8, len(os.sched_getaffinity(0))))


# ------------------------------------------------------------------------------------------------------ what runs on a node


class Part:
    """A share of the tensors, as submitit pickles, runs and requeues it.

    ``file`` is where it keeps its results: a line with the sizes and mtimes of what it reads, then a line a tensor.
    """

    def __init__(
        self, file: Path, share: Sequence[TensorInfo], sides: Sequence[HfCheckpoint], dtype: str | None
    ) -> None:
        self.file, self.directories, self.dtype = file, [hf.directory for hf in sides], dtype
        self.sizes = {t.name: t.nbytes for t in share}
        self.sources = sorted({str(hf.directory / hf.tensors[t.name].file) for hf in sides for t in share})
        self.added = self.idle = 0

    def compute(self, names: list[str]) -> list[dict[str, Any]]:
        """A row for each of these tensors: ``name`` and what was found."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Find what is not in the file yet; ``{"files": sizes and mtimes, "rows": name -> row}``.

        Raises:
            UserError: a source cannot be read, or changed meanwhile.
        """
        self.added, before = 0, self.stats()
        head, rows = recorded(self.file)
        if head == before:
            add_line(self.file, "\n")  # ends a line that a killed attempt may have left torn
        else:
            rows = {}
            self.file.write_text(json.dumps({"files": before}) + "\n")
        rows = {n: row for n, row in rows.items() if n in self.sizes}
        for names in self.batches([n for n in self.sizes if n not in rows]):
            found = [row | {"bytes": self.sizes[row["name"]]} for row in self.compute(names)]
            add_line(self.file, "".join(json.dumps(row) + "\n" for row in found))
            rows |= {row["name"]: row for row in found}
            self.added += len(found)
        _unchanged(before, self.stats())
        return {"files": before, "rows": rows}

    def checkpoint(self) -> Any:
        """What submitit requeues at a time limit. Raises a `UserError` when that has brought nothing several times."""
        from submitit.helpers import DelayedSubmission

        self.idle = 0 if self.added else self.idle + 1
        if self.idle >= MOST_IDLE:
            raise UserError(f"stopped {MOST_IDLE} times before anything was finished; set executor.time to more")
        return DelayedSubmission(self)

    def batches(self, names: Iterable[str]) -> Iterator[list[str]]:
        """What is read between two writes to the file."""
        enough, batch, held = max(BATCH_BYTES, sum(self.sizes.values()) // BATCHES), [], 0
        for name in names:
            batch.append(name)
            held += self.sizes[name]
            if held >= enough:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def stats(self) -> dict[str, list[int]]:
        """Size and mtime (ns) of every source."""
        try:
            return {path: [(s := os.stat(path)).st_size, s.st_mtime_ns] for path in self.sources}
        except OSError as error:
            raise UserError(
                f"{error.filename}: {error.strerror}; checkpoints must be where the nodes see them"
            ) from None


class VerifyPart(Part):
    """Compares its tensors; see `verify`."""

    def compute(self, names: list[str]) -> list[dict[str, Any]]:
        found = verify_hf(*self.directories, workers=_threads(), dtype=self.dtype, only=set(names))
        return [{"name": n, "digest": found["digests"].get(n), "different": found["different"].get(n)} for n in names]


class HashPart(Part):
    """Digests of its tensors; see `hash_files`."""

    def compute(self, names: list[str]) -> list[dict[str, Any]]:
        return [{"name": n, "digest": d} for n, d in _digests(open_hf(self.directories[0]), names).items()]


def recorded(file: Path) -> tuple[Any, dict[str, dict[str, Any]]]:
    """The head and the rows (by tensor) of a part's file; lines that are not whole do not count."""
    head, rows = None, {}
    with contextlib.suppress(FileNotFoundError):
        for number, line in enumerate(file.read_bytes().split(b"\n")):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                found = json.loads(line)
                if number == 0:
                    head = found["files"]
                elif isinstance(found["bytes"], int):
                    rows[found["name"]] = found
    return head, rows


def _unchanged(before: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> None:
    changed = [path for path, stat in now.items() if before.get(path, stat) != stat]
    if changed:
        raise UserError(f"{changed[0]}: changed while it was being read; try again when nothing writes to it")


# ------------------------------------------------------------------------------------------------------ Slurm


def _rows(
    kind: type[Part], title: str, tensors: Iterable[TensorInfo], sides: Sequence[HfCheckpoint], dtype: str | None,
    profile: Profile, tasks: int | None, progress: Progress | None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The rows of all tensors, by name in order."""
    shares = split(tensors, tasks)
    if not shares:
        return {}
    name = paths.new_id(title)
    folder = paths.home() / "arrays" / name
    parts = [kind(folder / f"part-{i}.jsonl", share, sides, dtype) for i, share in enumerate(shares)]
    results = Array(name, folder, parts, profile).run(progress)
    seen: dict[str, list[int]] = {}
    for result in results:
        _unchanged(seen, result["files"])
        seen |= result["files"]
    return dict(sorted((name, row) for result in results for name, row in result["rows"].items()))


class Array:
    """Parts as one Slurm job array: submitted, watched and cancelled together."""

    def __init__(self, name: str, folder: Path, parts: Sequence[Part], profile: Profile) -> None:
        self.name, self.folder, self.parts, self.profile = name, folder, parts, profile
        self.jobs: list[Any] = []
        self.states: dict[str, QueuedJob] = {}
        self.bytes_of: dict[Path, tuple[int, int]] = {}  # a part's file: its size when last read, bytes done

    def run(self, progress: Progress | None = None) -> list[dict[str, Any]]:
        """What the parts return, in their order; whatever ends this early cancels them all.

        Raises:
            UserError: see `verify`.
        """
        try:
            self.jobs = self._submit()
            results = self._watch(progress)
        except BaseException:
            self.cancel()
            if not self.jobs:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)
        return results

    def cancel(self) -> None:
        """End what still runs; found by its name where sbatch was interrupted before it told the id."""
        with contextlib.suppress(SlurmError):
            ids = {int(job.job_id.partition("_")[0]) for job in self.jobs}
            slurm_commands.cancel(
                sorted(ids) or [j.job_id for j in slurm_commands.queue().values() if j.name == f"mimo:{self.name}"]
            )

    def _submit(self) -> list[Any]:
        from submitit import SlurmExecutor

        if self.profile.ssh:
            raise UserError(f"job arrays start where Slurm is: log in to {self.profile.ssh}, or set executor.ssh=none")
        if absent := [name for name in ("sbatch", "srun") if not shutil.which(name)]:
            raise SlurmSilent(f"{absent[0]}: not found; is this a login node of the cluster?")
        if not SAFE_FOLDER.fullmatch(str(self.folder)):
            raise UserError(
                f"the record {str(self.folder)!r} has characters that submitit cannot pass on; set MIMO_JOBS_HOME to a "
                "directory named with letters, digits and _ @ + = , . / - only"
            )
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write the record: {error}; set MIMO_JOBS_HOME to a writable directory") from None
        # Slurm's signals must not end an interpreter that submitit has not prepared yet: imports may take long.
        python = f"""sh -c 'trap "" TERM USR2; exec "$@"' sh {shlex.quote(slurm.interpreter(self.profile))}"""
        try:
            with _slurm_environment(), contextlib.redirect_stderr(io.StringIO()):  # where submitit prints errors, too
                executor = SlurmExecutor(self.folder, max_num_timeout=MOST_TIMEOUTS, python=python)
                executor.update_parameters(**parameters(self.name, self.folder, self.profile))
                return executor.submit_array(self.parts)
        except RuntimeError as error:  # all that submitit raises
            words = re.sub(r"sbatch: (error: )?", "", " ".join(str(error).split()))
            raise SlurmError(f"Slurm refused the job array: {words}") from None

    def _watch(self, progress: Progress | None) -> list[dict[str, Any]]:
        results: dict[int, dict[str, Any]] = {}
        ended: dict[int, float] = {}  # without a result: since when
        total, ask_again = sum(sum(p.sizes.values()) for p in self.parts), 0.0
        while True:
            with contextlib.suppress(OSError):
                os.chmod(self.folder, self.folder.stat().st_mode)  # makes NFS look again (submitit does it, too)
            for i, job in enumerate(self.jobs):
                if i not in results and job.paths.result_pickle.exists():
                    results[i] = self._result(i)
            if progress:
                progress(sum(self._done(i, i in results) for i in range(len(self.jobs))), total)
            if len(results) == len(self.jobs):
                return [results[i] for i in range(len(self.jobs))]
            if time.monotonic() >= ask_again:
                with contextlib.suppress(SlurmSilent):  # the jobs do not depend on the controller
                    self._check(results, ended)
                ask_again = time.monotonic() + STATE_SECONDS
            time.sleep(POLL_SECONDS)

    def _check(self, results: Collection[int], ended: dict[int, float]) -> None:
        """Raise for a part that will have no result, according to Slurm."""
        self.states, now = states(self.jobs[0].job_id.partition("_")[0]), time.monotonic()
        for i, job in enumerate(self.jobs):
            state = self.states.get(job.job_id)
            if i in results or (state and state.active and not FOR_EVER.fullmatch(state.reason)):
                ended.pop(i, None)
            elif now - ended.setdefault(i, now) > RESULT_SECONDS:
                raise self._failed(i, self._end(i))

    def _result(self, i: int) -> dict[str, Any]:
        error = self.jobs[i].exception()
        if error is not None:
            raise self._failed(i, last_words(str(error)))
        return self.jobs[i].result()

    def _done(self, i: int, finished: bool) -> int:
        """Bytes that a part is done with; its file is read only when it has grown."""
        part = self.parts[i]
        if finished:
            return sum(part.sizes.values())
        with contextlib.suppress(OSError):
            size, (before, done) = part.file.stat().st_size, self.bytes_of.get(part.file, (-1, 0))
            if size != before:
                done = sum(row["bytes"] for row in recorded(part.file)[1].values())
                self.bytes_of[part.file] = size, done
            return done
        return 0

    def _failed(self, i: int, said: str) -> UserError:
        job = self.jobs[i]
        state = self.states.get(job.job_id)
        where = f" on {state.nodes}" if state and state.nodes else ""
        return UserError(
            f"part {i + 1} of {len(self.jobs)} failed (Slurm job {job.job_id}{where}): {said}\n  its log: {job.paths.stderr}"
        )

    def _end(self, i: int) -> str:
        """How a part without a result ended."""
        state = self.states.get(self.jobs[i].job_id)
        if state and state.active:
            return f"Slurm would never start it ({state.reason}); check executor.partition, time, cpus_per_task and mem"
        if state and state.state != "FAILED":
            return slurm_commands.described(state)
        try:
            lines = self.jobs[i].paths.stderr.read_text(errors="replace").split("\n")
        except OSError:
            return f"it ended without a log; do the nodes see {self.folder}?"
        lines = [line.strip() for line in lines if line.strip()]
        own = [line for line in lines if not line.startswith(("srun: ", "slurmstepd: "))]
        return (own or lines or ["it ended without a word"])[-1]


def parameters(name: str, folder: Path, profile: Profile) -> dict[str, Any]:
    """What submitit is asked for; its ``setup`` lines are the only ones that a shell reads."""
    minutes = -(-seconds(profile.time) // 60) if profile.time else MINUTES
    cpus = profile.cpus_per_task or CPUS
    environment = {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(CODE), **profile.environment}
    if profile.code == "installed":
        del environment["PYTHONPATH"]
    setup = ["set -eo pipefail"]
    if profile.modules:
        setup.append("module load " + " ".join(shlex.quote(m) for m in profile.modules))
    setup += [
        *profile.setup,
        "unset PYTHONPATH",
        *(f"export {key}={shlex.quote(value)}" for key, value in environment.items()),
    ]
    # Where JobRequeue=0 is the default, submitit could not requeue itself.
    options: dict[str, Any] = {"chdir": str(folder), "requeue": True}
    if profile.reservation:
        options["reservation"] = profile.reservation
    for option in profile.sbatch:
        key, equals, value = option.removeprefix("--").partition("=")
        options[key] = value if equals else True
    return {
        "job_name": f"mimo:{name}", "account": profile.account, "partition": slurm.partition_of(profile, uses_gpus=False),
        "qos": profile.qos, "constraint": profile.constraint, "exclude": profile.exclude, "mem": profile.mem, "time": minutes,
        "nodes": 1, "ntasks_per_node": 1, "cpus_per_task": cpus,
        "srun_args": [f"--cpus-per-task={cpus}"],  # since Slurm 22.05 srun does not take it from the job
        "signal_delay_s": min(SIGNAL_SECONDS, minutes * 60 // 4) or SIGNAL_SECONDS,
        "wckey": None,  # submitit's own, "submitit", is refused where wckeys are enforced
        "setup": setup, "additional_parameters": options,
    }  # fmt: skip


def states(array: str) -> dict[str, QueuedJob]:
    """Every task of a job array (``12_3``; ``12`` where it is a single job), as squeue says, or sacct once squeue has forgotten.

    submitit's own watcher asks sacct alone, without a time limit, and takes suspended jobs for ended ones.

    Raises:
        SlurmSilent: the controller does not answer.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher

    squeue = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%i\t%T\t%r\t%N"]
    sacct = ["sacct", "--allocations", "--parsable2", f"--jobs={array}", "--format=JobID,State,NodeList"]
    try:
        lines = [line.split("\t") for line in slurm_commands.call(squeue, 10.0).splitlines() if line.count("\t") == 3]
    except SlurmSilent:
        raise
    except SlurmError:
        lines = []
    if not lines:
        with contextlib.suppress(SlurmError):
            known = SlurmInfoWatcher().read_info(slurm_commands.call(sacct, 10.0))
            lines = [[task, row["State"].split(" ")[0], "", row["NodeList"]] for task, row in known.items()]
    return {task: QueuedJob(int(array), state, reason=why, nodes=nodes) for task, state, why, nodes in lines}


def last_words(trace: str) -> str:
    """What the exception of a traceback says, in at most two lines; its class too, unless it is one of ours."""
    said = trace.partition("\n----------------------\nYou can check")[0]
    lines = said.rpartition("Traceback (most recent call last):\n")[2].splitlines() or [trace]
    first = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), 0)
    name, _, text = lines[first].partition(": ")
    shown = text if name.startswith("mimo_jobs.errors.") else lines[first]
    return "\n".join([shown, *lines[first + 1 : first + 2]])


@contextlib.contextmanager
def _slurm_environment() -> Iterator[None]:
    """This process's environment as `slurm_commands` gives it to Slurm: submitit's sbatch inherits it, and so do the jobs."""
    kept = slurm_commands.environment()
    dropped = {key: os.environ.pop(key) for key in list(os.environ) if key not in kept}
    try:
        yield
    finally:
        os.environ.update(dropped)
