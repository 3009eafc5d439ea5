"""Hugging Face -> MIMO checkpoint: every rank reads its own slices of the safetensors files and writes its own file."""

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint import torch_dist
from mimo_jobs.checkpoint.manifest import (
    HEADERS_DIR,
    HF_DIR,
    PASSED_THROUGH_NAME,
    Manifest,
    companion_digests,
    companion_files,
    read_config,
    versions,
    write_json,
    write_manifest,
)
from mimo_jobs.conversion import identity, journal, publish
from mimo_jobs.conversion.digests import file_blocks, file_threads, merged, slowest, tensor_digests
from mimo_jobs.conversion.options import parse_options, written_config, written_shard
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.families.spec import Family
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.parallel.world import World
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import cast_to, itemsize
from mimo_jobs.weights.rules import stored_rows
from mimo_jobs.weights.safetensors_io import INDEX_NAME, HfCheckpoint, Shard, make_header, new_shard, open_hf

OBJECTS = (torch_dist.object_archive({}), torch_dist.object_archive(None))  # the common state, and empty extra states


@dataclass(frozen=True)
class ImportArgs:
    """See `jobs.import_hf`."""

    model: Path
    target: Path
    layout: ResolvedLayout
    dtype: str | None = None
    mtp: str = "keep"
    overwrite: bool = False
    fsync: bool = True


@dataclass
class ImportPlan:
    """What every rank will do, the same on every rank.

    Attributes:
        writes: (box, rank, chunk): which rank writes which box to which place of its file.
        tensors: the checkpoint's tensors with all their chunks.
        files: weight file -> bytes.
        exported: the shards that an export of this checkpoint writes (dtype and dropped tensors applied).
        objects: byte objects of the checkpoint (common state, empty extra states) -> where they lie.
        passed: the one file of passed-through tensors, None without any; ``passed_ranks``: who copies which.
    """

    args: ImportArgs
    family: Family
    config: dict[str, Any]
    hf: HfCheckpoint
    matched: plans.Matched
    dtypes: list[str]
    exported: dict[str, Shard]
    casts: dict[str, list[str]]
    dropped: list[str]
    writes: list[tuple[plans.Box, int, torch_dist.Chunk]] = field(default_factory=list)
    tensors: dict[str, torch_dist.StoredTensor] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    passed: Shard | None = None
    passed_ranks: list[tuple[str, int]] = field(default_factory=list)
    objects: dict[str, torch_dist.Chunk] = field(default_factory=dict)
    object_writes: list[tuple[int, torch_dist.Chunk, bytes]] = field(default_factory=list)

    @property
    def bytes_per_rank(self) -> list[int]:
        """Bytes that each rank reads, and writes, of weights."""
        moved = [0] * self.args.layout.world_size
        for box, rank, _ in self.writes:
            moved[rank] += box.rows * box.columns * itemsize(self.dtypes[box.rule])
        for name, rank in self.passed_ranks:
            moved[rank] += self.hf.tensors[name].nbytes
        return moved


def plan_import(args: ImportArgs) -> ImportPlan:
    """Read config and headers, check everything that can be checked, and place every byte. No tensor is read.

    Raises:
        UserError: see `safetensors_io.open_hf`, `plan.match`; UsageError for a layout the model does not allow.
    """
    dtype = parse_options(args.dtype, args.mtp)
    config = read_config(args.model)
    family = family_of(config, args.model / "config.json")
    weight_map = family.weight_map(config)
    plans.check_layout(weight_map, args.layout)
    hf = open_hf(args.model)
    matched = plans.match(weight_map, hf.tensors, str(args.model))
    dropped = matched.passed_through if args.mtp == "drop" else []
    config = written_config(family, config, dtype, args.mtp)
    casts = {
        n: [t.dtype, dtype] for n, t in hf.tensors.items() if dtype and cast_to(t.dtype, dtype) and n not in dropped
    }
    made = ImportPlan(
        args, family, config, hf, matched, [dtype or d for d in matched.dtypes],
        {s.name: written_shard(s, args.model, dtype, dropped) for s in hf.shards.values()}, casts, dropped,
    )  # fmt: skip
    made.exported = {n: s for n, s in made.exported.items() if s.tensors}
    _place_boxes(made)
    _place_passed_through(made)
    return made


def _place_boxes(made: ImportPlan) -> None:
    layout, rules = made.args.layout, made.matched.weight_map.rules
    boxes = plans.boxes(made.matched.weight_map, layout)
    sizes = [(b.rows * b.columns * itemsize(made.dtypes[b.rule]), b.holders) for b in boxes]
    ranks = plans.give_out(sizes, layout.world_size)
    ends = dict.fromkeys(sorted(set(ranks)), 0)
    for box, rank in zip(boxes, ranks, strict=True):
        rule = rules[box.rule]
        tensor, dtype = rule.stored[box.stored], made.dtypes[box.rule]
        offsets, shape = plans.box_extent(tensor, box)
        prefix, suffix = torch_dist.frame(dtype, shape)
        length = len(prefix) + math.prod(shape) * itemsize(dtype) + len(suffix)
        at = -(-ends[rank] // torch_dist.ALIGNMENT) * torch_dist.ALIGNMENT
        ends[rank] = at + length
        chunk = torch_dist.Chunk(offsets, shape, f"__{rank}_0.distcp", at, length)
        made.writes.append((box, rank, chunk))
        component = layout.components[rule.component]
        stored = torch_dist.StoredTensor(tensor.name, dtype, plans.stored_shape(tensor, component))
        made.tensors.setdefault(tensor.name, stored).chunks.append(chunk)
    first = min(ends)
    keys_of = {0: [torch_dist.COMMON_KEY], 1: torch_dist.extra_state_keys(made.tensors)}
    for i, archive in enumerate(OBJECTS):  # one archive serves every key that holds the same value
        chunk = torch_dist.Chunk((), (), f"__{first}_0.distcp", ends[first], len(archive))
        made.objects |= dict.fromkeys(keys_of[i], chunk)
        made.object_writes.append((first, chunk, archive))
        ends[first] += len(archive)
    made.files = {f"__{rank}_0.distcp": end for rank, end in ends.items()}


def _place_passed_through(made: ImportPlan) -> None:
    kept = [n for n in made.matched.passed_through if n not in made.dropped]
    if not kept:
        return
    dtypes = {n: made.casts.get(n, [made.hf.tensors[n].dtype] * 2)[1] for n in kept}
    header = make_header([(n, dtypes[n], made.hf.tensors[n].shape) for n in kept], {"format": "pt"})
    made.passed = new_shard(made.args.target, PASSED_THROUGH_NAME, header)
    made.passed_ranks = plans.spread(((n, made.hf.tensors[n].nbytes) for n in kept), made.args.layout.world_size)
    made.files[PASSED_THROUGH_NAME] = made.passed.size


def run_import(args: ImportArgs, world: World) -> dict[str, Any]:
    """Do this rank's part of an import; rank 0 publishes. Returns the summary (the same on every rank).

    Raises:
        UserError: bad input, no space, or (JobFailed) another rank failed first. Nothing is published then.
    """
    made = plan_import(args)
    revision = ""
    if world.rank == 0:
        publish.check_target(args.target, args.overwrite, args.model)
        publish.check_space(args.target, sum(made.files.values()), publish.staging_of(args.target, world.run_id))
        revision = identity.of_hf(args.model, made.hf)  # before the first byte is read
    staging = publish.staging_of(args.target, world.run_id)
    world.on_failure(journal.discard_unless_resumable(world, partial(shutil.rmtree, staging, ignore_errors=True)))
    if world.rank == 0:
        plan = journal.plan_digest(revision, args, versions()["mimo-jobs"])
        if not publish.open_staging(args.target, world.run_id, plan):
            write_companions(made, staging)
            journal.begin(staging, plan)
    world.barrier("staging")
    with transfer.Files() as files:
        left = journal.Journal(staging, world)
        with left.kept(files):
            with world.phase("import", sum(made.bytes_per_rank)) as moved:
                tasks = left.remaining(_tasks(made, staging, files, world.rank, left.counted(moved)))
                transfer.run_all(tasks, file_threads(args.layout.world_size))
            digests = _source_digests(made, files, world)
            if args.fsync:
                with world.timed("sync"):
                    files.sync()
            results = world.gather("imported", {"digests": digests, "seconds": world.seconds})
            summary = None
            if results is not None:
                made_of = identity.of_import(revision, made.family.rules_version, args.dtype, args.mtp)
                _finish(made, staging, merged(results, "digests"), made_of, world)
                summary = _summary(made) | {"seconds": slowest(results)}
            return world.broadcast("published", summary)


def _tasks(
    made: ImportPlan, staging: Path, files: transfer.Files, rank: int, moved: Callable[[int], None]
) -> Iterable[Callable[[], None]]:
    for box, owner, chunk in made.writes:
        if owner == rank:
            yield partial(_write_box, made, box, chunk, files, staging, moved)
    yield from passed_tasks(made, staging, files, rank, moved)
    for owner, chunk, archive in made.object_writes:
        if owner == rank:
            yield partial(_write_object, files, staging, chunk, archive)


def passed_tasks(
    made: ImportPlan, staging: Path, files: transfer.Files, rank: int, moved: Callable[[int], None]
) -> Iterable[Callable[[], None]]:
    """This rank's share of the tensors that no component holds."""
    for name, owner in made.passed_ranks:
        if owner == rank:
            assert made.passed is not None
            source, kept = made.hf.tensors[name], made.passed.tensors[name]
            cast = cast_to(source.dtype, kept.dtype)
            yield lambda s=source, k=kept, c=cast: transfer.copy_range(
                files.reader(made.hf.directory / s.file), s.offset, files.writer(staging / PASSED_THROUGH_NAME), k.offset,
                s.nbytes, moved, c,
            )  # fmt: skip
    if rank == 0 and made.passed is not None:
        head = len(made.passed.header).to_bytes(8, "little") + made.passed.header
        yield lambda: transfer.write_full(files.writer(staging / PASSED_THROUGH_NAME), head, 0)


def _write_object(files: transfer.Files, staging: Path, chunk: torch_dist.Chunk, archive: bytes) -> None:
    transfer.write_full(files.writer(staging / chunk.file), archive, chunk.offset)


def _write_box(
    made: ImportPlan, box: plans.Box, chunk: torch_dist.Chunk, files: transfer.Files, staging: Path,
    moved: Callable[[int], None],
) -> None:  # fmt: skip
    rule, target = made.matched.weight_map.rules[box.rule], files.writer(staging / chunk.file)
    after = made.dtypes[box.rule]
    prefix, suffix = torch_dist.frame(after, chunk.sizes)
    transfer.write_full(target, prefix, chunk.offset)
    tensor, at = rule.stored[box.stored], chunk.offset + len(prefix)
    for run in stored_rows(made.matched.segments[box.rule], box.stored, box.row, box.row + box.rows):
        info = made.hf.tensors[rule.hf[run.hf].name]
        source, size, cast = (
            files.reader(made.hf.directory / info.file),
            itemsize(info.dtype),
            cast_to(info.dtype, after),
        )
        to = at + (run.stored_row - box.row) * box.columns * itemsize(after)
        row_bytes = tensor.row_elements * size
        first = info.offset + run.hf_row * row_bytes
        if box.columns == tensor.row_elements:
            transfer.copy_range(source, first, target, to, run.count * row_bytes, moved, cast)
        else:
            left, right = box.column * size, (box.column + box.columns) * size
            transfer.gather_columns(source, first, row_bytes, left, right, run.count, target, to, moved, cast)
    # Rows of a padded vocabulary are zero: a new file's unwritten range is.
    transfer.write_full(target, suffix, chunk.offset + chunk.length - len(suffix))


def _source_digests(made: ImportPlan, files: transfer.Files, world: World) -> dict[str, str]:
    """Digests of the bytes an export has to write, of this rank's share of the HF tensors. Ties are checked here."""
    names = [n for s in made.exported.values() for n in s.tensors]
    tensors = [made.hf.tensors[n] for n in names]
    mine = [n for n, rank in plans.spread(((t.name, t.nbytes) for t in tensors), world.size) if rank == world.rank]
    jobs = [
        (
            n,
            file_blocks(
                files, made.hf.directory, made.hf.tensors[n], cast_to(*made.casts[n]) if n in made.casts else None
            ),
        )
        for n in mine
    ]
    return tensor_digests(jobs, world, "digest", sum(t.nbytes for t in tensors))


def write_companions(made: ImportPlan, staging: Path) -> None:
    """The small files of the source, and the headers that an export writes."""
    hf = staging / HF_DIR
    hf.mkdir()
    (staging / HEADERS_DIR).mkdir()
    for file in companion_files(made.args.model):
        shutil.copyfile(file, hf / file.name)
    if made.config != read_config(made.args.model):
        write_json(hf / "config.json", made.config)
    for shard in made.exported.values():
        (staging / HEADERS_DIR / f"{shard.name}.json").write_bytes(shard.header)
    if made.hf.index is not None:
        (hf / INDEX_NAME).write_bytes(made.hf.index)


def _finish(made: ImportPlan, staging: Path, digests: dict[str, str], made_of: identity.Identity, world: World) -> None:
    """Rank 0: ties, metadata, manifest, publication."""
    for name, target in made.matched.aliases.items():
        if digests[name] != digests[target]:
            raise UserError(
                f"{made.args.model}: {name} is tied to {target} (tie_word_embeddings=true) but holds other values; "
                "set tie_word_embeddings=false in config.json, or remove the tensor"
            )
    for name, size in made.files.items():
        found = (staging / name).stat().st_size
        assert found == size, (name, found, size)
    metadata = torch_dist.encode_metadata(made.tensors.values(), made.objects)
    (staging / torch_dist.METADATA_NAME).write_bytes(metadata)
    write_json(staging / torch_dist.FORMAT_NAME, torch_dist.FORMAT_JSON)
    write_manifest(manifest_of(made, staging, digests, made.files, made_of), staging)
    world.check()
    publish.publish(staging, made.args.target, made.args.overwrite, made.args.fsync)


def manifest_of(
    made: ImportPlan, staging: Path, digests: dict[str, str], files: dict[str, int], made_of: identity.Identity
) -> Manifest:
    """The manifest of what lies in ``staging``, its companions written."""
    return Manifest(
        model_type=made.family.model_type, rules_version=made.family.rules_version, config=made.config,
        source={"path": str(made.args.model), "tensors": len(made.hf.tensors), "bytes": made.hf.nbytes},
        layout=made.args.layout.as_layout(), digests=digests, casts=made.casts, aliases=made.matched.aliases,
        passed_through=[n for n in made.matched.passed_through if n not in made.dropped], dropped=made.dropped,
        files=files, companions=companion_digests(staging), versions=versions(), identity=made_of,
    )  # fmt: skip


def _summary(made: ImportPlan) -> dict[str, Any]:
    return {
        "target": str(made.args.target), "tensors": len(made.hf.tensors) - len(made.dropped),
        "bytes": sum(made.bytes_per_rank), "bytes_per_rank": made.bytes_per_rank,
        "passed_through": len(made.passed_ranks), "dropped": len(made.dropped), "cast": len(made.casts),
        "tied": sorted(made.matched.weight_map.aliases),
    }  # fmt: skip
