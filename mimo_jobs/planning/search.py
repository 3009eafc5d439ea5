"""From every layout to the best ones: with each, the settings that fit the card and are the fastest."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import LANGUAGE, ResolvedLayout, check_batch
from mimo_jobs.planning.candidates import Pins, Refused, layouts, micro_batches
from mimo_jobs.planning.cost import CostModel, Estimate
from mimo_jobs.planning.rates import Rates
from mimo_jobs.planning.sizes import Sizes
from mimo_jobs.planning.workload import Settings, Tuning, Workload
from mimo_jobs.training import checks
from mimo_jobs.training.memory import Memory


@dataclass(frozen=True)
class Question:
    """What a plan is made for.

    Attributes:
        config: config.json of the model.
        gpus: how many there are; gpu_memory: bytes of each.
        arguments: of `jobs.sft` or `jobs.lora`, for the checks of a training's settings.
    """

    config: Mapping[str, Any]
    tuning: Tuning
    workload: Workload
    gpus: int
    gpus_per_node: int
    gpu_memory: float
    rates: Rates
    pins: Pins
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A layout with settings. ``memory``: component -> what its fullest rank needs, as the dry run says it."""

    layout: ResolvedLayout
    settings: Settings
    memory: Mapping[str, Memory]

    @property
    def needed(self) -> int:
        """Bytes of the fullest rank."""
        together = sum if self.layout.colocated else max
        return together(m.total for m in self.memory.values())


@dataclass(frozen=True)
class Planned(Candidate):
    """One that fits, and how long its steps take."""

    estimate: Estimate


@dataclass
class Found:
    """What came of a search. Every layout is in one of ``best``, ``too_large`` and ``refused``.

    Attributes:
        best: each layout that fits, with its fastest settings; the fastest layout first.
        too_large: layouts that do not fit the card with any settings.
        refused: reason -> layouts that model, batch or training do not allow.
        smallest: of all that was reckoned, what needs the least memory; ``least``: how many bytes.
    """

    best: list[Planned] = field(default_factory=list)
    too_large: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    smallest: Candidate | None = None
    least: int | None = None

    @property
    def considered(self) -> int:
        return len(self.best) + self.too_large + self.refused.total()


def fits(needed: float, gpu_memory: float, rates: Rates) -> bool:
    """Whether so many bytes, as `training.memory` reckons them, leave what training cannot have."""
    return needed * rates.memory_factor + rates.memory_reserve <= gpu_memory


def search(question: Question, enough: int | None = None) -> Found:
    """Reckon every layout.

    Args:
        enough: stop at so many that fit.

    Raises:
        UserError: no supported model; UsageError: there is no layout that model, batch and training allow.
    """
    sizes = Sizes(question.config, question.tuning)
    costs = CostModel(sizes, question.workload, question.rates, question.gpus_per_node)
    found, pins, batch = Found(), question.pins, question.workload.global_batch_size
    for layout in layouts(sizes, question.gpus, question.gpus_per_node, batch, pins):
        if isinstance(layout, Refused):
            found.refused[layout.why] += 1
            continue
        tried, why = _settings(question, layout)
        if not tried:
            found.refused[why] += 1
            continue
        best = _fastest(question, sizes, costs, layout, tried, found)
        if best is None:
            found.too_large += 1
        else:
            found.best.append(best)
            if len(found.best) == enough:
                break
    if not found.considered:
        raise UsageError(_nothing(question))
    if found.refused.total() == found.considered:
        raise UsageError(found.refused.most_common(1)[0][0])
    # What differs by less than anybody can predict goes by the GPUs in use, then by memory.
    found.best.sort(key=lambda p: (float(f"{p.estimate.seconds:.3g}"), -p.layout.world_size, p.needed))
    return found


def _settings(question: Question, layout: ResolvedLayout) -> tuple[list[Settings], str]:
    """What is tried with a layout, what needs the least memory first, and why nothing is. Recomputation is where it may be."""
    found, why, pins = [], "", question.pins
    free = [True, False] if layout.components[LANGUAGE].tp > 1 else [False]
    split = free if pins.sequence_parallel is None else [pins.sequence_parallel]
    for size in micro_batches(layout, question.gpus, question.workload.global_batch_size, pins):
        try:
            if found:  # nothing else of what is checked has changed
                check_batch(layout, question.workload.global_batch_size, size)
            else:
                checks.check_settings({**question.arguments, "micro_batch_size": size}, layout)
        except UsageError as error:
            why = why or str(error)
            continue
        found += [Settings(size, pins.recompute or "full", s) for s in split]
    return found, why


def _fastest(
    question: Question, sizes: Sizes, costs: CostModel, layout: ResolvedLayout, tried: list[Settings], found: Found
) -> Planned | None:
    """The layout with the fastest settings that fit, if any do."""
    best: Planned | None = None
    for settings in tried:
        one = _fitting(question, sizes, layout, settings, found)
        if one is None:
            if settings is tried[0]:  # the others need more
                return None
            continue
        estimate = costs.estimate(layout, one.settings)
        if best is None or estimate.seconds < best.estimate.seconds:
            best = Planned(layout, one.settings, one.memory, estimate)
    return best


def _fitting(
    question: Question, sizes: Sizes, layout: ResolvedLayout, settings: Settings, found: Found
) -> Candidate | None:
    """The candidate if it fits: with as little recomputation, which is faster, as that is free and fits."""
    for recompute in ("none", "selective", "full") if question.pins.recompute is None else (settings.recompute,):
        tried = Settings(settings.micro_batch_size, recompute, settings.sequence_parallel)
        one = Candidate(layout, tried, sizes.memory(layout, tried, question.workload.max_length))
        needed = one.needed
        if found.least is None or needed < found.least:
            found.least, found.smallest = needed, one
        if fits(needed, question.gpu_memory, question.rates):
            return one
    return None


def _nothing(question: Question) -> str:
    pinned = ", ".join(f"layout.{path}={value}" for path, value in question.pins.layout.items())
    return f"no layout of at most gpus={question.gpus} GPUs has {pinned or 'room for both components'}; set gpus to more, or leave these fields out"
