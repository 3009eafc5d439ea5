"""Fine-tuning against transformers and PyTorch: 50 steps of SFT in three layouts, and every gradient in every class of layout.

    uv run python -m benchmarks.training_parity                # 50 steps, every layout class: some minutes on two cores
    uv run python -m benchmarks.training_parity --steps 6      # a quick look that it runs

On gloo, fp32, a tiny random model with all kinds of layers, images of several sizes. The reference is transformers' model in fp64 with
``torch.optim.AdamW``, ``clip_grad_norm_`` and transformers' cosine schedule with warm-up; the same loop in fp32 shows what of a
difference is fp32's own. A difference of curves is the largest over all steps, relative; a gradient's error is relative to its norm.
Gradients of A_log and dt_bias, sums that all but cancel, have a column of their own.
Writes benchmarks/results/training_parity.json.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.commit import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BATCH, SAMPLES = 4, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 1e-4])
    parser.add_argument("--output", default=str(RESULTS / "training_parity.json"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    import tests.gloo.conftest  # noqa: F401  # ranks are forked, with megatron-core imported

    console = Console(width=max(120, Console().width))
    started = time.perf_counter()
    curves = {f"{lr:g}": compare_curves(lr, options.steps, console) for lr in options.lr}
    gradients = compare_gradients(console)
    show(curves, gradients, options.steps, console)
    result = {
        "command": f"python -m benchmarks.training_parity --steps {options.steps} --lr {' '.join(f'{lr:g}' for lr in options.lr)}",
        "commit": commit(), "seconds": round(time.perf_counter() - started, 1),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "kernel": platform.release()},
        "versions": {p: metadata.version(p) for p in ("torch", "megatron-core", "transformers")},
        "steps": options.steps, "curves": curves, "gradients": gradients,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"written: {options.output}")


def compare_curves(lr: float, steps: int, console: Console) -> dict[str, Any]:
    """Loss curves of `tests.gloo.curves.LAYOUTS` at a learning rate."""
    import torch

    from mimo_jobs.training.config import Optimizer
    from tests.gloo.batches import tiny
    from tests.gloo.curves import LAYOUTS, batch_of, curve, largest_difference
    from tests.gloo.training import exact_run, samples_of_a_run

    config, model = tiny()
    samples, settings = samples_of_a_run(config, SAMPLES), Optimizer(lr=lr, warmup_steps=5, weight_decay=0.1)
    in_order = [s for i in range(steps) for s in batch_of(samples, BATCH, i)]
    with console.status(f"lr {lr:g}: transformers"):
        exact = exact_run(model, in_order, BATCH, steps, settings)
        single = exact_run(model, in_order, BATCH, steps, settings, torch.float32)
    found = {}
    for name, layout in LAYOUTS.items():
        with console.status(f"lr {lr:g}: {name}"):
            found[name] = curve(layout, config, model.state_dict(), samples, BATCH, steps, settings)
    one = found["one rank"]
    return {
        "first_loss": exact[0], "last_loss": exact[-1], "transformers fp32 against fp64": largest_difference(single, exact),
        "against transformers fp64": {n: largest_difference(c, exact) for n, c in found.items()},
        "against one rank": {n: largest_difference(c, one) for n, c in found.items() if n != "one rank"},
        "losses": {"transformers fp64": exact, **found},
    }  # fmt: skip


def compare_gradients(console: Console) -> dict[str, Any]:
    """Of every layout of tests/gloo/test_training_step.py the errors of loss, norm and the worst gradient."""
    from tests.gloo.test_training_step import CANCELLING, LAYOUTS, measure

    found = {}
    for name in LAYOUTS:
        with console.status(name):
            measured = measure(name)
        cancelling = {n: e for n, e in measured.errors.items() if n.endswith(CANCELLING)}
        errors = {n: e for n, e in measured.errors.items() if n not in cancelling}
        worst = max(errors, key=lambda n: errors[n])
        found[name] = {
            "loss": measured.loss_error, "norm": measured.norm_error, "worst_gradient": errors[worst], "of": worst,
            "cancelling": max(cancelling.values(), default=0.0), "median_gradient": statistics.median(errors.values()), "parameters": len(measured.errors),
        }  # fmt: skip
    return found


def show(curves: dict[str, Any], gradients: dict[str, Any], steps: int, console: Console) -> None:
    table = Table(title=f"largest relative difference of {steps} losses")
    for column in ("lr", "layout", "transformers fp64", "one rank"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for lr, one in curves.items():
        table.add_row(lr, "transformers fp32", f"{one['transformers fp32 against fp64']:.1e}", "")
        for name, error in one["against transformers fp64"].items():
            other = one["against one rank"].get(name)
            table.add_row(lr, name, f"{error:.1e}", "" if other is None else f"{other:.1e}")
    console.print(table)
    table = Table(title="one step against transformers fp64, relative errors")
    for column in ("layout", "loss", "norm", "worst gradient", "A_log, dt_bias"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for name, one in gradients.items():
        table.add_row(
            name, f"{one['loss']:.1e}", f"{one['norm']:.1e}", f"{one['worst_gradient']:.1e}", f"{one['cancelling']:.1e}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
