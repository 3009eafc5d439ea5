"""Hugging Face checkpoints made of hostile bytes, without torch: every bit pattern may occur, NaN payloads and denormals too."""

import json
import math
import random
from pathlib import Path

from mimo_jobs.families import family_of
from mimo_jobs.weights.dtypes import itemsize
from mimo_jobs.weights.safetensors_io import INDEX_NAME, SINGLE_NAME, make_header


def config_of(
    *, layers=5, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, key_heads=2, value_heads=4, vocab=321, tied=False,
    depth=2, v_hidden=48, v_ffn=80, v_heads=4,
) -> dict:  # fmt: skip
    text = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads, "linear_key_head_dim": 8, "linear_value_head_dim": 12, "vocab_size": vocab,
        "linear_conv_kernel_dim": 4, "mtp_num_hidden_layers": 1, "dtype": "bfloat16",
    }  # fmt: skip
    vision = {
        "depth": depth, "hidden_size": v_hidden, "intermediate_size": v_ffn, "num_heads": v_heads, "out_hidden_size": hidden,
        "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16,
    }  # fmt: skip
    return {
        "model_type": "qwen3_5",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


def entries_of(config: dict, mtp: bool = True) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor; A_log and the GDN norm in F32 as published."""
    rules = family_of(config).weight_map(config).rules
    found = []
    for tensor in (t for rule in rules for t in rule.hf):
        wide = tensor.name.endswith(("A_log", "linear_attn.norm.weight"))
        found.append((tensor.name, "F32" if wide else "BF16", tensor.shape))
    if mtp:
        hidden = config["text_config"]["hidden_size"]
        found += [
            ("mtp.fc.weight", "BF16", (hidden, 2 * hidden)),
            ("mtp.norm.weight", "BF16", (hidden,)),
            ("mtp.step", "I64", ()),
        ]
    return found


def make_hf(
    directory: Path,
    config: dict | None = None,
    *,
    shards: int = 3,
    seed: int = 0,
    mtp: bool = True,
    single=False,
    entries=None,
) -> Path:
    """Write config, tokenizer stand-in, ``shards`` files and their index."""
    config, rng = config or config_of(), random.Random(seed)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}\n")
    entries = entries or entries_of(config, mtp)
    rng.shuffle(entries)
    weight_map = {}
    for i in range(1 if single else shards):
        name = SINGLE_NAME if single else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = entries if single else entries[i::shards]
        header = make_header(part, {"format": "pt", "shard": str(i)})
        data = rng.randbytes(sum(math.prod(s) * itemsize(d) for _, d, s in part))
        (directory / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
        weight_map |= {n: name for n, _, _ in part}
    if not single:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index))
    return directory
