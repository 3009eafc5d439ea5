"""Steps in order on one launcher: the first failure ends the chain with its exit code. JSON records on disk say what ran.

A step is launched when the ones before it have succeeded, so the local chain is a loop; on a cluster, where steps are
queued together, it will be dependencies (``Step.needs`` is simply the step before).
"""

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from launchers.base import Job, make_record, outcome
from mimo_jobs import jobs, overrides, paths
from mimo_jobs.console import Steps, size
from mimo_jobs.errors import JobFailed, UserError
from mimo_jobs.layout import ParallelLayout, ResolvedLayout

SCHEMA = 1
IN_PROCESS = ("verify",)  # needs neither torch nor ranks: starting them would take longer than the work


@dataclass(frozen=True)
class Step:
    """One job of a chain: ``arguments`` as its function takes them, the layout still unresolved."""

    name: str
    job: str
    arguments: Mapping[str, Any]

    @property
    def layout(self) -> ResolvedLayout | None:
        """The resolved layout; None for jobs of one rank.

        Raises:
            UsageError: the layout does not resolve.
        """
        given = self.arguments.get("layout")
        return given.resolve() if isinstance(given, ParallelLayout) else None

    @property
    def world_size(self) -> int:
        layout = self.layout
        return layout.world_size if layout else 1

    def plain(self) -> dict[str, Any]:
        """The arguments as JSON: dataclasses become objects."""
        return {n: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for n, v in self.arguments.items()}  # type: ignore[arg-type]


@dataclass
class Run:
    """A chain under way, with its records in ``root``: one directory a step, or ``root`` itself for a single step."""

    name: str
    steps: list[Step]
    launcher: ModuleType
    run_id: str
    root: Path
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def job(self, step: Step) -> Job:
        """The launcher's view of a step."""
        number = self.steps.index(step) + 1
        record = self.root if len(self.steps) == 1 else self.root / f"{number}-{step.name}"
        run_id = self.run_id if len(self.steps) == 1 else f"{self.run_id}-{number}"
        return Job(step.job, step.plain(), step.world_size, record, run_id)


def steps_of(recipe: Any, name: str) -> list[Step]:
    """The steps of what a recipe returned: a ``fdl.Partial`` is a chain of one."""
    parts = recipe if isinstance(recipe, dict) else {name: recipe}
    found = []
    for step, partial in parts.items():
        job = partial.__fn_or_cls__.__name__
        assert jobs.JOBS.get(job) is partial.__fn_or_cls__, f"recipe {name}: {job} is not in jobs.JOBS"
        found.append(Step(step, job, overrides.arguments(partial)))
    return found


def make_run(name: str, steps: list[Step], launcher: ModuleType) -> Run:
    """A run with a fresh id; nothing is written yet."""
    run_id = paths.new_id(name)
    return Run(name, steps, launcher, run_id, paths.home() / "runs" / run_id)


def check_targets(steps: list[Step]) -> None:
    """Raise a `UserError` when any step of a chain would find its target there already."""
    from mimo_jobs.conversion.publish import check_target

    for step in steps:
        if "target" in step.arguments:
            check_target(Path(step.arguments["target"]), step.arguments["overwrite"])


def preflight(step: Step) -> Any:
    """Everything that can be known before the step's job starts, or None for jobs that have no plan.

    Raises:
        UserError: the job would fail; says why.
    """
    if "layout" not in step.arguments:
        return None
    from mimo_jobs.conversion.preflight import preflight as check

    return check(step.job, step.arguments)


def run_chain(run: Run, view: Steps, plans: Mapping[str, Any]) -> None:
    """Run every step; fills ``run.summaries``. ``plans`` holds the preflights that were made already, by step name.

    Raises:
        UserError: the records cannot be written, or a step failed, with its exit code and its first rank's error; later steps did not start.
    """
    make_record(run.root)
    for step in run.steps:
        with view.step(step.name) as shown:
            try:
                _record(run, step, "running")
                if step.name not in plans:
                    preflight(step)
                summary = _run_here(step, shown.watch) if step.job in IN_PROCESS else _launch(run, step, shown.watch)
            except KeyboardInterrupt:
                _record(run, step, "interrupted")
                raise
            except UserError:
                _record(run, step, "failed")
                raise
            run.summaries[step.name] = summary
            _record(run, step, "done")
            shown.done(told(step, summary))


def _launch(run: Run, step: Step, watch: Any) -> dict[str, Any]:
    job = run.job(step)
    job.write()
    run.launcher.launch(job, watch)
    ended = outcome(job)
    if ended.error is not None:
        _clear_staging(step, job.run_id)
        error = UserError(f"{step.name}: {ended.error}\n  the ranks' logs are in {job.record}")
        error.exit_code = ended.exit_code
        raise error
    return ended.summary


def _clear_staging(step: Step, run_id: str) -> None:
    """Remove what a failed step was writing; its rank 0 does that itself, unless it was killed."""
    if "target" not in step.arguments:
        return
    from mimo_jobs.conversion.publish import staging_of

    shutil.rmtree(staging_of(Path(step.arguments["target"]), run_id), ignore_errors=True)


def _run_here(step: Step, watch: Any) -> dict[str, Any]:
    from mimo_jobs.conversion.verify import verify_hf

    def progress(done: int, total: int) -> None:
        watch({"phase": "compare", "done": done, "total": total})

    left, right = step.arguments["left"], step.arguments["right"]
    certificate = verify_hf(left, right, progress=progress)
    if not certificate["equal"]:
        names = [*certificate["different"], *certificate["only_left"], *certificate["only_right"]]
        raise JobFailed(
            f"{step.name}: {len(names)} tensors differ, the first is {names[0]}\n"
            f"  nemo-run verify {shlex.quote(left)} {shlex.quote(right)} shows them"
        )
    return certificate


def told(step: Step, summary: Mapping[str, Any]) -> str:
    """A step's summary in a few words."""
    if "max_abs_difference" in summary:
        each = ", ".join(f"{name} {value:g}" for name, value in summary["max_abs_difference"].items())
        return f"identical; max abs difference: {each}"
    parts = [f"{summary['tensors']:,} tensors"] if "tensors" in summary else []
    if isinstance(summary.get("bytes"), int):
        parts.append(size(summary["bytes"]))
    where = step.arguments.get("target")
    return ", ".join(parts) + (f" → {where}" if where else "")


def _record(run: Run, step: Step, state: str) -> None:
    """RUN.json: what the chain is and how far it got; replaced whole at every change."""
    reached = run.steps.index(step)
    states = ["done"] * reached + [state] + ["waiting"] * (len(run.steps) - reached - 1)
    listed = [{"name": s.name, "job": s.job, "state": t} for s, t in zip(run.steps, states, strict=True)]
    text = json.dumps({"schema": SCHEMA, "recipe": run.name, "run_id": run.run_id, "steps": listed}, indent=2)
    partial = run.root / ".RUN.json"
    partial.write_text(text + "\n")
    os.replace(partial, run.root / "RUN.json")
