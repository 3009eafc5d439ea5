"""Everything that can be known of a fine-tuning run before it starts: settings, source, layout, data, disk, GPU memory. No torch."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mimo_jobs.checkpoint.manifest import is_mimo
from mimo_jobs.checkpoint.peft_dir import check_adapter, check_base, layout_of, read_peft
from mimo_jobs.conversion import preflight, publish
from mimo_jobs.conversion.exporter import ExportArgs, ExportPlan, plan_export
from mimo_jobs.conversion.importer import ImportArgs, ImportPlan, plan_import
from mimo_jobs.errors import UserError
from mimo_jobs.layout import IMAGES, LANGUAGE, ResolvedLayout
from mimo_jobs.training import checks, memory
from mimo_jobs.training.config import Dataset, Lora
from mimo_jobs.training.memory import Memory
from mimo_jobs.training.rows import steps_and_stop
from mimo_jobs.training.saved import checkpoint_directory, completed, steps_directory
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights.adapters import adapted_linears, check_settings, check_stages, targeted

LOOKED_AT = 16  # rows that are tried before anything starts
COUNTED = 4 << 30  # bytes of JSON whose lines are counted
ITEMSIZE = {"bf16": 2, "fp32": 4}
MASTER = 12  # bytes of a trained parameter in a step's checkpoint: fp32 copy and two moments
NARROW_MASTER = 8  # with optimizer.state=bf16


@dataclass(frozen=True)
class TrainingPreflight:
    """A fine-tuning run in numbers.

    Attributes:
        steps: optimizer steps, None when only the data can say.
        samples: of the data, None when not counted.
        parameters, trained: of the model, and of them (or of its adapters) those that train.
        memory: component -> bytes on the GPU of its fullest rank.
        disk_needed, disk_free: bytes, where the target goes; the target and its steps' checkpoints.
        step_bytes: of one checkpoint of a step.
        notes: sentences a user should read before queueing.
        held: component -> bytes of weights of its fullest rank.
        allowed: (component, field, value) -> whether the model allows that size of a component's layout.
    """

    layout: ResolvedLayout
    steps: int | None
    samples: int | None
    parameters: int
    trained: int
    memory: dict[str, Memory]
    disk_needed: int
    disk_free: int
    step_bytes: int
    notes: list[str]
    held: dict[str, int]
    allowed: Callable[[str, str, int], bool]


def check_training(
    arguments: Mapping[str, Any], made_by: Mapping[str, Any] | None = None, data_to_come: bool = False
) -> TrainingPreflight:
    """Check a fine-tuning job.

    Args:
        arguments: of `jobs.sft` or `jobs.lora`, the layout unresolved.
        made_by: arguments of the import that has still to write the source.
        data_to_come: an earlier step makes the data.

    Raises:
        UserError: whatever would stop the job and can be known now.
    """
    layout: ResolvedLayout = arguments["layout"].resolve()
    source, target = Path(arguments["source"]), Path(arguments["target"])
    publish.check_target(target, arguments["overwrite"], source)
    checks.check_settings(arguments, layout)
    made = _plan(source, target, layout, made_by)
    samples, notes = (None, []) if data_to_come else look_at(arguments["data"], arguments["dataset"])
    settings = arguments["validation"]
    if settings.data:
        notes += look_at(
            settings.data, dataclasses.replace(arguments["dataset"], split=settings.split), "validation.data"
        )[1]
    steps = _steps(arguments, samples)
    notes = [*checks.notes(arguments, layout), *notes]
    if steps is not None:
        checks.check_optimizer(arguments["optimizer"], steps)
    adapters = _adapters(arguments.get("lora"), made, source if made_by is None else None)
    needs, parameters, trained = _memory(arguments, made, adapters)
    written = 4 * trained if adapters else parameters * ITEMSIZE[arguments["precision"]]
    narrow = arguments["optimizer"].state == "bf16" and arguments["precision"] == "bf16" and adapters is None
    step_bytes = written + (NARROW_MASTER if narrow else MASTER) * trained
    needed, free = _disk(arguments, written, step_bytes)
    return TrainingPreflight(
        layout, steps, samples, parameters, trained, needs, needed, free, step_bytes, notes, preflight.held(made), preflight.allowed(made)
    )  # fmt: skip


def _plan(
    source: Path, target: Path, layout: ResolvedLayout, made_by: Mapping[str, Any] | None
) -> ImportPlan | ExportPlan:
    """The source's tensors under the layout; its files are looked at."""
    if made_by is not None:
        return plan_import(ImportArgs(Path(made_by["model"]), target, layout, made_by["dtype"], made_by["mtp"]))
    if is_mimo(source):
        return plan_export(ExportArgs(source, target, layout))
    return plan_import(ImportArgs(source, target, layout))


def _steps(arguments: Mapping[str, Any], samples: int | None) -> int | None:
    if arguments["steps"] is not None:
        return arguments["steps"]
    if samples is None or arguments["dataset"].packing:
        return None
    return steps_and_stop(lambda _: samples, arguments["global_batch_size"], None, arguments["epochs"])[0]


# ---------------------------------------------------------------------------------------------------------------- data


def look_at(data: str, settings: Dataset, field: str = "data") -> tuple[int | None, list[str]]:
    """Number of samples, if that is quickly found, and notes; the first rows are tried.

    Raises:
        UserError: there is no such data, it is empty, or its first rows fit no schema.
    """
    from mimo_jobs.training.data.files import KINDS, data_files, is_saved, no_such_file

    place = Path(data)
    if settings.images and not Path(settings.images).is_dir():
        raise UserError(f"dataset.images={settings.images}: no such directory")
    if not place.exists():
        if place.is_absolute():
            raise no_such_file(place)
        return None, [f"{field}={data} is a hub data set: rank 0 loads it, from the hub or from its host's cache"]
    if place.is_dir() and is_saved(place):
        return None, []
    files = data_files(place, settings.split)
    kind = KINDS[files[0].suffix.lower()]
    if not sum(f.stat().st_size for f in files):
        raise UserError(f"{field}={data}: no rows in it")
    if kind == "parquet":
        return _parquet(files), []
    if kind != "json":
        return None, []
    base = settings.images or str(files[0].parent)
    _try_rows(files, base, settings, f"{field}={data}")
    return _count(files), []


def _try_rows(files: list[Path], base: str, settings: Dataset, data: str) -> None:
    """Convert the first rows of JSON files, which are read no further."""
    from mimo_jobs.training.data.files import json_rows
    from mimo_jobs.training.data.samples import BadSample
    from mimo_jobs.training.data.schemas import NEEDS, SCHEMAS, fits, schema_of
    from mimo_jobs.weights.json_files import parse_object

    rows = list(islice(json_rows([str(f) for f in files]), LOOKED_AT))
    if not rows:
        raise UserError(f"{data}: no rows in it")
    where = [f"{files[row['file']].name}:{row['line']}" for row in rows]
    parsed = [parse_object(row["row"].encode(), Path(name)) for row, name in zip(rows, where, strict=True)]
    columns = sorted({key for row in parsed for key in row})
    schema = schema_of(columns) if settings.schema == "auto" else settings.schema
    if schema is None or not fits(schema, columns):
        needs = "\n".join(f"  {key}: {value}" for key, value in NEEDS.items())
        asked = "fit no schema" if settings.schema == "auto" else f"do not fit dataset.schema={schema}"
        raise UserError(f"{data}: its columns ({', '.join(columns)}) {asked}. Columns that a schema needs:\n{needs}")
    problems = []
    for row, name in zip(parsed, where, strict=True):
        try:
            SCHEMAS[schema](row, base)
        except BadSample as error:
            problems.append(f"{name}: {error}")
    if problems and (settings.on_bad == "stop" or len(problems) == len(rows)):
        which = "dataset.on_bad=stop, and a row" if settings.on_bad == "stop" else f"all of the first {len(rows)} rows"
        raise UserError(f"{data}: {which} cannot be used, e.g. {problems[0]}")


def _count(files: list[Path]) -> int | None:
    """Rows of JSON Lines; None where that would take long, or of other JSON."""
    if any(f.suffix.lower() == ".json" for f in files) or sum(f.stat().st_size for f in files) > COUNTED:
        return None
    count = 0
    for path in files:
        with open(path, "rb") as file:
            count += sum(bool(line.strip()) for line in file)
    return count


def _parquet(files: list[Path]) -> int | None:
    import pyarrow
    from pyarrow import parquet

    try:
        return sum(parquet.read_metadata(f).num_rows for f in files)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{files[0]}: cannot be read: {error}") from None


# -------------------------------------------------------------------------------------------------- parameters and disk


def _adapters(lora: Lora | None, made: ImportPlan | ExportPlan, source: Path | None) -> Lora | None:
    """The adapters' settings with those of the adapter to go on from, checked against the model."""
    if lora is None:
        return None
    weight_map, layout = made.matched.weight_map, made.args.layout
    if lora.adapter:
        found = read_peft(Path(lora.adapter))
        check_adapter(found, weight_map, str(source or "the model"))
        if source is not None and isinstance(made, ExportPlan):
            check_base(found, made.manifest, source)
        lora = found.applied_to(lora)
        check_settings(lora)
    check_stages(weight_map, targeted(weight_map, lora.targets), lora.targets, layout)
    return lora


def _memory(
    arguments: Mapping[str, Any], made: ImportPlan | ExportPlan, lora: Lora | None
) -> tuple[dict[str, Memory], int, int]:
    """Component -> memory of its fullest rank; the model's parameters, and how many train."""
    layout, itemsize, frozen = made.args.layout, ITEMSIZE[arguments["precision"]], arguments.get("freeze", "none")
    held, total = _elements(made)
    own = _adapter_elements(made, lora)
    kept = memory.activations(
        made.config, layout, micro_batch_size=arguments["micro_batch_size"], max_length=arguments["dataset"].max_length,
        itemsize=itemsize, recompute=arguments["recompute"], sequence_parallel=arguments["sequence_parallel"],
        images_train=bool(own.get(IMAGES)) if lora else frozen != IMAGES, head_trains=lora is None and frozen != LANGUAGE,
    )  # fmt: skip
    found = {}
    for name, component in layout.components.items():
        trains = lora is None and frozen != name
        adapters = max(own.get(name, {}).values(), default=0)
        each = held[name].values()
        narrow = arguments["optimizer"].state == "bf16"
        state = memory.state(
            max(each), max(each) if trains else 0, adapters, component.dp * component.cp, itemsize, narrow
        )
        found[name] = dataclasses.replace(state, activations=kept[name])
    if lora is not None:
        return found, sum(total.values()), _adapter_total(made, lora)
    return found, sum(total.values()), sum(n for name, n in total.items() if name != frozen)


def _elements(made: ImportPlan | ExportPlan) -> tuple[dict[str, dict[int, int]], dict[str, int]]:
    """Component -> rank -> parameters that it holds, and component -> its parameters."""
    weight_map, layout = made.matched.weight_map, made.args.layout
    held: dict[str, dict[int, int]] = {name: {} for name in layout.components}
    total = dict.fromkeys(layout.components, 0)
    for box in plans.boxes(weight_map, layout):
        rule = weight_map.rules[box.rule]
        for rank in box.holders:
            held[rule.component][rank] = held[rule.component].get(rank, 0) + box.rows * box.columns
    for rule in weight_map.rules:
        total[rule.component] += sum(math.prod(t.shape) for t in rule.hf)
    language = layout.components[LANGUAGE]
    if weight_map.aliases and language.pp > 1:  # a tied head: the last stage has the embeddings, too
        d = made.config["text_config"]
        for tp in range(language.tp):
            for rank in language.holders(tp, language.pp - 1):
                held[LANGUAGE][rank] += d["vocab_size"] * d["hidden_size"] // language.tp
    return held, total


def _adapter_elements(made: ImportPlan | ExportPlan, lora: Lora | None) -> dict[str, dict[int, int]]:
    """Component -> rank -> parameters of its adapters, of one replica (the others hold as many)."""
    if lora is None:
        return {}
    weight_map, layout = made.matched.weight_map, made.args.layout
    modules = targeted(weight_map, lora.targets)
    found: dict[str, dict[int, int]] = {name: {} for name in layout.components}
    first = {c.holders(0, s)[0] for c in layout.components.values() for s in range(c.pp)}
    for rank in first:
        for layer in adapted_linears(weight_map, modules, layout, rank).values():
            of = found[layer.component]
            of[rank] = of.get(rank, 0) + lora.rank * (len(layer.modules) * layer.columns + layer.rows)
    return found


def _adapter_total(made: ImportPlan | ExportPlan, lora: Lora) -> int:
    weight_map = made.matched.weight_map
    entries = layout_of(targeted(weight_map, lora.targets), weight_map, lora.rank, lora.dora)
    return sum(math.prod(shape) for _, _, shape in entries)


def _disk(arguments: Mapping[str, Any], written: int, step_bytes: int) -> tuple[int, int]:
    """Bytes needed and free where the target goes: of itself and, on the same disk, of the checkpoints of steps.

    Of these there is one more than are kept while the newest is written, also in a short run: one that is stopped again and again writes
    one each time. They take the room of those that are there already.

    Raises:
        UserError: there is not enough, or not where the checkpoints go.
    """
    target, saving = Path(arguments["target"]), arguments["saving"]
    place = steps_directory(target, saving.directory)
    there = sum(p.stat().st_size for _, step in completed(place) for p in step.iterdir() if p.is_file())
    kept = step_bytes * (saving.keep + 1)
    if _device(place) == _device(target):
        return written + kept, publish.check_space(target, written + kept - there)
    publish.check_space(checkpoint_directory(place, 1), kept - there)
    return written, publish.check_space(target, written)


def _device(place: Path) -> int:
    return next(p for p in (place, *place.parents) if p.exists()).stat().st_dev
