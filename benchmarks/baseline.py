"""transformers' own model on several GPUs, as its users train it: FSDP2, gradient checkpointing, bf16 over fp32 weights."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LR = 1e-5


def sharded(options: argparse.Namespace, samples: list[Any]) -> Callable[[], Any]:
    """A step of this rank: its part of the samples in micro-batches of ``options.micro``, then AdamW. Collective over the world.

    Weights, gradients and moments are fp32 and shared out over the ranks, layer by layer; layers compute in bf16. Returns a function that
    returns this rank's part of the mean loss.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForImageTextToText

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = json.loads((Path(options.model) / "config.json").read_text())
    model: Any = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=device == "cuda")
    own = samples[dist.get_rank() :: dist.get_world_size()]
    total = sum(int((s.labels >= 0).sum()) for s in samples)
    batches = [_inputs(own[at : at + options.micro], config, device) for at in range(0, len(own), options.micro)]

    def step() -> torch.Tensor:
        loss = torch.zeros((), device=device)
        for index, inputs in enumerate(batches):
            model.set_requires_gradient_sync(index == len(batches) - 1)
            # FSDP averages over ranks; a micro-batch's loss is a sum over the whole step's tokens.
            part = model(**inputs, num_items_in_batch=total).loss
            (part * dist.get_world_size()).backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _inputs(samples: list[Any], config: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    ids = torch.stack([s.input_ids for s in samples]).to(device)
    return {
        "input_ids": ids, "labels": ids.masked_fill(ids == config["image_token_id"], -100),
        "pixel_values": torch.cat([s.pixel_values for s in samples]).to(device),
        "image_grid_thw": torch.cat([s.image_grid_thw for s in samples]).to(device),
        "mm_token_type_ids": (ids == config["image_token_id"]).int(), "use_cache": False,
    }  # fmt: skip
