"""Qwen3.5-VL between Hugging Face and MIMO."""

from typing import TYPE_CHECKING

from mimo_jobs import jobs
from recipes import layouts

if TYPE_CHECKING:
    import fiddle as fdl


def qwen35vl_import(model: jobs.ModelRef, target: jobs.Dir) -> "fdl.Partial[dict]":
    """Hugging Face to MIMO: language TP4 and images TP4 on disjoint ranks, 8 GPUs.

    Example: model=Qwen/Qwen3.5-0.8B target=checkpoints/qwen35-mimo layout.language.tp=2 layout.images.tp=1
    """
    import fiddle as fdl

    return fdl.Partial(jobs.import_hf, model=model, target=target, layout=layouts.split_8gpu())


def qwen35vl_export(source: jobs.Dir, target: jobs.Dir) -> "fdl.Partial[dict]":
    """MIMO to Hugging Face: language TP4 and images TP4 on disjoint ranks, 8 GPUs.

    Example: source=checkpoints/qwen35-mimo target=checkpoints/qwen35-hf layout.language.tp=1 layout.images.tp=1
    """
    import fiddle as fdl

    return fdl.Partial(jobs.export_hf, source=source, target=target, layout=layouts.split_8gpu())


def qwen35vl_pipeline(model: jobs.ModelRef, workdir: jobs.Dir) -> "dict[str, fdl.Partial[dict]]":
    """Import, export and verify as one chain; steps that are done already are skipped.

    Example: model=Qwen/Qwen3.5-0.8B workdir=runs/qwen35 layout.language.tp=2 layout.images.tp=1

    Args:
        model: Hugging Face checkpoint
        workdir: where the outputs go: mimo, hf and verify.json
    """
    import fiddle as fdl

    mimo, exported = f"{workdir}/mimo", f"{workdir}/hf"
    return {
        "import": fdl.Partial(jobs.import_hf, model=model, target=mimo, layout=layouts.split_8gpu()),
        "export": fdl.Partial(jobs.export_hf, source=mimo, target=exported, layout=layouts.split_8gpu()),
        "verify": fdl.Partial(jobs.verify, left=model, right=exported, certificate=f"{workdir}/verify.json"),
    }
