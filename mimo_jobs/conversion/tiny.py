"""Random Qwen3.5-VL checkpoints in Hugging Face format, shaped like the published ones: for the quickstart, tests, benchmarks.

Values are drawn so that every tensor changes the logits. Dtypes are those of published checkpoints: bfloat16, except
F32 for ``A_log`` and ``linear_attn.norm``.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jobs.conversion.publish import check_target, open_staging, publish, staging_of
from mimo_jobs.errors import UserError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}
{%- else -%}{%- for item in message.content -%}
{%- if item.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ item.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


# Layers, hidden, ffn, heads, kv heads, GDN value heads, tied; vision depth, hidden, ffn, heads; files.
_PUBLISHED = {
    "0.8b": (24, 1024, 3584, 8, 2, 16, True, 12, 768, 3072, 12, 1),
    "4b": (32, 2560, 9216, 16, 4, 32, True, 24, 1024, 4096, 16, 3),
    "9b": (32, 4096, 12288, 16, 4, 32, False, 27, 1152, 4304, 16, 5),
    "27b": (64, 5120, 17408, 24, 4, 48, False, 27, 1152, 4304, 16, 15),
}
_BLOCK = 1_048_573  # a prime above all numbers of rows: no two rows of a tensor that repeats so many values are alike
_MANY = 1 << 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a checkpoint; the defaults are the quickstart's (1 MB), in which no two axes agree by accident."""

    hidden: int = 72
    ffn: int = 112
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    gdn_key_heads: int = 2
    gdn_value_heads: int = 4
    gdn_key_dim: int = 16
    gdn_value_dim: int = 24
    vocab: int = 320
    vision_depth: int = 2
    vision_hidden: int = 48
    vision_ffn: int = 80
    vision_heads: int = 4
    vision_positions: int = 64
    patch: int = 8
    tied: bool = True
    shards: int = 3
    mtp: bool = True


def published(name: str, shards: int | None = None, mtp: bool = True) -> Shape:
    """A published size (``0.8b``, ``4b``, ``9b``, ``27b``: 1.7, 9, 19, 55.6 GB of bfloat16); ``shards``: files, about 4 GB each if not given.

    Raises:
        UserError: ``name`` is none of them.
    """
    if name not in _PUBLISHED:
        raise UserError(f"shape {name!r} is not one of {', '.join(_PUBLISHED)}")
    layers, hidden, ffn, heads, kv, values, tied, depth, v_hidden, v_ffn, v_heads, files = _PUBLISHED[name]
    return Shape(
        hidden=hidden, ffn=ffn, layers=layers, heads=heads, kv_heads=kv, head_dim=256, gdn_key_heads=16, gdn_value_heads=values,
        gdn_key_dim=128, gdn_value_dim=128, vocab=248320, vision_depth=depth, vision_hidden=v_hidden, vision_ffn=v_ffn,
        vision_heads=v_heads, vision_positions=2304, patch=16, tied=tied, shards=shards or files, mtp=mtp,
    )  # fmt: skip


def make_tiny(
    target: str,
    seed: int = 0,
    overwrite: bool = False,
    shape: Shape | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a checkpoint directory that ``transformers`` loads offline; returns counts and bytes.

    Raises:
        UserError: ``target`` exists and ``overwrite`` is false, or a size does not fit another.
    """
    shape, final = shape or Shape(), Path(target)
    _check(shape)
    check_target(final, overwrite)
    staging = staging_of(final, "tiny")
    open_staging(final, "tiny", plan="")
    try:
        config = _config(shape)
        config.save_pretrained(staging)
        _write_processor(staging, shape)
        count, total = _write_weights(staging, config, shape, seed, progress)
        publish(staging, final, overwrite)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return {"tensors": count, "bytes": total, "shards": shape.shards, "target": str(final)}


def _check(shape: Shape) -> None:
    for name, size, by in (
        ("heads", shape.heads, shape.kv_heads),
        ("gdn_value_heads", shape.gdn_value_heads, shape.gdn_key_heads),
        ("vision_hidden", shape.vision_hidden, shape.vision_heads),
    ):
        if size % by:
            raise UserError(f"{name}={size} is not a multiple of {by}")
    if math.isqrt(shape.vision_positions) ** 2 != shape.vision_positions:
        raise UserError(f"vision_positions={shape.vision_positions} is not a square")
    if shape.vocab < 256 + len(SPECIAL_TOKENS):
        raise UserError(
            f"vocab={shape.vocab}: expected at least {256 + len(SPECIAL_TOKENS)} (bytes and special tokens)"
        )


def _token_ids() -> dict[str, int]:
    return {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}


def _config(shape: Shape) -> Any:
    from transformers import Qwen3_5Config

    rotary = shape.head_dim // 8  # pairs that rotate: a quarter of the head, as published
    ids = _token_ids()
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "linear_num_key_heads": shape.gdn_key_heads,
        "linear_num_value_heads": shape.gdn_value_heads,
        "linear_key_head_dim": shape.gdn_key_dim,
        "linear_value_head_dim": shape.gdn_value_dim,
        "vocab_size": shape.vocab,
        "full_attention_interval": 4,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": int(shape.mtp),
        "mtp_use_dedicated_embeddings": False,
        "tie_word_embeddings": shape.tied,
        "eos_token_id": ids["<|endoftext|>"],
        "dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [(rotary + 2) // 3, (rotary + 1) // 3, rotary // 3],
        },
    }
    vision = {
        "depth": shape.vision_depth,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_ffn,
        "num_heads": shape.vision_heads,
        "out_hidden_size": shape.hidden,
        "num_position_embeddings": shape.vision_positions,
        "patch_size": shape.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
    }
    config = Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=shape.tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        dtype="bfloat16",
    )
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    return config


def _write_processor(directory: Path, shape: Shape) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GenerationConfig, Qwen2VLImageProcessor, Qwen3_5Tokenizer, Qwen3VLProcessor
    from transformers import Qwen3VLVideoProcessor as VideoProcessor

    ids = _token_ids()
    tokenizer = Qwen3_5Tokenizer(
        vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))},
        merges=[],
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS} == ids
    cell = (2 * shape.patch) ** 2  # pixels of one image token
    sizes: dict[str, Any] = {"patch_size": shape.patch, "temporal_patch_size": 2, "merge_size": 2}
    limits: Any = {"shortest_edge": 4 * cell, "longest_edge": 4 * shape.vision_positions * cell}
    statistics: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, **sizes, **statistics),
        tokenizer=tokenizer,
        video_processor=VideoProcessor(size=limits, **sizes, **statistics),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
    end = ids["<|endoftext|>"]
    GenerationConfig(eos_token_id=[ids["<|im_end|>"], end], pad_token_id=end).save_pretrained(directory)


def _shapes(config: Any, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor; the MTP layer is shaped as a full-attention layer, plus its projection and norms."""
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    with torch.device("meta"):
        state = Qwen3_5ForConditionalGeneration(config).state_dict()
    for name, tensor in state.items():
        if not (shape.tied and name == "lm_head.weight"):
            yield name, tuple(tensor.shape)
    if not shape.mtp:
        return
    hidden, attention, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "layers.0.input_layernorm"):
        yield f"mtp.{norm}.weight", (hidden,)
    yield "mtp.layers.0.post_attention_layernorm.weight", (hidden,)
    yield "mtp.layers.0.self_attn.q_proj.weight", (2 * attention, hidden)
    yield "mtp.layers.0.self_attn.k_proj.weight", (kv, hidden)
    yield "mtp.layers.0.self_attn.v_proj.weight", (kv, hidden)
    yield "mtp.layers.0.self_attn.o_proj.weight", (hidden, attention)
    yield "mtp.layers.0.self_attn.q_norm.weight", (shape.head_dim,)
    yield "mtp.layers.0.self_attn.k_norm.weight", (shape.head_dim,)
    yield "mtp.layers.0.mlp.gate_proj.weight", (shape.ffn, hidden)
    yield "mtp.layers.0.mlp.up_proj.weight", (shape.ffn, hidden)
    yield "mtp.layers.0.mlp.down_proj.weight", (hidden, shape.ffn)


def _is_f32(name: str) -> bool:
    return name.endswith((".A_log", ".linear_attn.norm.weight"))


def _value(name: str, size: tuple[int, ...], generator: Any) -> Any:
    import torch

    if name.endswith(".A_log"):
        return torch.empty(size).uniform_(0.5, 8, generator=generator).log()
    scale = 0.5 if "embed" in name else 1 / math.sqrt(math.prod(size[1:]))
    if math.prod(size) > _MANY:  # 10^8 values a second can be drawn: minutes for a large model
        block = torch.empty(_BLOCK).normal_(generator=generator).mul_(scale).bfloat16()
        repeated = torch.empty(math.prod(size), dtype=torch.bfloat16)
        for part in repeated.split(_BLOCK):
            part.copy_(block[: len(part)])
        return repeated.view(size)
    value = torch.empty(size, dtype=torch.float32).normal_(generator=generator)
    if len(size) > 1:
        return value.mul_(scale)
    centred_at_one = name.endswith(".linear_attn.norm.weight") or (".visual." in name and "norm" in name)
    return value.mul_(0.2).add_(1.0 if centred_at_one and name.endswith("weight") else 0.0)


def _write_weights(
    directory: Path, config: Any, shape: Shape, seed: int, progress: Callable[[str, int, int], None] | None
) -> tuple[int, int]:
    """Cut the tensors, in order, into shards of about equal bytes; returns (tensors, bytes)."""
    import torch
    from safetensors.torch import save_file

    tensors = list(_shapes(config, shape))
    sizes = [math.prod(size) * (4 if _is_f32(name) else 2) for name, size in tensors]
    total, starts, done = sum(sizes), {}, 0
    for (name, _), size in zip(tensors, sizes, strict=True):
        starts[name], done = done, done + size
    generator, weight_map = torch.Generator().manual_seed(seed), {}
    for shard in range(shape.shards):
        file = f"model.safetensors-{shard + 1:05d}-of-{shape.shards:05d}.safetensors"
        held = [(n, s) for n, s in tensors if starts[n] * shape.shards // total == shard]
        values = {
            name: _value(name, size, generator).to(torch.float32 if _is_f32(name) else torch.bfloat16)
            for name, size in held
        }
        save_file(values, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
        if progress:
            progress("write", sum(sizes[: len(weight_map)]), total)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return len(tensors), total
