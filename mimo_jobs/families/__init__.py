"""The registry of model families: Hugging Face ``model_type`` -> `spec.Family`."""

from collections.abc import Mapping
from pathlib import Path

from mimo_jobs.errors import UserError, did_you_mean
from mimo_jobs.families import qwen35_vl
from mimo_jobs.families.spec import Family

FAMILIES: dict[str, Family] = {f.model_type: f for f in (qwen35_vl.FAMILY,)}


def family_of(config: Mapping, where: Path | str = "config.json") -> Family:
    """The family of an HF config; raises `UserError` naming the supported model types."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    hint = did_you_mean(str(model_type), FAMILIES)
    raise UserError(f"{where}: model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}{hint}")
