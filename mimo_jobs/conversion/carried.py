"""What a trained checkpoint carries over from the one it began with: configuration, tokenizer, headers, untouched tensors.

With these beside its weights it is a MIMO checkpoint like an imported one: any layout loads it, and an export needs nothing else.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint.manifest import (
    HEADERS_DIR,
    HF_DIR,
    PASSED_THROUGH_NAME,
    Manifest,
    is_mimo,
    read_manifest,
    versions,
    write_manifest,
)
from mimo_jobs.conversion import exporter, importer
from mimo_jobs.conversion.digests import merged, tensor_digests
from mimo_jobs.conversion.rows import RowReader
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.parallel.world import World
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights import transfer


@dataclass(frozen=True)
class Carried:
    """``directory`` holds the files, ``manifest`` what is said of them; its weights and identity are the source's."""

    directory: Path
    manifest: Manifest

    def attach(
        self, staging: Path, files: dict[str, int], layout: ResolvedLayout, identity: dict[str, Any]
    ) -> None:  # fmt: skip
        """Make a MIMO checkpoint of a directory with trained weights; the manifest is its last file. Links where it can.

        Args:
            files: weight file -> bytes, of what was trained.
        """
        for part in (HF_DIR, HEADERS_DIR):
            (staging / part).mkdir(exist_ok=True)
            for path in (self.directory / part).iterdir():
                _link(path, staging / part / path.name)
        files = dict(files)
        passed = self.directory / PASSED_THROUGH_NAME
        if passed.exists():
            _link(passed, staging / PASSED_THROUGH_NAME)
            files[PASSED_THROUGH_NAME] = passed.stat().st_size
        before = self.manifest
        casts = {name: cast for name, cast in before.casts.items() if name in before.passed_through}
        write_manifest(
            dataclasses.replace(
                before, job="sft", layout=layout.as_layout(), digests={}, casts=casts, files=files, versions=versions(), identity=identity,
            ),
            staging,
        )  # fmt: skip


def carry(source: Path, layout: ResolvedLayout, directory: Path, world: World) -> Carried:
    """What a checkpoint trained from ``source`` carries over. Collective over the world.

    Args:
        source: a MIMO checkpoint, whose own files are used, or a Hugging Face directory.
        directory: for what has to be made of a Hugging Face directory; made again if it is there.

    Raises:
        UserError: the source is not whole.
    """
    if is_mimo(source):
        return Carried(source, read_manifest(source))
    made = importer.plan_import(importer.ImportArgs(source, directory, layout))
    if world.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        importer.write_companions(made, directory)
    world.barrier("carried directory")
    with transfer.Files() as files:
        tasks = list(importer.passed_tasks(made, directory, files, world.rank, lambda _: None))
        transfer.run_all(tasks, 1)
        files.sync()
    world.barrier("carried")
    return Carried(directory, importer.manifest_of(made, directory, {}, {}, {}))


def exported_digests(checkpoint: Path, layout: ResolvedLayout, world: World) -> dict[str, str] | None:
    """HF name -> digest of the tensor that an export of a MIMO checkpoint reads; on rank 0. Every rank reads a share."""
    made = exporter.plan_export(exporter.ExportArgs(checkpoint, checkpoint.with_name("unused"), layout))
    sizes = [(name, tensor.nbytes) for name, tensor in made.tensors.items()]
    mine = [name for name, rank in plans.spread(sizes, world.size) if rank == world.rank]
    with transfer.Files() as files:
        rows = RowReader(checkpoint, files)
        jobs = [(name, exporter.held_blocks(made, name, files, rows)) for name in mine]
        found = tensor_digests(jobs, world, "digest", sum(size for _, size in sizes))
    results = world.gather("trained digests", {"digests": found})
    return None if results is None else merged(results, "digests")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another filesystem, or one without links
        shutil.copyfile(source, target)
