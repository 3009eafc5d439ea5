"""What would help where nothing fits: every change that is named was tried."""

import dataclasses
from collections.abc import Iterator

from mimo_jobs.console import size
from mimo_jobs.errors import UsageError
from mimo_jobs.planning import rates
from mimo_jobs.planning.candidates import Pins
from mimo_jobs.planning.search import Candidate, Found, Question, search
from mimo_jobs.submission import GPU_MEMORY
from mimo_jobs.training.config import Lora

MOST_GPUS = 8  # times as many as there are


def nothing_fits(question: Question, found: Found) -> str:
    """One screen: the smallest need, and what makes room."""
    least = found.smallest
    assert least is not None
    parts = ", ".join(f"{name} {size(m.total)}" for name, m in least.memory.items())
    factor = question.rates.memory_factor
    lines = [
        f"nothing fits: of {found.considered:,} layout{'s' * (found.considered > 1)} on gpus={question.gpus} {question.rates.card} the smallest needs "
        f"{size(least.needed * factor + question.rates.memory_reserve)} of a GPU ({parts}, {size(question.rates.memory_reserve)} reserve), "
        f"which has {size(question.gpu_memory)}",
        f"  it is {described(least)}",
    ]
    tried = list(_changes(question))
    lines.append(
        f"  what would help: {'; '.join(tried)}"
        if tried
        else "  no single change helps; use more and larger GPUs together"
    )
    return "\n".join(lines)


def described(candidate: Candidate) -> str:
    """``language tp4 pp2 dp1 and images tp1 dp1 on disjoint ranks, micro_batch_size=1 recompute=full``."""
    sizes = [
        f"{c.name} tp{c.tp}" + (f" pp{c.pp}" if c.pp > 1 else "") + f" dp{c.dp}"
        for c in candidate.layout.components.values()
    ]
    how = candidate.settings
    more = " sequence_parallel=true" if how.sequence_parallel else ""
    where = "colocated" if candidate.layout.colocated else "on disjoint ranks"
    return f"{' and '.join(sizes)} {where}, micro_batch_size={how.micro_batch_size} recompute={how.recompute}{more}"


def _changes(question: Question) -> Iterator[str]:
    pins = question.pins
    named = [f"layout.{path}" for path in pins.layout]
    named += [n for n in ("micro_batch_size", "recompute", "sequence_parallel") if getattr(pins, n) is not None]
    if named and _helps(dataclasses.replace(question, pins=Pins({}))):
        yield f"leaving out {', '.join(named)}"
    length, workload = question.workload.max_length // 2, question.workload
    while length >= max(workload.tokens, 2):
        if _helps(dataclasses.replace(question, workload=dataclasses.replace(workload, max_length=length))):
            yield f"max_length={length}"
            break
        length //= 2
    tuning = question.tuning
    narrow = dataclasses.replace(tuning, state="bf16")
    if (
        tuning.lora is None
        and tuning.precision == "bf16"
        and narrow != tuning
        and _helps(dataclasses.replace(question, tuning=narrow))
    ):
        yield "optimizer.state=bf16"
    if tuning.lora is None and _helps(
        dataclasses.replace(question, tuning=dataclasses.replace(tuning, freeze="none", lora=Lora()))
    ):
        yield "the recipe qwen35vl_lora"
    more = [question.gpus * 2**i for i in range(1, MOST_GPUS.bit_length())]
    if gpus := next((n for n in more if _helps(dataclasses.replace(question, gpus=n))), None):
        yield f"gpus={gpus}"
    larger = sorted((GPU_MEMORY[c], c) for c in rates.cards() if GPU_MEMORY[c] * 1e9 > question.gpu_memory)
    card = next(
        (c for gb, c in larger if _helps(dataclasses.replace(question, gpu_memory=gb * 1e9, rates=rates.load(c)))), None
    )
    if card:
        yield f"gpu={card}"


def _helps(question: Question) -> bool:
    try:
        return bool(search(question, enough=1).best)
    except UsageError:
        return False
