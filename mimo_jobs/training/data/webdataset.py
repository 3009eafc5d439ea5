"""WebDataset archives: members that share a name are a sample, their suffixes are its fields."""

import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from mimo_jobs.errors import UserError

_IMAGES = frozenset(WebDataset.IMAGE_EXTENSIONS)
_TEXTS = ("txt", "text", "transcript")
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as the library cuts names


def load_tars(files: list[str]) -> datasets.Dataset:
    """All samples of the archives, in the library's cache. Field types come from all member names, not from the first samples.

    Raises:
        UserError: an archive is damaged or has no sample.
    """
    fields = sorted({field for file in files for field in _fields(file)})
    if not fields:
        raise UserError(f"data={files[0]}: no member is named KEY.SUFFIX, as in a WebDataset archive")
    features: dict[str, Any] = {field: _feature(field) for field in fields}
    features |= {"__key__": datasets.Value("string"), "__url__": datasets.Value("string")}
    return datasets.load_dataset(
        "webdataset", data_files={"train": files}, split="train", features=datasets.Features(features)
    )


def tar_row(row: dict[str, Any]) -> dict[str, Any]:
    """Fields by meaning: those of ``.json`` as columns, the image suffixes as ``image`` or ``images``, ``.txt`` as ``caption``."""
    done: dict[str, Any] = {}
    images = []
    for field, value in row.items():
        suffix = field.rsplit(".", 1)[-1].lower()
        if value is None or field.startswith("__"):
            continue
        if suffix in ("json", "jsn") and isinstance(value, dict):
            done |= value
        elif suffix in _IMAGES:
            images.append(value)
        elif suffix in _TEXTS:
            done.setdefault("caption", value)
        else:
            done.setdefault(field, value)
    if images:
        done.pop("images", None)
        done["image"] = images[0] if len(images) == 1 else images
    return done


def _feature(field: str) -> Any:
    suffix = field.rsplit(".", 1)[-1].lower()
    if suffix in _IMAGES:
        return datasets.Image(decode=False)
    if suffix in ("json", "jsn"):
        return datasets.Json()
    if suffix in ("cls", "cls2", "index", "inx", "id"):
        return datasets.Value("int64")
    return datasets.Value("string" if suffix in _TEXTS else "binary")


def _fields(file: str) -> set[str]:
    try:
        with tarfile.open(file, "r:") as archive:
            names = [member.name for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data={Path(file)}: not a readable tar archive ({error})") from error
    return {match.group(2) for name in names if (match := _MEMBER.match(name))}
