"""A step on its batch host: ``python -m launchers.slurm_step RECORD`` starts the ranks, and writes down what happens to them.

It is what ``sbatch.sh`` becomes. It runs the ``srun`` of STEP.json, and then:

* ranks that succeed: ``done``;
* a rank that died (killed, out of memory, lost node): the ranks are started again, ``retries`` times;
* an error that would come again (bad input, a full disk): ``failed``, at once;
* the time limit is near or the job is preempted (`--signal`): the ranks are asked to stop, and the job goes back to the queue;
* cancelled: ``cancelled``.

Every outcome is a line in ``events.jsonl``, so that what happened is known where Slurm's own accounting is off.
"""

import contextlib
import enum
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launchers import hook, slurm_commands
from launchers.base import Job, Outcome, clear, log_tail, outcome, result
from launchers.profiles import seconds
from launchers.slurm import STEP
from launchers.slurm_commands import SlurmError
from mimo_jobs.conversion import identity
from mimo_jobs.conversion.journal import finished_tasks
from mimo_jobs.conversion.publish import remove_staging, staging_of
from mimo_jobs.errors import UserError
from mimo_jobs.parallel.attempt import ATTEMPT
from mimo_jobs.records import RUN, StepRecord, load
from mimo_jobs.training import saved

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
GOING_ON = 75  # EX_TEMPFAIL: this batch job ends, the step does not
POLL_SECONDS = 0.5
SETTLE_SECONDS = 2.0  # after a rank died, the time that Slurm has to say that it is the cause
REQUEUE_ATTEMPTS = 5
MOST_IDLE_REQUEUES = 3  # time limits in a row that a step may reach without having come further
HANGING_SECONDS = 30  # after a result, the time that srun has to notice that the ranks are gone
ENDING_SECONDS = 15  # and Slurm to end a step that is killed
STEP_CANCELLED = re.compile(r"\*\*\* STEP \S+ ON \S+ CANCELLED")
NODE_FAILED = re.compile(r"Node failure on|DUE TO NODE FAILURE|NODE FAIL", re.IGNORECASE)
KILLED = re.compile(
    r"srun: error: (?P<host>\S+): tasks? (?P<rank>[\d,-]+): (?P<how>Killed|Out Of Memory|Segmentation fault|Aborted)"
)


class Verdict(enum.Enum):
    """Why Slurm ends a job; the value is what people read."""

    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    LIMIT = "its time limit was near"
    REQUEUED = "stopped and requeued by Slurm"
    NODE = "a node failed"
    TOLD = "told to stop"


class Step:
    """One run of a step's batch job."""

    def __init__(self, directory: Path) -> None:
        self.plan = json.loads((directory / STEP).read_text())
        job = json.loads((directory / "JOB.json").read_text())
        self.job = Job(job["job"], job["arguments"], job["world_size"], directory, job["run_id"])
        self.record = StepRecord(self.plan["step"], job["job"], job["arguments"], directory, job["run_id"])
        self.job_id = int(os.environ.get("SLURM_JOB_ID") or 0)
        self.signals: list[int] = []
        self.ranks: subprocess.Popen[bytes] | None = None
        self.attempt = ""
        self.log_start = 0
        self.ends, self.stop_at = math.inf, 0.0  # epoch seconds; stop_at: when Slurm is asked again when the job ends

    # ------------------------------------------------------------------------------------------------------ running

    def run(self) -> int:
        """Run the step to an end, or back into the queue; returns the batch job's exit code."""
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)
        current = self.record.state().job_id
        if self.job_id and current is not None and current != self.job_id:
            print(
                f"{self.plan['step']}: job {current} has taken its place; nemo-run resume queues steps", file=sys.stderr
            )
            return 1
        nodes, restarts = os.environ.get("SLURM_JOB_NODELIST", ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.record.add(
            "started", job_id=self.job_id, nodes=nodes, restarts=restarts, gpus=self.plan["allocated_gpus"], host=os.uname().nodename,
        )  # fmt: skip
        if identity.is_complete(self.job.name, self.job.arguments):
            return self._end("done", 0, reason="its output was there already, made from the same inputs and settings")
        place = identity.place_of(self.job.name, self.job.arguments)
        replaces = self.plan.get("replaces")
        if replaces is not None and place and place.exists() and identity.revision(self.job.name, place) != replaces:
            return self._end("failed", 1, reason=identity.CHANGED.format(place))
        if self._node_failures() > self.plan["retries"]:
            return self._end(
                "failed", 1, reason=f"its nodes failed {self._node_failures()} times (retries={self.plan['retries']})"
            )
        for attempt in range(self.plan["retries"] + 1):
            if attempt:
                self.record.add("retry", job_id=self.job_id, reason=self._last_words, attempt=attempt)
            ended = self._attempt(attempt, restarts)
            if ended.error is None:
                return self._end("done", 0)
            self._end_ranks()  # a srun that died leaves its ranks behind
            if identity.is_complete(self.job.name, self.job.arguments):  # it was published before that happened
                return self._end("done", 0, reason=f"complete, although {ended.error.partition(chr(10))[0]}")
            if not ended.transient:
                break
            if self.signals:
                return self._after_signal()
            if (stopped := self._stopped_by_slurm()) is not None:
                return stopped
            self._last_words = ended.error
        return self._end("failed", 1, reason=ended.error)

    def _attempt(self, attempt: int, restarts: int) -> Outcome:
        """Start every rank, wait for all of them, and read what they left."""
        clear(self.job.record)
        self.attempt = f"{self.job_id}-{restarts}-{attempt}"
        log = self.job.record / "slurm.log"
        self.log_start = log.stat().st_size if log.exists() else 0
        ours = {
            **self.plan["environment"],
            ATTEMPT: self.attempt,
            "LOCAL_WORLD_SIZE": str(self.plan["ranks_on_a_node"]),
        }
        environment = _for_srun(ours)
        if self.plan["node_of_rank"] is not None:
            environment["SLURM_HOSTFILE"] = str(self._write_hosts())
        self._watch_limit()
        if not self.signals:
            # Its own process group: a signal to the batch job's group reaches the ranks once, through srun.
            self.ranks = subprocess.Popen(
                self.plan["srun"], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
            if self.signals:  # it arrived meanwhile
                self._forward(self.signals[-1])
            code = self._waited(self.ranks)
            self.ranks = None
        else:
            code = 1
        ended = outcome(self.job, self.attempt)
        if ended.error is None and code:
            return Outcome({}, f"srun ended with exit code {code} after the job had succeeded", 1, transient=True)
        return ended if ended.error is None else self._explained(ended)

    def _waited(self, srun: subprocess.Popen[bytes]) -> int:
        """The exit code of srun. It is ended when the job has its result and srun does not notice (a dead slurmstepd)."""
        finished: float | None = None
        while True:
            try:
                return srun.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                self._watch_limit()
                if finished is None and result(self.job.record, self.attempt) is not None:
                    finished = time.monotonic()
                if finished is not None and time.monotonic() - finished > HANGING_SECONDS:
                    self._end_ranks()
                    srun.kill()

    def _end_ranks(self) -> None:
        """End every step of this job that srun started, and wait until Slurm says that it has."""
        deadline = time.monotonic() + ENDING_SECONDS
        with contextlib.suppress(SlurmError):
            while (left := slurm_commands.steps(self.job_id)) and time.monotonic() < deadline:
                slurm_commands.end_steps(left)
                time.sleep(POLL_SECONDS)

    def _explained(self, ended: Outcome) -> Outcome:
        """The first error: what the first failing rank said, else how Slurm says that it died."""
        found = result(self.job.record, self.attempt)
        with contextlib.suppress(OSError):
            text = self._log()
            died, cancelled = KILLED.search(text), STEP_CANCELLED.search(text)
            if cancelled and not self.signals and (died is None or cancelled.start() < died.start()):
                died = None
            said = found.get("error") if found else None
            if died and (said is None or said.get("transient")):
                rank = died["rank"]
                how = {"Killed": "was killed (SIGKILL; out of memory?)", "Out Of Memory": "ran out of host memory"}.get(
                    died["how"], f"died: {died['how']}"
                )
                tail = log_tail(self.job.record, rank=int(re.split(r"[,-]", rank)[0]))
                return Outcome(
                    {}, f"rank {rank} on {died['host']} {how}" + (f"\n{tail}" if tail else ""), 1, transient=True
                )
            if said is None:  # no rank came as far as to say anything
                lines = "\n".join(f"  {line}" for line in text.splitlines()[-6:] if line.strip())
                return Outcome({}, f"no rank left a result; srun's last words:\n{lines}", 1, transient=True)
        return ended

    def _log(self) -> str:
        """What this attempt's srun said."""
        try:
            return (self.job.record / "slurm.log").read_bytes()[self.log_start :].decode(errors="replace")
        except OSError:
            return ""

    def _write_hosts(self) -> Path:
        """The host of every rank, for srun's arbitrary distribution."""
        hosts = slurm_commands.hosts(os.environ["SLURM_JOB_NODELIST"])
        path = self.job.record / ".hosts"
        path.write_text("".join(f"{hosts[n]}\n" for n in self.plan["node_of_rank"]))
        return path

    # ------------------------------------------------------------------------------------------------------ signals

    def _on_signal(self, signum: int, frame: object) -> None:
        self.signals.append(signum)
        self._forward(signum)

    def _forward(self, signum: int) -> None:
        """Ask the ranks to stop: srun passes it on to every task."""
        if self.ranks is not None and self.ranks.poll() is None and len(self.signals) == 1:
            with contextlib.suppress(ProcessLookupError):
                self.ranks.send_signal(signal.SIGUSR1)

    def _watch_limit(self) -> None:
        """Act as if signalled when the time for it has come: Slurm sends the signal once, and it may have come before `run` heard it.

        The end that Slurm tells is that of the time limit, also of one that was changed meanwhile, or of a preempted job's grace.
        """
        if self.signals or time.time() < self.stop_at:
            return
        fields = self._slurm_fields()
        limit, lead = fields.get("TimeLimit", ""), self.plan.get("signal_seconds", 0)
        if limit[:1].isdigit() and seconds(limit) <= lead:
            lead = 0  # there would be no time to work at all: such a job may run up to its limit
        self.ends = slurm_commands.epoch(fields.get("EndTime", "")) or self.ends
        self.stop_at = self.ends - lead
        if time.time() >= self.stop_at:
            self._on_signal(signal.SIGUSR1, None)

    def _after_signal(self) -> int:
        """The ranks have stopped because this job was told to: back to the queue, unless somebody cancelled it."""
        verdict = self._verdict() or (Verdict.LIMIT if self.signals[0] == signal.SIGUSR1 else Verdict.TOLD)
        return self._obey(verdict)

    def _stopped_by_slurm(self) -> int | None:
        """Whether the ranks ended because Slurm ends the whole job: it signals the ranks first, and this process later or never."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            verdict = self._verdict()
            if verdict is not None or self.signals:
                return self._obey(verdict or Verdict.TOLD)
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS)

    def _verdict(self) -> "Verdict | None":
        """Why Slurm ends this job, None when it does not. A job that ends is COMPLETING, whatever the cause: the rest has to tell."""
        fields = self._slurm_fields()
        state = fields.get("JobState", "")
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if state in ("PENDING", "REQUEUED") or int(fields.get("Restarts") or 0) > restarts:
            return Verdict.NODE if NODE_FAILED.search(self._log()) else Verdict.REQUEUED
        if fields.get("PreemptTime", "None") not in ("None", ""):
            return Verdict.PREEMPTED
        if state not in ("CANCELLED", "COMPLETING", "TIMEOUT"):
            return None
        limit, ran = fields.get("TimeLimit", ""), fields.get("RunTime", "")
        timed_out = fields.get("Reason") == "TimeLimit" or state == "TIMEOUT"
        if limit[:1].isdigit() and ran[:1].isdigit():
            timed_out = timed_out or seconds(ran) >= seconds(limit)
        return Verdict.LIMIT if timed_out else Verdict.CANCELLED

    def _obey(self, verdict: "Verdict") -> int:
        """End the batch job as Slurm's verdict on it has it."""
        if verdict is Verdict.CANCELLED:
            return self._end("cancelled", 130, reason=verdict.value)
        if verdict in (Verdict.LIMIT, Verdict.TOLD) and self._limits_without_progress() >= MOST_IDLE_REQUEUES:
            limit = f"time={self.plan['time']}" if self.plan["time"] else "its time limit"
            return self._end(
                "failed", 1, reason=f"it reached {limit} {MOST_IDLE_REQUEUES} times without coming further; set executor.time to more"
            )  # fmt: skip
        self.record.add("requeued", reason=verdict.value, job_id=self.job_id, progress=self._progress())
        if verdict in (Verdict.REQUEUED, Verdict.NODE):
            return GOING_ON
        for attempt in range(REQUEUE_ATTEMPTS):
            try:
                slurm_commands.requeue(self.job_id)
                break
            except SlurmError as error:
                if attempt + 1 == REQUEUE_ATTEMPTS:
                    return self._end("failed", 1, reason=f"{verdict.value}, and it could not be requeued: {error}")
                time.sleep(2.0 * (attempt + 1))
        time.sleep(30)  # Slurm ends this process; ending by itself first would make the job a failed one
        return GOING_ON

    def _slurm_fields(self) -> dict[str, str]:
        with contextlib.suppress(SlurmError):
            return slurm_commands.job_fields(self.job_id)
        return {}

    def _progress(self) -> int:
        """How far the step has come for good: tasks that a conversion need not do again, optimizer steps that are saved."""
        if "target" not in self.job.arguments:
            return 0
        if self.job.name in identity.TRAINING:
            directory = (self.job.arguments.get("saving") or {}).get("directory")
            return saved.progress(saved.steps_directory(Path(self.job.arguments["target"]), directory))
        return finished_tasks(staging_of(Path(self.job.arguments["target"]), self.job.run_id))

    def _limits_without_progress(self) -> int:
        """How many times in a row, this one included, the step was requeued without having come further."""
        seen = [self._progress()]
        for event in reversed(self.record.events()):
            if event["event"] == "submitted":
                break
            if event["event"] == "requeued" and event.get("reason") in (Verdict.LIMIT.value, Verdict.TOLD.value):
                seen.append(int(event.get("progress") or 0))
        return next((i for i, p in enumerate(seen) if p != seen[0]), len(seen))

    def _node_failures(self) -> int:
        """Starts of this job that a lost node ended: its own host, so that nothing more was said, or another, and Slurm requeued it."""
        count, open_start = 0, False
        for event in self.record.events()[:-1]:
            kind = event["event"]
            if kind == "submitted":
                count, open_start = 0, False
            elif kind == "started":
                count += open_start
                open_start = True
            elif kind in ("requeued", "done", "failed", "cancelled"):
                count += kind == "requeued" and event.get("reason") == Verdict.NODE.value
                open_start = False
        return count + open_start

    # ------------------------------------------------------------------------------------------------------ the end

    _last_words: str = ""

    def _end(self, event: str, code: int, reason: str | None = None) -> int:
        self._clear_staging()
        now = self.record.state()
        fields: dict[str, Any] = {
            "exit_code": code, "job_id": self.job_id, "seconds": round(now.elapsed, 1),
            "gpu_hours": round((now.gpu_seconds + (now.elapsed - now.seconds) * now.gpus) / 3600, 4),
        }  # fmt: skip
        if reason:
            fields["reason"] = reason
        self.record.add(event, **fields)
        ended = [self.record]
        if event != "done":
            print(f"{self.plan['step']}: {event}: {reason}", file=sys.stderr, flush=True)
            ended += self._end_children(event)
        for step in ended:  # the hook last: it may take its time
            hook.call(self.plan["on_finish"], self.plan["run"], step)
        return code

    def _clear_staging(self) -> None:
        """What the step was writing goes; a killed rank 0 could not remove it."""
        if "target" in self.job.arguments:
            remove_staging(Path(self.job.arguments["target"]), self.job.run_id)

    def _end_children(self, event: str) -> list[StepRecord]:
        """Write down that the steps behind this job will not start: Slurm cancels them without a word in their records."""
        directory = self.job.record
        try:
            run = load(directory if (directory / RUN).exists() else directory.parent)
        except UserError:
            return []
        names, ended, parents = [s.name for s in run.steps], [], {self.job_id}
        for child in run.steps[names.index(self.plan["step"]) + 1 :]:
            state = child.state()
            if state.state == "queued" and state.after in parents and state.job_id is not None:
                why = f"did not start: {self.plan['step']} {'failed' if event == 'failed' else 'was cancelled'}"
                child.add("cancelled", exit_code=1, reason=why)
                parents.add(state.job_id)
                ended.append(child)
        return ended


def _for_srun(more: dict[str, str]) -> dict[str, str]:
    """The batch job's environment without what another launcher left, and without what would override srun's own options."""
    unwanted = (
        "SLURM_NTASKS_PER_NODE",
        "SLURM_TASKS_PER_NODE",
        "SLURM_NTASKS",
        "SLURM_NPROCS",
        "SLURM_DISTRIBUTION",
        "SLURM_EXPORT_ENV",
    )
    kept = {k: v for k, v in os.environ.items() if k not in unwanted and not slurm_commands.LAUNCHED.fullmatch(k)}
    return kept | more


def main(argv: list[str] | None = None) -> int:
    """Run the step of a record; returns the batch job's exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return Step(Path(arguments[0])).run()
    except (UserError, OSError, ValueError, KeyError, IndexError) as error:
        print(f"slurm_step: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
