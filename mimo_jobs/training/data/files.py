"""Data files on disk: which ones are meant, what tells two states of them apart, and the rows of JSON ones."""

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UserError, did_you_mean

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".tar": "webdataset"}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}


def is_saved(path: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote this directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def no_such_file(path: Path) -> UserError:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return UserError(f"data={path}: no such file{did_you_mean(path.name, siblings)}")


def data_files(path: Path, split: str) -> list[Path]:
    """The data files that a path stands for, all of one kind.

    Of a directory: those in its sub-directory ``split``, or those whose names begin with the split, or, when no name
    begins with a split at all, every one.

    Raises:
        UserError: there is none, or of several kinds.
    """
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise UserError(f"data={path}: the suffix '{path.suffix}' is not known, expected {', '.join(KINDS)}")
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.is_file() and not _hidden(p, path))
    if not found:
        raise UserError(f"data={path}: no file in it ends in {', '.join(KINDS)}")
    names = _SPLITS.get(split, (split,))
    chosen = [p for p in found if p.relative_to(path).parts[0] in names and p.parent != path]
    chosen = chosen or [p for p in found if _begins(p.stem, names)]
    if not chosen:
        others = sorted({s for p in found for s, aliases in _SPLITS.items() if _is_of(p, path, aliases)})
        if others:
            raise UserError(f"data={path}: no files of split '{split}', but of {', '.join(others)}; set dataset.split")
        chosen = found
    kinds = {KINDS[p.suffix.lower()] for p in chosen}
    if len(kinds) > 1:
        raise UserError(f"data={path}: files of several kinds ({', '.join(sorted(kinds))}); name one file or directory")
    return chosen


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _begins(stem: str, names: tuple[str, ...]) -> bool:
    return any(stem == name or stem.startswith((f"{name}-", f"{name}_", f"{name}.")) for name in names)


def _is_of(file: Path, root: Path, names: tuple[str, ...]) -> bool:
    return file.relative_to(root).parts[0] in names or _begins(file.stem, names)


def digest_of(files: list[Path], *more: str) -> str:
    """Digest of paths, sizes and times of the last change, and of ``more``: no rank reads a data set to name it."""
    digest = blake2b(digest_size=16)
    for text in more:
        digest.update(f"{len(text)}:{text}".encode())
    for file in files:
        state = file.stat()
        digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def json_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """``{"row": JSON text of a row, "file": number of the file, "line": of the row, 1-based}`` of JSON Lines or JSON arrays.

    ``files`` is not a list: the datasets library would take lists apart and call once a file.

    Raises:
        UserError: damaged JSON; names file and line.
    """
    for number, name in enumerate(files):
        rows = _whole_rows(name) if Path(name).suffix.lower() == ".json" else None
        for line, row in rows if rows is not None else _lines(name):
            yield {"row": row, "file": number, "line": line}


def _lines(name: str) -> Iterator[tuple[int, str]]:
    with open(name, "rb") as file:
        for line, raw in enumerate(file, 1):
            if not (raw := raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw).strip():
                continue
            try:
                text = raw.decode()
                json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}:{line}: damaged JSON ({error}); mend or remove the line") from None
            yield line, text.strip()


def _whole_rows(name: str) -> list[tuple[int, str]] | None:
    """Rows of one JSON document: an array, or an object whose only array they are. None for JSON Lines in a .json file."""
    try:
        document = json.loads(Path(name).read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise UserError(f"{name}:{error.lineno}: damaged JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: damaged JSON ({error})") from None
    if isinstance(document, dict):
        arrays = [value for value in document.values() if isinstance(value, list)]
        document = arrays[0] if len(arrays) == 1 and len(document) <= 8 and "messages" not in document else [document]
        if len(document) == 1 and "conversations" in document:
            document = [document]
    if not isinstance(document, list):
        raise UserError(f"{name}: a {type(document).__name__}, expected an array of rows")
    return [(line, json.dumps(row, ensure_ascii=False)) for line, row in enumerate(document, 1)]
