"""The steps of a run: one after the other, watched, logged, saved, and stopped in good order."""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mimo_jobs.errors import JobFailed
from mimo_jobs.layout import IMAGES, LANGUAGE
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.modeling.lora import seed_dropout
from mimo_jobs.parallel.world import World
from mimo_jobs.training.checkpoints import Checkpoints
from mimo_jobs.training.config import Stop
from mimo_jobs.training.feeder import BadData, Feeder, Step
from mimo_jobs.training.flops import utilisation
from mimo_jobs.training.history import PARTS
from mimo_jobs.training.metrics import Metrics
from mimo_jobs.training.optimizer import Updates
from mimo_jobs.training.readback import Readback
from mimo_jobs.training.saved import Saved, completed
from mimo_jobs.training.step import run_step
from mimo_jobs.training.stopwatch import Stopwatch

WINDOW = 32  # steps whose median a spike is measured against
NAMED = 8  # samples named in an error
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Validated:
    """Mean loss per token of ``tokens``; ``problems``: id and reason of every sample that was left out."""

    loss: float
    tokens: int
    problems: list[str]


@dataclass
class Run:
    """What the loop works with on this rank.

    Attributes:
        metrics: on rank 0 only.
        validate: mean loss and tokens on the validation data, and what was left out of it; it asks before each step whether to
            stop, and says None then. None without validation data.
        flops: model FLOPs of a step from its table.
        save_every, validate_every: steps.
        dropout_seed: of adapters with dropout, which is drawn anew each step, so that a resumed run draws the same; else None.
        data: what the data set is (`data.Source.sketch`).
        done: optimizer steps done; ``kept``: of the newest checkpoint; ``losses``: of the last of them; ``skipped``: bad samples so far.
    """

    world: World
    built: BuiltModel
    updates: Updates
    checkpoints: Checkpoints
    device: torch.device
    steps: int
    identity: Mapping[str, Any]
    stop: Stop
    save_every: int
    validate_every: int
    metrics: Metrics | None
    validate: Callable[[Callable[[], bool]], Validated | None] | None
    flops: Callable[[Step], float]
    peak_tflops: float | None
    dropout_seed: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    done: int = 0
    kept: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)
    first_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    told: dict[str, float] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM, SIGUSR1 and Ctrl-C are remembered instead of raised: the step ends, and what was learnt is saved."""
    asked = False

    def remember(_signum: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    before = {signum: signal.signal(signum, remember) for signum in STOP_SIGNALS}
    stopped = False
    try:
        yield lambda: asked
    except KeyboardInterrupt:
        # Said again, when other ranks have ended, it must not cut off the logs that are being closed.
        stopped = True
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_IGN if stopped else handler)


@dataclass(frozen=True)
class Launched:
    """A step that the device works on, or has done.

    Attributes:
        numbers: the loss, summed over this rank's replica where it is the one that reports it, and the norm of all gradients.
        parts: seconds of the device by name, once it has done the step.
        rates: component -> learning rate, only those of this rank.
    """

    step: Step
    numbers: Readback
    parts: Callable[[], dict[str, float]]
    rates: Mapping[str, float]


def train(run: Run, feeder: Feeder) -> None:
    """Run the steps that are left. Collective over the world.

    On a GPU a step is launched before the numbers of the one before are read, so that the device never waits for the host; nothing is
    saved before its numbers were looked at.

    Raises:
        JobFailed: the loss is not finite, or above a bound of ``run.stop``.
        KeyboardInterrupt: asked to stop, with a checkpoint written: the run goes on from there when started again.
    """
    control: Any = dist.new_group(backend="gloo")
    with stop_asked() as asked:
        steps, before, waited, ahead = iter(feeder), time.perf_counter(), 0.0, None
        while run.done < run.steps:
            started = time.perf_counter()
            step, problem = _next(steps)
            waited += time.perf_counter() - started
            # Asked before the launch: what is asked for now costs no step more than the one that the device works on.
            stopping, launched = _any(control, asked()), None
            good = step is not None and any(step.table.rows)  # else all are bad: known to every rank
            if step is not None and good and not stopping:
                launched = _launch(run, step, run.done + (ahead is not None))
            if ahead is not None:
                before, waited = _finish(run, control, ahead, before, waited), 0.0
            ahead = launched
            if problem is not None:
                _publish(run)  # one that is being written is of an earlier step
                raise problem
            if step is not None and not good and not stopping:
                _left_out(run, step)
            if ahead is not None and _runs_ahead(run.device) and not _is_due(run, run.done + 1):
                _publish_if_written(run, control)
                continue
            if ahead is not None:
                _finish(run, control, ahead, before, waited)
                ahead = None
            stopping = _save_and_validate(run, control, stopping, asked)
            if stopping and run.done < run.steps:
                run.checkpoints.wait()
                raise KeyboardInterrupt
            run.watch.lap()  # what validation took is not the next step's
            before, waited = time.perf_counter(), 0.0


def _next(steps: Iterator[Step]) -> tuple[Step | None, BadData | None]:
    """The next step's samples, or why they forbid to go on, the same on every rank. What else goes wrong, only this rank knows: it is raised."""
    try:
        return next(steps), None
    except BadData as problem:
        return None, problem


def _launch(run: Run, step: Step, done: int) -> Launched:
    """Have the device do the optimizer step that follows ``done`` steps."""
    watch = run.watch
    run.updates.set_step(done)
    if run.dropout_seed is not None:
        seed_dropout(run.built, run.dropout_seed + done)
    tokens = step.table.total(step.table.loss_tokens)
    microbatches = [m.to(run.device) for m in step.microbatches]
    with watch.span("model"):
        loss = run_step(run.built, microbatches, tokens, watch)
    with watch.span("optimizer"):
        norm = run.updates.apply()
    numbers = Readback(torch.stack([loss.float(), norm]))
    rates = {name: s.optimizer.param_groups[0]["lr"] for name, s in run.updates.schedulers.items()}
    return Launched(step, numbers, watch.lap(), rates)


def _finish(run: Run, control: dist.ProcessGroup, launched: Launched, before: float, waited: float) -> float:
    """Wait for a step, look at its numbers and log it. Returns the time.

    Args:
        before: when the step before was over.
        waited: seconds since then that the host had no samples to launch.
    """
    summed, norm = launched.numbers.numbers().tolist()
    now = time.perf_counter()
    tokens = launched.step.table.total(launched.step.table.loss_tokens)
    parts = _parts(run, launched, now - before, waited)
    shared = torch.tensor([summed / max(1, tokens), *(parts[p] for p in PARTS)], dtype=torch.float64)
    dist.all_reduce(shared, group=control)
    loss, *each = shared.tolist()
    _check(run, launched.step, loss, norm)
    run.done += 1
    run.losses = [*run.losses, loss][-WINDOW:]
    run.first_loss = loss if run.first_loss is None else run.first_loss
    # Over all ranks: what the allocated GPUs did, a part each of the step's time.
    _log(run, launched, loss, norm, now - before, {p: v / run.world.size for p, v in zip(PARTS, each, strict=True)})
    return now


def _any(control: dist.ProcessGroup, asked: bool) -> bool:
    """Whether any rank was asked to stop."""
    shared = torch.tensor(float(asked))
    dist.all_reduce(shared, group=control)
    return shared.item() > 0


def _runs_ahead(device: torch.device) -> bool:
    """Whether a launched step is not yet done: a CPU has done it."""
    return device.type == "cuda"


def _is_due(run: Run, number: int) -> bool:
    """Whether something is to be done with the weights after a step."""
    return number == run.steps or any(every and number % every == 0 for every in (run.save_every, run.validate_every))


def _check(run: Run, step: Step, loss: float, norm: float) -> None:
    """Stop before weights that took harm are saved. Raises `JobFailed` with the step's samples."""
    number, bound = run.done + 1, run.stop
    why = None
    if not math.isfinite(loss):
        why = f"the loss is {loss}"
    elif bound.max_loss is not None and loss > bound.max_loss:
        why = f"the loss is {loss:.6g}, above stop.max_loss={bound.max_loss:g}"
    elif bound.spike is not None and len(run.losses) >= 4:
        usual = statistics.median(run.losses)
        if loss > bound.spike * usual:
            why = f"the loss is {loss:.6g}, above stop.spike={bound.spike:g} times the median {usual:.6g} of the last {len(run.losses)} steps"
    if why is None and not math.isfinite(norm):
        why = "the gradient's norm is not finite"
    if why is not None:
        raise _stopped(run, step, number, why)


def _stopped(run: Run, step: Step, number: int, why: str) -> JobFailed:
    ids = [i for p, i in enumerate(step.table.ids) if p not in step.table.bad]
    if run.metrics is not None:
        run.metrics.event(number, f"{why}; samples: {', '.join(ids)}", "warning")
    _publish(run)  # one that is being written is of an earlier step
    more = f" and {len(ids) - NAMED} more (metrics.jsonl names all)" if len(ids) > NAMED else ""
    last = next(iter(completed(run.checkpoints.root)), None)
    kept = f"the last checkpoint is {last[1]}" if last else "there is no checkpoint yet"
    return JobFailed(
        f"step {number}: {why}; nothing of this step was saved, {kept}. Its samples: {', '.join(ids[:NAMED])}{more}"
    )


def _parts(run: Run, launched: Launched, seconds: float, waited: float) -> dict[str, float]:
    """Where this rank's ``seconds`` went: its component's work is what is left when waiting is taken off, and the lack of samples what
    the device had no work for."""
    found = launched.parts()
    waiting, optimizer = found.get("waiting", 0.0), found.get("optimizer", 0.0)
    idle = max(0.0, seconds - found.get("model", 0.0) - optimizer)
    parts = dict.fromkeys(PARTS, 0.0) | {"data": min(waited, idle), "waiting": waiting, "optimizer": optimizer}
    busy = max(0.0, found.get("model", 0.0) - waiting)
    images = found.get(IMAGES, 0.0) if LANGUAGE in run.built.groups else busy
    parts[IMAGES], parts[LANGUAGE] = images, max(0.0, busy - images)
    return parts


def _log(run: Run, launched: Launched, loss: float, norm: float, seconds: float, parts: Mapping[str, float]) -> None:
    """``parts``: seconds of the mean rank."""
    step, rates = launched.step, launched.rates
    table = step.table
    tokens = table.total(table.tokens)
    run.tokens += tokens
    run.seconds += seconds
    run.skipped += len(step.problems)
    if run.metrics is None:
        return
    rate = rates.get(LANGUAGE, next(iter(rates.values()), 0.0))
    values: dict[str, float] = {
        "loss": loss, "grad_norm": norm, "lr": rate, "tokens": tokens, "loss_tokens": table.total(table.loss_tokens),
        "samples": sum(len(r) for r in table.rows), "seconds": seconds, **{f"seconds.{p}": v for p, v in parts.items()}, "skipped": run.skipped,
        "tokens_per_second": tokens / seconds, "tokens_per_second_per_gpu": tokens / seconds / run.world.size,
    }  # fmt: skip
    if rates.get(IMAGES, rate) != rate:
        values["lr_images"] = rates[IMAGES]
    if (used := utilisation(run.flops(step), seconds, run.world.size, run.peak_tflops)) is not None:
        values["mfu"] = used
    if torch.cuda.is_available():
        values["memory_bytes"] = torch.cuda.max_memory_allocated()
    _tell_problems(run, step)
    run.metrics.log(run.done, values)
    run.told = values
    run.world.progress("train", run.done, run.steps, "steps", note=note(run.told))


def note(values: Mapping[str, float]) -> str:
    """The moment in a few words; the parts are shares of the time of all ranks: ``loss 1.234 · grad 0.87 · lr 9.8e-06 · 12.3k tok/s/GPU · images 12 % language 80 % waiting 8 %``."""
    rate = values["tokens_per_second_per_gpu"]
    words = [
        f"loss {values['loss']:.4g}", f"grad {values['grad_norm']:.3g}", f"lr {values['lr']:.2g}",
        f"{rate / 1000:.1f}k tok/s/GPU" if rate >= 1000 else f"{rate:.0f} tok/s/GPU",
    ]  # fmt: skip
    if "mfu" in values:
        words.append(f"MFU {100 * values['mfu']:.0f} %")
    total = values["seconds"] or 1.0
    words.append(" ".join(f"{p} {100 * values[f'seconds.{p}'] / total:.0f} %" for p in (IMAGES, LANGUAGE, "waiting")))
    if values.get("skipped"):
        words.append(f"{values['skipped']:.0f} bad samples")
    return " · ".join(words)


def _left_out(run: Run, step: Step) -> None:
    """A step whose samples are all bad changes nothing but the count."""
    run.done += 1
    run.skipped += len(step.problems)
    if run.metrics is not None:
        _tell_problems(run, step)
        run.metrics.event(run.done, f"step {run.done} was left out: all of its samples are bad", "warning")
    run.world.progress("train", run.done, run.steps, "steps")


def _tell_problems(run: Run, step: Step) -> None:
    assert run.metrics is not None
    for problem in step.problems:
        print(f"bad sample, left out: {problem}", flush=True)
        run.metrics.event(run.done, problem, "bad sample")


def _save_and_validate(run: Run, control: Any, stopping: bool, asked: Callable[[], bool]) -> bool:
    """What is due after a step; whether any rank was asked to stop by now."""
    last = run.done == run.steps
    _publish_if_written(run, control)
    saved = stopping or last or bool(run.save_every and run.done % run.save_every == 0)
    if saved:
        _save(run)
    due = last or (run.validate_every and run.done % run.validate_every == 0)
    if run.validate is not None and due and not stopping:  # while the checkpoint is written
        validated = run.validate(lambda: _any(control, asked()))
        if validated is None:
            stopping = True
            if not saved:
                _save(run)
        else:
            _tell_validation(run, validated)
    if stopping or last:
        _publish(run)
    return stopping


def _publish_if_written(run: Run, control: Any) -> None:
    """Publish the checkpoint that was being written, once every rank has written its part."""
    if run.checkpoints.pending:
        busy = torch.tensor(float(run.checkpoints.writing))
        dist.all_reduce(busy, group=control)
        if not busy.item():
            _publish(run)


def _save(run: Run) -> None:
    """Begin a checkpoint, unless it would be the one that there is: of a run that is stopped before its next step."""
    _publish(run)
    if run.kept == run.done:
        return
    run.kept = run.done
    run.checkpoints.save(
        Saved(
            run.done, run.identity, skipped=run.skipped, losses=run.losses, first_loss=run.first_loss, tokens=run.tokens,
            seconds=run.seconds, data=run.data,
        )
    )  # fmt: skip


def _tell_validation(run: Run, validated: Validated) -> None:
    run.told["validation_loss"] = validated.loss
    if run.metrics is None:
        return
    for problem in validated.problems:
        print(f"bad validation sample, left out: {problem}", flush=True)
        run.metrics.event(run.done, f"validation: {problem}", "bad sample")
    run.metrics.validation(run.done, validated.loss, validated.tokens)


def _publish(run: Run) -> None:
    written = run.checkpoints.wait()
    if written is not None and run.metrics is not None:
        run.metrics.event(run.done, f"checkpoint {written}", "checkpoint")
