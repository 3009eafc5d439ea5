"""Data sets, wherever they are, as conversations at random access: memory-mapped Arrow files of the datasets library."""

import json
import re
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError

from mimo_jobs.errors import UserError, did_you_mean
from mimo_jobs.training.config import Dataset as Settings
from mimo_jobs.training.data.files import KINDS, data_files, digest_of, is_saved, json_rows, no_such_file
from mimo_jobs.training.data.samples import BadSample, Conversation
from mimo_jobs.training.data.schemas import NEEDS, SCHEMAS, fits, schema_of
from mimo_jobs.training.data.webdataset import load_tars, tar_row

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ROWS = "rows1"  # of what files.json_rows yields: raise it with a change, or old caches are read
_SKETCHED = 16  # rows that tell data sets of the same length apart
_LOOKED_AT = 64  # rows of JSON that are looked at for the columns


class Source:
    """Rows of a data set as conversations. Pickles as paths, so that worker processes map the same files.

    Attributes:
        schema: name of the schema that is used
        fingerprint: digest of the files (of a hub data set, its commit), the split and the schema
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        name: str,
        base: str,
        fingerprint: str,
        schema: str,
        files: list[str] | None = None,
    ) -> None:
        # Arrow rows: the library would decode images, and a rank may need only their sizes
        self._rows, self._name, self._base, self._files = rows.with_format("arrow"), name, base, files
        self._json = [key for key, feature in rows.features.items() if isinstance(feature, datasets.Json)]
        columns = self._columns(rows)
        self.schema = _chosen(schema, columns, name)
        self.fingerprint = digest_of([], fingerprint, self.schema, base)

    def __len__(self) -> int:
        return len(self._rows)

    def sketch(self) -> dict[str, Any]:
        """What the data set is, wherever its files lie: rows, schema, and a digest of some rows."""
        digest = blake2b(digest_size=16)
        for index in sorted({len(self) * n // _SKETCHED for n in range(_SKETCHED)} | {len(self) - 1}):
            digest.update(repr(self.row(index)).encode())
        return {"rows": len(self), "schema": self.schema, "digest": digest.hexdigest()}

    def conversation(self, index: int) -> Conversation:
        """Sample ``index`` as a conversation; images are not read.

        Raises:
            BadSample: the row does not fit the schema.
        """
        row = self.row(index)
        if not isinstance(row, dict):
            raise BadSample(f"the row is a {type(row).__name__}, expected an object")
        return SCHEMAS[self.schema](row, self._base)

    def id(self, index: int) -> str:
        """Where sample ``index`` is: ``train.jsonl:17`` (line or row, 1-based), ``name/split:17`` (row)."""
        if self._files is None:
            return f"{self._name}:{index + 1}"
        row = self._arrow_row(index, ["file", "line"])
        return f"{Path(self._files[row['file']]).name}:{row['line']}"

    def row(self, index: int) -> Any:
        """Row ``index``; of JSON it is what the line holds, whatever it is."""
        if self._files is not None:
            return json.loads(self._arrow_row(index, ["row"])["row"])
        row = self._arrow_row(index, None)
        for key in self._json:
            if isinstance(row[key], str):
                row[key] = json.loads(row[key])
        return tar_row(row) if "__key__" in row else row

    def _arrow_row(self, index: int, columns: list[str] | None) -> dict[str, Any]:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"sample {index} of {len(self._rows)}")
        table: Any = self._rows[index]
        return (table.select(columns) if columns else table).to_pylist()[0]

    def _columns(self, rows: datasets.Dataset) -> list[str]:
        if self._files is None and "__key__" not in rows.column_names:
            return rows.column_names
        looked_at = (self.row(index) for index in range(min(len(rows), _LOOKED_AT)))
        return sorted({key for row in looked_at if isinstance(row, dict) for key in row})


def open_source(data: str, settings: Settings, split: str | None = None) -> Source:
    """Open a data set.

    Args:
        data: a .jsonl, .json, .parquet or .tar (WebDataset) file, a directory of them, a directory of
            ``datasets.save_to_disk``, or a name on the hub
        settings: schema, split, subset and images count
        split: in place of ``settings.split``

    Raises:
        UserError: there is no such data set, it is empty or damaged, or its columns fit no schema.
    """
    datasets.disable_progress_bars()  # every rank would draw them into its log
    split = split or settings.split
    path = Path(data).expanduser()
    if not data.strip():
        raise UserError("data is empty: name a file, a directory or a data set on the hub")
    if not path.exists():
        if path.suffix.lower() in KINDS or not _HUB_NAME.fullmatch(data) or path.parts[0] in (".", "..", "~"):
            raise no_such_file(path)
        return _from_hub(data, settings, split)
    path = path.resolve()
    base = settings.images or str(path if path.is_dir() else path.parent)
    if not Path(base).is_dir():
        raise UserError(f"dataset.images={base}: no such directory")
    base = str(Path(base).resolve())
    if path.is_dir() and is_saved(path):
        rows, name = _from_saved(path, split)
        files = [f for f in sorted(path.rglob("*")) if f.suffix in (".arrow", ".json")]
        return Source(_filled(rows, data), name, base, digest_of(files, split), settings.schema)
    files = data_files(path, split)
    if path.is_dir() and not settings.images and len({file.parent for file in files}) == 1:
        base = str(files[0].parent)
    kind, fingerprint = KINDS[files[0].suffix.lower()], digest_of(files, split)
    texts = [str(file) for file in files]
    if kind == "json":
        features = datasets.Features(
            {"row": datasets.Value("string"), "file": datasets.Value("int32"), "line": datasets.Value("int64")}
        )
        rows = _loaded(
            data,
            lambda: datasets.Dataset.from_generator(
                json_rows, features=features, gen_kwargs={"files": tuple(texts)}, fingerprint=f"{_ROWS}-{fingerprint}"
            ),
        )
        return Source(_filled(rows, data), path.name, base, fingerprint, settings.schema, texts)
    if kind == "webdataset":
        rows = _loaded(data, lambda: load_tars(texts))
    else:
        rows = _loaded(data, lambda: datasets.load_dataset("parquet", data_files={"train": texts}, split="train"))
    return Source(_filled(rows, data), path.name, base, fingerprint, settings.schema)


def _filled(rows: datasets.Dataset, data: str) -> datasets.Dataset:
    if not len(rows):
        raise UserError(f"data={data}: no rows in it")
    return rows


def _loaded(data: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        if isinstance(error, ValueError) and "corresponds to no data" in str(error):
            raise UserError(f"data={data}: no rows in it") from error
        inner = error.__cause__ or error
        raise UserError(f"data={data} cannot be read: {type(inner).__name__}: {str(inner)[:500]}") from error


def _from_saved(path: Path, split: str) -> tuple[datasets.Dataset, str]:
    loaded = _loaded(str(path), lambda: datasets.load_from_disk(str(path)))
    if isinstance(loaded, datasets.Dataset):
        return loaded, path.name
    if split not in loaded:
        raise UserError(
            f"data={path}: no split '{split}' in it, but {', '.join(loaded)}{did_you_mean(split, loaded)}; set dataset.split"
        )
    return loaded[split], f"{path.name}/{split}"


def _from_hub(name: str, settings: Settings, split: str) -> Source:
    siblings = [p.name for p in Path(name).parent.iterdir()] if Path(name).parent.is_dir() else []
    near = did_you_mean(Path(name).name, siblings)
    try:
        rows = datasets.load_dataset(name, settings.subset, split=split)
    except (DatasetNotFoundError, ConnectionError, OSError) as error:
        raise UserError(
            f"data={name}: no such file or directory here{near}, and the data set cannot be had from the hub "
            f"({type(error).__name__}: {str(error)[:200]}). Without network, download it first: hf download {name} "
            "--repo-type dataset --local-dir DIR, and set data=DIR"
        ) from error
    except ValueError as error:  # an unknown subset or split; the message lists those that there are
        raise UserError(f"data={name} dataset.subset={settings.subset} dataset.split={split}: {error}") from error
    if not isinstance(rows, datasets.Dataset):
        raise UserError(f"data={name} dataset.split={split}: not one split")
    base = str(Path(settings.images or ".").resolve())
    # the library's own fingerprint has the times of local files in it; the checksums' names hold the commit
    commit = json.dumps(sorted(map(str, rows.info.download_checksums or ()))) if rows.info else ""
    fingerprint = digest_of([], name, str(settings.subset), split, commit, str(len(rows)), str(rows.features))
    return Source(_filled(rows, name), f"{name}/{split}", base, fingerprint, settings.schema)


def _chosen(schema: str, columns: list[str], name: str) -> str:
    found = schema_of(columns) if schema == "auto" else schema
    if found is None or not fits(found, columns):
        needs = "\n".join(f"  {key}: {value}" for key, value in NEEDS.items())
        asked = "fit no schema" if schema == "auto" else f"do not fit dataset.schema={schema}"
        raise UserError(
            f"data={name}: its columns ({', '.join(columns) or 'none'}) {asked}. Columns that a schema needs:\n{needs}"
        )
    return found
