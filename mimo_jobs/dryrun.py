"""What a dry run shows: every step with its fields, ranks, plan, and the exact command or script. Nothing is written or started."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from launchers import local, slurm
from launchers.base import RankGroup
from mimo_jobs import console, overrides, pipeline
from mimo_jobs.conversion.identity import TRAINING
from mimo_jobs.pipeline import IN_PROCESS, Plan, Planned
from mimo_jobs.records import RunRecord, StepRecord
from mimo_jobs.submission import Submission

HIDDEN = ("layout", "allowed")  # of a preflight: shown as the rank map, and no data


def show(plan: Plan, run: RunRecord, values: Mapping[str, Any], asked: Submission | None, as_json: bool) -> None:
    """Print it, for people or as JSON."""
    if as_json:
        print(json.dumps(_data(plan, run, asked), indent=2, default=str))
        return
    out = console.make()
    for planned, recorded in zip(plan.steps, run.steps, strict=True):
        _show_step(out, plan, planned, recorded, run, values, asked)
    for warning in plan.warnings:
        out.print(f"warning: {warning} (--force submits it all the same)", style="yellow", soft_wrap=True)
    for note in plan.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(
        f"dry run: nothing was started or written; every run gets its own directory in {run.root.parent}",
        soft_wrap=True,
    )


def _show_step(
    out: Any,
    plan: Plan,
    planned: Planned,
    recorded: StepRecord,
    run: RunRecord,
    values: Mapping[str, Any],
    asked: Submission | None,
) -> None:
    step, chained = planned.step, len(plan.steps) > 1
    ranks = f"{step.world_size} rank{'s' * (step.world_size > 1)}"
    out.print(f"{f'{step.name}: ' if chained else ''}{step.job} on {run.executor}, {ranks}", style="bold")
    if planned.skip:
        out.print(f"  skipped: {planned.why}\n", soft_wrap=True)
        return
    if planned.why:
        out.print(f"  runs again: {planned.why}", soft_wrap=True)
    out.print(console.recipe_table(overrides.flat(step.arguments), {} if chained else values, step.layout))
    if step.layout:
        out.print("ranks", style="bold")
        out.print(console.rank_map(step.layout, asked.requests[step.name].allocated if asked else None))
    if planned.preflight:
        out.print("plan", style="bold")
        table = console.training_table if planned.step.job in TRAINING else console.plan_table
        out.print(table(planned.preflight))
    if asked:
        out.print(slurm.SCRIPT, style="bold")
        for line in _script(planned, recorded, asked).splitlines():
            out.print(f"  {line}", soft_wrap=True)
    out.print("command", style="bold")
    groups = _commands(planned, recorded, asked)
    for text in console.command_lines(groups) if groups else ["  in this process, no ranks"]:
        out.print(text, soft_wrap=True)
    out.print()


def _script(planned: Planned, recorded: StepRecord, asked: Submission) -> str:
    """The script that would be queued; the job that it waits for has no id yet."""
    request = asked.requests[planned.step.name]
    first = next(p for p in asked.plan.to_run)
    text = slurm.script(
        request, asked.profile, recorded.directory, recorded.directory.parent / "code" if asked.code else None
    )
    if planned is first:
        return text
    head, mark, rest = text.partition("#SBATCH --chdir")
    return f"{head}#SBATCH --dependency=afterok:THE_STEP_BEFORE\n#SBATCH --kill-on-invalid-dep=yes\n{mark}{rest}"


def _commands(planned: Planned, recorded: StepRecord, asked: Submission | None) -> list[RankGroup]:
    job = pipeline.job_of(planned, recorded)
    if asked is not None:
        return slurm.commands(job, asked.requests[planned.step.name], asked.profile)
    return [] if planned.step.job in IN_PROCESS else local.commands(job)


def _data(plan: Plan, run: RunRecord, asked: Submission | None) -> dict[str, Any]:
    steps = []
    for planned, recorded in zip(plan.steps, run.steps, strict=True):
        step, layout = planned.step, planned.step.layout
        groups = [] if planned.skip else _commands(planned, recorded, asked)
        one = {
            "name": step.name, "job": step.job, "skip": planned.skip, "why": planned.why, "world_size": step.world_size, "arguments": step.plain(),
            "layout": layout.as_layout() if layout else None, "plan": _plan(planned),
            "commands": [{"ranks": list(g.ranks), "host": g.host, "command": g.command} for g in groups],
        }  # fmt: skip
        if asked and not planned.skip:
            request = asked.requests[step.name]
            one["nodes"] = [list(ranks) for ranks in request.placement.nodes]
            one["allocated_gpus"] = request.allocated_gpus
            one["script"] = _script(planned, recorded, asked)
        steps.append(one)
    first = _plan(plan.to_run[0]) if plan.to_run else None
    return {
        "recipe": plan.recipe,
        "executor": run.executor,
        "steps": steps,
        "plan": first,
        "notes": plan.notes,
        "warnings": plan.warnings,
    }


def _plan(planned: Planned) -> dict[str, Any] | None:
    made = planned.preflight
    if not made:
        return None
    found = {f.name: getattr(made, f.name) for f in fields(made) if f.name not in HIDDEN}
    if "memory" in found:
        found["memory"] = {name: asdict(held) | {"total": held.total} for name, held in found["memory"].items()}
    return found
