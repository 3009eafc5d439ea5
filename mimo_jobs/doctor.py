"""``nemo-run doctor``: whether an executor would run jobs, and what to change where it would not. Nothing slow is imported.

`run` gives a list of checks, which `table` shows. For a Slurm cluster they end with one real job (`launchers.slurm_probe`)
that looks from where the ranks would.
"""

import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from launchers import base, probe, profiles, slurm, slurm_commands, slurm_probe
from launchers.profiles import Profile
from launchers.slurm_commands import Partition, SlurmError, SlurmSilent
from mimo_jobs import machine_checks, paths, provenance
from mimo_jobs.console import size
from mimo_jobs.errors import UserError
from mimo_jobs.machine_checks import Check
from mimo_jobs.placement import place_ranks

COMMANDS = ("sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
WAIT_SECONDS = 60.0
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red"), "skipped": ("-", "dim")}

Checks = list[Check]


def run(executor: str, overrides: Mapping[str, Any], wait_seconds: float = WAIT_SECONDS) -> Checks:
    """Every check of an executor, in the order in which they depend on each other.

    Args:
        overrides: fields of its profile, as `launchers.profiles.load` takes them.
        wait_seconds: how long the probe job may wait in the queue.

    Raises:
        UsageError: no such kind of executor.
    """
    if base.check(executor) == "local":
        sight = probe.look([str(paths.home()), str(Path.cwd())])
        return [*_here(sight), *machine_checks.machine(sight)]
    return _slurm(executor, overrides, wait_seconds)


def table(checks: Iterable[Check]) -> Table:
    """A line a check, its fix on the lines below."""
    shown = Table.grid(padding=(0, 2))
    for check in checks:
        mark, style = MARKS[check.state]
        text = Text(check.found, style="dim" if check.state == "skipped" else "")
        if check.fix:
            text.append("\n→ " + check.fix.replace("\n", "\n  "), style=style)
        shown.add_row(Text(mark, style=style), Text(check.name), text)
    return shown


def _guarded(name: str, work: Callable[[], Checks]) -> Checks:
    """The checks that ``work`` makes; an error of the user, or of the system, is a failed one."""
    try:
        return work()
    except (UserError, OSError, ValueError, ImportError) as error:
        return [_failed(name, error)]


def _failed(name: str, error: Exception) -> Check:
    """Our errors end with the way out, after a semicolon."""
    found, _, fix = str(error).rpartition("; ")
    if found:
        return Check(name, "failed", found, fix)
    if isinstance(error, OSError):
        return Check(name, "failed", fix, f"make room or permission there, or set MIMO_JOBS_HOME (now {paths.home()})")
    field = re.search(r"executor\.\w+", fix)
    return Check(
        name, "failed", fix, f"set {field[0]} to something else" if field else "the command shows more by hand"
    )


def _fails(checks: Checks) -> bool:
    return any(check.state == "failed" for check in checks)


def _skipped(names: Iterable[str], needed: str) -> Checks:
    return [Check(name, "skipped", f"not tried: {needed} first") for name in names]


def _here(sight: dict[str, Any]) -> Checks:
    """What the submit side needs, wherever jobs run."""
    return [
        *_guarded("python", lambda: [machine_checks.python("python", sight)]), *_guarded("packages", machine_checks.packages), *_guarded("home", _home),
    ]  # fmt: skip


def _home() -> Checks:
    home = paths.home()
    base.make_record(home)
    with tempfile.TemporaryFile(dir=home):
        pass
    return [Check("home", "ok", f"records go to {home}")]


# --------------------------------------------------------------------------------------------------------------- Slurm


def _slurm(executor: str, overrides: Mapping[str, Any], wait_seconds: float) -> Checks:
    try:
        profile = profiles.load(executor, overrides)
    except UserError as error:
        return [
            _failed("profile", error),
            *_skipped(("scheduler", "partition", "request", "accounting", "probe job", "node"), "profile"),
        ]
    here = _here(probe.look())
    found = [_profile(executor, profile), *here]
    scheduler = _guarded("scheduler", _scheduler)
    found += scheduler
    if _fails(scheduler):
        return found + _skipped(("partition", "request", "accounting", "probe job", "node"), "scheduler")
    accounting, known = _accounting(), slurm_commands.partitions()
    places = _guarded("partition", lambda: _places(profile, known))
    found += places
    if _fails(places) or _fails([c for c in here if c.name == "home"]):
        needed = next((c.name for c in places if c.state == "failed"), "home")
        return [*found, *_skipped(["request"], needed), accounting, *_skipped(("probe job", "node"), needed)]
    with _directory() as directory:
        requests = _guarded("request", lambda: _requests(profile, known, directory))
        found += [*requests, accounting]
        if _fails(requests):
            return found + _skipped(("probe job", "node"), "request")
        return found + _guarded("probe job", lambda: _probe(profile, known, directory, wait_seconds))


def _profile(executor: str, profile: Profile) -> Check:
    if profiles.sent is not None:
        origin = "sent by the host that asked"
    else:
        origin = f"from {' and '.join(map(str, profiles.files()))}" if profiles.files() else "no executors.toml"
    fields = ", ".join(profile.plain())
    return Check(
        "profile", "ok", f"{executor}, {origin}" + (f"; sets {fields}" if fields else "; Slurm's own defaults")
    )


def _scheduler() -> Checks:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return [
            Check(
                "scheduler",
                "failed",
                f"not on PATH: {', '.join(missing)}",
                "run this on a login node of the cluster, or set executor.ssh",
            )
        ]
    try:
        version = slurm_commands.call(["scontrol", "--version"], 5.0).split()[-1]
        said = slurm_commands.call(["scontrol", "ping"], 10.0)
    except SlurmError as error:
        fix = "`scontrol ping` must say UP here; SLURM_CONF names the cluster's configuration where it is not the usual one"
        return [Check("scheduler", "failed", f"no controller of Slurm answers ({error})", fix)]
    start = time.monotonic()
    slurm_commands.partitions()
    took = 1000 * (time.monotonic() - start)
    down = re.findall(r"Slurmctld\((\w+)\) at (\S+) is DOWN", said)
    found = f"Slurm {version} answers in {took:.0f} ms"
    if down:
        return [
            Check(
                "scheduler",
                "warning",
                found + "".join(f"; its {role} controller {host} is down" for role, host in down),
            )
        ]
    return [Check("scheduler", "ok", found)]


def _places(profile: Profile, known: Mapping[str, Partition]) -> Checks:
    """The partitions of a profile: that they are there and up, that their nodes are as it says, and its time limit."""
    main = slurm.choose(known, profile.partition)
    if main is None:
        there = f"set executor.partition: {', '.join(known)}" if known else "`sinfo` shows what there is"
        return [Check("partition", "failed", "the cluster has no default partition", there)]
    found = [_partition("partition", main, profile.partition is None), _node_gpus(profile, main), _time(profile, main)]
    if profile.cpu_partition is not None:
        try:
            other = slurm.choose(known, profile.cpu_partition)
        except UserError as error:
            return [*found, _failed("cpu_partition", UserError(str(error).replace("executor.", "executor.cpu_", 1)))]
        if other is not None:
            found += [_partition("cpu_partition", other, False)]
            found += [c for c in [_time(profile, other)] if c.state != "ok"]
    return found


def _partition(name: str, part: Partition, default: bool) -> Check:
    counts = slurm_commands.call(["sinfo", "--noheader", f"--partition={part.name}", "--format=%F"], 5.0).split()
    totals = [sum(map(int, column)) for column in zip(*(c.split("/") for c in counts if c.replace("/", "").isdigit()))]
    working = sum(totals[:2]) if totals else part.nodes
    title = f"{part.name} (the default one)" if default else part.name
    each = f"{part.cpus} CPUs, {size(part.memory_mb << 20)}" + (f", {part.gpus} GPUs" if part.gpus else "")
    found = f"{title} is {'up' if part.available else 'not up'}: {part.nodes} node{'s' * (part.nodes != 1)} of {each}; {totals[1] if totals else '?'} idle"
    if not part.available:
        return Check(name, "failed", found, f"set executor.{name} to another one; `sinfo` shows them")
    if not working:
        return Check(
            name, "failed", f"{found}, and none in service", "`sinfo -R` tells why its nodes are down or drained"
        )
    return Check(name, "ok", found)


def _node_gpus(profile: Profile, part: Partition) -> Check:
    ours = f"executor.gpus_per_node={profile.gpus_per_node}"
    if profile.gpu_request == "none":
        return Check("gpus", "ok", f"not asked of Slurm (gpu_request=none); {profile.gpus_per_node} ranks a node")
    if profile.gpus_per_node > part.gpus:
        fix = (
            f"set executor.gpus_per_node={part.gpus}"
            if part.gpus
            else "set executor.gpu_request=none, or another executor.partition"
        )
        return Check("gpus", "failed", f"{ours}, a node of {part.name} has {part.gpus or 'none'}", fix)
    if profile.gpus_per_node < part.gpus:
        fix = f"set executor.gpus_per_node={part.gpus} to use them all"
        return Check("gpus", "warning", f"{ours}, a node of {part.name} has {part.gpus}", fix)
    return Check("gpus", "ok", f"{ours}, as a node has")


def _time(profile: Profile, part: Partition) -> Check:
    most = profiles.seconds(part.time) if re.fullmatch(r"[\d:-]+", part.time) else float("inf")
    limit = f"{part.time} of partition {part.name}"
    if profile.time is None:
        return Check(
            "time", "ok", f"executor.time is not set: the default of partition {part.name}, at most {part.time}"
        )
    asked = profiles.seconds(profile.time) or float("inf")
    if asked > most:
        return Check(
            "time",
            "failed",
            f"executor.time={profile.time} is more than {limit}",
            f"set executor.time={part.time}, or another partition",
        )
    warning = re.search(r"@(\d+)$", profile.signal)
    if warning and int(warning[1]) >= asked:
        found = f"executor.signal={profile.signal} comes as soon as a step of executor.time={profile.time} starts"
        return Check("time", "failed", found, "set executor.time to more")
    return Check("time", "ok", f"executor.time={profile.time} within {limit}")


def _requests(profile: Profile, known: Mapping[str, Partition], directory: Path) -> Checks:
    """Whether Slurm would take the script of a full node, and that of a step without GPUs."""
    found = []
    for name, uses_gpus in (("request", True), ("cpu request", False))[: 1 + (profile.cpu_partition is not None)]:
        placed = place_ranks(profile.gpus_per_node if uses_gpus else 1, profile.gpus_per_node)
        partition = slurm.choose(known, slurm.partition_of(profile, uses_gpus))
        asked = slurm.request("mimo:doctor", placed, profile, uses_gpus=uses_gpus, partition=partition)
        path = directory / "test.sh"
        path.write_text(slurm.script(asked, profile, directory, None))
        try:
            slurm_commands.would_run(str(path))
        except SlurmSilent:
            raise
        except SlurmError as error:
            found.append(_failed(name, slurm.explained(error, profile, known)))
            continue
        each = [(asked.tasks_per_node, "rank"), (asked.gpus, "GPU"), (asked.cpus, "CPU")]
        words = [f"{n} {what}{'s' * (n > 1)}" for n, what in each if n] + ["a rank"] * bool(asked.cpus)
        found.append(Check(name, "ok", f"Slurm would take a full node: {', '.join(words[:-1])} {words[-1]}"))
    return found


def _accounting() -> Check:
    fallback = "states then come from the jobs' own markers"
    start = time.monotonic()
    try:
        slurm_commands.call(
            ["sacct", "--allocations", "--noheader", "--starttime=now-1minutes", "--format=JobIDRaw"], 3.0
        )
    except SlurmError as error:
        return Check(
            "accounting",
            "warning",
            f"off or down ({error}); {fallback}",
            "nothing needs it; ended jobs are told apart by their records",
        )
    return Check("accounting", "ok", f"sacct answers in {1000 * (time.monotonic() - start):.0f} ms")


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """A directory in the records' home for what the checks write, gone at the end."""
    directory = paths.home() / "doctor" / paths.new_id("doctor")
    base.make_record(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            directory.parent.rmdir()


# ----------------------------------------------------------------------------------------------------------- the probe


def _probe(profile: Profile, known: Mapping[str, Partition], directory: Path, wait_seconds: float) -> Checks:
    partition = slurm.choose(known, profile.partition)
    reduced, asked = slurm_probe.request(f"mimo:{directory.name}", profile, partition)
    try:
        came = slurm_probe.run(reduced, asked, directory, provenance.ship_code, wait_seconds)
    except SlurmSilent:
        raise
    except SlurmError as error:
        raise slurm.explained(error, profile, known) from None
    job, title = came.job, f"job {came.job.job_id}"
    if came.rank is None:
        skipped = _skipped(["node"], "probe job")
        if job.waiting:
            why = f" ({job.reason})" if job.reason else ""
            found = f"{title} waited more than {wait_seconds:g} s in the queue{why} and was cancelled"
            fix = "`squeue --start` shows when jobs would start; try again later, or set executor.qos or another executor.partition"
            return [Check("probe job", "warning", found, fix), *skipped]
        where = f" on {job.nodes}" if job.nodes else ""
        return [Check("probe job", "failed", f"{title}{where} {_ending(came)}", _evidence(came, profile)), *skipped]
    if came.rank.get("schema") != probe.SCHEMA:
        fix = "set executor.code=snapshot, or install the same version of mimo-jobs there"
        return [
            Check("probe job", "failed", f"{title} was answered by another version of mimo-jobs", fix),
            *_skipped(["node"], "probe job"),
        ]
    home = str(paths.home())
    sight = came.rank | {"disks": {home if p == str(directory) else p: d for p, d in came.rank["disks"].items()}}
    found = [Check("probe job", "ok", f"{title} ran on {came.rank['host']} after {came.waited:.1f} s in the queue")]
    return [*found, *machine_checks.filesystem(came, paths.home()), *machine_checks.batch_host(came, profile),
            *machine_checks.ranks_place(sight, profile, asked)]  # fmt: skip


def _ending(came: slurm_probe.Probed) -> str:
    if came.job.active:
        return "was still running and was cancelled"
    if came.log is None:
        return f"{slurm_commands.described(came.job)}, and nothing that it wrote came here"
    return f"{slurm_commands.described(came.job)} before its rank could look around"


def _evidence(came: slurm_probe.Probed, profile: Profile) -> str:
    """The field that the log points to, and the log."""
    if came.log is None:
        return "set MIMO_JOBS_HOME to a directory that the compute nodes share with this host"
    lines = "\n".join(line[:300] for line in came.log)
    return f"{_advice(lines, profile)}; " + (f"its log ends:\n{lines}" if lines else "its log is empty")


def _advice(log: str, profile: Profile) -> str:
    """The field to change, by what bash, srun, pyxis, the modules or Python say."""
    python = re.escape(slurm.interpreter(profile))
    venv = f"executor.venv={profile.venv}" if profile.venv else f"{sys.prefix} (executor.venv is not set)"
    image = profile.container_image is not None
    rules = (
        (
            rf"{python}: .*(No such file|cannot execute|[Pp]ermission denied)|{python}: [Nn]o such file",
            f"{venv} has no Python on the node: set executor.venv to a virtual environment on the shared filesystem",
        ),
        (
            r"unrecognized option '--(no-)?container",
            "srun has no pyxis there: set executor.container_image=none, or ask for it",
        ),
        (r"pyxis|enroot", "see executor.container_image and executor.container_mounts"),
        (
            r"module: (command )?not found|ModuleCmd|Lmod|Unable to locate a modulefile",
            f"see executor.modules={','.join(profile.modules)}",
        ),
        (
            r"No module named '?(launchers|mimo_jobs)",
            "set executor.code=snapshot, or install mimo-jobs " + ("in the image" if image else f"in {venv}"),
        ),
        (r"execve\(\): .*No such file", "see executor.container_python" if image else f"see {venv}"),
    )
    known = next((advice for pattern, advice in rules if re.search(pattern, log)), None)
    shell = [f"executor.{name}" for name in ("setup", "modules", "environment") if getattr(profile, name)]
    return known or (f"see {' and '.join(shell)}" if shell else "see its script's options in the profile")
