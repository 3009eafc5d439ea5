"""MIMO checkpoint -> Hugging Face: every rank writes its own rows in place into files sized from the plan."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint import torch_dist
from mimo_jobs.checkpoint.manifest import (
    HEADERS_DIR,
    HF_DIR,
    PARITY_NAME,
    PASSED_THROUGH_NAME,
    Manifest,
    read_manifest,
    versions,
    write_json,
)
from mimo_jobs.checkpoint.peft_dir import PeftAdapter, check_adapter, check_base, read_peft
from mimo_jobs.conversion import identity, journal, publish
from mimo_jobs.conversion.digests import Blocks, file_blocks, file_threads, merged, slowest, tensor_digests
from mimo_jobs.conversion.merge import Merger, adapter_summary, merged_names
from mimo_jobs.conversion.options import parse_options, written_config, written_shard
from mimo_jobs.conversion.rows import RowReader
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.parallel.world import World
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import Cast, cast_to, itemsize
from mimo_jobs.weights.json_files import parse_object, read_bytes
from mimo_jobs.weights.rules import Segment, stored_rows
from mimo_jobs.weights.safetensors_io import (
    INDEX_NAME,
    SINGLE_NAME,
    Shard,
    TensorInfo,
    open_hf,
    parse_header,
    parse_index,
    read_shard,
)


@dataclass(frozen=True)
class ExportArgs:
    """See `jobs.export_hf`."""

    source: Path
    target: Path
    layout: ResolvedLayout
    dtype: str | None = None
    mtp: str = "keep"
    overwrite: bool = False
    fsync: bool = True
    verify: bool = True
    adapter: Path | None = None


@dataclass
class ExportPlan:
    """What every rank will do, the same on every rank.

    Attributes:
        stored: the checkpoint's tensors (`torch_dist.read_metadata`).
        shards: the files to write; ``tensors``: every tensor in them.
        shares: rows that each rank writes.
        passed: the file of passed-through tensors, None without any; ``passed_ranks``: who copies which.
        held: every tensor in the dtype that the checkpoint holds it in (`held_tensors`).
        casts: HF name -> [dtype held, dtype written].
        adapter: what is merged into the weights, None without; ``merged``: the tensors that it changes.
    """

    args: ExportArgs
    manifest: Manifest
    config: dict[str, Any]
    matched: plans.Matched
    stored: dict[str, torch_dist.StoredTensor]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    shares: list[plans.Share]
    passed: Shard | None
    passed_ranks: list[tuple[str, int]]
    held: dict[str, TensorInfo]
    casts: dict[str, list[str]]
    dropped: list[str]
    adapter: PeftAdapter | None = None

    @cached_property
    def merged(self) -> set[str]:
        return merged_names(self.adapter)

    @property
    def rounded(self) -> list[str]:
        """Tensors that are written in a narrower dtype than the checkpoint holds them in."""
        return [n for n, (before, after) in self.casts.items() if itemsize(after) < itemsize(before)]

    @property
    def bytes_per_rank(self) -> list[int]:
        """Bytes that each rank reads of the checkpoint."""
        moved = [0] * self.args.layout.world_size
        for share in self.shares:
            moved[share.rank] += share.rows * self._row_bytes(share)
        for name, rank in self.passed_ranks:
            assert self.passed is not None
            moved[rank] += self.passed.tensors[name].nbytes
        return moved

    def _row_bytes(self, share: plans.Share) -> int:
        tensor = self.matched.weight_map.rules[share.rule].stored[share.stored]
        return tensor.row_elements * itemsize(self.stored[tensor.name].dtype)


def plan_export(args: ExportArgs) -> ExportPlan:
    """Read manifest and metadata, check everything that can be checked, and place every byte. No tensor is read.

    Raises:
        UserError: a damaged or foreign checkpoint; UsageError for a layout the model does not allow.
    """
    dtype = parse_options(args.dtype, args.mtp)
    manifest = read_manifest(args.source)
    family = family_of(manifest.config, args.source / "mimo.json")
    if manifest.rules_version != family.rules_version:
        raise UserError(
            f"{args.source}: written with rules version {manifest.rules_version} of {family.model_type}, this version of "
            f"mimo_jobs has {family.rules_version}; export it with the mimo_jobs that wrote it ({manifest.versions.get('mimo-jobs')})"
        )
    weight_map = family.weight_map(manifest.config)
    plans.check_layout(weight_map, args.layout)
    templates = _read_templates(args.source)
    everything = {n: t for s in templates.values() for n, t in s.tensors.items()}
    matched = plans.match(weight_map, everything, str(args.source))
    adapter = read_peft(args.adapter) if args.adapter else None
    if adapter:
        check_adapter(adapter, weight_map, str(args.source))
        check_base(adapter, manifest, args.source)
    stored = torch_dist.read_metadata(args.source)
    _check_stored(args.source, weight_map, stored)
    dropped = matched.passed_through if args.mtp == "drop" else []
    config = written_config(family, manifest.config, dtype, args.mtp)
    shards = {n: written_shard(s, args.target, dtype, dropped) for n, s in templates.items()}
    shards = {n: s for n, s in shards.items() if s.tensors}
    tensors = {n: t for s in shards.values() for n, t in s.tensors.items()}
    passed_names = [n for n in matched.passed_through if n not in dropped]
    passed = read_shard(args.source / PASSED_THROUGH_NAME) if passed_names else None
    for name in passed_names:
        assert passed is not None
        if name not in passed.tensors:
            raise UserError(f"{args.source / PASSED_THROUGH_NAME}: {name} is missing; the checkpoint is damaged")
    if manifest.digests and (lost := set(manifest.digests) - set(everything)):
        raise UserError(
            f"{args.source}: the headers lack {len(lost)} of the tensors imported, e.g. {min(lost)}; import it again"
        )
    held = held_tensors(manifest, matched, stored, everything)
    casts = {n: [held[n].dtype, t.dtype] for n, t in tensors.items() if held[n].dtype != t.dtype}
    return ExportPlan(
        args, manifest, config, matched, stored, shards, tensors, plans.export_shares(matched, args.layout), passed,
        plans.spread(((n, tensors[n].nbytes) for n in passed_names), args.layout.world_size), held, casts, dropped, adapter,
    )  # fmt: skip


def held_tensors(
    manifest: Manifest, matched: plans.Matched, stored: dict[str, torch_dist.StoredTensor], headers: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:  # fmt: skip
    """Every HF tensor in the dtype that holds its values: the header's, or the stored one where they were trained.

    An import stores tensors that are fused in the widest of their dtypes, from which each comes back exactly; what training puts
    there does not.
    """
    if not manifest.trained:
        return headers
    held = dict(headers)
    for rule, runs in zip(matched.weight_map.rules, matched.segments, strict=True):
        for run in runs:
            name = rule.hf[run.hf].name
            held[name] = replace(headers[name], dtype=stored[rule.stored[run.stored].name].dtype)
    return held | {n: replace(headers[n], dtype=held[target].dtype) for n, target in matched.aliases.items()}


def _read_templates(source: Path) -> dict[str, Shard]:
    directory = source / HEADERS_DIR
    found = {}
    for path in sorted(directory.glob("*.json")):
        name, header = path.name.removesuffix(".json"), path.read_bytes()
        try:
            entries = parse_object(header, path)
            size = 8 + len(header) + max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise error if isinstance(error, UserError) else UserError(f"{path}: damaged: {error!r}") from None
        found[name] = parse_header(header, path.with_name(name), size)
    if not found:
        raise UserError(f"{directory}: holds no shard header; the checkpoint is damaged")
    return found


def _check_stored(source: Path, weight_map: plans.WeightMap, stored: dict[str, torch_dist.StoredTensor]) -> None:
    for rule in weight_map.rules:
        for tensor in rule.stored:
            found = stored.get(tensor.name)
            if found is None:
                raise UserError(
                    f"{source}: {tensor.name} is not in the checkpoint; it is of another model, or incomplete"
                )
            longer = (
                tensor.cut is plans.Cut.VOCAB and found.shape[0] >= tensor.rows and found.shape[1:] == tensor.shape[1:]
            )
            if found.shape != tensor.shape and not longer:
                raise UserError(
                    f"{source}: {tensor.name} has shape {list(found.shape)}, the config calls for {list(tensor.shape)}"
                )
            for chunk in found.chunks:
                path = source / chunk.file
                if not path.is_file():
                    raise UserError(f"{path}: missing; {torch_dist.METADATA_NAME} places {tensor.name} in it")


def run_export(args: ExportArgs, world: World) -> dict[str, Any]:
    """Do this rank's part of an export; rank 0 publishes. Returns the summary (the same on every rank).

    Raises:
        UserError: bad input, no space, bytes that differ from the source's digests, or (JobFailed) another rank failed
            first. Nothing is published then.
    """
    made = plan_export(args)
    if world.rank == 0:
        publish.check_target(args.target, args.overwrite, args.source, args.adapter)
        needed = sum(s.size for s in made.shards.values())
        publish.check_space(args.target, needed, publish.staging_of(args.target, world.run_id))
    staging = publish.staging_of(args.target, world.run_id)
    world.on_failure(journal.discard_unless_resumable(world, partial(shutil.rmtree, staging, ignore_errors=True)))
    if world.rank == 0:
        inputs = identity.of_mimo(args.source), identity.of_adapter(args.adapter) if args.adapter else None
        plan = journal.plan_digest(*inputs, made.manifest.digests, args, versions()["mimo-jobs"])
        if not publish.open_staging(args.target, world.run_id, plan):
            _prepare(made, staging)
            journal.begin(staging, plan)
    world.barrier("staging")
    with transfer.Files() as files:
        left = journal.Journal(staging, world)
        with left.kept(files):
            with world.phase("export", sum(made.bytes_per_rank)) as moved:
                tasks = left.remaining(_tasks(made, staging, files, world.rank, left.counted(moved)))
                transfer.run_all(tasks, file_threads(args.layout.world_size))
            world.barrier("written")  # digests read what other ranks wrote
            digests = _digests(made, staging, files, world) if args.verify else {"written": {}, "held": {}, "cast": {}}
            if args.fsync:
                with world.timed("sync"):
                    files.sync()
            results = world.gather("exported", {**digests, "seconds": world.seconds})
            summary = None
            if results is not None:
                summary = _finish(made, staging, {name: merged(results, name) for name in digests}, world)
                summary["seconds"] = slowest(results)
            return world.broadcast("published", summary)


def _prepare(made: ExportPlan, staging: Path) -> None:
    """Rank 0: companion files, and every weight file at its full size with its header."""
    hf = made.args.source / HF_DIR
    for file in sorted(p for p in hf.iterdir() if p.is_file() and p.name != INDEX_NAME):
        shutil.copyfile(file, staging / file.name)
    if made.config != made.manifest.config:
        write_json(staging / "config.json", made.config)
    for shard in made.shards.values():
        with open(staging / shard.name, "wb") as file:
            file.write(len(shard.header).to_bytes(8, "little") + shard.header)
            file.truncate(shard.size)


def _tasks(
    made: ExportPlan, staging: Path, files: transfer.Files, rank: int, moved: Callable[[int], None]
) -> Iterable[Callable[[], None]]:
    rows = RowReader(made.args.source, files)
    merger = Merger(made.adapter, files) if made.adapter else None
    for share in made.shares:
        if share.rank == rank:
            yield partial(_write_share, made, share, files, rows, staging, moved, merger)
    for name, owner in made.passed_ranks:
        if owner == rank:
            assert made.passed is not None
            yield partial(
                _copy_tensor, files, made.args.source, made.passed.tensors[name], staging, made.tensors[name], moved
            )


def _copy_tensor(
    files: transfer.Files,
    source: Path,
    before: TensorInfo,
    target: Path,
    after: TensorInfo,
    moved: Callable[[int], None],
) -> None:
    transfer.copy_range(
        files.reader(source / before.file), before.offset, files.writer(target / after.file), after.offset, before.nbytes,
        moved, cast_to(before.dtype, after.dtype),
    )  # fmt: skip


def _write_share(
    made: ExportPlan, share: plans.Share, files: transfer.Files, rows: RowReader, staging: Path,
    moved: Callable[[int], None], merger: Merger | None,
) -> None:  # fmt: skip
    rule = made.matched.weight_map.rules[share.rule]
    tensor = rule.stored[share.stored]
    stored = made.stored[tensor.name]
    aliases = {target: alias for alias, target in made.matched.aliases.items()}
    for run in stored_rows(made.matched.segments[share.rule], share.stored, share.row, share.row + share.rows):
        name = rule.hf[run.hf].name
        if merger and name in made.merged:
            info = made.tensors[name]
            target = files.writer(staging / info.file)
            merger.write_rows(rows, stored, tensor.row_elements, run, name, info.dtype, target, info.offset, moved)
            continue
        for i, out in enumerate(n for n in (name, aliases.get(name)) if n in made.tensors):
            counted = moved if i == 0 else _silent
            _write_rows(made, stored, tensor.row_elements, run, made.tensors[out], files, rows, staging, counted)


def _silent(_: int) -> None:
    """Bytes of a tied tensor's second copy do not count as progress."""


def _write_rows(
    made: ExportPlan, stored: torch_dist.StoredTensor, row_elements: int, run: Segment, info: TensorInfo,
    files: transfer.Files, rows: RowReader, staging: Path, moved: Callable[[int], None],
) -> None:  # fmt: skip
    """Rows of a checkpoint tensor, however it is chunked, to rows of an HF tensor."""
    target, cast = files.writer(staging / info.file), cast_to(stored.dtype, info.dtype)
    out_row, row_bytes = row_elements * itemsize(info.dtype), row_elements * itemsize(stored.dtype)
    for a, b, parts in rows.spans(stored, row_elements, run.stored_row, run.stored_row + run.count):
        to = info.offset + (run.hf_row + a - run.stored_row) * out_row
        transfer.write_rows(parts, row_bytes, b - a, target, to, moved, cast)


def _digests(made: ExportPlan, staging: Path, files: transfer.Files, world: World) -> dict[str, dict[str, str]]:
    """Of this rank's share of the tensors: digests of what was written; of what cast and merged ones were made from; of the casts."""
    sizes = [(n, t.nbytes) for n, t in made.tensors.items()]
    mine = [n for n, rank in plans.spread(sizes, world.size) if rank == world.rank]
    rows = RowReader(made.args.source, files)
    written = [(n, file_blocks(files, staging, made.tensors[n])) for n in mine]
    held = [(n, held_blocks(made, n, files, rows)) for n in mine if n in made.casts or n in made.merged]
    cast = [
        (n, held_blocks(made, n, files, rows, cast_to(*made.casts[n])))
        for n in mine
        if n in made.casts.keys() - made.merged
    ]
    total = sum(size for _, size in sizes)
    return {
        "written": tensor_digests(written, world, "verify", total),
        "held": tensor_digests(held, world, "verify the source", total) if made.casts or made.merged else {},
        "cast": tensor_digests(cast, world, "verify the cast", total) if made.casts else {},
    }


def held_blocks(
    made: ExportPlan, name: str, files: transfer.Files, rows: RowReader, cast: Cast | None = None
) -> Blocks:
    """The bytes of a tensor as the checkpoint holds it, cast if asked."""
    if name in made.matched.passed_through:
        assert made.passed is not None
        return file_blocks(files, made.args.source, made.passed.tensors[name], cast)
    name = made.matched.aliases.get(name, name)

    def read() -> Iterator[memoryview]:
        rule, at = next(
            (r, h)
            for r, rule in enumerate(made.matched.weight_map.rules)
            for h, t in enumerate(rule.hf)
            if t.name == name
        )
        runs = sorted((s for s in made.matched.segments[rule] if s.hf == at), key=lambda s: s.hf_row)
        for run in runs:
            tensor = made.matched.weight_map.rules[rule].stored[run.stored]
            stored = made.stored[tensor.name]
            narrow = cast_to(stored.dtype, made.held[name].dtype)
            for block in rows.blocks(stored, tensor.row_elements, run.stored_row, run.stored_row + run.count):
                held = narrow(block) if narrow else block
                yield cast(held) if cast else held

    return read


def _finish(made: ExportPlan, staging: Path, digests: dict[str, dict[str, str]], world: World) -> dict[str, Any]:
    """Rank 0: index, audit, certificate, publication."""
    _write_index(made, staging)
    audit = open_hf(staging)  # raises when index, headers and files do not agree
    certificate = _certificate(made, digests, sorted(audit.tensors))
    if certificate["different"]:
        first, trained = certificate["different"][0], made.manifest.trained
        raise UserError(
            f"{made.args.source}: {len(certificate['different'])} of {len(made.tensors)} tensors differ from what was "
            f"{'trained' if trained else 'imported'}, e.g. {first}; the checkpoint is damaged: nothing was published"
            + ("" if trained else ". Import it again")
        )
    source, args = identity.of_mimo(made.args.source), made.args
    adapter = identity.of_adapter(args.adapter) if args.adapter else None
    made_of = identity.of_export(source, made.manifest.rules_version, args.dtype, args.mtp, args.verify, adapter)
    if made.adapter and adapter:
        certificate |= {"adapter": adapter_summary(made.adapter, adapter)}
    write_json(staging / PARITY_NAME, certificate | {"identity": made_of})
    world.check()
    publish.publish(staging, made.args.target, made.args.overwrite, made.args.fsync)
    counts = {k: certificate[k] for k in ("verified", "equal", "cast", "merged", "unknown") if k in certificate}
    return {
        "target": str(made.args.target), "tensors": len(made.tensors), "bytes": sum(made.bytes_per_rank),
        "bytes_per_rank": made.bytes_per_rank, "shards": len(made.shards), "parity": counts, "casts": _cast_kinds(made),
        "tied": sorted(certificate["tied"]), "passed_through": len(made.passed_ranks),
        "dropped": len(certificate["dropped"]), "trained": made.manifest.trained, "certificate": str(made.args.target / PARITY_NAME),
    }  # fmt: skip


def _cast_kinds(made: ExportPlan) -> dict[str, int]:
    """``{"BF16 to F32": 98}``, of import and export together."""
    kinds = [" to ".join(pair) for casts in (made.manifest.casts, made.casts) for pair in casts.values()]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _write_index(made: ExportPlan, staging: Path) -> None:
    """The source's own index when it still lists exactly what was written, else one that does."""
    source = made.args.source / HF_DIR / INDEX_NAME
    if not source.exists():
        if set(made.shards) != {SINGLE_NAME}:
            raise UserError(
                f"{source}: missing, but the checkpoint's headers are of {len(made.shards)} shards; import it again"
            )
        return
    index = parse_index(read_bytes(source), source)
    total = sum(t.nbytes for t in made.tensors.values())
    if set(index["weight_map"]) == set(made.tensors) and total == made.manifest.source.get("bytes"):
        shutil.copyfile(source, staging / INDEX_NAME)
        return
    names = [n for n in index["weight_map"] if n in made.tensors]
    metadata = {**(index.get("metadata") or {}), "total_size": total}
    write_json(staging / INDEX_NAME, {"metadata": metadata, "weight_map": {n: made.tensors[n].file for n in names}})


def _status(made: ExportPlan, name: str, digests: dict[str, dict[str, str]]) -> str:
    """How a tensor that was written stands to the digest that the import, or the training, took of it."""
    changed = name in made.casts or name in made.merged
    found, expected = digests["held" if changed else "written"].get(name), made.manifest.digests.get(name)
    # A tensor cast at import has the digest of its cast bytes.
    kind = "merged" if name in made.merged else "cast" if name in made.casts or name in made.manifest.casts else "equal"
    if name in digests["cast"] and digests["cast"][name] != digests["written"][name]:
        return "different"
    if found is None:  # verify=false
        return kind if changed else "unknown"
    if expected is None:
        return "unknown"
    return kind if found == expected else "different"


def _certificate(made: ExportPlan, digests: dict[str, dict[str, str]], index_names: list[str]) -> dict[str, Any]:
    """The parity certificate: what was written, against the digests that the import, or the training, took."""
    written = digests["written"]
    status = {name: _status(made, name, digests) for name in made.tensors}
    kinds = ("equal", "cast", "merged", "unknown") if made.adapter else ("equal", "cast", "unknown")
    count = {s: sum(v == s for v in status.values()) for s in kinds}
    return {
        "format": 1, "kind": "export", "source": str(made.args.source), "imported_from": made.manifest.source,
        "trained": made.manifest.trained, "verified": made.args.verify, "tensors": len(made.tensors), **count,
        "different": sorted(n for n, s in status.items() if s == "different"),
        "tied": dict(made.matched.weight_map.aliases), "passed_through": [n for n, _ in sorted(made.passed_ranks)],
        "dropped": sorted({*made.dropped, *made.manifest.dropped}),
        "casts": {"import": made.manifest.casts, "export": made.casts},
        "index": {"files": sorted(made.shards), "names_equal_files": index_names == sorted(made.tensors)},
        "layout": made.args.layout.as_layout(), "versions": {"written_by": made.manifest.versions, "exported_by": versions()},
        "digest": "blake3", "digests": {n: {"digest": written.get(n), "status": status[n]} for n in made.tensors},
    }  # fmt: skip
