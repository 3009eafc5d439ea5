"""Executors as profiles: ``--executor slurm`` or ``slurm:NAME``, read from ``executors.toml``. Standard library only.

```toml
[slurm]                      # --executor slurm, and what every named cluster starts from
account = "research"
partition = "batch"

[slurm.eos]                  # --executor slurm:eos
partition = "h100"
container_image = "/images/train.sqsh"
environment = { NCCL_DEBUG = "WARN" }
```

The user's file is ``~/.config/mimo_jobs/executors.toml``, the project's ``executors.toml`` in the working directory or above
it; the project's wins, field by field, and ``executor.FIELD=value`` on the command line wins over both. Values go to Slurm as
data: what could be read as anything else is refused here. ``setup`` is the one field that a shell runs.
"""

import dataclasses
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mimo_jobs.errors import UsageError, UserError, did_you_mean

FILE_NAME = "executors.toml"
KIND = "slurm"

NAME, ANY, OPTION = r"[A-Za-z0-9_][\w.,@+:=/-]*", r"[^\0]+", r"--[a-z][a-z0-9-]*(=[^\0\n\r'\\]*)?"
Name = Annotated[str, "name", NAME]
Expression = Annotated[str, "Slurm expression", r"[\w.,@+:=/&|!*()\[\]-]+"]
Limit = Annotated[str, "minutes, HH:MM:SS or D-HH:MM:SS", r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}"]
Memory = Annotated[str, "memory such as 64G", r"\d+[KMGT]?"]
Signal = Annotated[
    str, "signal and seconds before the limit, such as USR1@120", r"(B:)?(USR1|USR2|TERM|INT)(@\d{1,5})?"
]
Path_ = Annotated[str, "absolute path", r"(/|~/)[^\0\n]*"]
Text = Annotated[str, "text", ANY]
Line = Annotated[str, "one line", r"[^\0\n\r]+"]
Mount = Annotated[str, "mount SOURCE:TARGET[:FLAGS] without a comma, which pyxis would split", r"[^\0,]+"]
Option = Annotated[str, "option such as --comment=x", OPTION]


@dataclass(frozen=True)
class Profile:
    """Where and how jobs run on a Slurm cluster; see docs/slurm.md.

    Attributes:
        account: Slurm account
        partition: partition; without it Slurm's default
        cpu_partition: partition of steps that need no GPU (verify, and arrays over shards); without it the same
        qos: quality of service
        reservation: reservation
        constraint: node features
        nodelist: nodes to use
        exclude: nodes not to use
        time: time limit of a step
        signal: signal that asks a step to stop and be requeued
        gpus_per_node: GPUs, and so ranks, of a node
        gpu_request: how GPUs are asked for
        gpu: model of the GPU, such as H100; memory is checked against it
        gpu_memory: memory of a GPU in GB, where the model is not a known one
        cpus_per_task: CPUs of a rank; without it the node's share
        mem: host memory of a node
        exclusive: whole nodes
        retries: times that a step is repeated after a crash
        container_image: image for pyxis; the ranks run in it
        container_mounts: mounts SOURCE:TARGET[:FLAGS] besides the job's own directories
        container_python: Python in the image
        environment: variables of the ranks
        venv: virtual environment that the jobs use, on the shared filesystem; without it the one of this command
        modules: environment modules to load
        setup: shell lines before the job starts, the only field that a shell runs
        code: snapshot ships this command's code with the job; installed uses what the venv or image holds
        network_interface: interface of NCCL and Gloo
        sbatch: further options of sbatch
        srun: further options of srun
        ssh: login node where commands run instead, such as user@login.example.org (needs venv)
        on_finish: command that is given the step's JSON when it ends
    """

    account: Name | None = None
    partition: Name | None = None
    cpu_partition: Name | None = None
    qos: Name | None = None
    reservation: Name | None = None
    constraint: Expression | None = None
    nodelist: Expression | None = None
    exclude: Expression | None = None
    time: Limit | None = None
    signal: Signal = "USR1@60"
    gpus_per_node: int = 8
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    gpu: Name | None = None
    gpu_memory: int | None = None
    cpus_per_task: int | None = None
    mem: Memory | None = None
    exclusive: bool = False
    retries: int = 1
    container_image: Text | None = None
    container_mounts: tuple[Mount, ...] = ()
    container_python: Text = "python3"
    environment: Mapping[str, str] = field(default_factory=dict)
    venv: Path_ | None = None
    modules: tuple[Name, ...] = ()
    setup: tuple[Line, ...] = ()
    code: Literal["snapshot", "installed"] = "snapshot"
    network_interface: Name | None = None
    sbatch: tuple[Option, ...] = ()
    srun: tuple[Option, ...] = ()
    ssh: Name | None = None
    on_finish: Text | None = None

    def plain(self) -> dict[str, Any]:
        """JSON of the fields that are not the default's."""
        return {
            f.name: _plain(value)
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != _default(f) and value is not None
        }


sent: Mapping[str, Any] | None = (
    None  # the profile that came over ssh with the command; files and overrides are in it already
)

LEAST = {"gpus_per_node": 1, "gpu_memory": 1, "cpus_per_task": 1, "retries": 0}
OWN_ELSEWHERE = {  # sbatch options that fields, or the launcher itself, already set
    "--account": "account", "--partition": "partition", "--qos": "qos", "--time": "time", "--signal": "signal",
    "--gpus-per-node": "gpus_per_node", "--gres": "gpu_request", "--mem": "mem", "--exclusive": "exclusive",
    "--cpus-per-task": "cpus_per_task", "--reservation": "reservation", "--constraint": "constraint",
    "--nodelist": "nodelist", "--exclude": "exclude", "--container-image": "container_image",
    "--container-mounts": "container_mounts", "--nodes": "", "--ntasks": "", "--ntasks-per-node": "", "--output": "",
    "--error": "", "--dependency": "", "--job-name": "", "--wrap": "", "--array": "", "--requeue": "", "--no-requeue": "",
    "--test-only": "", "--wait": "", "--help": "", "--usage": "", "--version": "", "--hold": "", "--clusters": "", "--chdir": "", "--export": "environment", "--parsable": "", "--kill-on-invalid-dep": "", "--open-mode": "",
}  # fmt: skip


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def _default(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def files() -> list[Path]:
    """The profile files that there are, the one that wins last."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    user = Path(config).expanduser() / "mimo_jobs" / FILE_NAME
    here = Path.cwd()
    project = next((p / FILE_NAME for p in (here, *here.parents) if (p / FILE_NAME).is_file()), None)
    return [p for p in (user, project) if p is not None and p.is_file()]


def load(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """The profile of ``slurm`` or ``slurm:NAME`` with ``overrides`` (field -> value; ``environment.X`` -> text).

    Raises:
        UsageError: no such profile, or a field, value or type that is wrong; names the file and the field.
    """
    if sent is not None:
        return from_plain(sent, {})
    cluster = name.partition(":")[2]
    values: dict[str, Any] = {}
    known, found = [], False
    for path in files():
        table = _table(path)
        clusters = {k: v for k, v in table.items() if isinstance(v, dict) and k not in _fields()}
        known += clusters
        found = found or cluster in clusters
        common = {k: v for k, v in table.items() if k not in clusters}
        for (
            name_of,
            part,
        ) in clusters.items():  # also those that are not asked for: a misspelled field looks like a cluster
            for key, value in part.items():
                _checked(f"{path}: [{KIND}.{name_of}] {key}", key, value)
        for where, part in ((f"{path}: [{KIND}]", common), (f"{path}: [{KIND}.{cluster}]", clusters.get(cluster, {}))):
            _merge(values, {k: _checked(f"{where} {k}", k, v) for k, v in part.items()})
    if cluster and not found:
        hint = did_you_mean(cluster, known) or (f"; there are {', '.join(sorted(set(known)))}" if known else "")
        places = ", ".join(map(str, files())) or f"~/.config/mimo_jobs/{FILE_NAME} or ./{FILE_NAME}"
        raise UsageError(f"--executor {name}: no [{KIND}.{cluster}] in {places}{hint}")
    return _overridden(values, overrides or {}, name)


def from_plain(plain: Mapping[str, Any], overrides: Mapping[str, Any]) -> Profile:
    """A recorded profile (`Profile.plain`), with ``overrides`` as in `load`. Raises `UsageError` for a wrong one."""
    return _overridden({k: _checked(f"profile.{k}", k, v) for k, v in plain.items()}, overrides, KIND)


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any], name: str) -> Profile:
    for key, value in overrides.items():
        if value is None:
            values.pop(key, None)
            continue
        top, dot, variable = key.partition(".")
        part = {top: {variable: value}} if dot else {top: value}
        _merge(values, {k: _checked(f"executor.{key}", k, v) for k, v in part.items()})
    return _whole(Profile(**values), name)


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value


def _whole(profile: Profile, name: str) -> Profile:
    """What fields mean together."""
    if profile.ssh and not profile.venv:
        raise UsageError(f"--executor {name}: ssh={profile.ssh} needs venv, the virtual environment on that host")
    if profile.on_finish is not None and not hook_words(profile.on_finish):
        raise UsageError("executor.on_finish: expected a command")
    return profile


def hook_words(command: str) -> list[str]:
    """The words of an ``on_finish`` command. Raises `UsageError` for quotes that do not close."""
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UsageError(f"on_finish={command!r}: {error}; it is split into words, not run by a shell") from None


def _table(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    for key in found:
        if key != KIND:
            raise UsageError(f"{path}: unknown table [{key}]; profiles are [{KIND}] and [{KIND}.NAME]")
    table = found.get(KIND, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {KIND}: expected a table [{KIND}]")
    return table


def _fields() -> dict[str, Any]:
    hints = typing.get_type_hints(Profile, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(Profile)}


def _checked(where: str, name: str, value: Any) -> Any:
    """A value of TOML or of the command line as the field's type."""
    hints = _fields()
    if name not in hints:
        hint = did_you_mean(name, hints) or f"; the fields are {', '.join(hints)}"
        raise UsageError(f"{where}: unknown field {name!r}{hint}")
    hint = next(m for m in _members(hints[name]) if m is not type(None))
    if name == "environment":
        return _environment(where, value)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where}={value!r}: expected a list")
        item = typing.get_args(hint)[0]
        return tuple(_scalar(f"{where}[{i}]", name, item, v) for i, v in enumerate(value))
    return _scalar(where, name, hint, value)


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of ``X | None``, or the type itself."""
    arguments = typing.get_args(hint)
    return arguments if type(None) in arguments else (hint,)


def _scalar(where: str, name: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise UsageError(f"{where}={value!r}: expected one of {', '.join(typing.get_args(hint))}")
    if hint in (int, bool):
        if type(value) is not hint:
            raise UsageError(f"{where}={value!r}: expected {'an integer' if hint is int else 'true or false'}")
        if hint is int and value < LEAST[name]:
            raise UsageError(f"{where}={value}: expected an integer of at least {LEAST[name]}")
        return value
    _, expected, pattern = typing.get_args(hint)
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII if pattern != ANY else 0):
        raise UsageError(f"{where}={value!r}: expected {expected}{_allowed(pattern)}")
    if hint is Option and (own := _own_option(value.partition("=")[0])):
        option, instead = own, f"; set {OWN_ELSEWHERE[own]}" if OWN_ELSEWHERE[own] else ""
        raise UsageError(f"{where}={value!r}: {option} is set by the launcher{instead}")
    return value


def _own_option(option: str) -> str | None:
    """The option of sbatch that is ours to set and that this one is, or abbreviates (getopt_long(3))."""
    return next((own for own in OWN_ELSEWHERE if own.startswith(option)), None)


def _allowed(pattern: str) -> str:
    """What characters a name may have, in words."""
    if pattern == NAME:
        return " of letters, digits and _ . , @ + : = / - (Slurm's own names have no others)"
    if pattern == OPTION:
        return ", without quotes, backslashes or line ends"
    return ""


def _environment(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}={value!r}: expected a table of variables")
    for name, text in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"{where}: {name!r} is no name of an environment variable")
        if not isinstance(text, str) or "\0" in text:
            raise UsageError(
                f"{where}.{name}={text!r}: expected text"
                if isinstance(text, str)
                else f"{where}.{name}={text!r}: expected text; write it in quotes"
            )
    return dict(value)


def parse(given: Mapping[str, str]) -> dict[str, Any]:
    """``executor.`` fields of a command line (without the prefix) as values: ``{"partition": "big", "retries": "2"}``.

    Lists are separated by commas; ``none`` empties a field.

    Raises:
        UsageError: an unknown field, or a value that is not of its type.
    """
    return {name: _parsed(name, text) for name, text in given.items()}


def _parsed(name: str, text: str) -> Any:
    top, dot, _ = name.partition(".")
    hints = _fields()
    if top not in hints or (dot and top != "environment") or name == "environment":
        if name == "environment":
            raise UsageError("executor.environment is a group; set executor.environment.NAME=value")
        hint = did_you_mean(top, hints) or f"; the fields are {', '.join(hints)}"
        raise UsageError(f"unknown field 'executor.{name}'{hint.replace(chr(39), chr(39) + 'executor.', 1)}")
    if top == "environment":
        return text
    hint = next(m for m in _members(hints[top]) if m is not type(None))
    if text.lower() == "none" and len(_members(hints[top])) > 1:
        return None
    if typing.get_origin(hint) is tuple:
        return tuple(text.split(",")) if text and text.lower() != "none" else ()
    if hint is int:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,9}", text) else text
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return text


def signal_name(signal: str) -> str:
    """``B:USR1@120`` -> ``USR1``."""
    return signal.removeprefix("B:").partition("@")[0]


def signal_seconds(signal: str) -> int:
    """How long before the limit: ``B:USR1@120`` -> 120; Slurm's own 60 where that is not said."""
    return int(signal.partition("@")[2] or 60)


def seconds(limit: str) -> int:
    """Seconds of a Slurm time limit (sbatch(1), --time): ``30`` are minutes, ``1:30`` minutes and seconds, ``2-12`` days and hours."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    if dash:
        parts += [0] * (3 - len(parts))
        return int(days) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)
