"""A fine-tuning run from its arguments to its checkpoint: the part before and after the loop."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimo_jobs.checkpoint import torch_dist
from mimo_jobs.checkpoint.manifest import HF_DIR, is_mimo, read_config, read_manifest, write_manifest
from mimo_jobs.checkpoint.model_io import MODEL_PREFIXES, load_model, save_model
from mimo_jobs.checkpoint.peft_dir import base_digest, read_peft
from mimo_jobs.conversion import identity, publish
from mimo_jobs.conversion.adapters import fill_adapters, write_peft
from mimo_jobs.conversion.carried import Carried, carry, exported_digests
from mimo_jobs.conversion.fill import fill_model
from mimo_jobs.conversion.importer import ImportArgs, plan_import
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.layout import IMAGES, LANGUAGE
from mimo_jobs.modeling import kernels
from mimo_jobs.modeling.build import BuiltModel, build
from mimo_jobs.modeling.lora import add_adapters
from mimo_jobs.parallel.world import World
from mimo_jobs.training import flops, metrics
from mimo_jobs.training.args import TrainArgs
from mimo_jobs.training.checkpoints import Checkpoints, errors_named
from mimo_jobs.training.checks import check_optimizer, check_settings
from mimo_jobs.training.config import Lora
from mimo_jobs.training.data import Encoder, Source
from mimo_jobs.training.feeder import Feeder, Step
from mimo_jobs.training.inputs import in_words, open_data, rows_of, same_data
from mimo_jobs.training.loop import Run, Validated, train
from mimo_jobs.training.optimizer import make_optimizer
from mimo_jobs.training.owner import owned
from mimo_jobs.training.process import distributed
from mimo_jobs.training.rows import Rows
from mimo_jobs.training.saved import CARRIED, Saved, clear_partial, make_way, newest, read
from mimo_jobs.training.step import component_module, run_step, watch_images, wrap_for_training
from mimo_jobs.training.stopwatch import Stopwatch
from mimo_jobs.weights.adapters import projections, targeted

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


def run_training(args: TrainArgs, world: World) -> dict[str, Any]:
    """Train, and publish what was trained. Returns the summary (the same on every rank).

    Raises:
        UserError: bad input, or (JobFailed) the loss went wrong or another rank failed first; KeyboardInterrupt when asked to stop.
    """
    check_settings(vars(args), args.layout)
    metrics.check(args.logging)
    with contextlib.ExitStack() as until_the_end:
        if world.rank == 0:
            publish.check_target(args.target, args.overwrite, args.source)
            until_the_end.enter_context(owned(args.checkpoints, world.run_id, partial(world.say, kind="warning")))
            publish.check_target(args.target, args.overwrite, args.source)  # whoever was waited for may have made it
            if args.overwrite and (told := make_way(args.checkpoints, args.identity, _made_of(args))):
                world.say(told, kind="warning")
        world.barrier("checked")
        with distributed(world) as device:
            return _run(args, world, device)


def _made_of(args: TrainArgs) -> Mapping[str, Any] | None:
    """The identity of what ``overwrite`` would replace."""
    with contextlib.suppress(UserError):
        return identity.recorded("lora" if args.lora else "sft", args.target)
    return None


def _run(args: TrainArgs, world: World, device: torch.device) -> dict[str, Any]:
    source, validation = open_data(args, world)
    data = same_data(args, source, world)
    found = _going_on(args, data, world)
    encoder = Encoder(str(_processor(args.source)), args.dataset)
    rows, steps, left_out = rows_of(args, source, encoder, world)
    check_optimizer(args.optimizer, steps)
    built = _build(args)
    if (
        world.rank == 0
        and device.type == "cuda"
        and args.precision == "bf16"
        and not kernels.available("cuda", torch.bfloat16)
    ):
        world.say(
            "flash-linear-attention is not installed: plain PyTorch takes its place, and is slow; pip install 'mimo-jobs[gpu]'",
            kind="warning",
        )
    with world.timed("load"):
        _load(args, built)
    wrap_for_training(built, wide_gradients=args.optimizer.state == "fp32")
    updates = make_optimizer(built, args.optimizer, steps)
    carried = None if args.lora else carry(args.source, args.layout, args.checkpoints / CARRIED, world)

    def finish(staging: Path, files: dict[str, int]) -> None:
        if carried is not None:
            carried.attach(staging, files, args.layout, {})

    checkpoints = Checkpoints(
        built, updates, args.checkpoints, args.saving.keep, args.saving.background, adapters=args.lora is not None, finish=finish
    )  # fmt: skip
    run = Run(
        world, built, updates, checkpoints, device, steps, args.identity, args.stop, args.saving.every, args.validation.every,
        None, None, _flops(args, built), _peak(args), dropout_seed=args.seed if args.lora and args.lora.dropout else None, data=data,
        skipped=len(left_out),
    )  # fmt: skip
    if found is not None:
        with world.timed("resume"):
            checkpoints.load(found[0])
        before = found[1]
        run.done, run.kept, run.skipped, run.losses = before.step, before.step, before.skipped, list(before.losses)
        run.first_loss, run.tokens, run.seconds = before.first_loss, before.tokens, before.seconds
        world.say(f"going on from {found[0]}, after step {run.done} of {steps}")
    if validation is not None:
        run.validate = partial(_validate, args, built, validation, encoder, device)
    log = _metrics(args, world, run, steps, len(source))
    with log or contextlib.nullcontext():
        run.metrics = log
        if log is not None and found is None:
            for problem in left_out:
                log.event(0, problem, "bad sample")
        watch_images(built, run.watch)
        world.progress("train", run.done, steps, "steps")
        with Feeder(built, source, encoder, rows, args.shares, args.dataset, run.done, steps) as feeder:
            train(run, feeder)
    summary = _publish(args, built, carried, world)
    peaks = world.gather("ended", torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
    if peaks is not None:
        summary |= {
            "steps": steps, "loss": run.losses[-1] if run.losses else None, "first_loss": run.first_loss, "tokens": run.tokens,
            "skipped": run.skipped, "training_seconds": run.seconds, "memory_bytes": max(peaks),
            "tokens_per_second_per_gpu": run.tokens / run.seconds / world.size if run.seconds else None,
        }  # fmt: skip
    return world.broadcast("trained", summary if peaks is not None else None)


def _going_on(args: TrainArgs, data: Mapping[str, Any], world: World) -> tuple[Path, Saved] | None:
    """The checkpoint to go on from, as rank 0 sees the disk: others may have an old view of it.

    Raises:
        UserError: it is of another run, or the data set is another one now.
    """
    found = None
    if world.rank == 0:
        clear_partial(args.checkpoints, partial(world.say, kind="warning"))
        found = newest(args.checkpoints, args.identity, partial(world.say, kind="warning"))
    name = world.broadcast("going on from", found[0].name if found else None)
    if name is not None and found is None:
        found = args.checkpoints / name, read(args.checkpoints / name)
    if found is not None and found[1].data and found[1].data != data:
        raise UserError(
            f"data={args.data}: it has changed since {found[0]} was saved ({in_words(found[1].data, data)}): samples would be "
            "repeated or missed; give the data set as it was, or another target"
        )
    return found


def _validate(
    args: TrainArgs, built: BuiltModel, source: Source, encoder: Encoder, device: torch.device, stop_asked: Callable[[], bool]
) -> Validated | None:  # fmt: skip
    """Mean loss per token over the first samples of the validation data; None when asked to stop."""
    count = min(len(source), args.validation.samples or len(source))
    shares = args.shares
    rows = Rows(lambda _: [[i] for i in range(count)], shares.global_batch_size, count)
    settings = dataclasses.replace(args.dataset, packing=False)
    steps, total, tokens, problems = -(-count // shares.global_batch_size), 0.0, 0, []
    built.model.eval()
    try:
        with Feeder(built, source, encoder, rows, shares, settings, 0, steps) as feeder, torch.no_grad():
            for step in feeder:
                if stop_asked():
                    return None
                problems += step.problems
                here = step.table.total(step.table.loss_tokens)
                if not here:
                    continue
                moved = [m.to(device) for m in step.microbatches]
                total += float(run_step(built, moved, here, Stopwatch(), train=False))
                tokens += here
    finally:
        built.model.train()
    shared = torch.tensor(total, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return Validated(float(shared) / max(1, tokens), tokens, problems)


# --------------------------------------------------------------------------------------------------------------- model


def _processor(source: Path) -> Path:
    return source / HF_DIR if is_mimo(source) else source


def source_config(source: Path) -> dict[str, Any]:
    """The Hugging Face config of a MIMO checkpoint or a Hugging Face directory. Raises `UserError` when it is neither."""
    return read_manifest(source).config if is_mimo(source) else read_config(source)


def _build(args: TrainArgs) -> BuiltModel:
    dtype = DTYPES[args.precision]
    frozen = {args.freeze} if args.freeze != "none" else set()
    built = build(
        source_config(args.source),
        args.layout,
        dtype=dtype,
        sequence_parallel=args.sequence_parallel,
        float32_parameters=_float32_parameters(args) if dtype != torch.float32 else (),
        overrides={name: RECOMPUTE[args.recompute] for name in (LANGUAGE, IMAGES)},
    )
    for name in frozen & set(built.groups):
        component_module(built, name).requires_grad_(False)
    return built


def _float32_parameters(args: TrainArgs) -> list[str]:
    """Endings of the parameters that the source keeps in fp32 beside others in 16 bits (``self_attention.A_log``)."""
    if is_mimo(args.source):
        stored = torch_dist.read_metadata(args.source)  # of a step's checkpoint, with the optimizer's state
        dtypes = {key: tensor.dtype for key, tensor in stored.items() if key.startswith(MODEL_PREFIXES)}
    else:
        made = plan_import(ImportArgs(args.source, args.target, args.layout))
        dtypes = {key: tensor.dtype for key, tensor in made.tensors.items()}
    if set(dtypes.values()) == {"F32"}:
        return []
    return sorted(
        {key.partition(".layers.")[2].partition(".")[2] or key for key, dtype in dtypes.items() if dtype == "F32"}
    )


def _load(args: TrainArgs, built: BuiltModel) -> None:
    if is_mimo(args.source):
        load_model(built, args.source)
    else:
        fill_model(built, args.source)
    if args.lora is not None:
        lora = _lora(args)
        add_adapters(built, lora, args.seed)
        if lora.adapter:
            fill_adapters(built, Path(lora.adapter))


def _lora(args: TrainArgs) -> Lora:
    """The adapters' settings: those of the adapter that training goes on from, if any."""
    assert args.lora is not None
    return read_peft(Path(args.lora.adapter)).applied_to(args.lora) if args.lora.adapter else args.lora


# ------------------------------------------------------------------------------------------------------------- numbers


def _flops(args: TrainArgs, built: BuiltModel) -> Any:
    model = flops.of_config(source_config(args.source))
    merge = built.hf.vision_config.spatial_merge_size**2
    language: flops.Training = "lora" if args.lora else "passed" if args.freeze == LANGUAGE else "trained"
    images: flops.Training = "frozen" if args.freeze == IMAGES else "trained"
    if args.lora is not None:
        weight_map = family_of(source_config(args.source)).weight_map(source_config(args.source))
        adapted = {projections(weight_map)[m].component for m in targeted(weight_map, _lora(args).targets)}
        images = "lora" if IMAGES in adapted else "frozen"

    def of_step(step: Step) -> float:
        table = step.table
        good = [s for row in table.rows for s in row]
        work = model.language((int(table.tokens[s]) for s in good), table.total(table.loss_tokens))
        patches, pairs = (sum(int(a[s]) for s in good) for a in (table.image_tokens * merge, table.patch_pairs))
        vision = flops.Work(model.patch * patches, model.patch_attention * pairs)
        return work.passes(language) + vision.passes(images)

    return of_step


def _peak(args: TrainArgs) -> float | None:
    if args.logging.peak_tflops is not None:
        return args.logging.peak_tflops
    return flops.peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _metrics(args: TrainArgs, world: World, run: Run, steps: int, samples: int) -> metrics.Metrics | None:
    if world.rank != 0 or world.record is None:
        return None
    whole: Any = args
    settings = {n: v for n, v in dataclasses.asdict(whole).items() if n not in ("identity", "layout")}
    plain = json.loads(json.dumps(settings, default=str))
    about = plain | {
        "layout": args.layout.as_layout(),
        "total_steps": steps,
        "samples_in_data": samples,
        "world_size": world.size,
    }
    if torch.cuda.is_available():
        about |= {"card": torch.cuda.get_device_name(), "gpus": world.size}
    return metrics.Metrics(world.record, args.logging, about, run.done)


# ------------------------------------------------------------------------------------------------------------- results


def _publish(args: TrainArgs, built: BuiltModel, carried: Carried | None, world: World) -> dict[str, Any]:
    """The trained checkpoint, or the adapters as a PEFT directory, where ``target`` says."""
    if carried is None:
        lora = _lora(args)
        base = base_digest(read_manifest(args.source)) if is_mimo(args.source) else None
        return write_peft(
            built, args.target, str(args.source), lora, base=base, identity=dict(args.identity), overwrite=args.overwrite, run_id=world.run_id
        )  # fmt: skip
    staging = publish.staging_of(args.target, world.run_id)
    if world.rank == 0:
        publish.check_target(args.target, args.overwrite, args.source)
        publish.open_staging(args.target, world.run_id, plan="")
    world.barrier("trained staging")
    weights = staging / "weights"  # megatron-core wants an empty directory
    if world.rank == 0:
        weights.mkdir()
    world.barrier("trained weights")
    with errors_named(weights, "make room and start again: the run goes on from its last checkpoint"):
        save_model(built, weights)
    if world.rank == 0:
        for path in list(weights.iterdir()):
            path.rename(staging / path.name)
        weights.rmdir()
        files = {p.name: p.stat().st_size for p in sorted(staging.glob("*.distcp"))}
        carried.attach(staging, files, args.layout, dict(args.identity))
    world.barrier("trained manifest")
    digests = exported_digests(staging, args.layout, world)
    summary: dict[str, Any] = {"target": str(args.target)}
    if digests is not None:
        write_manifest(dataclasses.replace(read_manifest(staging), digests=digests), staging)
        publish.publish(staging, args.target, args.overwrite)
        summary |= {"tensors": len(digests), "bytes": sum(p.stat().st_size for p in args.target.glob("*.distcp"))}
    world.barrier("trained published")
    return summary
