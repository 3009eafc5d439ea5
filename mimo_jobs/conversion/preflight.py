"""Everything that can be known before a job starts, from headers and the layout. No torch, no tensor read."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint.peft_dir import check_adapter, read_peft
from mimo_jobs.conversion import publish
from mimo_jobs.conversion.exporter import ExportArgs, ExportPlan, plan_export
from mimo_jobs.conversion.importer import ImportArgs, ImportPlan, plan_import
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.layout import ComponentLayout, ParallelLayout, ResolvedLayout
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights.dtypes import itemsize


@dataclass(frozen=True)
class Preflight:
    """A job's plan in numbers.

    Attributes:
        tensors: HF tensors read (import) or written (export), passed-through ones included.
        bytes_per_rank: bytes of weights that each rank moves.
        passed_through, tied, dropped: HF names.
        casts: number of tensors whose dtype changes.
        disk_needed, disk_free: bytes, where the target goes.
        notes: sentences a user should read before queueing.
        held: component -> bytes of weights of its fullest rank, were a model built in this layout.
        allowed: (component, field, value) -> whether the model allows that size of a component's layout.
    """

    layout: ResolvedLayout
    tensors: int
    total_bytes: int
    bytes_per_rank: list[int]
    passed_through: list[str]
    tied: list[str]
    dropped: list[str]
    casts: int
    disk_needed: int
    disk_free: int
    notes: list[str]
    held: dict[str, int]
    allowed: Callable[[str, str, int], bool]


def preflight(job: str, arguments: Mapping[str, Any]) -> Preflight | None:
    """Check a job's arguments (as `jobs` takes them) and plan it; None for jobs that have no plan.

    Raises:
        UserError: whatever would stop the job and can be known now.
    """
    if job == "import_hf":
        return check_import(import_args(**arguments))
    if job == "export_hf":
        return check_export(export_args(**arguments))
    return None


def check_import(args: ImportArgs) -> Preflight:
    """Plan an import and check its target and disk; see `preflight`."""
    publish.check_target(args.target, args.overwrite, args.model)
    made = plan_import(args)
    needed = sum(made.files.values())
    passed = [n for n, _ in made.passed_ranks]
    notes = _idle_notes(args.layout, made.bytes_per_rank)
    if made.dropped:
        notes.append(f"{len(made.dropped)} passed-through tensors (e.g. {made.dropped[0]}) are dropped: mtp=drop")
    return Preflight(
        args.layout, len(made.hf.tensors) - len(made.dropped), sum(made.bytes_per_rank), made.bytes_per_rank, sorted(passed),
        sorted(made.matched.weight_map.aliases), sorted(made.dropped), len(made.casts), needed,
        publish.check_space(args.target, needed), notes, held(made), allowed(made),
    )  # fmt: skip


def check_export(args: ExportArgs) -> Preflight:
    """Plan an export and check its target and disk; see `preflight`."""
    publish.check_target(args.target, args.overwrite, args.source, args.adapter)
    made = plan_export(args)
    needed = sum(s.size for s in made.shards.values())
    notes = _idle_notes(args.layout, made.bytes_per_rank)
    if made.adapter:
        notes.append(f"{len(made.merged)} tensors are merged with the adapter {args.adapter}")
    if made.rounded and args.dtype is None:
        notes.append(
            f"{len(made.rounded)} tensors were trained in a wider dtype than they had before, to which they are rounded; dtype=fp32 "
            "writes them as they are"
        )
    if made.dropped:
        notes.append(f"{len(made.dropped)} passed-through tensors (e.g. {made.dropped[0]}) are dropped: mtp=drop")
    return Preflight(
        args.layout, len(made.tensors), sum(made.bytes_per_rank), made.bytes_per_rank, sorted(n for n, _ in made.passed_ranks),
        sorted(made.manifest.aliases), sorted(made.dropped), len(made.casts), needed,
        publish.check_space(args.target, needed), notes, held(made), allowed(made),
    )  # fmt: skip


def check_export_of(made_by: Mapping[str, Any], arguments: Mapping[str, Any]) -> Preflight:
    """Plan an export of a checkpoint that an import (arguments ``made_by``) has still to write, from that import's source.

    Raises:
        UserError: what would stop the export and can be known now.
    """
    export = export_args(**arguments)
    publish.check_target(export.target, export.overwrite, export.source, export.adapter)
    mtp = "drop" if "drop" in (export.mtp, made_by["mtp"]) else "keep"
    args = ImportArgs(Path(made_by["model"]), export.source, export.layout, export.dtype or made_by["dtype"], mtp)
    made = plan_import(args)
    if export.adapter and export.adapter.exists():  # else a step of the chain has still to write it too
        check_adapter(read_peft(export.adapter), made.matched.weight_map, made_by["model"])
    needed = sum(s.size for s in made.exported.values())
    return Preflight(
        export.layout, sum(len(s.tensors) for s in made.exported.values()), sum(made.bytes_per_rank), made.bytes_per_rank,
        sorted(n for n, _ in made.passed_ranks), sorted(made.matched.weight_map.aliases), sorted(made.dropped), len(made.casts),
        needed, publish.check_space(export.target, needed), _idle_notes(export.layout, made.bytes_per_rank), held(made), allowed(made),
    )  # fmt: skip


def held(made: ImportPlan | ExportPlan) -> dict[str, int]:
    """component -> bytes of weights that the rank which holds most of it holds, as a model built in this layout would."""
    weight_map, layout = made.matched.weight_map, made.args.layout
    ranks: dict[tuple[str, int], int] = {}
    for box in plans.boxes(weight_map, layout):
        rule = weight_map.rules[box.rule]
        for rank in box.holders:
            at = (rule.component, rank)
            ranks[at] = ranks.get(at, 0) + box.rows * box.columns * itemsize(made.matched.dtypes[box.rule])
    return {name: max((n for (c, _), n in ranks.items() if c == name), default=0) for name in layout.components}


def allowed(made: ImportPlan | ExportPlan) -> Callable[[str, str, int], bool]:
    """Whether the model allows another size of one component's layout."""
    weight_map, layout = made.matched.weight_map, made.args.layout

    @functools.cache
    def check(component: str, field: str, value: int) -> bool:
        changed = {**layout.components, component: replace(layout.components[component], **{field: value})}
        try:
            plans.check_layout(weight_map, replace(layout, components=changed))
        except UsageError:
            return False
        return True

    return check


def _idle_notes(layout: ResolvedLayout, moved: list[int]) -> list[str]:
    idle = [r for r in range(layout.world_size) if moved[r] == 0]
    return [f"ranks {idle} move no bytes: another rank of their component holds the same weights"] if idle else []


def import_args(model: str, target: str, layout: ParallelLayout | Mapping | None = None, **options: Any) -> ImportArgs:
    """`ImportArgs` from what a recipe or JOB.json holds; the layout may be plain nested dicts."""
    _check_options("import_hf", options, ImportArgs)
    return ImportArgs(directory("model", model), directory("target", target), as_layout(layout).resolve(), **options)


def export_args(source: str, target: str, layout: ParallelLayout | Mapping | None = None, **options: Any) -> ExportArgs:
    """`ExportArgs` from what a recipe or JOB.json holds; the layout may be plain nested dicts."""
    _check_options("export_hf", options, ExportArgs)
    if options.get("adapter") is not None:
        options["adapter"] = directory("adapter", options["adapter"])
    return ExportArgs(directory("source", source), directory("target", target), as_layout(layout).resolve(), **options)


def _check_options(job: str, options: Mapping[str, Any], args: type) -> None:
    known = {f.name for f in fields(args)}
    if unknown := sorted(set(options) - known):
        raise UsageError(f"{job}: unknown argument {unknown[0]}; known: {', '.join(sorted(known))}")


def directory(field: str, value: str | Path) -> Path:
    """An absolute path. Raises `UsageError` when it is empty."""
    if not str(value or ""):
        raise UsageError(f"{field} is empty: give a directory, e.g. {field}=/data/qwen")
    if "\0" in str(value):
        raise UserError(f"{field}: a path cannot hold a NUL character")
    return Path(value).expanduser().absolute()


def as_layout(value: ParallelLayout | Mapping | None) -> ParallelLayout:
    """A `ParallelLayout` from nested dicts (JOB.json)."""
    if value is None:
        return ParallelLayout()
    if isinstance(value, ParallelLayout):
        return value
    components = {
        n: v if isinstance(v, ComponentLayout) else ComponentLayout(**v) for n, v in value.items() if n != "world_size"
    }
    return ParallelLayout(**components, world_size=value.get("world_size"))
