"""Everything that can be known before a job starts, from headers and the layout. No torch, no tensor read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mimo_jobs.conversion import publish
from mimo_jobs.conversion.exporter import ExportArgs, plan_export
from mimo_jobs.conversion.importer import ImportArgs, plan_import
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.layout import ComponentLayout, ParallelLayout, ResolvedLayout


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
        publish.check_space(args.target, needed), notes,
    )  # fmt: skip


def check_export(args: ExportArgs) -> Preflight:
    """Plan an export and check its target and disk; see `preflight`."""
    publish.check_target(args.target, args.overwrite, args.source)
    made = plan_export(args)
    needed = sum(s.size for s in made.shards.values())
    notes = _idle_notes(args.layout, made.bytes_per_rank)
    if made.dropped:
        notes.append(f"{len(made.dropped)} passed-through tensors (e.g. {made.dropped[0]}) are dropped: mtp=drop")
    return Preflight(
        args.layout, len(made.tensors), sum(made.bytes_per_rank), made.bytes_per_rank, sorted(n for n, _ in made.passed_ranks),
        sorted(made.manifest.aliases), sorted(made.dropped), len(made.casts), needed,
        publish.check_space(args.target, needed), notes,
    )  # fmt: skip


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
