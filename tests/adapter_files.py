"""PEFT adapter directories without torch and peft."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mimo_jobs.checkpoint.peft_dir import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, layout_of
from mimo_jobs.families import family_of
from mimo_jobs.weights.adapters import targeted
from mimo_jobs.weights.safetensors_io import make_header


def make_adapter(
    directory: Path,
    config: dict,
    targets: str,
    *,
    rank: int = 4,
    seed: int = 0,
    base: str | None = None,
    **settings: Any,
) -> dict[str, np.ndarray]:
    """Write an adapter of random values; returns ``MODULE.lora_A``, ``MODULE.lora_B`` ... -> fp32 values."""
    weight_map = family_of(config).weight_map(config)
    modules, rng = targeted(weight_map, targets), np.random.default_rng(seed)
    entries = layout_of(modules, weight_map, rank, bool(settings.get("use_dora")))
    values = {n: (rng.standard_normal(shape) * 0.1).astype(np.float32) for n, _, shape in entries}
    written = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 6,
        "bias": "none",
        "target_modules": list(modules),
    } | settings
    write(directory, written, entries, b"".join(v.tobytes() for v in values.values()))
    if base is not None:
        (directory / MANIFEST_NAME).write_text(json.dumps({"format": 1, "base": base}))
    return {n.removeprefix("base_model.model.").removesuffix(".weight"): v for n, v in values.items()}


def write(directory: Path, config: dict, entries: list, data: bytes) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    header = make_header(entries, {"format": "pt"})
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    (directory / WEIGHTS_NAME).write_bytes(len(header).to_bytes(8, "little") + header + data)
