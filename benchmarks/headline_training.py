"""Training in `benchmarks.headline`: planned, run, killed, resumed, exported, compared."""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.headline_parts import POLL_SECONDS, Started, kinds, require

if TYPE_CHECKING:
    from benchmarks.headline import Headline

WARM_UP = 3  # steps that are no measure of speed: kernels are compiled and tuned
OF_PLAN = ("layout.", "micro_batch_size", "recompute", "sequence_parallel", "optimizer.state")
FREEZES = {"freeze=images": ("vision",), "freeze=language": ("language", "head")}
SPEED = "tokens_per_second_per_gpu"


def run(bench: "Headline") -> dict[str, Any]:
    from mimo_jobs.training.saved import steps_directory

    o, target = bench.options, bench.work / "sft"
    fields, suggested = _suggested(bench, bench.prepare(), target)
    last = o.steps + o.resume_steps
    fields |= {"steps": last, "saving.every": o.steps, "saving.keep": 1, "saving.background": "false"}
    fields |= ({} if bench.gpus else {"dataset.workers": 0}) | dict(word.split("=", 1) for word in o.set)
    words = ("recipes.qwen35vl_sft", *(f"{name}={value}" for name, value in fields.items()), "--executor", "local")
    saved = steps_directory(target, fields.get("saving.directory"))
    first = _interrupted(bench, words, saved)
    with bench.line.start(*words) as started:
        _follow(started, o.steps)
        ended = started.end()
    again = started.history()
    require(again.resumed == [o.steps], f"it went on from {again.resumed}, not from {o.steps}")
    require(list(again.steps) == list(range(o.steps + 1, last + 1)), f"it made the steps {list(again.steps)}")
    shutil.rmtree(saved)
    told, steps = ended.summary("qwen35vl_sft"), first.pop("steps") | again.steps
    begin = min(WARM_UP, o.steps - 1)
    usual = [values for number, values in steps.items() if begin < number <= o.steps]
    found = {
        "command": ended.command, "planned": suggested, "median_of_steps": [begin + 1, o.steps],
        **{name: round(statistics.median(v[name] for v in usual), 4) for name in (SPEED, "seconds", "tokens")},
        "mfu": round(statistics.median(v["mfu"] for v in usual), 4) if "mfu" in usual[-1] else None,
        "memory_bytes": told["memory_bytes"], "losses": {n: round(v["loss"], 5) for n, v in steps.items()},
        "tokens_per_second_per_gpu_of_steps": {n: round(v[SPEED], 2) for n, v in steps.items()},
        "first": first, "resumed": {"at": again.resumed[0], "steps": o.resume_steps, "seconds": round(ended.seconds, 2)},
        "trained": {name: told[name] for name in ("tensors", "bytes", "tokens", "skipped")},
    }  # fmt: skip
    print(f"training: {found[SPEED]:.1f} tokens/s per GPU, median of steps {begin + 1} to {o.steps}")
    return found | {"export": _exported(bench, target)}


def _suggested(bench: "Headline", image_tokens: int, target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the command that the planner ends with, and what it promises.

    First with the images on ranks of their own, then in any layout; where nothing fits, the layout of the conversion.
    """
    from benchmarks.headline import OF_BEST

    o, why = bench.options, f"best on {bench.card} with the language's TP {bench.half} and images on ranks of their own"
    places = (f"data={bench.data}", f"target={target}")
    samples = (
        f"tokens={o.tokens}",
        f"image_tokens={image_tokens}",
        f"max_length={o.tokens}",
        f"global_batch_size={o.batch}",
    )
    own = [word for word in o.set if word.startswith(OF_PLAN)]
    said = ""
    for pins in (bench.apart(), []):
        once = {word.partition("=")[0]: word for word in (*pins, *own)}
        ran = bench.planned(bench.mimo, *samples, *places, *once.values())
        if not ran.rc:
            best = ran.data["layouts"][0]
            words = ran.data["command"][2:-2]  # without nemo-run, the recipe and the executor
            return dict(word.split("=", 1) for word in words), {"why": why} | {name: best[name] for name in OF_BEST}
        said = ran.said.strip()
        why = f"best on {bench.card} in any layout; with images on ranks of their own: {said}"
    words = (
        f"source={bench.mimo}",
        *places,
        *bench.layout,
        f"global_batch_size={o.batch}",
        f"dataset.max_length={o.tokens}",
    )
    why = f"the layout of the conversion; of all others: {said}"
    return dict(word.split("=", 1) for word in words), {"why": why, "layout": list(bench.layout)}


def _interrupted(bench: "Headline", words: Sequence[str], saved: Path) -> dict[str, Any]:
    """Train until the checkpoint of ``--steps`` is there, then kill a rank, which ends them all."""
    from mimo_jobs.training.saved import RECORD, checkpoint_directory, progress

    number, begun = bench.options.steps, time.perf_counter()
    place = checkpoint_directory(saved, number)
    with bench.line.start(*words) as started:
        _follow(started, 0, until=place)
        if not place.exists():
            started.end(codes=())
        seconds, rank = time.perf_counter() - begun, started.kill_last_rank()
        ended = started.end(codes=(0, 1))
    at = progress(saved)
    require(
        ended.rc == 1 and at == number, f"the run ended with {ended.rc} at step {at} before rank {rank} could be killed"
    )
    history, told = started.history(), [line for line in ended.said.splitlines() if line.startswith("nemo-run: ")]
    print(f"  rank {rank} was killed after step {number}; {' '.join(told)}", flush=True)
    nbytes = sum(json.loads((place / RECORD).read_text())["files"].values())
    return {
        "steps": {n: values for n, values in history.steps.items() if n <= number}, "seconds": round(seconds, 2),
        "checkpoint_bytes": nbytes, "killed_rank": rank,
    }  # fmt: skip


def _follow(started: Started, after: int, until: Path | None = None) -> None:
    """Print the steps as they come, until a directory is there or the command ends."""
    shown, over = after, False
    while not over:
        over = not started.running or (until is not None and until.exists())
        history = started.history()
        for number, values in history.steps.items():
            if number > shown:
                shown = number
                speed = f"{values[SPEED]:8.1f} tokens/s per GPU  {values['seconds']:.2f} s"
                print(f"  step {number:3}  loss {values['loss']:.4f}  {speed}", flush=True)
        time.sleep(0 if over else POLL_SECONDS)


def _exported(bench: "Headline", target: Path) -> dict[str, Any]:
    """Export what was trained, as the pipeline does: the export compares every tensor it writes with the digests of training."""
    place = bench.work / "trained"
    exported = bench.export(target, place)
    parity, count = exported["parity"], exported["tensors"]
    require(exported["trained"] and parity["verified"] and parity["equal"] == count, f"the export says {parity}")
    shutil.rmtree(target)
    told = bench.line.run("verify", str(bench.source), str(place), codes=(0, 1)).data
    names, same = set(told["digests"]), set(told["digests"]) - set(told["different"])
    mtp = {name for name in names if name.startswith("mtp.")}
    require(not told["only_left"] and not told["only_right"], "the export has other tensors than the source")
    require(mtp <= same and (mtp or bench.options.source), f"MTP's {len(mtp - same)} tensors are not the source's")
    trained = kinds(names - same)
    frozen = [kind for word in bench.options.set for kind in FREEZES.get(word, ())]
    still = [n for n, count in kinds(names).items() if n not in ("mtp", *frozen) and count and not trained[n]]
    require(not still, f"no tensor of {' and '.join(still)} was changed by the training")
    shutil.rmtree(place)
    print(f"exported: {parity['equal']}/{count} tensors as trained; {len(same)} as before, MTP's {len(mtp)} among them")
    return exported | {"as_before_training": kinds(same)}
