"""The round trip and a fine-tuning in small: nothing to download, no GPU."""

from typing import TYPE_CHECKING

from mimo_jobs import jobs, paths
from mimo_jobs.training.config import Dataset, Logging, Lora, Optimizer
from recipes import layouts

if TYPE_CHECKING:
    import fiddle as fdl


def quickstart(workdir: jobs.Dir | None = None, seed: int = 0) -> "dict[str, fdl.Partial[dict]]":
    """Make a tiny model, import and export it, compare bits and logits, then train and merge adapters.

    Example: workdir=quickstart

    Args:
        workdir: where the checkpoints and the data go; without it a fresh directory
        seed: seed of the random weights and of the data
    """
    import fiddle as fdl

    base = workdir or str(paths.home() / paths.new_id("quickstart"))
    original, data, mimo, exported, adapter, merged = (
        f"{base}/{name}" for name in ("original", "data", "mimo", "exported", "lora", "merged")
    )
    return {
        "make": fdl.Partial(jobs.make_tiny, target=original, seed=seed),
        "data": fdl.Partial(jobs.make_data, target=data, seed=seed),
        "import": fdl.Partial(jobs.import_hf, model=original, target=mimo, layout=layouts.split_3ranks()),
        "export": fdl.Partial(jobs.export_hf, source=mimo, target=exported, layout=layouts.pipeline_3ranks()),
        "verify": fdl.Partial(jobs.verify, left=original, right=exported),
        "logits": fdl.Partial(jobs.compare_logits, left=original, right=exported),
        "lora": _few_steps(mimo, data, adapter, seed),
        "merge": fdl.Partial(
            jobs.export_hf, source=mimo, adapter=adapter, target=merged, layout=layouts.split_3ranks()
        ),
    }


def _few_steps(source: str, data: str, target: str, seed: int) -> "fdl.Partial[dict]":
    """Adapters on the tiny model, in fp32 on the CPU; the loss falls within 16 steps of 8 samples."""
    import fiddle as fdl

    return fdl.Partial(
        jobs.lora, source=source, data=data, target=target, layout=layouts.split_3ranks(), steps=16, global_batch_size=8,
        micro_batch_size=4, seed=seed, precision="fp32", recompute="none", lora=fdl.Config(Lora, rank=16),
        optimizer=fdl.Config(Optimizer, lr=2e-2, warmup_steps=2), dataset=fdl.Config(Dataset, workers=0),
        logging=fdl.Config(Logging, tensorboard=False),
    )  # fmt: skip
