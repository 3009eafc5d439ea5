"""A plan on a terminal, and as JSON."""

import dataclasses
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mimo_jobs.layout import IMAGES, LANGUAGE, Component
from mimo_jobs.planning.cost import PARTS
from mimo_jobs.planning.rates import NUMBERS, Rates
from mimo_jobs.planning.search import Found, Planned, Question

WIDTH = 80  # columns that a command may take before it is broken
SHOWN = 10
TITLES = ("#", "tok/s\na GPU", "step\n(s)", LANGUAGE, IMAGES, "GPUs", "micro\nbatch", "recom-\npute", "seq.\npar.")


def speed(question: Question, plan: Planned) -> float:
    """Tokens a second for each of the GPUs there are, used or not."""
    tokens = question.workload.global_batch_size * question.workload.tokens
    return tokens / plan.estimate.seconds / question.gpus


def peaks(plan: Planned, rates: Rates) -> dict[str, float]:
    """Component -> bytes that its part of its fullest rank is predicted to take."""
    return {name: m.total * rates.memory_factor for name, m in plan.memory.items()}


def title(recipe: str, model: str, question: Question) -> str:
    """What is planned."""
    w = question.workload
    images = (
        f"{w.image_tokens:,} of them of {w.images} image{'s' * (w.images > 1)}" if w.image_tokens else "without images"
    )
    return (
        f"{recipe} of {model} on {question.gpus} {question.rates.card}: samples of {w.tokens:,} tokens, {images}, {w.loss_tokens:,} with a loss, "
        f"at most {w.max_length:,}; {w.global_batch_size:,} samples a step"
    )


def layouts_table(question: Question, best: Sequence[Planned]) -> Table:
    """A line a layout: how fast, where, and with which settings."""
    table = _table(TITLES, right=(0, 1, 2, 6))
    for place, one in enumerate(best, 1):
        language, images = one.layout.components[LANGUAGE], one.layout.components[IMAGES]
        ranks = f"{one.layout.world_size} colocated" if one.layout.colocated else f"{language.size} + {images.size}"
        table.add_row(
            str(place), f"{float(f'{speed(question, one):.3g}'):,.0f}", _seconds(one.estimate.seconds), _sizes(language), _sizes(images), ranks,
            str(one.settings.micro_batch_size), one.settings.recompute, "yes" if one.settings.sequence_parallel else "no",
        )  # fmt: skip
    return table


def parts_table(question: Question, best: Sequence[Planned]) -> Table:
    """A line a layout: shares of the step's time, and memory."""
    heads = [p.replace("communication", "communi-\ncation") for p in PARTS]
    table = _table(("#", *heads, "GB of a GPU (share)"), right=range(1 + len(PARTS)))
    for place, one in enumerate(best, 1):
        shares = [f"{100 * one.estimate.parts[p] / one.estimate.seconds:.0f} %" for p in PARTS]
        table.add_row(str(place), *shares, _memory(question, one))
    return table


def _table(titles: Sequence[str], right: Collection[int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place in right else "left", no_wrap=True, vertical="bottom")
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"


def _sizes(c: Component) -> str:
    """``tp2 dp4``; sizes of one are left out, unless all are."""
    return " ".join(f"{n}{getattr(c, n)}" for n in ("tp", "pp", "dp") if getattr(c, n) > 1) or "tp1"


def _memory(question: Question, plan: Planned) -> Text:
    """Colocated components share a card, others have their own: ``31 + 4.2 (44 %)`` or ``31 (39 %), 4.2 (5 %)``."""
    taken = list(peaks(plan, question.rates).values())
    if plan.layout.colocated:
        return Text(f"{' + '.join(f'{n / 1e9:.3g}' for n in taken)} {_share(question, sum(taken))}")
    return Text(", ".join(f"{n / 1e9:.3g} {_share(question, n)}" for n in taken))


def _share(question: Question, taken: float) -> str:
    return f"({100 * taken / question.gpu_memory:.0f} %)"


def summary(question: Question, found: Found) -> list[str]:
    """Lines below the tables: how many there were, what it rests on, and what stands in the way."""
    refused, kept, gb = found.refused.total(), len(found.best), f"{question.gpu_memory / 1e9:g} GB"
    lines = [
        f"{found.considered:,} layout{'s' * (found.considered > 1)} considered: {kept:,} fit, {found.too_large:,} do not fit {gb}, {refused:,} are refused"
    ]
    if refused:
        why, count = found.refused.most_common(1)[0]
        lines.append(f"refused   {why}" + (f" (and {refused - count:,} others)" if count < refused else ""))
    used, batch = found.best[0].layout.world_size, question.workload.global_batch_size
    if used < question.gpus:
        idle = f"{question.gpus - used} of {question.gpus} GPUs"
        lines.append(
            f"note      the best layout leaves {idle} without work; another global_batch_size than {batch} may use them"
        )
    if assumed := question.rates.assumed:
        count = f"{len(assumed)} of {len(NUMBERS)} constants behind these numbers"
        lines.append(
            f"note      {count} are assumed, not yet measured (docs/planning.md): try the first few layouts for some steps"
        )
    return lines


def command(
    recipe: str,
    values: Mapping[str, Any],
    executor: str,
    of_executor: Mapping[str, str],
    question: Question,
    best: Planned,
) -> list[str]:
    """The words that run the best layout: what the user gave, and what was chosen.

    Args:
        values: the user's fields, as the recipe names them, and ``model``.
        of_executor: fields of the executor's profile that the user gave.
    """
    layout, how = best.layout, best.settings
    chosen: dict[str, Any] = {}
    for name, c in layout.components.items():
        fields = ("tp", "pp", "dp") if c.pp > 1 else ("tp", "dp")
        chosen |= {f"layout.{name}.{field}": getattr(c, field) for field in fields}
        if layout.colocated:
            chosen[f"layout.{name}.rank_offset"] = 0
    chosen |= {
        "micro_batch_size": how.micro_batch_size,
        "recompute": how.recompute,
        "sequence_parallel": how.sequence_parallel,
    }
    given = {"source": values["model"], "data": values.get("data", "DATA"), "target": values.get("target", "TARGET")}
    kept = {p: v for p, v in values.items() if p != "model"}
    told = (given | kept | chosen).items()
    fields = [f"{p}={str(v).lower() if isinstance(v, bool) or v is None else v}" for p, v in told]
    return [
        f"recipes.{recipe}",
        *fields,
        *(f"executor.{p}={v}" for p, v in of_executor.items()),
        "--executor",
        executor,
    ]


def pasted(words: Sequence[str]) -> str:
    """A command of ours for a shell, broken into lines."""
    lines = ["nemo-run"]
    for word in map(shlex.quote, words):
        if len(lines[-1]) + len(word) < WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return " \\\n".join(lines)


def data(question: Question, found: Found) -> dict[str, Any]:
    """The plan as plain data, without the command."""
    return {
        "gpus": question.gpus, "gpu": question.rates.card, "gpu_memory_bytes": int(question.gpu_memory), "gpus_per_node": question.gpus_per_node,
        "workload": dataclasses.asdict(question.workload), "precision": question.tuning.precision, "freeze": question.tuning.freeze,
        "considered": found.considered, "fit": len(found.best), "too_large": found.too_large, "refused": dict(found.refused.most_common()),
        "layouts": [_plain(question, one) for one in found.best[:SHOWN]],
        "rates": dataclasses.asdict(question.rates), "assumed": question.rates.assumed,
    }  # fmt: skip


def _plain(question: Question, plan: Planned) -> dict[str, Any]:
    taken = peaks(plan, question.rates)
    return {
        "layout": plan.layout.as_layout(), "world_size": plan.layout.world_size, "colocated": plan.layout.colocated,
        "micro_batch_size": plan.settings.micro_batch_size, "recompute": plan.settings.recompute,
        "sequence_parallel": plan.settings.sequence_parallel, "microbatches": plan.estimate.microbatches,
        "tokens_per_second_per_gpu": speed(question, plan), "step_seconds": plan.estimate.seconds, "seconds": plan.estimate.parts,
        "memory": {n: dataclasses.asdict(m) | {"total": m.total} for n, m in plan.memory.items()},
        "peak_bytes": taken, "share_of_card": {n: p / question.gpu_memory for n, p in taken.items()},
    }  # fmt: skip
