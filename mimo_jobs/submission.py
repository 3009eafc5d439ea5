"""A chain on a Slurm cluster: every step is queued at once, each after the one before it; then this process may go.

Nothing is remembered here: what was queued is in the record before and after each ``sbatch``, so a submission that was cut short
is continued by `submit` on the same record, and a job whose id was lost is found in the queue by its name.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers import profiles, slurm, slurm_commands
from launchers.base import SLURM_PATH, make_record
from launchers.profiles import Profile
from launchers.slurm import Request
from launchers.slurm_commands import Partition, SlurmError, SlurmSilent
from mimo_jobs import pipeline, placement, provenance
from mimo_jobs.console import size
from mimo_jobs.conversion.identity import TRAINING
from mimo_jobs.errors import UserError
from mimo_jobs.pipeline import USE_GPUS, Plan, Planned
from mimo_jobs.placement import Placement
from mimo_jobs.records import RunRecord, StepRecord

# Memory of GPUs by the name that vendors sell them under, GB (nvidia.com data sheets).
GPU_MEMORY = {"A100-40GB": 40, "A100": 80, "A100-80GB": 80, "H100": 80, "H100-NVL": 94, "H200": 141, "H20": 96, "B200": 180, "B300": 288,
              "GH200": 96, "L4": 24, "L40S": 48, "A40": 48, "A10": 24, "V100": 32, "RTX6000ADA": 48, "RTXPRO6000": 96}  # fmt: skip
HOST_BYTES_OF_A_RANK = (
    300 << 20
)  # interpreter, plan and buffers: RssAnon measured 25-57 MB (benchmarks/results/conversion.json), the rest is room
SAVED_BYTES_A_SECOND = 1e9  # of a node to a parallel filesystem; slower ones are told by their first checkpoint


@dataclass
class Submission:
    """A plan with what Slurm is asked for, by step name. ``known``: the cluster's partitions, empty where Slurm is not at hand."""

    plan: Plan
    profile: Profile
    requests: dict[str, Request]
    known: Mapping[str, Partition]

    @property
    def code(self) -> bool:
        """Whether this command's code is shipped with the jobs."""
        return self.profile.code == "snapshot"


def prepare(plan: Plan, profile: Profile, *, need_slurm: bool) -> Submission:
    """Place every step on nodes and check what the cluster and the profile say. Adds to the plan's warnings and notes.

    Args:
        need_slurm: false for a dry run, which also works where Slurm is not installed.

    Raises:
        UserError: the cluster cannot run it; names the field.
    """
    known: Mapping[str, Partition] = {}
    try:
        known = slurm_commands.partitions()
    except SlurmError as error:
        if need_slurm:
            raise
        plan.notes.append(f"Slurm was not asked: {error}")
    requests = {}
    for planned in plan.to_run:
        step = planned.step
        layout, uses_gpus = step.layout, step.job in USE_GPUS
        placed = (
            placement.place(layout, profile.gpus_per_node)
            if layout
            else placement.place_ranks(1, profile.gpus_per_node)
        )
        partition = slurm.choose(known, slurm.partition_of(profile, uses_gpus)) if known else None
        asked = slurm.request(f"mimo:{step.name}", placed, profile, uses_gpus=uses_gpus, partition=partition)
        requests[step.name] = asked
        _check_nodes(planned, asked, profile, partition)
        for note in _placement_notes(planned, placed, asked, profile):
            plan.notes.append(f"{step.name}: {note}" if len(plan.steps) > 1 else note)
    _check_memory(plan, profile)
    _check_signals(plan, profile, requests)
    if not os.access(slurm.interpreter(profile), os.X_OK):
        plan.warnings.append(
            f"{slurm.interpreter(profile)} is not there, on this host at least: executor.venv={profile.venv}"
        )
    hook = profiles.hook_words(profile.on_finish or "")
    if hook and shutil.which(hook[0]) is None:
        plan.warnings.append(f"executor.on_finish={profile.on_finish}: there is no command {hook[0]} on this host")
    if profile.code == "installed" and (dirty := provenance.code_state().get("dirty")):
        plan.warnings.append(
            f"{len(dirty)} files of this code are not committed (e.g. {dirty[0]}) and would not be shipped: executor.code=installed"
        )
    return Submission(plan, profile, requests, known)


def _check_nodes(planned: Planned, asked: Request, profile: Profile, partition: Partition | None) -> None:
    if partition is None:
        return
    name = planned.step.name
    if not partition.available:
        raise UserError(f"executor.partition={partition.name}: is down; sinfo shows the others")
    if asked.nodes > partition.nodes:
        raise UserError(
            f"{name}: layout of {planned.step.world_size} ranks needs {asked.nodes} nodes of {profile.gpus_per_node} GPUs, partition {partition.name} has "
            f"{partition.nodes}; use a smaller layout or another executor.partition"
        )
    if asked.gpus > partition.gpus:
        raise UserError(
            f"{name}: asks {asked.gpus} GPUs of a node, nodes of {partition.name} have {partition.gpus}; set "
            + (
                f"executor.gpus_per_node={partition.gpus}"
                if partition.gpus
                else "executor.gpu_request=none, or another executor.partition"
            )
        )
    if asked.cpus and asked.cpus * asked.tasks_per_node > partition.cpus:
        raise UserError(
            f"{name}: executor.cpus_per_task={asked.cpus} times {asked.tasks_per_node} ranks of a node is more than its {partition.cpus} CPUs; "
            f"set executor.cpus_per_task={max(1, partition.cpus // asked.tasks_per_node)}"
        )
    needed = asked.tasks_per_node * HOST_BYTES_OF_A_RANK
    given = memory_bytes(profile.mem) if profile.mem else partition.memory_mb << 20
    if given and needed > given:
        where = f"executor.mem={profile.mem}" if profile.mem else f"a node of {partition.name}"
        raise UserError(
            f"{name}: {asked.tasks_per_node} ranks of a node need {size(needed)} of host memory, {where} has {size(given)}"
        )


def memory_bytes(text: str) -> int:
    """Bytes of Slurm's ``64G``; a plain number counts megabytes, 0 is the whole node (sbatch(1), --mem)."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    return int(text.rstrip("KMGT")) << units.get(text[-1], 20)


def _placement_notes(planned: Planned, placed: Placement, asked: Request, profile: Profile) -> list[str]:
    notes = list(placed.notes)
    idle = asked.allocated_gpus - planned.step.world_size if asked.gpus else 0
    layout = planned.step.layout
    if idle > 0 and layout is not None:
        notes.append(
            placement.advice(layout, profile.gpus_per_node, planned.preflight.allowed if planned.preflight else None)
            or f"{idle} of {asked.allocated_gpus} allocated GPUs stay idle"
        )
    return notes


def _check_memory(plan: Plan, profile: Profile) -> None:
    """What the components' weights would take on the GPU that the profile names. Conversion itself uses no GPU memory."""
    if profile.gpu is None and profile.gpu_memory is None:
        return
    limit = profile.gpu_memory or GPU_MEMORY.get((profile.gpu or "").upper())
    if limit is None:
        raise UserError(
            f"executor.gpu={profile.gpu}: its memory is not known; set executor.gpu_memory in GB (known: {', '.join(GPU_MEMORY)})"
        )
    named = f"{profile.gpu or 'GPU'} of {limit} GB"
    for planned in plan.to_run:
        made = planned.preflight
        if made is None or not made.held:
            continue
        layout = planned.step.layout
        assert layout is not None
        together = sum if layout.colocated else max
        if planned.step.job in TRAINING:
            _check_training_memory(plan, planned, named, limit * 1e9, together)
            continue
        total = together(made.held.values())
        each = ", ".join(f"{name} {size(n)}" for name, n in made.held.items())
        fits = (
            "fits"
            if total < limit * 1e9
            else "does not fit: train it in a layout with more tensor or pipeline parallelism"
        )
        plan.notes.append(
            f"{planned.step.name}: converts without GPU memory; the weights of a rank ({each}) on one {named}: {fits}"
        )


def _check_training_memory(
    plan: Plan, planned: Planned, named: str, limit: float, together: Callable[[Iterable[int]], int]
) -> None:
    """A warning when what is there whatever the data does not fit, a note when the longest samples may not."""
    needs = planned.preflight.memory
    certain, total = together(m.certain for m in needs.values()), together(m.total for m in needs.values())
    each = ", ".join(f"{name} {size(m.total)}" for name, m in needs.items())
    more = "more layout.*.tp or layout.language.pp" + (
        ", or the recipe qwen35vl_lora" if planned.step.job == "sft" else ""
    )
    if certain > limit:
        plan.warnings.append(
            f"{planned.step.name}: weights, gradients and optimizer state of a rank need {size(certain)}, one {named} has less: "
            f"use {more}"
        )
    elif total > limit:
        plan.notes.append(
            f"{planned.step.name}: with the longest samples a rank may need {size(total)} ({each}), one {named} has less: if it runs "
            f"out, lower micro_batch_size or dataset.max_length, set recompute=full, or use {more}"
        )
    else:
        plan.notes.append(
            f"{planned.step.name}: a rank needs at most about {size(total)} ({each}) on one {named}: fits"
        )


def _check_signals(plan: Plan, profile: Profile, requests: Mapping[str, Request]) -> None:
    """A note when a training may not have saved by the time that its job ends."""
    name, _, lead = profile.signal.partition("@")
    for planned in plan.to_run:
        if planned.step.job not in TRAINING or planned.preflight is None:
            continue
        seconds = planned.preflight.step_bytes / (SAVED_BYTES_A_SECOND * requests[planned.step.name].nodes)
        if seconds > int(lead or 0) / 2:  # the step that runs is finished before
            plan.notes.append(
                f"{planned.step.name}: a checkpoint is {size(planned.preflight.step_bytes)}, at 1 GB/s a node {seconds:.0f} s to write, and "
                f"executor.signal={profile.signal} leaves {lead} s for the last one before the time limit; set executor.signal={name}@"
                f"{60 * -(-int(2 * seconds + 60) // 60)}"
            )


# ---------------------------------------------------------------------------------------------------------- queueing


def check_requests(submission: Submission, run: RunRecord, directory: Path, queued: Collection[str] = ()) -> None:
    """Ask Slurm whether it would take every distinct request (sbatch --test-only), before anything is queued.

    Raises:
        UserError: it would not; names the profile's field.
    """
    seen = set()
    for planned, recorded in zip(submission.plan.steps, run.steps, strict=True):
        if planned.skip or planned.step.name in queued:
            continue
        asked = submission.requests[planned.step.name]
        text = slurm.script(asked, submission.profile, directory, None)
        shape = "\n".join(line for line in text.splitlines() if line.startswith("#SBATCH") and "--job-name" not in line)
        if shape in seen:
            continue
        seen.add(shape)
        path = directory / f".{recorded.name}.test.sh"
        path.write_text(text)
        try:
            slurm_commands.would_run(str(path))
        except SlurmSilent:
            raise
        except SlurmError as error:
            raise slurm.explained(error, submission.profile, submission.known) from None
        finally:
            path.unlink(missing_ok=True)


def submit(submission: Submission, run: RunRecord, running: Mapping[str, int] | None = None) -> dict[str, int]:
    """Queue every step that is to run, in order; step name -> job id.

    Args:
        running: jobs of steps that are with Slurm already, which later steps wait for.

    Raises:
        UserError: a step could not be queued; those before it are, and the record says so.
    """
    profile = submission.profile
    code = run.root / "code" if submission.code else None
    queued: dict[str, int] = {}
    after: int | None = None
    for planned, recorded in zip(submission.plan.steps, run.steps, strict=True):
        name = planned.step.name
        if running and name in running:
            after = running[name]
            continue
        make_record(recorded.directory, SLURM_PATH)
        if planned.skip:
            if recorded.state().state not in ("done", "skipped"):
                recorded.add("skipped", reason=planned.why)
            continue
        base = submission.requests[name]
        if (lost := _lost_job(run, recorded)) is not None:
            recorded.add("submitted", job_id=lost, after=after)
            queued[name] = after = lost
            continue
        named = title(run, name)
        asked = Request(named, base.placement, base.gpus, base.cpus, base.partition, after)
        script = slurm.write(
            pipeline.job_of(planned, recorded, SLURM_PATH), name, run.run_id, asked, profile, code, planned.replaces
        )
        recorded.add("submitting", title=named, **({"reason": planned.why} if planned.why else {}))
        try:
            after = slurm_commands.submit(str(script))
        except SlurmSilent as error:  # it may be queued: then it is found by its title
            raise UserError(
                f"{name}: whether it was queued is not known: {error}\n"
                f"  nemo-run status {run.run_id} tells when Slurm answers, nemo-run resume {run.run_id} queues the rest"
            ) from None
        except SlurmError as error:
            recorded.add("failed", reason=f"not queued: {error}", exit_code=1)
            left = f"; queued already: {', '.join(f'{n} (job {j})' for n, j in queued.items())}" if queued else ""
            raise UserError(
                f"{name} was not queued: {error}{left}\n  nemo-run resume {run.run_id} queues the rest"
            ) from None
        recorded.add("submitted", job_id=after, after=asked.after)
        queued[name] = after
    return queued


def _lost_job(run: RunRecord, step: StepRecord) -> int | None:
    """The job of a step whose sbatch was not heard to the end, if there is one."""
    state = step.state()
    if state.state != "queued" or state.job_id is not None:
        return None
    return slurm_commands.find(title(run, step.name), users(run), state.known_jobs)


def title(run: RunRecord, step: str) -> str:
    """What squeue shows of a step's job; no two runs share it."""
    return f"mimo:{run.run_id}.{step}"


def users(run: RunRecord) -> list[str]:
    """Whose jobs a run's are, for squeue; empty for ours."""
    return [str(run.about["uid"])] if "uid" in run.about else []


def start(submission: Submission, run: RunRecord, recipe: Any) -> dict[str, int]:
    """Write the record of a new run, and queue it. Returns step name -> job id.

    Raises:
        UserError: the record cannot be written, Slurm would refuse a step, or did.
    """
    make_record(run.root, SLURM_PATH)
    check_requests(submission, run, run.root)
    provenance.describe(run, submission.plan, recipe, ship=submission.code)
    return submit(submission, run)


def about(profile: Profile | None, words: list[str]) -> dict[str, Any]:
    """The part of RUN.json that does not depend on the steps."""
    found: dict[str, Any] = {"command": words, "directory": os.getcwd(), **provenance.who()}
    found |= {"versions": provenance.versions(), "code": provenance.code_state()}
    if profile is not None:
        found |= {"profile": profile.plain(), "cluster": slurm_commands.cluster_name()}
    return found
