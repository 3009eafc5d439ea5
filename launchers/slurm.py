"""A Slurm cluster: one sbatch script a step, whose text holds no typed value that a shell could read as anything but data.

The script loads what the profile names and becomes `launchers.slurm_step`, which reads STEP.json beside it and starts the ranks with
``srun``. NeMo-Run's SlurmExecutor is not used: it cannot place 17 ranks as 8 + 8 + 1, pastes environment values into the script,
does not requeue, and takes seconds to import (docs/slurm.md).
"""

import dataclasses
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.base import LOGS, Job, RankGroup
from launchers.profiles import Profile, hook_words, signal_name, signal_seconds
from launchers.slurm_commands import Partition
from mimo_jobs.errors import UserError, did_you_mean
from mimo_jobs.placement import Placement

SCHEMA = 1
SCRIPT = "sbatch.sh"
STEP = "STEP.json"
LOG = "slurm.log"
CPUS_WITHOUT_GPUS = 8  # threads of a verify: more are no faster than the disk


@dataclass(frozen=True)
class Request:
    """What a step asks Slurm for, besides its profile.

    Attributes:
        title: the job's name in squeue.
        gpus: GPUs asked of each node; 0 for steps that need none.
        cpus: CPUs of a rank; None leaves it to Slurm.
        after: job that must succeed first.
    """

    title: str
    placement: Placement
    gpus: int
    cpus: int | None
    partition: str | None
    after: int | None = None

    @property
    def nodes(self) -> int:
        return len(self.placement.nodes)

    @property
    def tasks_per_node(self) -> int:
        return max(len(ranks) for ranks in self.placement.nodes)

    @property
    def allocated(self) -> Placement:
        """The placement on the GPUs that are really asked for: fewer than a node's when the ranks need fewer."""
        return dataclasses.replace(self.placement, gpus_per_node=max(self.gpus, self.tasks_per_node))

    @property
    def allocated_gpus(self) -> int:
        return self.nodes * self.gpus


def request(
    title: str, placement: Placement, profile: Profile, *, uses_gpus: bool, partition: Partition | None = None,
    after: int | None = None,
) -> Request:  # fmt: skip
    """The request of a step; ``partition`` is what the cluster says of it, if it was asked."""
    most = max(len(ranks) for ranks in placement.nodes)
    gpus = 0
    if uses_gpus and profile.gpu_request != "none":
        gpus = profile.gpus_per_node if profile.exclusive else most
    cpus = profile.cpus_per_task
    if cpus is None and partition is not None:
        cpus = (
            max(1, partition.cpus // max(most, profile.gpus_per_node))
            if uses_gpus
            else min(CPUS_WITHOUT_GPUS, partition.cpus)
        )
    return Request(title, placement, gpus, cpus, partition_of(profile, uses_gpus), after)


def partition_of(profile: Profile, uses_gpus: bool) -> str | None:
    """Where a step goes."""
    return profile.partition if uses_gpus else profile.cpu_partition or profile.partition


def interpreter(profile: Profile) -> str:
    """The Python that runs on the batch host, and the ranks without a container."""
    if profile.venv is None:
        return sys.executable
    return os.path.join(os.path.expanduser(profile.venv), "bin", "python")


def script(
    asked: Request, profile: Profile, record: Path, code: Path | None, module: str = "launchers.slurm_step"
) -> str:
    """The text of ``sbatch.sh``. Options are quoted for Slurm's own reader, everything else for the shell.

    ``module`` is what the script becomes; it is given the record.
    """
    python = interpreter(profile)
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(asked, profile, record))]
    # A signal that comes before python hears it (a slow setup, a slow start) would end the shell: the job failed, the chain cancelled
    # without a word. What is ignored stays so through exec, until python installs its handlers; `slurm_step` makes up for what is lost.
    lines.append(f"trap '' {' '.join(dict.fromkeys(('USR1', 'USR2', signal_name(profile.signal))))}")
    if profile.modules:  # before the strict mode, which neither Lmod nor /etc/profile is written for
        lines.append("command -v module >/dev/null || . /etc/profile")
        lines += [f"module load {shlex.quote(m)} || exit 1" for m in profile.modules]
    lines.append("set -eo pipefail")
    lines += profile.setup
    lines.append(f'export PATH={shlex.quote(str(Path(python).parent))}:"$PATH" PYTHONSAFEPATH=1')
    lines.append(f"export PYTHONPATH={shlex.quote(str(code))}" if code else "unset PYTHONPATH")
    lines.append(f"exec {shlex.quote(python)} -m {module} {shlex.quote(str(record))}")
    return "\n".join(lines) + "\n"


def _options(asked: Request, profile: Profile, record: Path) -> list[str]:
    signal = profile.signal.removeprefix("B:")
    options: list[tuple[str, Any]] = [
        ("job-name", asked.title), ("account", profile.account), ("partition", asked.partition), ("qos", profile.qos),
        ("reservation", profile.reservation), ("constraint", profile.constraint), ("nodelist", profile.nodelist),
        ("exclude", profile.exclude), ("nodes", asked.nodes), ("ntasks-per-node", asked.tasks_per_node),
        ("cpus-per-task", asked.cpus), (profile.gpu_request, _gpus(asked, profile)), ("mem", profile.mem),
        ("exclusive", profile.exclusive or None), ("time", profile.time), ("signal", f"B:{signal}"), ("requeue", True),
        ("dependency", f"afterok:{asked.after}" if asked.after else None),
        ("kill-on-invalid-dep", "yes" if asked.after else None),
        ("chdir", record), ("output", str(record / LOG).replace("%", "%%")), ("open-mode", "append"),
    ]  # fmt: skip
    made = [
        f"--{name}" if value is True else f"--{name}={quoted(str(value))}"
        for name, value in options
        if value is not None
    ]
    for option in profile.sbatch:
        name, equals, value = option.partition("=")
        made.append(f"{name}={quoted(value)}" if equals else name)
    return made


def _gpus(asked: Request, profile: Profile) -> str | None:
    if not asked.gpus:
        return None
    return f"gpu:{asked.gpus}" if profile.gpu_request == "gres" else str(asked.gpus)


def quoted(value: str) -> str:
    """A value for an ``#SBATCH`` line, whose reader knows quotes, backslashes and comments (slurm: src/sbatch/opt.c)."""
    if re.fullmatch(r"[A-Za-z0-9_.,@%+=:/\[\]-]*", value):
        return value
    assert not re.search(r"['\\\0\n\r]", value), value
    return f"'{value}'"


def rank_command(job: Job, asked: Request, profile: Profile, words: Sequence[str] | None = None) -> list[str]:
    """The ``srun`` that starts every rank, inside the step's allocation. ``words``: module and arguments other than the worker's."""
    placement = asked.placement
    command = [
        "srun",
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--input=none",
        f"--nodes={asked.nodes}",
        f"--ntasks={job.world_size}",
    ]
    # Ranks are placed one by one (SLURM_HOSTFILE) where blocks of equal size would not put them where the plan has them.
    command.append(
        f"--ntasks-per-node={asked.tasks_per_node}" if placement.contiguous_uniform else "--distribution=arbitrary"
    )
    if asked.cpus:
        command.append(f"--cpus-per-task={asked.cpus}")
    if profile.container_image:
        mounts = ",".join([*_own_mounts(job), *profile.container_mounts])
        command += [
            f"--container-image={profile.container_image}",
            f"--container-mounts={mounts}",
            "--no-container-mount-home",
        ]
    python = profile.container_python if profile.container_image else interpreter(profile)
    return [*command, *profile.srun, python, "-m", *(words or ("mimo_jobs.worker", str(job.file)))]


def _own_mounts(job: Job) -> list[str]:
    """The run's record and every directory that the job reads or writes, at their own paths."""
    places = [job.record.parent if job.record.parent.name != "runs" else job.record]
    for name, value in _paths(job.arguments):
        place = Path(value)
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith(
            "models--"
        ):  # a hub download: links into its blobs
            place = place.parent.parent
        beside = name in ("target", "certificate", "directory") or (name == "data" and not place.is_dir())
        places.append(place.parent if beside else place)
    found = list(dict.fromkeys(map(str, places)))
    for place in found:
        if re.search(r"[,:]", place):
            raise UserError(
                f"{place}: pyxis cannot mount a path with ',' or ':' (container_image is set); use another directory"
            )
    return [f"{place}:{place}" for place in found]


def _paths(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Absolute paths among a job's arguments and their groups: (name of the field, path)."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _paths(value)
        elif isinstance(value, str) and os.path.isabs(value):
            yield name, value


def rank_environment(job: Job, profile: Profile, code: Path | None) -> dict[str, str]:
    """What the ranks find in their environment besides Slurm's own."""
    own = {"MIMO_JOBS_LOGS": str(job.record / LOGS), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if code:
        own["PYTHONPATH"] = str(code)
    if profile.network_interface:
        own |= {"NCCL_SOCKET_IFNAME": profile.network_interface, "GLOO_SOCKET_IFNAME": profile.network_interface}
    return {**own, **profile.environment}


def commands(job: Job, asked: Request, profile: Profile) -> list[RankGroup]:
    """For a dry run: what starts which ranks."""
    nodes = asked.nodes
    return [
        RankGroup(range(job.world_size), f"{nodes} node{'s' * (nodes > 1)} of Slurm", rank_command(job, asked, profile))
    ]


def write(
    job: Job, step: str, run_id: str, asked: Request, profile: Profile, code: Path | None, replaces: str | None = None
) -> Path:
    """JOB.json, STEP.json and ``sbatch.sh`` of a step in its record; the script.

    ``replaces``: `identity.revision` of the output that the step may replace, None where that was not decided.
    """
    job.write()
    (job.record / LOGS).mkdir(exist_ok=True)
    if profile.container_image:  # what is mounted must be there
        for name in ("target", "certificate"):
            if job.arguments.get(name):
                Path(job.arguments[name]).parent.mkdir(parents=True, exist_ok=True)
    placement = asked.placement
    text = {
        "schema": SCHEMA, "run": run_id, "step": step, "job": job.name, "srun": rank_command(job, asked, profile),
        "node_of_rank": None if placement.contiguous_uniform else [placement.node_of(r) for r in range(job.world_size)],
        "ranks_on_a_node": asked.tasks_per_node, "environment": rank_environment(job, profile, code),
        "retries": profile.retries, "on_finish": hook_words(profile.on_finish or ""), "allocated_gpus": asked.allocated_gpus,
        "time": profile.time, "signal_seconds": signal_seconds(profile.signal), "replaces": replaces,
    }  # fmt: skip
    (job.record / STEP).write_text(json.dumps(text, indent=2) + "\n")
    path = job.record / SCRIPT
    path.write_text(script(asked, profile, job.record, code))
    path.chmod(0o755)
    return path


def explained(error: UserError, profile: Profile, known: Mapping[str, Partition]) -> UserError:
    """What Slurm says of a request, with the field to change."""
    said = str(error)
    for words, name, hint in (
        ("qos", "qos", "; sacctmgr show assoc user=$USER format=account,qos lists yours"),
        ("account", "account", "; sacctmgr show assoc user=$USER lists yours"),
        ("partition", "partition", did_you_mean(profile.partition or "", known) or f"; there are {', '.join(known)}"),
        ("time limit", "time", ""),
        (
            "node configuration",
            "gpus_per_node",
            "; sinfo -o '%P %D %c %G' shows what nodes have (cpus_per_task and mem count too)",
        ),
        ("reservation", "reservation", ""),
        ("number of nodes", "nodelist", ""),
        ("feature", "constraint", ""),
    ):
        if words in said.lower():
            narrowed = [
                f"{n}={getattr(profile, n)}" for n in ("nodelist", "exclude", "constraint") if getattr(profile, n)
            ]
            if name == "gpus_per_node" and narrowed:
                return UserError(
                    f"Slurm would refuse executor.{' executor.'.join(narrowed)}: {said}; no nodes are left that have what is asked for"
                )
            value = getattr(profile, name)
            return UserError(
                f"Slurm would refuse executor.{name}={'(not set)' if value is None else value}: {said}{hint}"
            )
    return UserError(f"Slurm would refuse the job: {said}")


def choose(known: Mapping[str, Partition], name: str | None) -> Partition | None:
    """The partition named, or the default one. Raises a `UserError` for one that the cluster does not have."""
    if name is None:
        return next((p for p in known.values() if p.default), None)
    if "," in name:
        return min((p for n in name.split(",") if (p := choose(known, n))), key=lambda p: p.cpus, default=None)
    if known and name not in known:
        raise UserError(
            f"executor.partition={name}: the cluster has no such partition{did_you_mean(name, known) or f'; there are {", ".join(known)}'}"
        )
    return known.get(name)
