"""What a chain is and what of it has to run: steps, what is done already, and everything that can be checked beforehand.

`running` runs a chain on this machine, `submission` queues it on a cluster; both work from the same `Plan`.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.base import SAFE_PATH, Job
from mimo_jobs import jobs, overrides, paths, records
from mimo_jobs.console import size
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.layout import ParallelLayout, ResolvedLayout
from mimo_jobs.records import RunRecord, StepRecord
from mimo_jobs.worker import rebuilt

IN_PROCESS = ("verify",)  # on this machine needs neither torch nor ranks: starting them would take longer than the work
USE_GPUS = ("import_hf", "sft", "lora", "export_hf", "compare_logits")  # whose ranks are placed on GPUs


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
class Planned:
    """A step with what was decided about it.

    Attributes:
        skip: its output is there and is what it would make.
        why: the reason, for people; empty when it simply runs.
        preflight: its weight plan in numbers, None for jobs that have none.
        replaces: `identity.revision` of an old output of ours that the step may replace, and nothing else.
    """

    step: Step
    skip: bool = False
    why: str = ""
    preflight: Any = None
    replaces: str | None = None

    @property
    def job_step(self) -> Step:
        """The step as its job gets it: with leave to replace the output that was found to be old."""
        if self.replaces is None or "overwrite" not in self.step.arguments:
            return self.step
        return dataclasses.replace(self.step, arguments={**self.step.arguments, "overwrite": True})


@dataclass
class Plan:
    """A whole chain, decided and checked. ``warnings`` need --force, ``notes`` are to be read."""

    recipe: str
    steps: list[Planned]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def to_run(self) -> list[Planned]:
        return [p for p in self.steps if not p.skip]


def steps_of(recipe: Any, name: str) -> list[Step]:
    """The steps of what a recipe returned: a ``fdl.Partial`` is a chain of one."""
    parts = recipe if isinstance(recipe, dict) else {name: recipe}
    found = []
    for step, partial in parts.items():
        job = partial.__fn_or_cls__.__name__
        assert jobs.JOBS.get(job) is partial.__fn_or_cls__, f"recipe {name}: {job} is not in jobs.JOBS"
        found.append(Step(step, job, overrides.arguments(partial)))
    return found


def make_plan(
    name: str, steps: list[Step], resumable: bool, active: Collection[str] = (), done: Collection[str] = ()
) -> Plan:
    """Decide what runs and check it all.

    Args:
        resumable: outputs that are there already are kept, or replaced when they are old.
        active: steps that are queued or run already; their outputs are on their way.
        done: steps that a record says succeeded, for those whose output does not say what it was made from.

    Raises:
        UserError: a step would fail; says why.
    """
    for step in steps:
        step.layout  # noqa: B018  a layout that does not resolve is the first thing to say
    _check_casts(steps)
    _check_logging(steps)
    plan = Plan(name, _decided(steps, active, done) if resumable else [Planned(s) for s in steps])
    checked = [p for p in plan.to_run if p.step.name not in active]
    _check_targets(checked)
    _preflight(plan, checked)
    return plan


def _check_casts(steps: list[Step]) -> None:
    """A verify at the end of a chain must expect what the chain makes. Raises a `UsageError` that names the fields."""
    made = {s.arguments["target"]: s for s in steps if "target" in s.arguments}
    for step in steps:
        export = made.get(step.arguments.get("right", "")) if step.job == "verify" else None
        imported = made.get(export.arguments.get("source", "")) if export else None
        if export is None or imported is None:
            continue
        for setting in ("dtype", "mtp"):
            set_at = [s for s in (imported, export) if s.arguments.get(setting) not in (None, "keep")]
            expected = set_at[-1].arguments[setting] if set_at else imported.arguments.get(setting)
            if len({s.arguments[setting] for s in set_at}) > 1:
                named = " and ".join(f"{s.name}.{setting}={s.arguments[setting]}" for s in set_at)
                raise UsageError(
                    f"{named}: a cast of a cast cannot be verified against the source; set {setting}=... for the whole chain"
                )
            if step.arguments.get(setting) != expected:
                raise UsageError(
                    f"{step.name}.{setting}={step.arguments.get(setting) or 'none'}, but {set_at[-1].name if set_at else imported.name}.{setting}={expected or 'none'}: "
                    f"the two would differ; set {setting}={expected or 'none'} for the whole chain"
                )


def _check_logging(steps: list[Step]) -> None:
    """No secret among the settings, also of a step that is done already: the record has them all. Raises a `UsageError`."""
    from mimo_jobs.training.checks import check_logging

    for step in steps:
        if "logging" in step.arguments:
            check_logging(step.arguments["logging"])


# ------------------------------------------------------------------------------------------------ what is done already


def _decided(steps: list[Step], active: Collection[str], done: Collection[str]) -> list[Planned]:
    from mimo_jobs.conversion import identity

    earlier: dict[str, identity.Identity] = {}
    pending: set[str] = set()
    planned = []
    for step in steps:
        place = identity.place_of(step.job, step.arguments)
        inputs = {v for n, v in step.arguments.items() if n in ("left", "right", "model", "data") and v in pending}
        reads = {step.arguments.get("source"), step.arguments.get("adapter")} & pending
        inputs |= reads - earlier.keys()  # made by a step whose output says nothing about itself
        if place is None and step.name in done and not inputs and step.name not in active:
            planned.append(Planned(step, skip=True, why="done already, says the record"))
            continue
        if place is None or inputs:  # what it reads is still to be made
            planned.append(
                Planned(step, why=f"{_names(inputs)} will be made again" if place and place.exists() else "")
            )
            pending |= {step.arguments["target"]} if "target" in step.arguments else set()
            continue
        expected = identity.expected(step.job, step.arguments, earlier)
        if step.name in active:
            assert expected is not None
            earlier[str(place)] = expected
            pending.add(str(place))
            planned.append(Planned(step))
            continue
        assert expected is not None
        one = _compared(step, place, expected)
        earlier[str(place)] = expected
        if not one.skip:
            pending.add(str(place))
        planned.append(one)
    return planned


def _compared(step: Step, place: Path, expected: Mapping[str, Any]) -> Planned:
    """Whether what lies at ``place`` is what the step would make; what is not is replaced once the new one is whole."""
    from mimo_jobs.conversion import identity

    try:
        recorded = identity.recorded(step.job, place)
    except UserError as error:
        if not identity.is_ours(step.job, place):
            if step.arguments.get("overwrite"):
                return Planned(step, why=f"overwrite=true: {place} is replaced")
            raise UserError(
                f"{step.name}: {error}\n  it is not from this pipeline; give another workdir, or overwrite=true to replace it"
            ) from None
        return Planned(step, why=f"what is there is damaged: {error}", replaces=identity.revision(step.job, place))
    if recorded is None:
        return _begun(step, place, expected)
    changed = identity.difference(recorded, expected)
    if not changed:
        return Planned(step, skip=True, why=f"done already: {place} was made from the same inputs and settings")
    return Planned(step, why=f"{changed}; {place} is replaced", replaces=identity.revision(step.job, place))


def _begun(step: Step, place: Path, expected: Mapping[str, Any]) -> Planned:
    """A step without an output; checkpoints that a fine-tuning with other settings left on its way make room for it."""
    from mimo_jobs.conversion import identity

    if step.job not in identity.TRAINING:
        return Planned(step)
    from mimo_jobs.training import saved

    root = saved.steps_directory(place, step.arguments["saving"].directory)
    other, done = saved.other_run(root, expected), saved.progress(root)
    if other is None:
        return Planned(step, why=f"goes on after step {done}" if done else "")
    changed = identity.difference(other.identity, expected)
    why = f"{changed}; checkpoints up to step {other.step} of the run before are set aside"
    return Planned(step, why=why, replaces=identity.revision(step.job, place))


def _names(places: set[str]) -> str:
    return " and ".join(sorted(places))


# --------------------------------------------------------------------------------------------------- what can be checked


def _check_targets(steps: list[Planned]) -> None:
    from mimo_jobs.conversion.publish import check_target

    for planned in steps:
        arguments = planned.job_step.arguments
        if "target" in arguments:
            check_target(Path(arguments["target"]), arguments["overwrite"])


def _preflight(plan: Plan, steps: list[Planned]) -> None:
    """Plan every step that can be planned now: one whose source an earlier step makes is planned from that step's own source."""
    from mimo_jobs.conversion import identity, preflight

    makers = {p.step.arguments["target"]: p.step for p in plan.to_run if "target" in p.step.arguments}
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for planned in steps:
        arguments = planned.job_step.arguments
        if "layout" not in arguments:
            continue
        origin = _origin(arguments.get("source", ""), makers)
        if "model" in arguments and arguments["model"] in makers:
            continue  # an earlier step makes the model itself
        if isinstance(origin, Step) and not Path(origin.arguments["model"]).is_dir():
            continue  # an earlier step of the chain makes the model itself
        if planned.step.job in identity.TRAINING:
            made = _check_training(arguments, origin, makers)
        elif isinstance(origin, Step):
            made = preflight.check_export_of(origin.arguments, arguments)
        else:
            to_come = {"adapter": None} if arguments.get("adapter") in makers else {}
            at = {"source": origin} if "source" in arguments else {}
            made = preflight.preflight(planned.step.job, {**arguments, **to_come, **at})
        planned.preflight = made
        if made is not None:
            place = next(p for p in Path(arguments["target"]).parents if p.exists())
            device = place.stat().st_dev
            needed[device] = needed.get(device, 0) + made.disk_needed
            places[device] = place
            plan.notes += [f"{planned.step.name}: {note}" if len(plan.steps) > 1 else note for note in made.notes]
    for device, total in needed.items():
        free = shutil.disk_usage(places[device]).free
        if total > free:
            raise UserError(f"the outputs of all steps need {size(total)}, but {places[device]} has {size(free)} free")


def _origin(source: str, makers: Mapping[str, Step]) -> Step | str:
    """The import that has still to make a checkpoint, or what it is trained from; else the checkpoint that is there."""
    while (maker := makers.get(source)) is not None:
        if maker.job == "import_hf":
            return maker
        source = maker.arguments["source"]
    return source


def _check_training(arguments: Mapping[str, Any], origin: Step | str, makers: Mapping[str, Step]) -> Any:
    from mimo_jobs.training.preflight import check_training

    to_come = arguments["data"] in makers
    if isinstance(origin, Step):
        return check_training(arguments, origin.arguments, to_come)
    return check_training({**arguments, "source": origin}, None, to_come)


# --------------------------------------------------------------------------------------------------------------- records


def new_record(plan: Plan, executor: str, about: Mapping[str, Any]) -> RunRecord:
    """The record of a new run; nothing is written yet."""
    run_id = paths.new_id(plan.recipe)
    return record_at(paths.home() / "runs" / run_id, run_id, plan, executor, about)


def record_at(root: Path, run_id: str, plan: Plan, executor: str, about: Mapping[str, Any]) -> RunRecord:
    """A record of ``plan`` in ``root``."""
    count = len(plan.steps)
    steps = [
        StepRecord(
            p.step.name, p.step.job, p.step.plain(), records.step_directory(root, i, p.step.name, count),
            records.step_run_id(run_id, i, count),
        )
        for i, p in enumerate(plan.steps, 1)
    ]  # fmt: skip
    return RunRecord(root, steps, {"run_id": run_id, "recipe": plan.recipe, "executor": executor, **about})


def step_of(recorded: StepRecord) -> Step:
    """A recorded step as it was planned, for a run that goes on.

    Raises:
        UsageError: its arguments are not those of its job; a record of another version.
    """
    where = f"{recorded.directory}: arguments"
    return Step(recorded.name, recorded.job, rebuilt(jobs.JOBS[recorded.job], dict(recorded.arguments), where))


def job_of(planned: Planned, recorded: StepRecord, names: re.Pattern[str] = SAFE_PATH) -> Job:
    """The launcher's view of a step; ``names`` is what its record's path may hold."""
    step = planned.job_step
    return Job(step.job, step.plain(), step.world_size, recorded.directory, recorded.run_id, names)


def is_local(executor: str) -> bool:
    return executor.partition(":")[0] == "local"


def process_alive(about: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a record still runs, as far as this host can tell: no zombie, and no other of that number."""
    if about.get("host") != os.uname().nodename or not about.get("pid"):
        return False
    state, started = process_stat(int(about["pid"]))
    return state not in ("", "Z") and about.get("started") in (None, started)


def process_stat(pid: int) -> tuple[str, int]:
    """State and start time (clock ticks since boot) of a process; ("", 0) when there is none (proc(5), /proc/pid/stat)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return words[0], int(words[19])
