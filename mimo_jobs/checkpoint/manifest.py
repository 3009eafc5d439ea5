"""The manifest of a MIMO checkpoint: what makes its directory self-contained, and the last file to appear in it.

```
CHECKPOINT/
  mimo.json                manifest (last)
  .metadata metadata.json  torch_dist (megatron-core)
  __<rank>_0.distcp        weights, one file a rank
  passed_through.safetensors
  hf/                      config, tokenizer, processor, chat template, index ... of the source, byte for byte
  headers/<shard>.json     safetensors headers that an export writes
```
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, get_origin

from mimo_jobs.errors import UserError
from mimo_jobs.weights.json_files import read_bytes, read_object

MANIFEST_NAME = "mimo.json"
HF_DIR = "hf"
HEADERS_DIR = "headers"
PARITY_NAME = "parity.json"  # of an export; it speaks of that directory only, so an import leaves it behind
PASSED_THROUGH_NAME = "passed_through.safetensors"
FORMAT = 1
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)


@dataclass(frozen=True)
class Manifest:
    """Contents of ``mimo.json``.

    Attributes:
        model_type, rules_version: the family and the version of its rules that wrote the checkpoint.
        config: the HF config that an export writes.
        source: where the weights came from: path, tensors, bytes.
        job: what made the weights, ``import_hf`` or ``sft``.
        digests: HF name -> blake3 of its bytes in the dtype that the checkpoint holds it in (`exporter.held_tensors`).
        casts: HF name -> [dtype before, dtype after], of tensors that were cast when they were imported.
        aliases: tied HF names that the export repeats -> the name they repeat.
        passed_through: HF names carried untouched; ``dropped``: those left out on request.
        layout: component -> sizes, of the job that wrote it; any layout can read it.
        files: file name -> bytes, every weight file of the checkpoint.
        companions: path below the checkpoint -> blake3, every file that an export copies or reads beside the weights.
        versions: packages that wrote it.
        identity: what it was made from (`conversion.identity`); empty in checkpoints of earlier versions.
    """

    model_type: str
    rules_version: int
    config: dict[str, Any]
    source: dict[str, Any]
    layout: dict[str, dict[str, int]]
    job: str = "import_hf"
    digests: dict[str, str] = field(default_factory=dict)
    casts: dict[str, list[str]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    passed_through: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def trained(self) -> bool:
        """Whether the weights are no longer those of ``source``."""
        return self.job != "import_hf"


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write ``mimo.json`` durably: written beside, synced, renamed."""
    write_json(directory / MANIFEST_NAME, asdict(manifest))


def write_json(path: Path, value: object) -> None:
    """A JSON file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_mimo(directory: Path) -> bool:
    """Whether a directory is a finished MIMO checkpoint; a checkpoint that is none is a Hugging Face directory."""
    return (directory / MANIFEST_NAME).exists()


def read_manifest(directory: Path) -> Manifest:
    """Read and check a manifest, and that every file it names has its size.

    Raises:
        UserError: no or a damaged manifest (an unfinished checkpoint has none), or a missing or truncated file.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give the target of an import")
    if not path.exists():
        hint = (
            "; it looks like a Hugging Face directory: import it first" if (directory / "config.json").exists() else ""
        )
        raise UserError(f"{directory}: has no {MANIFEST_NAME}: not a finished MIMO checkpoint{hint}")
    value = read_object(path)
    if value.get("format") != FORMAT:
        raise UserError(f"{path}: format {value.get('format')!r}; this version of mimo_jobs reads {FORMAT}")
    known: dict[str, Any] = {f.name: get_origin(f.type) or f.type for f in fields(Manifest)}
    for name, entry in value.items():
        if name not in known or not isinstance(entry, known[name]) or isinstance(entry, bool):
            raise UserError(f"{path}: damaged: {name} is {type(entry).__name__} or unknown")
    try:
        manifest = Manifest(**value)
    except TypeError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    for name, size in manifest.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"{file}: {what}, {MANIFEST_NAME} says {size} bytes; the checkpoint is damaged: import it again"
            )
    check_companions(directory, manifest)
    return manifest


def check_companions(directory: Path, manifest: Manifest) -> None:
    """Every companion file is as the import left it. Raises `UserError` naming the first that is not."""
    for name, digest in manifest.companions.items():
        path = directory / name
        if file_digest(read_bytes(path)) != digest:
            raise UserError(f"{path}: is not what the import left there; the checkpoint is damaged: import it again")


def companion_digests(directory: Path) -> dict[str, str]:
    """path -> blake3 of every file in ``hf/`` and ``headers/`` of a checkpoint."""
    found = sorted(p for part in (HF_DIR, HEADERS_DIR) for p in (directory / part).iterdir())
    return {str(p.relative_to(directory)): file_digest(p.read_bytes()) for p in found}


def file_digest(raw: bytes) -> str:
    """blake3, as a hex string."""
    from blake3 import blake3

    return blake3(raw).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that matter to a checkpoint, without importing them."""
    found = {}
    for package in ("mimo-jobs", "megatron-core", "torch", "transformers", "safetensors"):
        try:
            found[package] = package_metadata.version(package)
        except package_metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of an HF directory. Raises `UserError` when it is missing or not a JSON object."""
    return read_object(directory / "config.json")


def companion_files(directory: Path) -> list[Path]:
    """The files beside the weights that an export should bring back (tokenizer, processor, templates, licence ...)."""
    return sorted(
        p
        for p in directory.iterdir()
        if p.is_file() and not p.name.endswith(_WEIGHTS) and not p.name.startswith(".") and p.name != PARITY_NAME
    )
