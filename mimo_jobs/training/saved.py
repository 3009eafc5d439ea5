"""What checkpoints of a training run are there, by their names and records. No torch, no tensor read."""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimo_jobs.conversion.identity import difference, digest
from mimo_jobs.errors import UserError
from mimo_jobs.weights.json_files import read_object

RECORD = "training.json"
CARRIED = "carried"  # what a Hugging Face source has beside its weights
_NAME = re.compile(r"step-(\d{8})")


def steps_directory(target: Path, directory: str | None) -> Path:
    """Where the checkpoints of a run are: ``saving.directory``, else beside its target."""
    return Path(directory) if directory else target.with_name(f"{target.name}.steps")


@dataclass(frozen=True)
class Saved:
    """Contents of ``training.json``: a checkpoint after ``step`` optimizer steps.

    Attributes:
        identity: what the run is (`conversion.identity`); only a run of the same goes on from it.
        files: name -> bytes of every weight file.
        skipped: bad samples left out so far.
        losses: of the last steps, oldest first, for the spike bound.
        first_loss, tokens, seconds: of the run so far, over all of its starts.
        data: what the data set is (`data.Source.sketch`); empty in checkpoints of earlier versions.
    """

    step: int
    identity: Mapping[str, Any]
    files: Mapping[str, int] = field(default_factory=dict)
    skipped: int = 0
    losses: list[float] = field(default_factory=list)
    first_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_directory(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return root / f"step-{step:08d}"


def completed(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of what looks like a checkpoint, newest first; see `read`."""
    if not root.is_dir():
        return []
    found = [(int(m[1]), p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


def read(directory: Path) -> Saved:
    """The record of a checkpoint, after a look at its files.

    Raises:
        UserError: it is not whole.
    """
    try:
        saved = Saved(**read_object(directory / RECORD))
    except (TypeError, UserError) as error:
        raise UserError(f"{directory}: not a whole checkpoint: {error}") from None
    for name, size in saved.files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes, expected {size}"
            raise UserError(f"{path}: {what}: not a whole checkpoint")
    return saved


def newest(root: Path, identity: Mapping[str, Any], warn: Callable[[str], None]) -> tuple[Path, Saved] | None:
    """The newest whole checkpoint of a run; ``warn`` hears of newer ones that are not whole.

    Raises:
        UserError: it is of another run.
    """
    for _, directory in completed(root):
        try:
            saved = read(directory)
        except UserError as error:
            warn(f"{error}; the one before it is used")
            continue
        if saved.identity != identity:
            raise UserError(
                f"{directory}: a checkpoint of another run: {difference(saved.identity, identity)}; give another target or "
                f"saving.directory, overwrite=true to set {root} aside, or remove it"
            )
        return directory, saved
    return None


def clear_partial(root: Path, warn: Callable[[str], None]) -> None:
    """Remove what was cut off while it was written; only the owner of ``root`` may."""
    for partial in sorted(root.glob(".step-*.partial")):
        warn(f"{partial.name} was cut off while it was written; it is removed")
        shutil.rmtree(partial)


def progress(root: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return next((step for step, _ in completed(root)), 0)


def other_run(root: Path, identity: Mapping[str, Any]) -> Saved | None:
    """The newest whole checkpoint in ``root`` if it is of another run than ``identity`` says."""
    for _, directory in completed(root):
        try:
            saved = read(directory)
        except UserError:
            continue
        return saved if saved.identity != identity else None
    return None


def make_way(root: Path, identity: Mapping[str, Any], finished: Mapping[str, Any] | None) -> str:
    """Clear ``root`` of the checkpoints of another run: nothing that took time is lost. Says what was done.

    Args:
        finished: identity of the target that is there. Checkpoints on the way to it are of no more use, and removed; those of a run
            that did not end are set aside, as ``ROOT.of-DIGEST``.
    """
    other = other_run(root, identity)
    if other is None:
        return ""
    ours = [p for p in root.iterdir() if _NAME.fullmatch(p.name) or p.name == CARRIED or p.match(".step-*.partial")]
    if finished is not None and other.identity == finished:
        for path in ours:
            shutil.rmtree(path)
        return f"{root}: held checkpoints of the run that made the target to be replaced; they were removed"
    aside = _unused(root.with_name(f"{root.name}.of-{digest(other.identity)[:8]}"))
    aside.mkdir()
    for path in ours:
        os.rename(path, aside / path.name)
    why = difference(other.identity, identity)
    return f"{root}: held checkpoints of another run, up to step {other.step} ({why}); they are in {aside} now"


def _unused(place: Path) -> Path:
    names = itertools.chain([place], (place.with_name(f"{place.name}-{n}") for n in itertools.count(2)))
    return next(p for p in names if not p.exists())
