"""Which projections take a low-rank adapter, and which rows and columns of a rank's layers are theirs. No torch.

An adapter belongs to one Hugging Face projection, as in PEFT: ``W + scale * B @ A`` with A (rank, in) and B (out, rank).
megatron-core fuses projections (q, k and v; gate and up; the inputs of Gated DeltaNet) and tensor parallelism cuts the fused
layer. B has one row for each row of the weight, so a family's `Rule` says for B too which row is which.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mimo_jobs.errors import UsageError, did_you_mean
from mimo_jobs.families.spec import BoundTensor, Cut, WeightMap
from mimo_jobs.layout import LANGUAGE, ResolvedLayout, stage_layers
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights.rules import segments, stored_rows

WEIGHT = ".weight"
# Embeddings and the head are cut by vocabulary; all else is replicated.
_LINEAR_CUTS = (Cut.ROWS, Cut.GATED_ROWS, Cut.COLUMNS)


class Settings(Protocol):
    """What an adapter is made of: `mimo_jobs.training.config.Lora`, or what an adapter_config.json says."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def dora(self) -> bool: ...
    @property
    def dropout(self) -> float: ...


def check_settings(settings: Settings) -> None:
    """Whether an adapter can be made like that.

    Raises:
        UsageError: a setting is out of its bounds, or two do not go together.
    """
    if not isinstance(settings.rank, int) or settings.rank < 1:
        raise UsageError(f"lora.rank={settings.rank}: expected an integer of at least 1")
    if not (settings.alpha > 0 and math.isfinite(settings.alpha)):
        raise UsageError(f"lora.alpha={settings.alpha:g}: expected a number above 0")
    if not 0 <= settings.dropout < 1:
        raise UsageError(f"lora.dropout={settings.dropout:g}: expected a number of at least 0 and below 1")
    if settings.dora and settings.dropout:
        raise UsageError(f"lora.dropout={settings.dropout:g} is not implemented for lora.dora=true; set lora.dropout=0")


def scale_of(settings: Settings) -> float:
    """What the update is multiplied with: alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732)."""
    return settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)


@dataclass(frozen=True)
class Projection:
    """A linear layer of the Hugging Face model; ``rule`` and ``hf`` say where its weight is in the weight map."""

    module: str
    component: str
    rule: int
    hf: int
    out_features: int
    in_features: int


def projections(weight_map: WeightMap) -> dict[str, Projection]:
    """Module name -> projection, of every linear layer of decoder and vision tower, in the weight map's order."""
    found = {}
    for r, rule in enumerate(weight_map.rules):
        linear = all(t.cut in _LINEAR_CUTS and len(t.shape) == 2 for t in rule.stored)
        for h, tensor in enumerate(rule.hf):
            if linear and len(tensor.shape) == 2 and tensor.name.endswith(WEIGHT):
                module = tensor.name.removesuffix(WEIGHT)
                found[module] = Projection(module, rule.component, r, h, *tensor.shape)
    return found


def targeted(weight_map: WeightMap, targets: str, field: str = "lora.targets") -> tuple[str, ...]:
    """The modules that ``targets`` names, in the weight map's order.

    Args:
        targets: comma-separated: ``language``, ``images``, or module names, whole or their ends (``q_proj``, ``mlp.up_proj``),
            matched as PEFT matches a list of ``target_modules``.
        field: what to call it in an error.

    Raises:
        UsageError: a target matches nothing.
    """
    known = projections(weight_map)
    names = [name for part in targets.split(",") if (name := part.strip())]
    if not names:
        raise UsageError(f"{field} is empty: give language, images, or names such as q_proj,v_proj")
    chosen: set[str] = set()
    for name in names:
        hits = {m for m, p in known.items() if p.component == name} or {m for m in known if _ends(m, name)}
        if not hits:
            endings = list(dict.fromkeys(_ending(p) for p in known.values()))
            components = list(dict.fromkeys(p.component for p in known.values()))
            hint = did_you_mean(name, [*components, *endings, *known])
            raise UsageError(
                f"{field}={name!r} is no projection of the model{hint}\n  known: {', '.join([*components, *endings])}"
            )
        chosen |= hits
    return tuple(m for m in known if m in chosen)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _ending(projection: Projection) -> str:
    """How users know it: the vision tower's last words (qkv, proj) say little alone."""
    return ".".join(projection.module.split(".")[-1 if projection.component == LANGUAGE else -2 :])


def target_modules(weight_map: WeightMap, modules: Sequence[str]) -> list[str]:
    """PEFT's ``target_modules`` for exactly these modules: short ends where they match nothing else, else whole names."""
    chosen, everything = set(modules), set()
    for tensor in (t for rule in weight_map.rules for t in rule.hf):
        parts = tensor.name.split(".")
        everything |= {".".join(parts[:i]) for i in range(1, len(parts))}
    exact: dict[str, bool] = {}
    found = set()
    for module in modules:
        parts = module.split(".")
        for ending in (parts[-1], ".".join(parts[-2:])):
            if ending not in exact:
                exact[ending] = all(m in chosen for m in everything if _ends(m, ending))
            if exact[ending]:
                found.add(ending)
                break
        else:
            found.add(module)
    return sorted(found)


def check_stages(weight_map: WeightMap, modules: Iterable[str], targets: str, layout: ResolvedLayout) -> None:
    """Every pipeline stage of a component that has adapters has one: each of its ranks needs something to train.

    Raises:
        UsageError: naming the first stage without one.
    """
    known = projections(weight_map)
    pp = layout.components[LANGUAGE].pp
    layers = {weight_map.rules[known[m].rule].stage for m in modules if known[m].component == LANGUAGE}
    for stage, held in enumerate(stage_layers(weight_map.num_layers, pp)) if layers else ():
        if layers.isdisjoint(held):
            raise UsageError(
                f"lora.targets={targets!r}: stage {stage} of layout.language.pp={pp} (layers {held.start} to {held.stop - 1}) "
                "has none of them; add targets that every layer has (down_proj), or set a smaller layout.language.pp"
            )


@dataclass(frozen=True)
class Section:
    """Rows ``[row, row + rows)`` of a rank's layer are rows ``[offset, offset + rows)`` of a checkpoint tensor with ``of`` rows;
    ``suffix`` is what follows ``.weight`` in its key."""

    suffix: str
    row: int
    rows: int
    offset: int
    of: int


@dataclass(frozen=True)
class Run:
    """``count`` rows from ``row`` of a rank's layer are rows from ``hf_row`` of ``modules[module]``."""

    row: int
    count: int
    module: int
    hf_row: int


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of one rank, and the projections with an adapter that it is made of.

    Attributes:
        key: its name in a checkpoint, without ``.weight``.
        modules: the projections, the same on every rank that holds a part of the layer.
        sections: all of its rows, in order.
        runs: the rows that belong to ``modules``; a rank may hold none of some.
        by_columns: tensor parallelism cuts columns (A), else rows (B).
        column, columns, in_features: the columns held here, of how many.
    """

    key: str
    component: str
    modules: tuple[str, ...]
    sections: tuple[Section, ...]
    runs: tuple[Run, ...]
    by_columns: bool
    column: int
    columns: int
    in_features: int

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.sections)


def adapted_linears(
    weight_map: WeightMap, modules: Iterable[str], layout: ResolvedLayout, rank: int
) -> dict[str, AdaptedLinear]:
    """Key -> layer, of every layer that ``rank`` holds and that has one of ``modules`` in it."""
    chosen = set(modules)
    together: dict[str, list[str]] = {}
    for rule in weight_map.rules:
        hit = [t.name.removesuffix(WEIGHT) for t in rule.hf if t.name.removesuffix(WEIGHT) in chosen]
        if hit:
            names = together.setdefault(_key(rule.stored[0]), [])
            names += hit
    boxes: dict[str, list[plans.Box]] = {key: [] for key in together}
    for box in plans.boxes(weight_map, layout):
        key = _key(weight_map.rules[box.rule].stored[box.stored])
        if key in boxes and rank in box.holders:
            boxes[key].append(box)
    return {key: _layer(weight_map, key, together[key], held) for key, held in boxes.items() if held}


def _key(tensor: BoundTensor) -> str:
    return tensor.name.partition(WEIGHT)[0] if WEIGHT in tensor.name else ""


def _layer(weight_map: WeightMap, key: str, modules: list[str], boxes: list[plans.Box]) -> AdaptedLinear:
    sections, runs, row = [], [], 0
    for box in boxes:  # the weight map lists the parts of a fused layer in the layer's own order
        rule = weight_map.rules[box.rule]
        tensor = rule.stored[box.stored]
        sections.append(Section(tensor.name.partition(WEIGHT)[2], row, box.rows, box.row, tensor.rows))
        for run in stored_rows(segments(rule), box.stored, box.row, box.row + box.rows):
            module = rule.hf[run.hf].name.removesuffix(WEIGHT)
            if module in modules:
                runs.append(Run(row + run.stored_row - box.row, run.count, modules.index(module), run.hf_row))
        row += box.rows
    first = boxes[0]
    tensor = weight_map.rules[first.rule].stored[first.stored]
    return AdaptedLinear(
        key, weight_map.rules[first.rule].component, tuple(modules), tuple(sections), tuple(runs), tensor.cut is Cut.COLUMNS,
        first.column, first.columns, tensor.row_elements,
    )  # fmt: skip
