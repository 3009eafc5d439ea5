"""What state recorded runs are in: what the jobs wrote themselves, reconciled with what Slurm says.

A job's own last word (done, failed, cancelled) is the truth. Otherwise one squeue tells the rest, one sacct what squeue no longer
knows; both may be silent, and a job that neither knows and that left no word is lost. What only Slurm knew is written into the
record, so that it stays known when Slurm has forgotten it.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launchers import slurm_commands
from launchers.slurm_commands import QueuedJob, SlurmError
from mimo_jobs import pipeline
from mimo_jobs.records import SUCCEEDED, RunRecord, StepRecord, StepState

SETTLE_SECONDS = 35.0  # a file written on a compute node may be seen here this much later (NFS attribute cache: 3-30 s; nfs(5), acregmax)
FORGOTTEN_SECONDS = 10.0  # a job that neither squeue nor sacct has is given up this long after its last word
SUBMIT_SECONDS = 120.0  # an sbatch that takes longer is not coming back

REASONS = {
    "Dependency": "waits for the step before", "Priority": "waits for its turn (Priority)", "Resources": "waits for free nodes (Resources)",
    "BeginTime": "starts again in a moment (requeued)", "JobHeldUser": "held; scontrol release starts it",
    "JobHeldAdmin": "held by an administrator", "DependencyNeverSatisfied": "the step before did not succeed",
    "PartitionDown": "its partition is down", "ReqNodeNotAvail": "its nodes are not available", "QOSMaxGRESPerUser": "your limit of GPUs is reached",
}  # fmt: skip


@dataclass
class Seen:
    """A step as it is now; ``state`` is reconciled, ``slurm`` is Slurm's own word for an active job."""

    step: StepRecord
    state: StepState
    slurm: str = ""
    progress: Mapping[str, Any] | None = None

    def data(self) -> dict[str, Any]:
        """Plain JSON."""
        s = self.state
        return {
            "name": self.step.name, "job": self.step.job, "state": s.state, "job_id": s.job_id, "nodes": s.nodes, "elapsed": round(s.elapsed, 1),
            "gpu_hours": round(s.gpu_seconds / 3600, 4), "attempts": s.attempts, "requeues": s.requeues, "progress": self.progress,
            "reason": s.reason, "exit_code": s.exit_code, "record": str(self.step.directory),
        }  # fmt: skip


@dataclass
class SeenRun:
    """A run as it is now."""

    run: RunRecord
    steps: list[Seen]
    notes: list[str] = field(default_factory=list)
    alive: bool = False  # the command that runs its steps on this machine

    @property
    def state(self) -> str:
        """The state of the whole: the first that went wrong, else what is under way."""
        states = [s.state.state for s in self.steps]
        for state in ("failed", "cancelled", "running", "queued", "waiting"):
            if state in states and not (state == "waiting" and all(s in SUCCEEDED for s in states)):
                if state == "queued" and any(s in SUCCEEDED for s in states):
                    return "queued"
                return state
        return "done"

    @property
    def active(self) -> bool:
        return any(
            s.state.state in ("queued", "running") or (s.state.state == "waiting" and self.alive) for s in self.steps
        )

    def data(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "run_id": self.run.run_id, "recipe": self.run.about.get("recipe"), "executor": self.run.executor, "state": self.state,
            "record": str(self.run.root), "steps": [s.data() for s in self.steps], "notes": self.notes,
        }  # fmt: skip


def look(runs: Sequence[RunRecord]) -> list[SeenRun]:
    """The present state of runs: at most one squeue and one sacct for all of them."""
    seen = [SeenRun(run, [Seen(s, s.state()) for s in run.steps]) for run in runs]
    open_steps = [
        s
        for r in seen
        if not pipeline.is_local(r.run.executor)
        for s in r.steps
        if s.state.state in ("queued", "running")
    ]
    users = {str(r.run.about["uid"]) for r in seen if "uid" in r.run.about}
    cluster = _ask(open_steps, users) if open_steps else Cluster({}, {}, None)
    for one in seen:
        home = str(one.run.about.get("cluster") or "")
        if pipeline.is_local(one.run.executor):
            _reconcile_local(one)
        elif open_steps and home and (here := slurm_commands.cluster_name()) and here != home:
            one.notes.append(
                f"{one.run.run_id} is on cluster {home}, this is {here}; the states are what the jobs wrote themselves"
            )
        else:
            _reconcile(one, cluster)
        for step in one.steps:
            if step.state.state == "running":
                step.progress = step.step.progress()
    return seen


@dataclass
class Cluster:
    """What Slurm said: jobs by id and by name, and why it said nothing."""

    jobs: Mapping[int, QueuedJob]
    by_title: Mapping[str, Sequence[QueuedJob]]
    silent: str | None

    def job(self, state: StepState) -> QueuedJob | None:
        if state.job_id is not None:
            found_job = self.jobs.get(state.job_id)  # numbers are given out again, names are not
            return found_job if found_job and found_job.name in (state.title, "") else None
        found = [j for j in self.by_title.get(state.title, ()) if j.job_id not in state.known_jobs]
        return max(found, key=lambda j: (j.active, j.job_id), default=None)


def _ask(steps: Sequence[Seen], users: Collection[str]) -> Cluster:
    try:
        queue = slurm_commands.queue(users)
    except SlurmError as error:
        return Cluster({}, {}, str(error))
    missing = [s.state.job_id for s in steps if s.state.job_id is not None and s.state.job_id not in queue]
    by_title: dict[str, list[QueuedJob]] = {}
    for job in queue.values():
        by_title.setdefault(job.name, []).append(job)
    return Cluster(queue | slurm_commands.accounting(missing), by_title, None)


def _reconcile(seen: SeenRun, cluster: Cluster) -> None:
    if cluster.silent and any(s.state.state in ("queued", "running") for s in seen.steps):
        seen.notes.append(f"Slurm was not heard ({cluster.silent}); the states are what the jobs wrote themselves")
    for number, step in enumerate(seen.steps):
        if step.state.state in ("queued", "running") and not cluster.silent:
            job = cluster.job(step.state)
            if job is None or not job.active:
                step.state = step.step.state()  # it may have spoken since
            if step.state.state in ("queued", "running"):
                _apply(step, job, seen.steps[:number])
        elif step.state.state == "waiting":
            step.state.reason = _why_waiting(seen, number)


def _apply(step: Seen, job: QueuedJob | None, before: Sequence[Seen]) -> None:
    """What Slurm says of a step that has not said how it ended."""
    state = step.state
    if job is not None and job.active:
        state.job_id, step.slurm = job.job_id, job.state
        if job.waiting:
            state.state = "queued"
            state.reason = _waits(state, job)
        else:
            state.state = "running"
            state.nodes = state.nodes or job.nodes
            state.started = state.started or time.time()
        return
    if job is None:
        if state.job_id is None:
            if time.time() - state.last > SUBMIT_SECONDS:
                _conclude(step, "cancelled", "its submission was cut short; nemo-run resume queues it")
            return
        if time.time() - state.last < FORGOTTEN_SECONDS:
            return
        if state.state == "running":
            _conclude(
                step,
                "failed",
                f"job {state.job_id} ended without a word, and Slurm no longer knows it (is accounting off?)",
            )
        else:
            _conclude(
                step,
                "cancelled",
                _parents(before)
                or f"job {state.job_id} left the queue without having started, and Slurm no longer knows it",
            )
        return
    if job.state == "COMPLETED":
        # Its own word is on its way through the filesystem.
        if time.time() - max(state.last, job.ended) > SETTLE_SECONDS:
            _settle(step, "failed", f"job {job.job_id} completed in Slurm's eyes, but left no word in its record")
    elif job.state == "CANCELLED":
        never_ran = state.state == "queued" and not state.ran
        _settle(step, "cancelled", (_parents(before) if never_ran else "") or "cancelled")
    else:
        _settle(step, "failed", _without_a_word(step, job))


def _without_a_word(step: Seen, job: QueuedJob) -> str:
    """Why a job ended that could not say so itself."""
    if job.state == "FAILED" and not step.state.ran:
        job = slurm_commands.accounting([job.job_id]).get(job.job_id, job)  # squeue does not tell exit codes
        code = f" with exit code {job.exit_code.partition(':')[0]}" if job.exit_code not in ("", "0:0") else ""
        return f"ended{code} before its first word: look at executor.setup, modules and venv, and at {step.step.directory / 'slurm.log'}"
    code = f" (exit code {job.exit_code})" if job.exit_code not in ("", "0:0") else ""
    return f"{slurm_commands.described(job)}{code}; {step.step.directory / 'slurm.log'} has its last words"


def _conclude(step: Seen, state: str, reason: str) -> None:
    """An end that is only inferred, from what is not there: true for now, and not written down."""
    step.state = dataclasses.replace(step.state, state=state, reason=reason, exit_code=1)


def _settle(step: Seen, state: str, reason: str) -> None:
    """Take an end that only Slurm knows of, and write it down."""
    with contextlib.suppress(OSError):
        step.step.add(state, reason=reason, exit_code=1, seen_by="status")
        step.state = step.step.state()
        return
    _conclude(step, state, reason)


def _waits(state: StepState, job: QueuedJob) -> str:
    """Why a job waits: Slurm's word, and ours where it was requeued."""
    reason = REASONS.get(job.reason.strip("()"), job.reason.strip("()"))
    again = state.requeues and state.reason
    return f"{state.reason}; {reason}" if again and reason and reason not in state.reason else reason or state.reason


def _parents(before: Sequence[Seen]) -> str:
    wrong = next((s for s in before if s.state.state in ("failed", "cancelled")), None)
    return (
        f"did not start: {wrong.step.name} {'failed' if wrong.state.state == 'failed' else 'was cancelled'}"
        if wrong
        else ""
    )


def _why_waiting(seen: SeenRun, number: int) -> str:
    if parents := _parents(seen.steps[:number]):
        return parents
    about = seen.run.about
    if pipeline.process_alive(about):
        return "about to be queued"
    return "not queued: its submission was cut short; nemo-run resume queues it"


def _reconcile_local(seen: SeenRun) -> None:
    about = seen.run.about
    host, pid = str(about.get("host")), int(about.get("pid") or 0)
    here = host == os.uname().nodename
    seen.alive = pipeline.process_alive(about)
    if not here and any(s.state.state == "running" for s in seen.steps):
        seen.notes.append(f"{seen.run.run_id} runs on {host}; whether it still does is known there")
    for number, step in enumerate(seen.steps):
        if step.state.state == "running" and here and not seen.alive:
            step.state = step.step.state()
            if step.state.state == "running":
                _settle(step, "failed", f"the command that ran it (process {pid} on {host}) is gone")
        elif step.state.state == "waiting":
            step.state.reason = _parents(seen.steps[:number])


def wait(run: RunRecord, show: Callable[[SeenRun], None], seconds: float = 2.0) -> SeenRun:
    """Until no step of a run is queued or running any more; ``show`` is given every look."""
    while True:
        seen = look([run])[0]
        show(seen)
        if not seen.active:
            return seen
        time.sleep(seconds)
