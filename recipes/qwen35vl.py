"""Qwen3.5-VL between Hugging Face and MIMO, and its fine-tuning."""

from typing import TYPE_CHECKING, Literal

from mimo_jobs import jobs
from mimo_jobs.errors import UsageError
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


def qwen35vl_sft(source: jobs.ModelRef, data: jobs.DataRef, target: jobs.Dir) -> "fdl.Partial[dict]":
    """Fine-tune every parameter: language TP4 and images TP4 on disjoint ranks, 8 GPUs.

    Example: source=checkpoints/qwen35-mimo data=naver-clova-ix/cord-v2 target=checkpoints/qwen35-sft optimizer.lr=1e-5
    """
    import fiddle as fdl

    return fdl.Partial(jobs.sft, source=source, data=data, target=target, layout=layouts.split_8gpu())


def qwen35vl_lora(source: jobs.ModelRef, data: jobs.DataRef, target: jobs.Dir) -> "fdl.Partial[dict]":
    """Fine-tune low-rank adapters: language TP4 and images TP4 on disjoint ranks, 8 GPUs.

    Example: source=checkpoints/qwen35-mimo data=naver-clova-ix/cord-v2 target=checkpoints/qwen35-lora lora.rank=16
    """
    import fiddle as fdl

    return fdl.Partial(jobs.lora, source=source, data=data, target=target, layout=layouts.split_8gpu())


def qwen35vl_pipeline(
    model: jobs.ModelRef,
    workdir: jobs.Dir,
    data: jobs.DataRef | None = None,
    train: Literal["none", "sft", "lora"] = "none",
) -> "dict[str, fdl.Partial[dict]]":
    """Import, fine-tune if wanted, export and verify as one chain; what is done is skipped.

    Example: model=Qwen/Qwen3.5-0.8B workdir=runs/qwen35 layout.language.tp=2 layout.images.tp=1

    Args:
        model: Hugging Face checkpoint
        workdir: where the outputs go: mimo, hf, and verify.json or, of a training, sft or lora
        data: images and text to train on: JSONL, Parquet, WebDataset or a hub data set
        train: what is trained between import and export: nothing, every parameter, or adapters that the export merges
    """
    import fiddle as fdl

    if (data is None) != (train == "none"):
        raise UsageError(
            f"data={data} is given, but nothing is trained on it; set train=sft or train=lora, or leave data out"
            if data is not None
            else f"train={train} needs data=...: a JSONL, Parquet or WebDataset file, a directory, or a hub data set"
        )
    mimo, exported, trained = f"{workdir}/mimo", f"{workdir}/hf", f"{workdir}/{train}"
    chain = {"import": fdl.Partial(jobs.import_hf, model=model, target=mimo, layout=layouts.split_8gpu())}
    export = fdl.Partial(jobs.export_hf, source=mimo, target=exported, layout=layouts.split_8gpu())
    if data is None:
        verify = fdl.Partial(jobs.verify, left=model, right=exported, certificate=f"{workdir}/verify.json")
        return chain | {"export": export, "verify": verify}
    job = {"sft": jobs.sft, "lora": jobs.lora}[train]
    chain[train] = fdl.Partial(job, source=mimo, data=data, target=trained, layout=layouts.split_8gpu())
    if train == "sft":
        export.source = trained
    else:
        export.adapter = trained
    return chain | {"export": export}
