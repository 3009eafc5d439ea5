"""A chain on this machine: each step is launched when the ones before it have succeeded, the first failure ends it."""

import os
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from launchers import hook, local
from launchers.base import make_record, outcome
from mimo_jobs import pipeline, records
from mimo_jobs.console import Steps, size
from mimo_jobs.errors import UserError
from mimo_jobs.pipeline import IN_PROCESS, Plan, Planned, Step
from mimo_jobs.records import SUCCEEDED, RunRecord, StepRecord

END_SECONDS = 30.0


def run_chain(plan: Plan, run: RunRecord, view: Steps) -> dict[str, dict[str, Any]]:
    """Run every step that is not done; returns each one's summary. ``on_finish`` of ``run.about`` is called for each that ended.

    Raises:
        UserError: the records cannot be written, or a step failed, with its exit code and its first rank's error; later
            steps did not start.
    """
    make_record(run.root)
    run.write()
    summaries = {}
    tell = partial(hook.call, run.about.get("on_finish") or (), run.run_id)
    for planned, recorded in zip(plan.steps, run.steps, strict=True):
        make_record(recorded.directory)
        name = planned.step.name
        if planned.skip:
            if recorded.state().state not in SUCCEEDED:
                recorded.add("skipped", reason=planned.why)
            view.skipped(name, planned.why)
            continue
        with view.step(name) as shown:
            if planned.why:
                shown.note(planned.why)
            recorded.add("started", host=os.uname().nodename, pid=os.getpid())
            try:
                if planned.preflight is None and planned is not plan.steps[0]:
                    check_again(planned.step)
                _check_replaced(planned)
                here = planned.step.job in IN_PROCESS
                summary = (
                    _run_here(planned.step, recorded, shown.watch) if here else _launch(planned, recorded, shown.watch)
                )
            except KeyboardInterrupt:
                recorded.add("cancelled", reason="interrupted", exit_code=130)
                tell(recorded)
                raise
            except UserError as error:
                recorded.add("failed", reason=str(error), exit_code=error.exit_code)
                tell(recorded)
                raise
            except Exception as error:  # a full disk, a defect: the record must say so
                recorded.add("failed", reason=f"{type(error).__name__}: {error}", exit_code=1)
                tell(recorded)
                raise
            recorded.add("done")
            tell(recorded)
            summaries[name] = summary
            shown.done(told(planned.step, summary))
    return summaries


def _check_replaced(planned: Planned) -> None:
    from mimo_jobs.conversion import identity

    place = identity.place_of(planned.step.job, planned.step.arguments)
    if (
        planned.replaces is not None
        and place is not None
        and place.exists()
        and identity.revision(planned.step.job, place) != planned.replaces
    ):
        raise UserError(f"{planned.step.name}: {identity.CHANGED.format(place)}")


def check_again(step: Step) -> None:
    """What could not be checked before the chain began, because the step's input was not there."""
    from mimo_jobs.conversion import identity

    if step.job in identity.TRAINING:
        from mimo_jobs.training.preflight import check_training

        check_training(step.arguments)
    elif "layout" in step.arguments:
        from mimo_jobs.conversion.preflight import preflight

        preflight(step.job, step.arguments)


def _launch(planned: Planned, recorded: StepRecord, watch: Any) -> dict[str, Any]:
    job = pipeline.job_of(planned, recorded)
    job.write()
    local.launch(job, watch)
    ended = outcome(job)
    if ended.error is not None:
        if "target" in job.arguments:  # rank 0 removes it itself, unless it was killed
            from mimo_jobs.conversion.publish import remove_staging

            remove_staging(Path(job.arguments["target"]), job.run_id)
        error = UserError(f"{recorded.name}: {ended.error}\n  the ranks' logs are in {job.record}")
        error.exit_code = ended.exit_code
        raise error
    return ended.summary


def _run_here(step: Step, recorded: StepRecord, watch: Any) -> dict[str, Any]:
    from mimo_jobs.conversion.verify import certify

    def progress(done: int, total: int) -> None:
        watch({"phase": "compare", "done": done, "total": total})

    given = step.arguments
    place = Path(given["certificate"]) if given.get("certificate") else None
    try:
        found = certify(given["left"], given["right"], place, progress, given["dtype"], given["mtp"])
    except UserError as error:
        raise type(error)(f"{step.name}: {error}") from None
    records.write_json(recorded.directory / "result.json", {"status": "ok", "summary": found})
    return found


def told(step: Step, summary: Mapping[str, Any]) -> str:
    """A step's summary in a few words."""
    if "max_abs_difference" in summary:
        each = ", ".join(f"{name} {value:g}" for name, value in summary["max_abs_difference"].items())
        return f"identical; max abs difference: {each}"
    where = step.arguments.get("target")
    if summary.get("loss") is not None:
        first = f"{summary['first_loss']:.4g} → " if summary.get("first_loss") is not None else ""
        return f"{summary['steps']:,} steps, loss {first}{summary['loss']:.4g} → {where}"
    parts = [f"{summary[n]:,} {n}" for n in ("tensors", "samples") if n in summary]
    if isinstance(summary.get("bytes"), int):
        parts.append(size(summary["bytes"]))
    return ", ".join(parts) + (f" → {where}" if where else "")


def cancel(run: RunRecord) -> str:
    """Interrupt the command that runs a chain on this machine; what it said.

    Raises:
        UserError: it runs on another machine, or does not end.
    """
    active = [s for s in run.steps if s.state().state == "running"]
    host, pid = str(run.about.get("host")), int(run.about.get("pid") or 0)
    if not active or not pid:
        return "nothing of it runs"
    if host != os.uname().nodename:
        raise UserError(f"{run.run_id} runs on {host}; run `nemo-run cancel {run.run_id}` there")
    if not pipeline.process_alive(run.about):
        active[-1].add("cancelled", reason=f"process {pid}, which ran it, is gone", exit_code=1)
        return f"process {pid}, which ran it, was gone already"
    os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        if not pipeline.process_alive(run.about):
            return "interrupted"
        time.sleep(0.1)
    raise UserError(f"process {pid} did not end within {END_SECONDS:g} s of its interruption; kill -9 {pid} ends it")
