"""Batches for the tiny model, with the answers of transformers."""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.tiny import tiny_config, tiny_model

SAME_SIZE = ((1, 4, 8), (1, 4, 8))
VARIED = ((1, 4, 8), (1, 8, 8))


@dataclass(frozen=True)
class Batch:
    """Two rows, each with one image or none."""

    input_ids: Tensor
    pixel_values: Tensor | None = None
    grid_thw: Tensor | None = None


def text_batch(config: dict[str, Any], seq: int = 71) -> Batch:
    """Longer than one chunk (64) of the delta rule, and odd."""
    generator = torch.Generator().manual_seed(5)
    return Batch(torch.randint(0, config["text_config"]["vocab_size"] - 10, (2, seq), generator=generator))


def image_batch(config: dict[str, Any], grids: tuple[tuple[int, int, int], ...], seq: int = 43) -> Batch:
    """One image of each given size (frames, rows, columns of patches) a row, at different places."""
    generator = torch.Generator().manual_seed(6)
    vision = config["vision_config"]
    ids = torch.randint(0, config["text_config"]["vocab_size"] - 10, (len(grids), seq), generator=generator)
    for row, (frames, height, width) in enumerate(grids):
        start, tokens = 5 + row, frames * height * width // vision["spatial_merge_size"] ** 2
        ids[row, start - 1] = config["vision_start_token_id"]
        ids[row, start : start + tokens] = config["image_token_id"]
        ids[row, start + tokens] = config["vision_end_token_id"]
    grid_thw = torch.tensor(grids)
    features = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return Batch(ids, torch.randn(int(grid_thw.prod(-1).sum()), features, generator=generator), grid_thw)


def hf_logits(model: Any, batch: Batch) -> Tensor:
    """(batch, seq, vocab) of transformers."""
    if batch.pixel_values is None:
        return model(input_ids=batch.input_ids).logits
    types = (batch.input_ids == model.config.image_token_id).int()
    return model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.grid_thw,
        mm_token_type_ids=types,
    ).logits


def tiny(**sizes: Any) -> tuple[dict[str, Any], torch.nn.Module]:
    """Config and model, made once a process for the same sizes."""
    return _tiny(json.dumps(sizes, sort_keys=True))


@functools.cache
def _tiny(sizes: str) -> tuple[dict[str, Any], torch.nn.Module]:
    torch.set_num_threads(1)  # ranks are forked: no thread pool may exist yet
    config = tiny_config(**json.loads(sizes))
    return config, tiny_model(config)
