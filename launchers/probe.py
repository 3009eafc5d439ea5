"""What a machine is like, seen from inside a job: ``python -m launchers.probe OUT.json`` writes it down and exits.

``python -m launchers.probe DIRECTORY`` is what the batch script of ``nemo-run doctor`` becomes: it looks at the batch host and then
becomes the ``srun`` of DIRECTORY/PROBE.json, which starts the above where a rank would run. Standard library only and Python 3.8
or later, because it must also run, and tell, where this package does not.
"""

from __future__ import annotations

import fcntl
import glob
import importlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1
PLAN = "PROBE.json"
NONCE = "nonce"
BATCH = "batch.json"
RANK = "rank.json"
PACKAGES = ("mimo-jobs", "torch", "megatron-core", "transformers")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_CPUS_ON_NODE")
BATCH_MODULES = ("launchers.slurm_step",)
RANK_MODULES = (
    "mimo_jobs.worker",
    "mimo_jobs.conversion.importer",
    "blake3",
    "ml_dtypes",
)  # the last two are imported late
SMI_SECONDS = 10.0
SIOCGIFADDR = 0x8915  # linux/sockios.h
VIRTUAL = ("lo", "docker", "veth", "br-", "virbr", "cni", "flannel", "cali", "ifb", "tun", "tap", "dummy")


def look(places: Iterable[str] = (), smi_seconds: float = SMI_SECONDS) -> dict[str, Any]:
    """Plain JSON about this machine: interpreter, packages, GPUs, network, memory, CPUs, and the disks of ``places``."""
    return {
        "schema": SCHEMA, "time": time.time(), "host": os.uname().nodename,
        "python": {"version": ".".join(map(str, sys.version_info[:3])), "executable": sys.executable},
        "versions": {name: version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "gpus": gpus(smi_seconds), "interfaces": interfaces(), "memory": memory(), "cpus": cpus(),
        "disks": {place: disk(place) for place in places},
    }  # fmt: skip


def version(package: str) -> str | None:
    """The installed version, None without one; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpus(seconds: float = SMI_SECONDS) -> dict[str, Any]:
    """``devices``: /dev/nvidia0 ...; ``found``: name and bytes of memory as the driver has them; ``problem``: why it has none."""
    devices = sorted(glob.glob("/dev/nvidia[0-9]*"))
    if shutil.which("nvidia-smi") is None:
        models = []
        for path in sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")):
            lines = dict(line.split(":", 1) for line in _text(path).splitlines() if ":" in line)
            models.append({"name": lines.get("Model", "unknown").strip(), "memory": None})
        return {"devices": devices, "found": models, "problem": ""}
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"devices": devices, "found": [], "problem": f"nvidia-smi did not answer within {seconds:g} s"}
    except OSError as error:
        return {"devices": devices, "found": [], "problem": f"nvidia-smi: {error}"}
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        problem = f"nvidia-smi: {' '.join(said.split()) or f'exit code {done.returncode}'}"
        return {"devices": devices, "found": [], "problem": problem}
    found = []
    for line in said.splitlines():
        name, _, size = line.rpartition(",")
        if name:
            found.append({"name": name.strip(), "memory": int(size) << 20 if size.strip().isdigit() else None})
    return {"devices": devices, "found": found, "problem": ""}


def interfaces() -> dict[str, dict[str, Any]]:
    """Network interfaces: name -> ``up``, IPv4 ``address`` or None, ``virtual``: of a container or this host alone."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for path in sorted(glob.glob("/sys/class/net/*/operstate")):
            name = path.split("/")[-2]
            # drivers that do not say whether they have a link leave "unknown" (kernel: Documentation/networking/operstates.rst)
            up = _text(path).strip() in ("up", "unknown")
            found[name] = {"up": up, "address": _address(asked, name), "virtual": name.startswith(VIRTUAL)}
    return found


def _address(asked: socket.socket, name: str) -> str | None:
    try:
        answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])


def memory() -> dict[str, int | None]:
    """Bytes of host memory: ``total``, ``available``, and the ``limit`` of this process's control group, None without one."""
    lines = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines() if ":" in line)
    total, available = (_leading(lines.get(name, "")) << 10 for name in ("MemTotal", "MemAvailable"))
    limits = [n for n in map(_leading, _cgroup_limits()) if 0 < n < total]
    return {"total": total, "available": available, "limit": min(limits) if limits else None}


def _cgroup_limits() -> list[str]:
    """What limits memory: of this group and those above it, in version 2 and version 1 of control groups."""
    found = []
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (
            ("/sys/fs/cgroup", "memory.max") if not controllers else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        )
        for group in (Path(path), *Path(path).parents):
            found.append(_text(f"{root}{group}/{name}"))
    return found


def cpus() -> dict[str, int]:
    """``usable`` by this process, and in the ``machine``."""
    return {"usable": len(os.sched_getaffinity(0)), "machine": os.cpu_count() or 0}


def disk(place: str) -> dict[str, Any]:
    """``free`` bytes where a path is or would be, or the ``problem``."""
    path = Path(place)
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return {"free": shutil.disk_usage(path).free}
    except OSError as error:
        return {"problem": str(error)}


def imported(modules: Iterable[str]) -> dict[str, str]:
    """Module -> the error of importing it, empty when there is none."""
    found = {}
    for name in modules:
        try:
            importlib.import_module(name)
            found[name] = ""
        except BaseException as error:  # a module may even exit
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _leading(text: str) -> int:
    digits = text.split()[:1]
    return int(digits[0]) if digits and digits[0].isdigit() else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _write(path: Path, value: dict[str, Any]) -> None:
    """A file that is there only when it is whole."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(value) + "\n")
    os.replace(partial, path)


def _look_as_rank(out: Path) -> None:
    found = look([str(out.parent), "/tmp"])
    found["imports"] = imported(RANK_MODULES)
    found["nonce"] = _text(str(out.with_name(NONCE)))
    found["time"] = time.time()
    _write(out, found)


def _start(directory: Path) -> None:
    """Look at the batch host, then become the ``srun`` that looks where a rank would be."""
    plan = json.loads((directory / PLAN).read_text())
    found = {
        "schema": SCHEMA,
        "host": os.uname().nodename,
        "python": sys.executable,
        "imports": imported(BATCH_MODULES),
    }
    found["commands"] = {name: shutil.which(name) for name in plan["commands"]}
    _write(directory / BATCH, found)
    os.execvpe(plan["srun"][0], plan["srun"], {**os.environ, **plan["environment"]})


def main(argv: list[str] | None = None) -> int:
    """Write OUT.json, or start what DIRECTORY/PROBE.json says."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m launchers.probe OUT.json", file=sys.stderr)
        return 2
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm may send a job's --signal a minute early; srun inherits this
    try:
        place = Path(arguments[0])
        _start(place) if place.is_dir() else _look_as_rank(place)
    except (OSError, ValueError, KeyError) as error:
        print(f"probe: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
