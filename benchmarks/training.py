"""Training speed on one GPU, beside transformers' own model in a plain PyTorch loop: the same weights, the same samples, in turns.

    python -m benchmarks.training --shape 0.8b --rows 4 --tokens 2048 --image 768
    python -m benchmarks.training --shape tiny --rows 2 --tokens 128 --image 32 --steps 2 --output /tmp/look.json     # anywhere, to see that it runs

Every row is a sample of ``tokens`` tokens with one square image; all text has a loss. transformers runs with gradient checkpointing, as
its users do; ``--recompute`` is what mimo_jobs recomputes. Both keep optimizer state in fp32 (transformers: fp32 weights under bf16
autocast; ``--baseline bf16``: weights and state in bf16; mimo_jobs ``--state bf16``: gradients and moments in bf16, fp32 weights), and use flash-linear-attention if it is there. Each side runs in a process
of its own, in turns; a step's time is the median after the warm-up. The losses of both sides stand beside each other: they are the
same training. ``--profile`` adds where two more steps of mimo_jobs spend the device's time. Writes benchmarks/results/training.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.commit import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SIDES = ("transformers", "mimo_jobs")
LR = 1e-5
SPANS = ("Optimizer.", "ProfilerStep")
PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformers": "transformers",
    "flash-linear-attention": "fla",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "0.8b", "4b", "9b"), default="0.8b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--image", type=int, default=768, help="pixels a side")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--recompute", choices=("full", "selective", "none"), default="none")
    parser.add_argument("--state", choices=("fp32", "bf16"), default="fp32", help="gradients and moments of mimo_jobs")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--baseline", choices=("mixed", "bf16"), default="mixed")
    parser.add_argument("--model", help="directory for the checkpoint; made if it is not there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=str(RESULTS / "training.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.side:
        run = with_transformers if options.side == "transformers" else with_mimo_jobs
        print(json.dumps(measured(run, options)))
        return
    with tempfile.TemporaryDirectory() as place:
        options.model = options.model or f"{place}/model"
        make_model(options)
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side in SIDES:
                found[side].append(in_a_process(side, options))
                print(side, json.dumps(found[side][-1]), flush=True)
    write(found, options)


def make_model(options: argparse.Namespace) -> None:
    """A checkpoint of random weights of the shape, if it is not there."""
    from mimo_jobs.conversion.tiny import Shape, make_tiny, published

    if not Path(options.model).exists():
        make_tiny(options.model, shape=Shape() if options.shape == "tiny" else published(options.shape))


def in_a_process(side: str, options: argparse.Namespace) -> dict[str, Any]:
    plain = {n: v for n, v in vars(options).items() if v is not None and n not in ("side", "output", "profile")}
    words = [f"--{n}={v}" for n, v in plain.items()] + ["--profile"] * options.profile
    command = [sys.executable, "-m", "benchmarks.training", f"--side={side}", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{side}: {ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def measured(run: Callable[..., tuple[Callable[[], Any], Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Losses, median seconds of a step, tokens a second, share of the matrix rate, peak memory."""
    import torch

    from mimo_jobs.training import flops

    cuda = torch.cuda.is_available()
    step, config = run(options)
    losses, seconds = paced(step, options.warmup + options.steps)
    patches = (options.image // config["vision_config"]["patch_size"]) ** 2
    model, tokens = flops.of_config(config), options.rows * options.tokens
    work = model.language([options.tokens] * options.rows, loss_tokens(config, options)) + model.images(
        [patches] * options.rows
    )
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    reserved = torch.cuda.memory_reserved() if cuda else 0
    free, whole = torch.cuda.mem_get_info() if cuda else (0, 0)
    profile = where_time_goes(step) if options.profile and options.side == "mimo_jobs" else None
    median, rate = statistics.median(seconds[options.warmup :]), matrix_rate() if cuda else None
    products = flops.Work(
        work.weights
    )  # 6 N D, N without the embedding, D the tokens or patches that each weight meets
    return {
        "losses": [round(loss, 5) for loss in losses], "step_seconds": round(median, 4), "tokens_per_second": round(tokens / median, 1),
        "mfu_of_matrix_rate": round(work.passes("trained") / median / rate, 4) if rate else None,
        "mfu_6nd_of_matrix_rate": round(products.passes("trained") / median / rate, 4) if rate else None,
        "matrix_tflops": round(rate / 1e12, 1) if rate else None,
        "peak_gb": round(peak / 1e9, 2) if cuda else None, "profile": profile,
        "outside_of_pytorch_gb": round((whole - free - reserved) / 1e9, 2) if cuda else None,
        "allocation_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0) if cuda else None,
    }  # fmt: skip


def paced(
    step: Callable[[], Any], steps: int, starting: Callable[[int], object] = lambda _: None
) -> tuple[list[float], list[float]]:
    """The losses of steps, and the seconds of each: from the end of the one before to its own on the device.

    As `training.loop`, a step is launched before the loss of the one before is read. ``starting`` is called with the number of a step before it is launched.
    """
    from mimo_jobs.training.readback import Readback

    losses: list[float] = []
    seconds: list[float] = []
    ahead, before = None, time.perf_counter()
    for number in range(steps + 1):
        if number < steps:
            starting(number)
        launched = Readback(step()) if number < steps else None
        if ahead is not None:
            losses.append(float(ahead.numbers()))
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
        ahead = launched
    return losses, seconds


def where_time_goes(step: Callable[[], Any], steps: int = 2, most: int = 40) -> dict[str, Any]:
    """Milliseconds a step: of the device in its largest kernels, by the operator that started them too, and of the clock."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        started = time.perf_counter()
        paced(step, steps)
        seconds = (time.perf_counter() - started) / steps

    def largest(of: Callable[[Any], float], wanted: Callable[[Any], bool]) -> list[dict[str, Any]]:
        rows = sorted((e for e in seen.key_averages() if wanted(e) and of(e) > 0), key=of, reverse=True)
        return [
            {"name": e.key[:120], "ms": round(of(e) / 1000 / steps, 3), "calls": e.count // steps} for e in rows[:most]
        ]

    def on_device(event: Any) -> bool:  # a span that the host has named is drawn on the device, too
        return "CUDA" in str(event.device_type) and not event.key.startswith(SPANS)

    kernels = largest(lambda e: e.self_device_time_total, on_device)
    operators = largest(
        lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total, lambda e: "CPU" in str(e.device_type)
    )
    busy = sum(e.self_device_time_total for e in seen.key_averages() if on_device(e))
    return {
        "step_ms_with_profiler": round(seconds * 1000, 1),
        "device_ms": round(busy / 1000 / steps, 1),
        "waits_of_the_device": waits([e for e in seen.events() if on_device(e)], steps),
        "kernels": kernels,
        "operators": operators,
    }


def waits(kernels: list[Any], steps: int, least: float = 20.0, most: int = 12) -> dict[str, Any]:
    """Milliseconds a step between kernels, and the longest times of more than ``least`` microseconds, with the kernels around them."""
    found, last, until = [], "", 0.0
    for kernel in sorted(kernels, key=lambda e: e.time_range.start):
        if last and kernel.time_range.start > until:
            found.append((kernel.time_range.start - until, last, kernel.name))
        if kernel.time_range.end > until:
            last, until = kernel.name, kernel.time_range.end
    longest = sorted((w for w in found if w[0] > least), reverse=True)
    return {
        "ms": round(sum(w[0] for w in found) / 1000 / steps, 2), "ms_of_long_ones": round(sum(w[0] for w in longest) / 1000 / steps, 2),
        "longest": [{"ms": round(ms / 1000, 3), "after": after[:60], "before": before[:60]} for ms, after, before in longest[:most]],
    }  # fmt: skip


def samples_of(config: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    """Random samples: an image or several (``options.images``), then text; the label of a token is the next one, unless that is of an image."""
    import torch

    from mimo_jobs.training.batches import IGNORED
    from tests.gloo.training import Sample

    vision = config["vision_config"]
    side, features = (
        options.image // vision["patch_size"],
        vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
    )
    image_tokens, images = side**2 // vision["spatial_merge_size"] ** 2, getattr(options, "images", 1)
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(options.rows):
        text = torch.randint(0, 250, (options.tokens - images * (image_tokens + 2),), generator=generator)
        head = [
            config["vision_start_token_id"],
            *[config["image_token_id"]] * image_tokens,
            config["vision_end_token_id"],
        ] * images
        ids = torch.cat([torch.tensor(head), text])
        labels = torch.cat([ids[1:], torch.tensor([IGNORED])])
        labels[labels == config["image_token_id"]] = IGNORED
        pixels = torch.randn(images * side**2, features, generator=generator)
        made.append(Sample(ids, labels, torch.tensor([[1, side, side]] * images), pixels))
    return made


def loss_tokens(config: dict[str, Any], options: argparse.Namespace) -> int:
    return sum(int((s.labels >= 0).sum()) for s in samples_of(config, options))


def with_transformers(options: argparse.Namespace) -> tuple[Callable[[], Any], Any]:
    """transformers' model, its own loss and gradient checkpointing, AdamW."""
    import torch
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if options.baseline == "bf16" else torch.float32
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype=dtype).to(device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    config = json.loads((Path(options.model) / "config.json").read_text())
    samples = samples_of(config, options)
    ids = torch.stack([s.input_ids for s in samples]).to(device)
    inputs = {
        "input_ids": ids, "labels": ids.masked_fill(ids == config["image_token_id"], -100),
        "pixel_values": torch.cat([s.pixel_values for s in samples]).to(device),
        "image_grid_thw": torch.cat([s.image_grid_thw for s in samples]).to(device),
        "mm_token_type_ids": (ids == config["image_token_id"]).int(), "use_cache": False,
    }  # fmt: skip

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=options.baseline == "mixed"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, config


def with_mimo_jobs(options: argparse.Namespace) -> tuple[Callable[[], Any], Any]:
    """Both components on one rank, as `qwen35vl_sft` trains them."""
    import torch

    from mimo_jobs.conversion.fill import fill_model
    from mimo_jobs.layout import ComponentLayout, ParallelLayout
    from mimo_jobs.modeling.build import build
    from mimo_jobs.parallel.world import World
    from mimo_jobs.training.batches import Shares
    from mimo_jobs.training.config import Optimizer
    from mimo_jobs.training.optimizer import make_optimizer
    from mimo_jobs.training.process import distributed
    from mimo_jobs.training.run import RECOMPUTE
    from mimo_jobs.training.step import run_step, wrap_for_training
    from mimo_jobs.training.stopwatch import Stopwatch
    from tests.gloo.training import microbatches_of, table_of

    device = distributed(World()).__enter__()  # until the process ends
    config = json.loads((Path(options.model) / "config.json").read_text())
    layout = ParallelLayout(ComponentLayout(), ComponentLayout(), 1).resolve()
    built = build(
        config,
        layout,
        dtype=torch.bfloat16,
        overrides=dict.fromkeys(("language", "images"), RECOMPUTE[options.recompute]),
    )
    fill_model(built, Path(options.model))
    wrap_for_training(built, wide_gradients=options.state == "fp32")
    updates = make_optimizer(
        built,
        Optimizer(lr=LR, weight_decay=0.0, schedule="constant", state=options.state),
        options.warmup + options.steps,
    )
    samples, shares = samples_of(config, options), Shares(1, 1, options.rows, 1)
    table = table_of(samples, [[i] for i in range(options.rows)])
    made = [m.pinned() if device.type == "cuda" else m for m in microbatches_of(built, samples, table, shares)]
    total, watch = table.total(table.loss_tokens), Stopwatch()

    def step() -> torch.Tensor:
        updates.set_step(0)
        loss = run_step(built, [m.to(device) for m in made], total, watch)
        updates.apply()
        return loss / total

    return step, config


def matrix_rate(size: int = 8192, times: int = 20) -> float:
    """FLOP/s of a bf16 matrix product on this card: what a share of can be had."""
    import torch

    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(3):
        left @ right
    events[0].record()
    for _ in range(times):
        left @ right
    events[1].record()
    torch.cuda.synchronize()
    return 2 * size**3 * times / (events[0].elapsed_time(events[1]) / 1000)


def versions() -> dict[str, str]:
    return {p: metadata.version(p) for p in PACKAGES if importlib.util.find_spec(PACKAGES[p])}


def write(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    import torch

    settings = {n: v for n, v in vars(options).items() if n not in ("side", "output", "model")}
    best = {side: max(r["tokens_per_second"] for r in runs) for side, runs in found.items()}
    result = {
        "command": f"python -m benchmarks.training {' '.join(f'--{n} {v}' for n, v in settings.items())}", "commit": commit(),
        "machine": {
            "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": versions(), "settings": settings, "runs": found,
        "ratio": round(best["mimo_jobs"] / best["transformers"], 3),
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"mimo_jobs {best['mimo_jobs']:.0f} tokens/s, transformers {best['transformers']:.0f}: {result['ratio']}x; written: {options.output}"
    )


if __name__ == "__main__":
    main()
