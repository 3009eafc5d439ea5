"""A small job that looks at a cluster from inside: submitted, watched and removed here; what runs there is `launchers.probe`.

It is started just as a step is, by `launchers.slurm`'s script and ``srun``, so that what it meets a step would meet.
"""

import contextlib
import dataclasses
import json
import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import probe, profiles, slurm, slurm_commands
from launchers.base import Job
from launchers.profiles import Profile
from launchers.slurm import Request
from launchers.slurm_commands import Partition, QueuedJob, SlurmError
from mimo_jobs.placement import place_ranks
from mimo_jobs.records import read_json

LIMIT_SECONDS = 120
LIMIT = "00:02:00"
MEMORY = "4G"  # an interpreter needs 100 MB; unpacking a container image is the rest
RUN_SECONDS = LIMIT_SECONDS + 30.0
ARRIVAL_SECONDS = 10.0  # a network filesystem may remember for some seconds that a file is not there
ARRIVAL_SECONDS_OF_THE_REST = 2.0  # when the log is here already
END_SECONDS = 3.0
POLL_SECONDS, ASK_SECONDS = 0.1, 0.5
LOG_LINES = 6
COMMANDS = ("srun", "scontrol", "squeue")  # what a step needs on its batch host


@dataclass(frozen=True)
class Probed:
    """What came of a probe job.

    Attributes:
        job: as Slurm told of it last.
        waited: seconds in the queue, up to now if it still waits.
        batch, rank: what it saw on the batch host and where a rank runs; None when that did not arrive.
        nonce: what it should have read.
        submitted, seen: epoch seconds of this host, around the ``time`` of the rank's clock.
        log: the last lines that the job printed; None when not even its log came here.
    """

    job: QueuedJob
    waited: float
    batch: dict[str, Any] | None
    rank: dict[str, Any] | None
    nonce: str
    submitted: float
    seen: float
    log: list[str] | None


def request(title: str, profile: Profile, partition: Partition | None) -> tuple[Profile, Request]:
    """A small job through a profile: one task on one node, one GPU (all with ``exclusive``), two minutes; and what it asks."""
    changed: dict[str, Any] = {"signal": "USR1@1"}
    if profile.time is None or not 0 < profiles.seconds(profile.time) < LIMIT_SECONDS:
        changed["time"] = LIMIT
    if profile.mem is not None:
        changed["mem"] = MEMORY
    reduced = dataclasses.replace(profile, **changed)
    placed = place_ranks(1, profile.gpus_per_node)
    return reduced, slurm.request(title, placed, reduced, uses_gpus=True, partition=partition)


def run(profile: Profile, asked: Request, directory: Path, ship: Callable[[Path], Path], wait_seconds: float) -> Probed:
    """Submit the probe, wait for what it sees, and end it.

    Args:
        profile, asked: of `request`.
        directory: an empty one for it, in the records' home; the caller removes it.
        ship: copies this code into a directory, and gives the PYTHONPATH.
        wait_seconds: how long the job may wait in the queue.

    Raises:
        UserError: it was not queued.
    """
    code = ship(directory) if profile.code == "snapshot" else None
    job = Job("probe", {}, 1, directory, directory.name)
    nonce = secrets.token_hex(8)
    hook = shlex.split(profile.on_finish or "")[:1]
    plan = {
        "srun": slurm.rank_command(job, asked, profile, ["launchers.probe", str(directory / probe.RANK)]),
        "environment": slurm.rank_environment(job, profile, code),
        "commands": [*COMMANDS, *hook],
    }
    (directory / probe.NONCE).write_text(nonce)
    (directory / probe.PLAN).write_text(json.dumps(plan))
    script = directory / slurm.SCRIPT
    script.write_text(slurm.script(asked, profile, directory, code, module="launchers.probe"))
    submitted = time.time()
    job_id = slurm_commands.submit(str(script))
    ended = False
    try:
        job, waited, rank = _watched(job_id, directory, wait_seconds)
        seen = time.time()
        ended = rank is not None and _ends(job_id)
        return Probed(job, waited, read_json(directory / probe.BATCH), rank, nonce, submitted, seen, _log(directory))
    finally:
        if not ended:
            with contextlib.suppress(SlurmError):
                slurm_commands.cancel([job_id])
                _ends(job_id)


def _watched(job_id: int, directory: Path, wait_seconds: float) -> tuple[QueuedJob, float, dict[str, Any] | None]:
    """The job, its seconds in the queue and what its rank saw, when there is something to say."""
    job, waited = QueuedJob(job_id, "PENDING"), 0.0
    start = asked_at = time.monotonic()
    ended_at: float | None = None
    while True:
        rank, now = read_json(directory / probe.RANK), time.monotonic()
        if rank is not None or now - asked_at >= ASK_SECONDS:
            asked_at = now
            with contextlib.suppress(SlurmError):  # a controller that is busy once
                job = _told(job, forgotten=now - start > 5.0)
        if job.waiting:
            waited = now - start
        elif not job.active and ended_at is None:
            ended_at = now
        if rank is not None or (job.waiting and waited > wait_seconds) or now - start > waited + RUN_SECONDS:
            return job, waited, rank
        patience = ARRIVAL_SECONDS_OF_THE_REST if _log(directory) is not None else ARRIVAL_SECONDS
        if ended_at is not None and now - ended_at > patience:
            return job, waited, None
        time.sleep(POLL_SECONDS)


def _told(job: QueuedJob, forgotten: bool) -> QueuedJob:
    """What Slurm says of the job now. ``forgotten``: one that squeue does not have has ended."""
    found = slurm_commands.queue().get(job.job_id)
    if found is not None or not forgotten:
        return found or job
    known = slurm_commands.accounting([job.job_id]).get(job.job_id)
    return known if known and not known.active else QueuedJob(job.job_id, "ENDED", nodes=job.nodes)


def _ends(job_id: int) -> bool:
    """Whether the job ends within seconds: its log is then whole, and nothing writes into its directory."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(SlurmError):
            job = slurm_commands.queue().get(job_id)
            if job is None or not job.active:
                return True
        time.sleep(POLL_SECONDS)
    return False


def _log(directory: Path) -> list[str] | None:
    try:
        text = (directory / slurm.LOG).read_text(errors="replace")
    except OSError:
        return None
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LOG_LINES:]
