"""What `launchers.probe` saw of a machine, judged: this one, or a compute node from where a rank runs. See `mimo_jobs.doctor`."""

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launchers import probe
from launchers.profiles import Profile
from launchers.slurm import Request
from mimo_jobs.console import size
from mimo_jobs.errors import did_you_mean

if TYPE_CHECKING:
    from launchers.slurm_probe import Probed

DISTRIBUTION = "mimo-jobs"
LOW_DISK = 1 << 30  # bytes; a record is a few MB, what a conversion writes is checked before it starts
TRAINING = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what: ``scheduler``, ``partition`` ...
        found: what is there, in a sentence.
        fix: what to do when it is not ok: a command or a field to set.
    """

    name: str
    state: Literal["ok", "warning", "failed", "skipped"]
    found: str
    fix: str = ""


def python(name: str, sight: dict[str, Any], fix: str = "`uv sync` makes a virtual environment that fits") -> Check:
    """The interpreter against what this package requires."""
    from packaging.specifiers import SpecifierSet

    version, place = sight["python"]["version"], sight["python"]["executable"]
    wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if version in SpecifierSet(wanted):
        return Check(name, "ok", f"Python {version} at {place}")
    return Check(name, "warning", f"Python {version} at {place}, {DISTRIBUTION} needs {wanted}", fix)


def requirements() -> dict[str, Any]:
    """Package -> ``packaging`` requirement of this package."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    return {r.name: r for r in wanted if r.marker is None or r.marker.evaluate()}


def packages() -> list[Check]:
    """What is installed here against what this package requires."""
    missing, outside = [], []
    for name, wanted in requirements().items():
        version = probe.version(name)
        if version is None:
            missing.append(name)
        elif not wanted.specifier.contains(version, prereleases=True):
            outside.append(f"{name} {version} (needs {wanted.specifier})")
    fix = "`uv sync` installs what pyproject.toml requires"
    if missing:
        return [Check("packages", "failed", f"not installed: {', '.join(missing + outside)}", fix)]
    if outside:
        return [Check("packages", "warning", f"outside what pyproject.toml requires: {', '.join(outside)}", fix)]
    return [Check("packages", "ok", _listed({name: probe.version(name) for name in probe.PACKAGES}))]


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def machine(sight: dict[str, Any], prefix: str = "") -> list[Check]:
    """GPUs, memory, CPUs and disks."""
    return [
        gpus(f"{prefix}gpus", sight),
        memory(f"{prefix}memory", sight),
        cpus(f"{prefix}cpus", sight),
        disks(f"{prefix}disk", sight),
    ]


def gpus(name: str, sight: dict[str, Any], profile: Profile | None = None, asked: int = 0) -> Check:
    """What the driver shows, and on a cluster what Slurm gave."""
    seen, environment = sight["gpus"], sight["environment"]
    given = environment.get("CUDA_VISIBLE_DEVICES")
    slurm = f"CUDA_VISIBLE_DEVICES={given}" if given is not None else "no CUDA_VISIBLE_DEVICES"
    if (count := environment.get("SLURM_GPUS_ON_NODE")) is not None:
        slurm += f", SLURM_GPUS_ON_NODE={count}"
    tail = f" ({slurm})" if profile is not None else ""
    needless = "conversion needs none, training does"
    if seen["problem"]:
        return Check(
            name,
            "warning",
            f"{seen['problem']}{tail}; {needless}",
            "run nvidia-smi there; the NVIDIA driver may need a restart",
        )
    if not seen["found"]:
        devices = f"{', '.join(seen['devices'])}, but no NVIDIA driver" if seen["devices"] else "no NVIDIA GPU"
        fix = "set executor.partition to one with GPUs before training" if profile else "train on a machine with GPUs"
        return Check(name, "warning", f"{devices}{tail}; {needless}", fix)
    models = sorted({(g["name"], g["memory"]) for g in seen["found"]}, key=str)
    words = [f"{sum(g['name'] == m for g in seen['found'])} x {m}" + (f" of {size(b)}" if b else "") for m, b in models]
    found = ", ".join(words) + tail
    if asked and not given:
        return Check(name, "warning", f"{found}: Slurm gave none of them", "set executor.gpu_request to gres or none")
    if (
        profile is not None
        and profile.gpu
        and not any(profile.gpu.split("-")[0].lower() in m.lower() for m, _ in models)
    ):
        return Check(name, "warning", f"{found}, executor.gpu={profile.gpu}", "set executor.gpu to what the nodes have")
    return Check(name, "ok", found)


def memory(name: str, sight: dict[str, Any]) -> Check:
    """Host memory, and the part of it that a control group leaves."""
    seen = sight["memory"]
    limit = f"; this process may use {size(seen['limit'])}" if seen["limit"] else ""
    return Check(name, "ok", f"{size(seen['total'])}, {size(seen['available'])} available{limit}")


def cpus(name: str, sight: dict[str, Any], asked: int | None = None) -> Check:
    """CPUs that this process may use."""
    usable, every = sight["cpus"]["usable"], sight["cpus"]["machine"]
    found = f"{usable} of {every} usable by this process" if usable != every else f"{every}"
    if asked and usable < asked:
        return Check(name, "warning", f"{found}, {asked} were asked for a rank", f"set executor.cpus_per_task={usable}")
    return Check(name, "ok", found)


def disks(name: str, sight: dict[str, Any]) -> Check:
    """Free space of the places looked at."""
    found = ", ".join(
        f"{size(d['free'])} free at {place}" if "free" in d else d["problem"] for place, d in sight["disks"].items()
    )
    if all(d.get("free", 0) >= LOW_DISK for d in sight["disks"].values()):
        return Check(name, "ok", found)
    return Check(
        name, "warning", found, "make room, or set MIMO_JOBS_HOME and the recipe's target to another filesystem"
    )


# --------------------------------------------------------------------------------------------------- a node of a cluster


def filesystem(came: "Probed", home: Path) -> list[Check]:
    """Whether files of one side appear on the other, how soon, and whether their clocks agree."""
    assert came.rank is not None
    if came.rank["nonce"] != came.nonce:
        fix = "set MIMO_JOBS_HOME to a directory that the compute nodes share with this host"
        return [Check("filesystem", "failed", f"the node did not find what this host had written to {home}", fix)]
    written, ahead = came.rank["time"], 0.0
    if written < came.submitted:
        ahead = written - came.submitted
    elif written > came.seen:
        ahead = written - came.seen
    shared = f"{home} is shared: the node read this host's file"
    if not ahead:
        return [
            Check("filesystem", "ok", f"{shared}, and its own was here within {max(0.1, came.seen - written):.1f} s")
        ]
    clock = f"the node's clock is at least {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this host's"
    state = "warning" if abs(ahead) > 1 else "ok"
    return [
        Check("filesystem", "ok", f"{shared}, and its own came here"),
        Check("clock", state, clock, "times in records will differ; ask for NTP on the nodes" if state != "ok" else ""),
    ]


def batch_host(came: "Probed", profile: Profile) -> list[Check]:
    """Where a step's own process runs: it needs this code and Slurm's commands."""
    batch = came.batch
    if batch is None:
        return []
    if problem := _import_problem(batch):
        return [Check("batch host", "failed", f"{batch['host']}: {problem}", _import_fix(problem, profile, False))]
    absent = [name for name, place in batch["commands"].items() if place is None]
    if absent:
        fix = "have executor.setup or executor.modules put them on PATH" + (
            "; see executor.on_finish" if profile.on_finish else ""
        )
        return [Check("batch host", "failed", f"{batch['host']}: not on PATH: {', '.join(absent)}", fix)]
    return [Check("batch host", "ok", f"{batch['host']}: steps start with {batch['python']}")]


def ranks_place(sight: dict[str, Any], profile: Profile, asked: Request) -> list[Check]:
    """Everything about where a rank runs."""
    fix = _python_fix(profile.container_image is not None)
    found = [python("node python", sight, fix), _worker(sight, profile), _node_packages(sight, profile)]
    found.append(gpus("node gpus", sight, profile, asked.gpus))
    found.append(network("node network", sight["interfaces"], profile.network_interface))
    return [*found, memory("node memory", sight), cpus("node cpus", sight, asked.cpus), disks("node disk", sight)]


def _import_problem(sight: dict[str, Any]) -> str:
    return next((f"{module} does not import: {problem}" for module, problem in sight["imports"].items() if problem), "")


def _python_fix(container: bool) -> str:
    return f"set {'executor.container_image' if container else 'executor.venv'} to one with the Python that is needed"


def _import_fix(problem: str, profile: Profile, container: bool) -> str:
    return _python_fix(container) if "SyntaxError" in problem else _code_fix(profile, container)


def _code_fix(profile: Profile, container: bool) -> str:
    place = "the image of executor.container_image" if container else f"executor.venv={profile.venv or sys.prefix}"
    return f"install what mimo-jobs requires into {place}" + (
        "; or set executor.code=snapshot" if profile.code == "installed" else ""
    )


def _worker(sight: dict[str, Any], profile: Profile) -> Check:
    if problem := _import_problem(sight):
        fix = _import_fix(problem, profile, profile.container_image is not None)
        return Check("worker", "failed", f"ranks would not start: {problem}", fix)
    code = "the code shipped with the job" if profile.code == "snapshot" else "the code installed there"
    return Check("worker", "ok", f"ranks start with {code}")


def _node_packages(sight: dict[str, Any], profile: Profile) -> Check:
    """Versions there: what training imports, and with installed code this package's own, compared with those here."""
    there, name = sight["versions"], "node packages"
    fix = _code_fix(profile, profile.container_image is not None)
    missing = [p for p in TRAINING if there[p] is None]
    if missing:
        return Check(
            name, "warning", f"not installed: {', '.join(missing)}; conversion needs none of them, training does", fix
        )
    wanted, notes, outside = requirements(), [], []
    for package in TRAINING:
        here = probe.version(package)
        if package in wanted and not wanted[package].specifier.contains(there[package], prereleases=True):
            outside.append(f"{package} {there[package]} (needs {wanted[package].specifier})")
        elif here != there[package]:
            notes.append(f"{package} {there[package]} (here {here})")
    if profile.code == "installed" and there[DISTRIBUTION] != probe.version(DISTRIBUTION):
        outside.append(f"{DISTRIBUTION} {there[DISTRIBUTION]} (here {probe.version(DISTRIBUTION)})")
    if outside:
        return Check(name, "warning", f"other than here: {', '.join(outside + notes)}", fix)
    same = _listed({p: there[p] for p in TRAINING})
    return Check(name, "ok", f"as required: {same}" + f"; differs from here: {', '.join(notes)}" * bool(notes))


def network(name: str, seen: dict[str, dict[str, Any]], wanted: str | None) -> Check:
    """The interface of NCCL and Gloo. NCCL takes the beginning of a name, Gloo needs the whole."""
    listed = [f"{n} ({i['address'] or 'no IPv4 address'})" for n, i in seen.items() if i["up"] and not i["virtual"]]
    others = f"set executor.network_interface to one of {', '.join(listed)}" if listed else "ask what joins the nodes"
    if wanted is None:
        if not listed:
            return Check(name, "warning", "no interface is up but virtual ones", "set executor.network_interface")
        return Check(
            name, "ok", f"executor.network_interface is not set: NCCL and Gloo choose; up are {', '.join(listed)}"
        )
    for interface in wanted.split(","):
        if interface not in seen:
            near = did_you_mean(interface, seen)
            return Check(
                name, "failed", f"executor.network_interface={wanted}: the node has no {interface}{near}", others
            )
        if not seen[interface]["up"]:
            return Check(
                name, "failed", f"executor.network_interface={wanted}: {interface} is not up on the node", others
            )
    return Check(name, "ok", f"executor.network_interface={wanted} is up")
