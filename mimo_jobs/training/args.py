"""The arguments of a fine-tuning run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimo_jobs.layout import IMAGES, LANGUAGE, ResolvedLayout
from mimo_jobs.training.batches import Shares
from mimo_jobs.training.config import Dataset, Logging, Lora, Optimizer, Saving, Stop, Validation
from mimo_jobs.training.saved import steps_directory


@dataclass(frozen=True)
class TrainArgs:
    """See `jobs.sft` and `jobs.lora`; ``lora`` is None for the former."""

    source: Path
    data: str
    target: Path
    layout: ResolvedLayout
    steps: int | None
    epochs: float
    global_batch_size: int
    micro_batch_size: int
    seed: int
    precision: str
    freeze: str
    sequence_parallel: bool
    recompute: str
    optimizer: Optimizer
    dataset: Dataset
    validation: Validation
    saving: Saving
    logging: Logging
    stop: Stop
    lora: Lora | None
    overwrite: bool
    identity: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints to go on from are."""
        return steps_directory(self.target, self.saving.directory)

    @property
    def shares(self) -> Shares:
        """Who works on which rows."""
        language, images = (self.layout.components[n].dp for n in (LANGUAGE, IMAGES))
        return Shares(
            language, images, self.micro_batch_size, self.global_batch_size // (self.micro_batch_size * language)
        )
