"""Samples for a tiny model, and a transformers + PyTorch loop over the same global batches."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.training.batches import IGNORED, Microbatch, Shares, StepTable, images_inputs, language_inputs
from mimo_jobs.training.optimizer import Updates
from mimo_jobs.training.step import run_step
from mimo_jobs.training.stopwatch import Stopwatch


@dataclass(frozen=True)
class Sample:
    """A tokenised sample with its pixels."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    image_grid_thw: torch.Tensor
    pixel_values: torch.Tensor | None


def make_sample(config: dict[str, Any], grids: list[tuple[int, int, int]], text: int, seed: int) -> Sample:
    """``text`` random tokens with images between them; labels on about half of the tokens, shifted."""
    random = np.random.default_rng(seed)
    vision, merge = config["vision_config"], config["vision_config"]["spatial_merge_size"] ** 2
    ids: list[int] = []
    for grid in grids:
        ids += [*random.integers(0, 250, 3), config["vision_start_token_id"]]
        ids += [config["image_token_id"]] * (int(np.prod(grid)) // merge) + [config["vision_end_token_id"]]
    ids += list(random.integers(0, 250, text))
    input_ids = np.array(ids, np.int64)
    labels = np.append(input_ids[1:], IGNORED)
    labels[random.random(len(labels)) < 0.5] = IGNORED
    labels[labels == config["image_token_id"]] = IGNORED
    features = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    patches = int(sum(np.prod(g) for g in grids))
    pixels = random.standard_normal((patches, features)).astype(np.float32) if grids else None
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    return Sample(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        grid_thw,
        None if pixels is None else torch.from_numpy(pixels),
    )


def samples_of_a_run(
    config: dict[str, Any], count: int, *, same_size: bool = False, text_only: bool = False
) -> list[Sample]:
    """Images of varying sizes; every fourth sample has none, every fifth has two."""
    sizes = [(1, 4, 8), (1, 8, 4), (1, 8, 8), (1, 4, 4)]
    made = []
    for i in range(count):
        grids = [sizes[0]] if same_size else [] if i % 4 == 3 else [sizes[i % 4]] + ([sizes[2]] if i % 5 == 4 else [])
        made.append(make_sample(config, [] if text_only else grids, 9 + 5 * (i % 3), seed=i))
    return made


def table_of(samples: list[Sample], rows: list[list[int]]) -> StepTable:
    """What all ranks know of a step."""
    images = [int((s.image_grid_thw.prod(-1)).sum()) // 4 if len(s.image_grid_thw) else 0 for s in samples]
    return StepTable(
        rows,
        [str(i) for i in range(len(samples))],
        np.array([len(s.input_ids) for s in samples]),
        np.array(images),
        np.array([int((s.labels != IGNORED).sum()) for s in samples]),
        np.array([int((s.image_grid_thw.prod(-1) ** 2).sum()) for s in samples]),
    )


def shares_of(layout: ResolvedLayout, microbatches: int) -> Shares:
    """Who works on which rows in a layout, with two rows in a micro-batch."""
    return Shares(layout.components["language"].dp, layout.components["images"].dp, 2, microbatches)


def microbatches_of(built: Any, samples: list[Sample], table: StepTable, shares: Shares) -> list[Microbatch]:
    """This rank's microbatches of one step."""
    encoded = dict(enumerate(samples))
    pixels = {i: (s.pixel_values, s.image_grid_thw) for i, s in encoded.items() if s.pixel_values is not None}
    made = []
    for m in range(shares.microbatches):
        images = None
        if "images" in built.groups:
            found = images_inputs(built.hf, table, shares, m, built.groups["images"].dp.rank(), pixels)
            images = {"images": {"vision": found}} if found is not None else None
        if "language" in built.groups:
            config = built.configs["language"]
            multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
            one = language_inputs(
                built.hf,
                table,
                shares,
                m,
                built.groups["language"].dp.rank(),
                encoded,
                multiple=multiple,
            )
            one.inputs["modality_inputs"] = images
        else:
            one = Microbatch({"input_ids": None, "modality_inputs": images}, 1)
        made.append(one)
    return made


def train_step(built: BuiltModel, updates: Updates, samples: list[Sample], step: int) -> float:
    """One optimizer step on samples, one a row and two a micro-batch; this rank's part of their mean loss."""
    shares = shares_of(built.layout, len(samples) // built.layout.components["language"].dp // 2)
    table = table_of(samples, [[i] for i in range(len(samples))])
    updates.set_step(step)
    total = table.total(table.loss_tokens)
    loss = run_step(built, microbatches_of(built, samples, table, shares), total, Stopwatch()).item() / total
    assert updates.apply().item() > 0
    return loss


def hf_loss(model: Any, samples: list[Sample]) -> torch.Tensor:
    """Mean loss over all tokens that have one, each sample alone."""
    total, count = torch.zeros((), dtype=next(model.parameters()).dtype), 0
    for s in samples:
        ids = s.input_ids[None]
        inputs: dict[str, Any] = dict(input_ids=ids)
        if s.pixel_values is not None:
            inputs |= dict(
                pixel_values=s.pixel_values.to(total.dtype),
                image_grid_thw=s.image_grid_thw,
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
            )
        logits = model(**inputs).logits[0]
        total = total + F.cross_entropy(logits, s.labels, ignore_index=IGNORED, reduction="sum")
        count += int((s.labels != IGNORED).sum())
    return total / count


def exact(model: Any, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor], float]:
    """Loss, gradients and their norm, of transformers in fp64."""
    double = copy.deepcopy(model).double()
    loss = hf_loss(double, samples)
    loss.backward()
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in double.named_parameters()}
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values())).item()  # pyright: ignore
    return loss.item(), gradients, norm


def exact_run(
    model: Any, samples: list[Sample], batch: int, steps: int, settings: Any, dtype: torch.dtype = torch.float64
) -> list[float]:
    """Losses of a transformers + PyTorch loop: AdamW, clipping, transformers' cosine schedule."""
    from transformers import get_cosine_schedule_with_warmup

    model = copy.deepcopy(model).to(dtype)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps,
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = hf_loss(model, samples[step * batch : (step + 1) * batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
