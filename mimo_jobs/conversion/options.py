"""What ``dtype=`` and ``mtp=`` mean, the same at import and at export."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UsageError
from mimo_jobs.families.spec import Family
from mimo_jobs.weights.dtypes import DTYPES, cast_to, parse_dtype
from mimo_jobs.weights.safetensors_io import Shard, make_header, new_shard

MTP_CHOICES = ("keep", "drop")


def parse_options(dtype: str | None, mtp: str) -> str | None:
    """The safetensors dtype to cast to, None without a cast. Raises `UserError` for an unknown ``dtype`` or ``mtp``."""
    if mtp not in MTP_CHOICES:
        raise UsageError(f"mtp={mtp!r}: expected one of {', '.join(MTP_CHOICES)}")
    return parse_dtype(dtype) if dtype else None


def written_config(family: Family, config: dict[str, Any], dtype: str | None, mtp: str) -> dict[str, Any]:
    """The HF config that goes with the weights after the cast and the drop."""
    config = family.drop_passed_through(config) if mtp == "drop" else copy.deepcopy(config)
    if dtype:
        for section in (config, config.get("text_config"), config.get("vision_config")):
            for name in ("dtype", "torch_dtype"):
                if isinstance(section, dict) and section.get(name):
                    section[name] = DTYPES[dtype][1]
    return config


def written_shard(shard: Shard, directory: Path, dtype: str | None, dropped: Collection[str]) -> Shard:
    """A shard after the cast and the drop: the same header, byte for byte, when neither changes it."""
    kept = [t for t in shard.tensors.values() if t.name not in dropped]
    if len(kept) == len(shard.tensors) and not any(cast_to(t.dtype, dtype) for t in kept):
        return shard
    entries = [(t.name, dtype if dtype and cast_to(t.dtype, dtype) else t.dtype, t.shape) for t in kept]
    return new_shard(directory, shard.name, make_header(entries, shard.metadata))
