"""Training speed of layouts on the GPUs of one host, the same weights and samples in each, in turns.

    python -m benchmarks.layouts --shape 0.8b --gpus 2 --rows 8 --tokens 2048 --images 1 --image 768
    python -m benchmarks.layouts --shape tiny --gpus 2 --rows 4 --tokens 128 --image 32 --steps 2 --output /tmp/look.json     # anywhere

``transformers`` among the layouts is its own model under FSDP2 (`benchmarks.baseline`), first, where more than one GPU is asked.
Homogeneous layouts have language and images on the same ranks, cut alike; heterogeneous ones do not. A step is a global batch of
``--rows`` samples of ``--tokens`` tokens with ``--images`` square images each, with optimizer; its time is the median after the
warm-up, of the slowest rank. Losses of all layouts stand beside each other: it is the same training. Each rank tells the seconds of a
step by part; ``waiting`` is for other ranks. Writes benchmarks/results/layouts.json, which the planner's rates are fitted to.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.commit import commit
from benchmarks.training import RESULTS, ROOT, loss_tokens, make_model, matrix_rate, paced, samples_of, versions

BASELINE = "transformers"
# Words as recipes have them, by number of GPUs; language, then images.
LAYOUTS: dict[int, dict[str, tuple[dict[str, int], dict[str, int]]]] = {
    1: {"one": ({}, {})},
    2: {
        "dp2": ({"dp": 2}, {"dp": 2}), "tp2": ({"tp": 2}, {"tp": 2}), "tp2 / dp2": ({"tp": 2}, {"dp": 2}),
        "1 | 1": ({}, {"rank_offset": 1}),
    },
    4: {
        "dp4": ({"dp": 4}, {"dp": 4}), "tp2 dp2": ({"tp": 2, "dp": 2}, {"tp": 2, "dp": 2}), "tp4": ({"tp": 4}, {"tp": 4}),
        "tp2 dp2 / dp4": ({"tp": 2, "dp": 2}, {"dp": 4}), "tp4 / dp4": ({"tp": 4}, {"dp": 4}),
        "tp2 | dp2": ({"tp": 2}, {"dp": 2, "rank_offset": 2}), "dp2 | dp2": ({"dp": 2}, {"dp": 2, "rank_offset": 2}),
        "pp2 | dp2": ({"pp": 2}, {"dp": 2, "rank_offset": 2}),
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "0.8b", "4b", "9b"), default="0.8b")
    parser.add_argument("--gpus", type=int, choices=LAYOUTS, default=2)
    parser.add_argument("--layouts", nargs="+", help="names of some of them")
    parser.add_argument("--rows", type=int, default=8, help="samples of a global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a language replica in a micro-batch")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--images", type=int, default=1, help="images of a sample")
    parser.add_argument("--image", type=int, default=768, help="pixels a side")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--recompute", choices=("full", "selective", "none"), default="none")
    parser.add_argument("--state", choices=("fp32", "bf16"), default="fp32", help="gradients and moments of mimo_jobs")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--freeze", choices=("none", "images"), default="none")
    parser.add_argument("--model", help="directory for the checkpoint; made if it is not there")
    parser.add_argument("--output", default=str(RESULTS / "layouts.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.one:
        spawn(options)
        return
    known = [BASELINE] * (options.gpus > 1) + list(LAYOUTS[options.gpus])
    if unknown := set(options.layouts or ()) - set(known):
        parser.error(f"--layouts: {', '.join(sorted(unknown))} not among {', '.join(known)}")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        options.model = options.model or f"{place}/model"
        make_model(options)
        for name in options.layouts or known:
            found[name] = in_a_process(name, options)
            print(name, json.dumps(found[name]), flush=True)
    write(found, options)


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A layout that does not fit, or fails, says so in the results; the others go on."""
    plain = {
        n: v
        for n, v in vars(options).items()
        if v is not None and n not in ("one", "output", "layouts", "sequence_parallel")
    }
    words = [f"--{n}={v}" for n, v in plain.items()] + ["--sequence-parallel"] * options.sequence_parallel
    command = [sys.executable, "-m", "benchmarks.layouts", f"--one={name}", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"failed": ended.stderr.strip().splitlines()[-1][-300:]}
    return json.loads(ended.stdout.splitlines()[-1])


def spawn(options: argparse.Namespace) -> None:
    from torch import multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank, (options, port), nprocs=options.gpus)


def rank(number: int, options: argparse.Namespace, port: int) -> None:
    """One rank of one layout; the first prints what all measured."""
    import torch
    import torch.distributed as dist

    from mimo_jobs.training import flops

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(number)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if cuda else "gloo", init_method=address, rank=number, world_size=options.gpus)
    step, components, config, watch = baseline(options) if options.one == BASELINE else prepared(options)
    losses, seconds = paced(
        step, options.warmup + options.steps, lambda number: watch.lap() if number == options.warmup else None
    )
    parts = {name: value / options.steps for name, value in watch.lap()().items()}
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    rate = matrix_rate() if cuda else None
    mine = {
        "components": components,
        "losses": losses,
        "seconds": seconds[options.warmup :],
        "parts": parts,
        "peak": peak,
    }
    all_of: list[Any] = [None] * options.gpus
    dist.all_gather_object(all_of, mine)
    if number == 0:
        model, side = flops.of_config(config), options.image // config["vision_config"]["patch_size"]
        work = model.language([options.tokens] * options.rows, loss_tokens(config, options))
        frames = model.images([side**2] * options.images * options.rows)
        total = work.passes("trained") + frames.passes("frozen" if options.freeze == "images" else "trained")
        median = statistics.median(max(times) for times in zip(*(one["seconds"] for one in all_of), strict=True))
        print(json.dumps(told(all_of, options, median, total, rate)))
    dist.barrier()
    dist.destroy_process_group()


def told(
    all_of: list[Any], options: argparse.Namespace, median: float, total: float, rate: float | None
) -> dict[str, Any]:
    language, images = LAYOUTS[options.gpus].get(options.one, (None, None))
    speed = options.rows * options.tokens / median
    return {
        "language": language, "images": images, "losses": [round(sum(s), 5) for s in zip(*(one["losses"] for one in all_of), strict=True)],
        "step_seconds": round(median, 4), "tokens_per_second": round(speed, 1), "tokens_per_second_per_gpu": round(speed / options.gpus, 1),
        "mfu_of_matrix_rate": round(total / median / options.gpus / rate, 4) if rate else None,
        "matrix_tflops": round(rate / 1e12, 1) if rate else None,
        "ranks": [
            {"components": one["components"], "peak_gb": round(one["peak"] / 1e9, 2), "seconds": {n: round(s, 4) for n, s in one["parts"].items()}}
            for one in all_of
        ],
    }  # fmt: skip


def baseline(options: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any], Any]:
    """As `prepared`, of transformers."""
    from benchmarks.baseline import sharded
    from mimo_jobs.training.stopwatch import Stopwatch

    config = json.loads((Path(options.model) / "config.json").read_text())
    return sharded(options, samples_of(config, options)), [BASELINE], config, Stopwatch()


def prepared(options: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any], Any]:
    """A step of this rank; its components; config.json; the stopwatch."""
    import torch

    from mimo_jobs.conversion.fill import fill_model
    from mimo_jobs.layout import ComponentLayout, ParallelLayout
    from mimo_jobs.modeling.build import build
    from mimo_jobs.training.batches import Shares
    from mimo_jobs.training.config import Optimizer
    from mimo_jobs.training.optimizer import make_optimizer
    from mimo_jobs.training.run import RECOMPUTE
    from mimo_jobs.training.step import component_module, run_step, watch_images, wrap_for_training
    from mimo_jobs.training.stopwatch import Stopwatch
    from tests.gloo.training import microbatches_of, table_of

    config = json.loads((Path(options.model) / "config.json").read_text())
    language, images = LAYOUTS[options.gpus][options.one]
    layout = ParallelLayout(ComponentLayout(**language), ComponentLayout(**images), options.gpus).resolve()
    recompute = dict.fromkeys(("language", "images"), RECOMPUTE[options.recompute])
    built = build(
        config, layout, dtype=torch.bfloat16, sequence_parallel=options.sequence_parallel, overrides=recompute
    )
    fill_model(built, Path(options.model))
    if options.freeze in built.groups:
        component_module(built, options.freeze).requires_grad_(False)
    wrap_for_training(built, wide_gradients=options.state == "fp32")
    updates = make_optimizer(
        built,
        Optimizer(lr=1e-5, weight_decay=0.0, schedule="constant", state=options.state),
        options.warmup + options.steps,
    )
    dp = {name: component.dp for name, component in layout.components.items()}
    shares = Shares(dp["language"], dp["images"], options.micro, options.rows // dp["language"] // options.micro)
    samples = samples_of(config, options)
    table = table_of(samples, [[i] for i in range(options.rows)])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    made = [m.pinned() if device.type == "cuda" else m for m in microbatches_of(built, samples, table, shares)]
    total, watch = table.total(table.loss_tokens), Stopwatch()
    watch_images(built, watch)

    def step() -> torch.Tensor:
        updates.set_step(0)
        with watch.span("model"):
            loss = run_step(built, [m.to(device) for m in made], total, watch)
        with watch.span("optimizer"):
            updates.apply()
        return loss / total

    return step, list(built.groups), config, watch


def write(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    import torch

    settings = {n: v for n, v in vars(options).items() if n not in ("one", "output", "model", "layouts")}
    words = " ".join(f"--{n.replace('_', '-')} {v}" for n, v in settings.items() if not isinstance(v, bool))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "command": f"python -m benchmarks.layouts {words}" + " --sequence-parallel" * options.sequence_parallel, "commit": commit(),
        "machine": {"card": card, "cores": os.cpu_count()}, "versions": versions(), "settings": settings, "layouts": found,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    for name, one in found.items():
        speed = (
            one.get("failed")
            or f"{one['tokens_per_second_per_gpu']:8.0f} tokens/s/GPU   step {one['step_seconds']:.3f} s"
        )
        print(f"{name:15} {speed}")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
