"""The plan of a conversion: from headers and a layout, which rank moves which rows where. No tensor is read.

Import: every box (a TP/PP part of a checkpoint tensor) is written by one of the ranks that hold it under the layout.
Export: every row of every HF tensor is written by one of the ranks that hold it; the holders share by whole rows, also
for tensors that TP cuts by columns, so that all reads and writes are contiguous.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mimo_jobs.errors import UsageError, UserError, did_you_mean
from mimo_jobs.families.spec import BoundTensor, Cut, WeightMap
from mimo_jobs.layout import Component, ResolvedLayout, check_divides, padded_vocab, stage_layers
from mimo_jobs.weights.dtypes import itemsize, widest
from mimo_jobs.weights.rules import Segment, segments

FLOATS = ("F64", "F32", "BF16", "F16")
MIN_SHARE = 4 << 20  # smaller tensors go whole to one holder: a share below a few MiB costs more calls than it saves


class Header(Protocol):
    """What a plan knows of an HF tensor: a `safetensors_io.TensorInfo`."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Box:
    """Rows x columns of a checkpoint tensor's matrix view, and the ranks that hold them. ``rows`` may end beyond the
    HF rows (padded vocabulary)."""

    rule: int
    stored: int
    row: int
    rows: int
    column: int
    columns: int
    holders: tuple[int, ...]


@dataclass(frozen=True)
class Matched:
    """An HF checkpoint against a weight map.

    Attributes:
        segments: per rule, `rules.segments`.
        dtypes: per rule, the dtype of its HF tensors; when they differ, the one that holds all of them exactly.
        aliases: tied names that the checkpoint does hold -> the name they repeat.
        passed_through: names carried untouched.
    """

    weight_map: WeightMap
    segments: list[list[Segment]]
    dtypes: list[str]
    aliases: dict[str, str]
    passed_through: list[str]


def match(weight_map: WeightMap, headers: Mapping[str, Header], where: str) -> Matched:
    """Match every HF name exactly once.

    Raises:
        UserError: a key that no rule matches, a key that a rule needs and is not there, a wrong shape or dtype.
    """
    owners: dict[str, int] = {}
    for index, rule in enumerate(weight_map.rules):
        for tensor in rule.hf:
            assert tensor.name not in owners, f"{tensor.name} is matched by two rules"
            owners[tensor.name] = index
    passed = [n for n in headers if n.startswith(weight_map.passed_through)]
    aliases = {n: t for n, t in weight_map.aliases.items() if n in headers}
    known = set(owners) | set(passed) | set(aliases)
    if unknown := [n for n in headers if n not in known]:
        raise UserError(
            f"{where}: {len(unknown)} tensor(s) that no rule of the family matches, e.g. {unknown[0]} "
            f"{list(headers[unknown[0]].shape)}{did_you_mean(unknown[0], set(owners) - set(headers))}"
        )
    if missing := [n for n in owners if n not in headers]:
        raise UserError(
            f"{where}: {len(missing)} tensor(s) that the config calls for are missing, e.g. {missing[0]}; "
            "the download is incomplete, or config.json is of another model"
        )
    dtypes = []
    for rule in weight_map.rules:
        for tensor in rule.hf:
            _check_header(tensor, headers[tensor.name], where)
        kinds = {headers[t.name].dtype for t in rule.hf}
        together = widest(kinds)
        if together is None:
            named = ", ".join(f"{t.name} {headers[t.name].dtype}" for t in rule.hf)
            raise UserError(f"{where}: tensors that are stored as one have dtypes that none holds exactly: {named}")
        dtypes.append(together)
    for name, target in aliases.items():
        if (headers[name].dtype, headers[name].shape) != (headers[target].dtype, headers[target].shape):
            raise UserError(f"{where}: {name} is tied to {target} (tie_word_embeddings) but differs in shape or dtype")
    return Matched(weight_map, [segments(r) for r in weight_map.rules], dtypes, aliases, passed)


def _check_header(tensor: BoundTensor, header: Header, where: str) -> None:
    if tuple(header.shape) != tensor.shape:
        raise UserError(
            f"{where}: {tensor.name} has shape {list(header.shape)}, config.json calls for {list(tensor.shape)}"
        )
    if header.dtype not in FLOATS:
        raise UserError(f"{where}: {tensor.name} has dtype {header.dtype}; supported for weights: {', '.join(FLOATS)}")


def check_layout(weight_map: WeightMap, layout: ResolvedLayout) -> None:
    """The layout against the model: TP divides heads, KV heads, FFN; no pipeline stage is empty. Raises `UsageError`."""
    for name, component in layout.components.items():
        tp = component.tp
        for what, value in weight_map.divisors.get(name, ()):
            check_divides(name, "tp", tp, what, value)
        what, value = weight_map.groups.get(name, ("", tp))
        if value % tp and tp % value:
            check_divides(name, "tp", tp, what, value)
        for rule in weight_map.rules:
            for tensor in rule.stored if rule.component == name else ():
                cut = {Cut.ROWS: tensor.rows, Cut.COLUMNS: tensor.row_elements, Cut.GATED_ROWS: tensor.rows // 2}
                check_divides(name, "tp", tp, f"the width of {tensor.name}", cut.get(tensor.cut, tp))
    language = layout.components["language"]
    if language.cp > 1:
        for what, value in weight_map.divisors["language"]:
            if what == "linear_num_key_heads":
                check_divides("language", "tp", language.tp * language.cp, what, value)
    if language.pp > weight_map.num_layers:
        raise UsageError(
            f"layout.language.pp={language.pp} exceeds the model's {weight_map.num_layers} layers; "
            f"set layout.language.pp to {weight_map.num_layers} or less"
        )


def boxes(weight_map: WeightMap, layout: ResolvedLayout) -> list[Box]:
    """Every box of every checkpoint tensor under a layout (megatron-core's sharded_state_dict, without the model)."""
    language = layout.components["language"]
    stage_of = {i: s for s, layers in enumerate(stage_layers(weight_map.num_layers, language.pp)) for i in layers}
    found = []
    for index, rule in enumerate(weight_map.rules):
        component = layout.components[rule.component]
        stage = (
            stage_of[rule.stage] if isinstance(rule.stage, int) else {"first": 0, "last": component.pp - 1}[rule.stage]
        )
        for stored, tensor in enumerate(rule.stored):
            found += _cut(index, stored, tensor, component, stage)
    return found


def _cut(rule: int, stored: int, tensor: BoundTensor, component: Component, stage: int) -> list[Box]:
    tp, rows, width = component.tp, tensor.rows, tensor.row_elements
    holders = [tuple(component.holders(t, stage)) for t in range(tp)]
    match tensor.cut:
        case Cut.REPLICATED:
            everyone = tuple(sorted(r for group in holders for r in group))
            return [Box(rule, stored, 0, rows, 0, width, everyone)]
        case Cut.COLUMNS:
            part = width // tp
            return [Box(rule, stored, 0, rows, t * part, part, holders[t]) for t in range(tp)]
        case Cut.GATED_ROWS:
            part = rows // 2 // tp
            return [
                Box(rule, stored, h * rows // 2 + t * part, part, 0, width, holders[t])
                for t in range(tp)
                for h in (0, 1)
            ]
        case _:
            part = (padded_vocab(rows, tp) if tensor.cut is Cut.VOCAB else rows) // tp
            return [Box(rule, stored, t * part, part, 0, width, holders[t]) for t in range(tp)]


def stored_shape(tensor: BoundTensor, component: Component) -> tuple[int, ...]:
    """The global shape in the checkpoint (a padded vocabulary is longer than the HF tensor)."""
    rows = padded_vocab(tensor.rows, component.tp) if tensor.cut is Cut.VOCAB else tensor.rows
    return (rows, *tensor.shape[1:])


def box_extent(tensor: BoundTensor, box: Box) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of a box in its tensor's own number of dimensions."""
    if tensor.cut is Cut.COLUMNS:
        return (box.row, box.column), (box.rows, box.columns)
    return (box.row, *(0 for _ in tensor.shape[1:])), (box.rows, *tensor.shape[1:])


def give_out(sizes: Iterable[tuple[int, tuple[int, ...]]], world_size: int) -> list[int]:
    """One rank for each (bytes, holders): the holder with the least so far, the same answer on every rank."""
    load, chosen = [0] * world_size, []
    for nbytes, holders in sizes:
        rank = min(holders, key=lambda r: (load[r], r))
        load[rank] += nbytes
        chosen.append(rank)
    return chosen


@dataclass(frozen=True)
class Share:
    """Whole rows ``[row, row + rows)`` of a checkpoint tensor that ``rank`` turns into HF rows."""

    rank: int
    rule: int
    stored: int
    row: int
    rows: int


def export_shares(matched: Matched, layout: ResolvedLayout) -> list[Share]:
    """Every row of every checkpoint tensor, each given to one of the ranks that hold it under ``layout``."""
    together: dict[tuple[int, int, int, int], list[int]] = {}
    for box in boxes(matched.weight_map, layout):
        tensor = matched.weight_map.rules[box.rule].stored[box.stored]
        stop = min(box.row + box.rows, tensor.rows)
        if box.row < stop:
            together.setdefault((box.rule, box.stored, box.row, stop), []).extend(box.holders)
    pieces = []
    for (rule, stored, row, stop), holders in together.items():
        tensor = matched.weight_map.rules[rule].stored[stored]
        row_bytes = tensor.row_elements * itemsize(matched.dtypes[rule])
        holders = sorted(set(holders))
        count = max(1, min(len(holders), (stop - row) * row_bytes // MIN_SHARE, stop - row))
        cuts = [row + (stop - row) * i // count for i in range(count + 1)]
        for i in range(count):
            allowed = (
                tuple(holders)
                if count == 1
                else tuple(holders[len(holders) * i // count : len(holders) * (i + 1) // count])
            )
            pieces.append((rule, stored, cuts[i], cuts[i + 1] - cuts[i], allowed, (cuts[i + 1] - cuts[i]) * row_bytes))
    ranks = give_out(((p[5], p[4]) for p in pieces), layout.world_size)
    return [Share(rank, *p[:4]) for rank, p in zip(ranks, pieces, strict=True)]


def spread(names: Iterable[tuple[str, int]], world_size: int) -> list[tuple[str, int]]:
    """(name, rank): whole tensors handed to all ranks of the job, the largest first, by bytes."""
    ordered = sorted(names, key=lambda n: (-n[1], n[0]))
    everyone = tuple(range(world_size))
    ranks = give_out(((size, everyone) for _, size in ordered), world_size)
    return [(name, rank) for (name, _), rank in zip(ordered, ranks, strict=True)]
