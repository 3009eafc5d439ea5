"""What an output was made from, as a small dict that it carries: so a step that is done is known, and why another is not.

An identity names the job, the version of its rules, the settings that change bytes, and its inputs: for a Hugging Face checkpoint
a digest over file names, sizes, modification times and small files; for an output of another step the digest of *its* identity. So
the identities of a whole chain are known before any of it ran. The layout is not part of it: every layout makes the same bytes.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint.manifest import (
    MANIFEST_NAME,
    PARITY_NAME,
    companion_files,
    file_digest,
    is_mimo,
    read_config,
    read_manifest,
)
from mimo_jobs.checkpoint.peft_dir import CONFIG_NAME, read_peft
from mimo_jobs.checkpoint.peft_dir import MANIFEST_NAME as PEFT_MANIFEST_NAME
from mimo_jobs.conversion.options import parse_options
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.weights.json_files import read_bytes, read_object
from mimo_jobs.weights.safetensors_io import HfCheckpoint, open_hf

Identity = dict[str, Any]
_MANIFESTS = {"import_hf": MANIFEST_NAME, "sft": MANIFEST_NAME, "lora": PEFT_MANIFEST_NAME, "export_hf": PARITY_NAME}
CHANGED = "{} is not what it was when this run was planned; it was left as it is: run the pipeline again, which looks at it anew"


def digest(identity: Mapping[str, Any]) -> str:
    """blake3 of an identity's canonical JSON."""
    return file_digest(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode())


def of_hf(directory: Path, hf: HfCheckpoint | None = None) -> str:
    """The revision of a Hugging Face checkpoint, from its headers and small files: no tensor is read.

    Raises:
        UserError: it cannot be read.
    """
    hf = hf or open_hf(directory)
    weights = []
    for name, shard in sorted(hf.shards.items()):
        stat = (directory / name).stat()
        weights.append([name, stat.st_size, stat.st_mtime_ns, file_digest(shard.header)])
    small = [[p.name, file_digest(read_bytes(p))] for p in companion_files(directory)]
    return digest({"weights": weights, "companions": small, "index": file_digest(hf.index or b"")})


def of_import(source: str, rules_version: int, dtype: str | None, mtp: str) -> Identity:
    """The identity of a MIMO checkpoint; ``source`` is `of_hf` of what was read."""
    return {
        "job": "import_hf",
        "rules": rules_version,
        "source": source,
        "dtype": parse_options(dtype, mtp),
        "mtp": mtp,
    }


def of_export(
    source: str, rules_version: int, dtype: str | None, mtp: str, verify: bool, adapter: str | None = None
) -> Identity:
    """The identity of an export; ``source`` is `of_mimo` of the checkpoint, ``adapter`` `of_adapter` of what is merged."""
    made = {
        "job": "export_hf", "rules": rules_version, "source": source, "dtype": parse_options(dtype, mtp), "mtp": mtp, "verify": verify,
    }  # fmt: skip
    return made | ({"adapter": adapter} if adapter else {})


def of_adapter(directory: Path) -> str:
    """The revision of a PEFT directory: of the identity it carries, else of its files: no tensor is read.

    Raises:
        UserError: it cannot be read.
    """
    adapter = read_peft(directory)
    if adapter.identity:
        return digest(adapter.identity)
    stat = (directory / adapter.shard.name).stat()
    config = file_digest(read_bytes(directory / CONFIG_NAME))
    return digest({"config": config, "weights": [file_digest(adapter.shard.header), stat.st_size, stat.st_mtime_ns]})


def of_verify(left: str, right: str, dtype: str | None, mtp: str) -> Identity:
    """The identity of a certificate; both sides are `of_hf`."""
    return {"job": "verify", "left": left, "right": right, "dtype": parse_options(dtype, mtp), "mtp": mtp}


TRAINING = ("sft", "lora")
_ELSEWHERE = ("source", "data", "target", "layout", "validation", "saving", "logging", "stop", "overwrite")
_SPEED = ("micro_batch_size", "sequence_parallel", "recompute")
_SPEED_OF_DATA = ("workers", "prefetch")
_MEMORY_OF_OPTIMIZER = ("state",)


def of_training(job: str, source: str, rules_version: int, arguments: Mapping[str, Any]) -> Identity:
    """The identity of what a fine-tuning run makes.

    The layout and how a batch is worked off change its numbers by rounding only, so they are not part of it: a run that needs
    too much memory may go on with others.

    Args:
        source: `of_checkpoint` of what the run begins with.
    """
    settings = {n: _plain(v) for n, v in arguments.items() if n not in (*_ELSEWHERE, *_SPEED)}
    settings["dataset"] = {n: v for n, v in settings["dataset"].items() if n not in _SPEED_OF_DATA}
    settings["optimizer"] = {n: v for n, v in settings["optimizer"].items() if n not in _MEMORY_OF_OPTIMIZER}
    if adapter := settings.get("lora", {}).get("adapter"):
        settings["lora"] = {**settings["lora"], "adapter": of_adapter(Path(adapter))}
    return {"job": job, "rules": rules_version, "source": source, "data": of_data(arguments["data"]), **settings}


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def of_data(data: str) -> str:
    """The revision of a data set: of local files their names, sizes and modification times, else the hub id itself.

    Raises:
        UserError: a local path that is not there.
    """
    place = Path(data)
    if not place.exists():
        return data
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    stats = [(str(p.relative_to(place.parent)), p.stat()) for p in files]
    return digest({"files": [[name, s.st_size, s.st_mtime_ns] for name, s in stats]})


def of_checkpoint(directory: Path) -> str:
    """`of_mimo` or `of_hf`, whichever it is."""
    return of_mimo(directory) if is_mimo(directory) else of_hf(directory)


def of_mimo(directory: Path) -> str:
    """The revision of a MIMO checkpoint: of the identity it carries, else of its manifest."""
    recorded = read_manifest(directory).identity
    return digest(recorded) if recorded else file_digest(read_bytes(directory / MANIFEST_NAME))


def recorded(job: str, place: Path) -> Identity | None:
    """The identity that an output carries, None when it is not there; its manifest is checked.

    Raises:
        UserError: something else is there, or the output is damaged.
    """
    if not place.exists():
        return None
    if job in ("import_hf", "sft"):
        return read_manifest(place).identity or {}
    if job == "lora":
        if not (place / PEFT_MANIFEST_NAME).is_file():
            raise UserError(f"{place}: has no {PEFT_MANIFEST_NAME}: not an adapter of mimo_jobs")
        return read_peft(place).identity
    if job == "verify":
        found = read_object(place)
        if found.get("kind") != "verify":
            raise UserError(f"{place}: is no certificate of mimo_jobs")
        return found.get("identity") or {}
    open_hf(place)
    if not (place / PARITY_NAME).is_file():
        raise UserError(f"{place}: has no {PARITY_NAME}: not an export of mimo_jobs")
    return read_object(place / PARITY_NAME).get("identity") or {}


def rules_of(directory: Path) -> int:
    """The version of the rules of a MIMO checkpoint, or for a Hugging Face checkpoint."""
    if is_mimo(directory):
        return read_manifest(directory).rules_version
    return family_of(read_config(directory), directory / "config.json").rules_version


def is_ours(job: str, place: Path) -> bool:
    """Whether what lies there, damaged perhaps, was written by such a job: replacing it loses nothing that cannot be made again."""
    if job == "verify":
        with contextlib.suppress(OSError):
            return b'"kind": "verify"' in place.read_bytes()[:200]
        return False
    return (place / _MANIFESTS[job]).is_file()


def revision(job: str, place: Path) -> str:
    """A digest of the manifest of an output, damaged or not; empty when it has none."""
    manifest = place / _MANIFESTS[job] if job in _MANIFESTS else place
    return file_digest(manifest.read_bytes()) if manifest.is_file() else ""


def expected(job: str, arguments: Mapping[str, Any], earlier: Mapping[str, Identity]) -> Identity | None:
    """The identity that a job's output will carry; None for jobs whose outputs carry none.

    Args:
        earlier: output directory -> identity, of steps of the same chain that will have made it by then.

    Raises:
        UserError: an input cannot be read.
    """
    if job == "import_hf":
        model = Path(arguments["model"])
        return of_import(of_hf(model), rules_of(model), arguments["dtype"], arguments["mtp"])
    if job == "export_hf":
        made = earlier.get(arguments["source"])
        source = Path(arguments["source"])
        rules = made["rules"] if made else rules_of(source)
        revision = digest(made) if made else of_mimo(source)
        adapter = arguments.get("adapter")
        if adapter:
            adapter = digest(earlier[adapter]) if adapter in earlier else of_adapter(Path(adapter))
        return of_export(revision, rules, arguments["dtype"], arguments["mtp"], arguments["verify"], adapter)
    if job in TRAINING:
        made, source = earlier.get(arguments["source"]), Path(arguments["source"])
        rules = made["rules"] if made else rules_of(source)
        return of_training(job, digest(made) if made else of_checkpoint(source), rules, arguments)
    if job == "verify" and arguments.get("certificate"):
        left, right = (of_hf(Path(arguments[side])) for side in ("left", "right"))
        return of_verify(left, right, arguments["dtype"], arguments["mtp"])
    return None


def place_of(job: str, arguments: Mapping[str, Any]) -> Path | None:
    """Where a job's output lies, None when it leaves none that carries an identity."""
    name = "target" if job in _MANIFESTS else {"verify": "certificate"}.get(job)
    return Path(arguments[name]) if name and arguments.get(name) else None


def is_complete(job: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a job's output is there already and was made from just these inputs and settings."""
    place = place_of(job, arguments)
    try:
        return place is not None and place.exists() and recorded(job, place) == expected(job, arguments, {})
    except UserError:
        return False


NAMES = {
    "rules": "the conversion rules", "source": "the source", "dtype": "dtype", "mtp": "mtp", "verify": "verify", "left": "left",
    "right": "right", "job": "the job", "adapter": "the adapter", "data": "the data",
}  # fmt: skip


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why an output has to be made again, in words; empty when it has not."""
    if not before:
        return "it does not say what it was made from"
    changed = []
    before, now = _flat(before), _flat(now)
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old != new:
            short = any(isinstance(v, str) and len(v) == 64 for v in (old, new))
            changed.append(
                f"{NAMES.get(name, name)} changed"
                if short
                else f"{NAMES.get(name, name)} was {_word(old)}, now {_word(new)}"
            )
    return "; ".join(changed)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer": {"lr": 1e-5}}`` -> ``{"optimizer.lr": 1e-5}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _word(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
