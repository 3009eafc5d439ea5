"""Slurm's commands, as lists of arguments and with time limits; nothing of them passes through a shell.

States come from squeue, which knows jobs until MinJobAge after their end, and from sacct, which may be off, purged or late.
"""

import functools
import os
import re
import subprocess
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_jobs.errors import UserError

SECONDS = 20.0
# A user's defaults for Slurm's commands would change what these ask and how their answers read.
OURS = re.compile(r"(SLURM|SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SINFO|SCANCEL|SCONTROL)_(?!CONF)")
LAUNCHED = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_(ADDR|PORT)|(TORCHELASTIC|PMI|PMIX|OMPI)_.*"
)
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
          "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


class SlurmError(UserError):
    """A command of Slurm failed; the message is its own, with the command's name."""


class SlurmSilent(SlurmError):
    """Slurm is not installed here, or does not answer."""


@dataclass(frozen=True)
class QueuedJob:
    """What Slurm says of a job. ``reason`` is why it waits; ``nodes`` its node list; ``ended`` epoch seconds, 0 if not known."""

    job_id: int
    state: str
    name: str = ""
    reason: str = ""
    nodes: str = ""
    exit_code: str = ""
    ended: float = 0.0

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def waiting(self) -> bool:
        return self.state in WAITING


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would change Slurm's defaults or another launcher left."""
    kept = {k: v for k, v in os.environ.items() if not OURS.match(k) and not LAUNCHED.fullmatch(k)}
    return kept | dict(more or {})


def call(command: Sequence[str], seconds: float = SECONDS) -> str:
    """Standard output of a command.

    Raises:
        SlurmSilent: it is not there, or the controller does not answer within ``seconds``.
        SlurmError: it failed.
    """
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, errors="replace", timeout=seconds, env=environment(),
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (FileNotFoundError, PermissionError):
        raise SlurmSilent(
            f"{command[0]}: not found; is this a login node of the cluster? (Slurm's commands must be on PATH)"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{command[0]} did not answer within {seconds:g} s") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        silent = re.search(
            r"Unable to contact slurm controller|Connection refused|Zero Bytes were transmitted|Socket timed out", said
        )
        raise (SlurmSilent if silent else SlurmError)(f"{command[0]}: {_own_words(said)}")
    return done.stdout


def _own_words(said: str) -> str:
    """``sbatch: error: Batch job submission failed: Invalid qos`` without its prefixes."""
    return re.sub(r"\b(sbatch|srun|squeue|sacct|scontrol|scancel|sinfo): (error: |fatal: )?", "", said)


def queue(users: Iterable[str] = (), seconds: float = 5.0) -> dict[int, QueuedJob]:
    """The jobs of users (names or numbers; without any, of this one) that the controller knows, ended ones included.

    Raises:
        SlurmSilent, SlurmError: see `call`.
    """
    whose = f"--user={','.join(users)}" if users else "--me"
    text = call(["squeue", whose, "--noheader", "--states=all", "--format=%A\t%T\t%j\t%r\t%N\t%e"], seconds)
    return {j.job_id: j for line in text.splitlines() if (j := _queued(line.split("\t"))) is not None}


def _queued(words: list[str]) -> QueuedJob | None:
    if len(words) < 6 or not words[0].strip().isdigit():
        return None
    job_id, state, name, reason, nodes, end = (w.strip() for w in words[:6])
    return QueuedJob(int(job_id), state, name, "" if reason == "None" else reason, nodes, ended=epoch(end))


def epoch(text: str) -> float:
    """Epoch seconds of Slurm's local time; 0 for one that is not known."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return 0.0


def accounting(job_ids: Iterable[int], seconds: float = 3.0) -> dict[int, QueuedJob]:
    """What sacct has of these jobs; empty when accounting is off, down, late or purged."""
    ids = ",".join(map(str, job_ids))
    if not ids:
        return {}
    fields = "JobIDRaw,State,JobName,Reason,NodeList,ExitCode,End"
    try:
        text = call(
            ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={ids}", f"--format={fields}"], seconds
        )
    except SlurmError:
        return {}
    found = {}
    for line in text.splitlines():
        words = line.split("|")
        if len(words) == 7 and words[0].isdigit():
            state = words[1].split(" ")[0]  # "CANCELLED by 1000"
            reason = "" if words[3] in ("None", "") else words[3]
            found[int(words[0])] = QueuedJob(
                int(words[0]), state, words[2], reason, words[4], words[5], epoch(words[6])
            )
    return found


def submit(script: str, seconds: float = 60.0) -> int:
    """Queue a script; the job's id.

    Raises:
        SlurmSilent, SlurmError: it was not queued.
    """
    answer = call(["sbatch", "--parsable", script], seconds)
    ids = re.findall(r"^\s*(\d+)(?:;\S+)?\s*$", answer, re.MULTILINE)
    if not ids:  # sites wrap sbatch, and their wrappers talk
        raise SlurmSilent(f"sbatch: {' '.join(answer.split())[:200] or 'no answer'}: names no job")
    return int(ids[-1])


def would_run(script: str, seconds: float = 20.0) -> None:
    """Raise a `SlurmError` unless Slurm would accept the script (sbatch --test-only)."""
    call(["sbatch", "--test-only", script], seconds)


def cancel(job_ids: Sequence[int]) -> None:
    """End jobs; those that have ended already do not matter."""
    if job_ids:
        call(["scancel", "--quiet", *map(str, job_ids)], 30.0)


def cancel_named(names: Collection[str], users: Iterable[str] = ()) -> list[int]:
    """End every job of these names, whatever their records say of them; the jobs' ids."""
    ids = sorted(
        (j.job_id for j in queue(users).values() if j.active and j.name in names), reverse=True
    )  # dependents first
    cancel(ids)
    return ids


def find(name: str, users: Iterable[str] = (), known: Collection[int] = ()) -> int | None:
    """The active job of this name that is not among the known ones, None without one."""
    ids = (j.job_id for j in queue(users).values() if j.active and j.name == name and j.job_id not in known)
    return max(ids, default=None)


def steps(job_id: int) -> list[str]:
    """``["12.0"]``: the steps of a job that srun started and that have not ended."""
    text = call(["squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i"], 10.0)
    return [word for word in text.split() if re.fullmatch(rf"{job_id}\.\d+", word)]


def end_steps(ids: Sequence[str]) -> None:
    """Kill steps, not their job."""
    call(["scancel", "--quiet", "--signal=KILL", *ids], 10.0)


def cluster_name() -> str:
    """``ClusterName`` of the cluster that answers here; empty when none does."""
    return _cluster_name(os.environ.get("SLURM_CONF", ""))


@functools.cache
def _cluster_name(configuration: str, seconds: float = 5.0) -> str:
    try:
        found = re.search(r"^ClusterName\s*=\s*(\S+)", call(["scontrol", "show", "config"], seconds), re.MULTILINE)
    except SlurmError:
        return ""
    return found[1] if found else ""


def requeue(job_id: int) -> None:
    """Put a running job back into the queue. Slurm ends what it runs."""
    call(["scontrol", "requeue", str(job_id)], 30.0)


def job_fields(job_id: int, seconds: float = 10.0) -> dict[str, str]:
    """``scontrol show job`` as field -> value; values with spaces are cut at the first."""
    text = call(["scontrol", "--oneliner", "show", "job", str(job_id)], seconds)
    return dict(re.findall(r"(\w+)=(\S*)", text))


@dataclass(frozen=True)
class Partition:
    """A partition as its smallest node has it; ``memory_mb`` and ``cpus`` are of a node."""

    name: str
    default: bool
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    time: str
    available: bool


def partitions(seconds: float = 5.0) -> dict[str, Partition]:
    """Every partition, from one call of sinfo.

    Raises:
        SlurmSilent, SlurmError: see `call`.
    """
    text = call(["sinfo", "--noheader", "--format=%P\t%D\t%c\t%m\t%G\t%l\t%a", "--exact"], seconds)
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        words = [w.strip() for w in line.split("\t")]
        if len(words) != 7:
            continue
        name = words[0].removesuffix("*")
        counts = [int(re.match(r"\d*", w)[0] or 0) for w in words[1:4]]  # type: ignore[index]
        gpus = sum(int(n) for n in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", words[4]))
        part = Partition(
            name, words[0].endswith("*"), counts[0], counts[1], counts[2], gpus, words[5], words[6] == "up"
        )
        found[name] = _smallest(found[name], part) if name in found else part
    return found


def _smallest(a: Partition, b: Partition) -> Partition:
    return Partition(
        a.name, a.default, a.nodes + b.nodes, min(a.cpus, b.cpus), min(a.memory_mb, b.memory_mb), max(a.gpus, b.gpus), a.time,
        a.available or b.available,
    )  # fmt: skip


def hosts(nodelist: str) -> list[str]:
    """``node[1-3]`` -> the three names."""
    return call(["scontrol", "show", "hostnames", nodelist], 10.0).split()


def described(job: QueuedJob) -> str:
    """Why an ended job ended, in words."""
    words: dict[str, Any] = {
        "CANCELLED": "cancelled", "TIMEOUT": "reached its time limit", "NODE_FAIL": "a node failed",
        "OUT_OF_MEMORY": "ran out of host memory", "PREEMPTED": "preempted", "BOOT_FAIL": "a node did not boot",
        "DEADLINE": "reached its deadline", "FAILED": "failed", "COMPLETED": "completed",
    }  # fmt: skip
    return words.get(job.state, job.state.lower())
