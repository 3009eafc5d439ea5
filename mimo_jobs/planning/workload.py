"""What is trained, on what, and how: the inputs of a plan that are no layout. Standard library only."""

from dataclasses import dataclass
from typing import NamedTuple

from mimo_jobs.training.config import Lora


@dataclass(frozen=True)
class Workload:
    """Samples as the cost model sees them: all alike.

    Attributes:
        tokens: mean tokens of a sample, image tokens included.
        image_tokens: of them, those of its images; 0 for text alone.
        loss_tokens: of them, those with a loss (the head works on no others).
        global_batch_size: samples of an optimizer step.
        max_length: tokens of the longest sample, for which there has to be memory.
        images: mean images of a sample, which share its image tokens; patches attend inside their own.
    """

    tokens: int
    image_tokens: int
    loss_tokens: int
    global_batch_size: int
    max_length: int
    images: int = 1


@dataclass(frozen=True)
class Tuning:
    """What of the model trains.

    Attributes:
        precision: ``bf16`` or ``fp32``, of weights and activations.
        freeze: ``none``, or the component that does not train.
        lora: the adapters; None trains every parameter.
        state: ``bf16`` or ``fp32``, of gradients and moments.
    """

    precision: str = "bf16"
    freeze: str = "none"
    lora: Lora | None = None
    state: str = "fp32"


class Settings(NamedTuple):
    """How a microbatch is computed; see `jobs.sft`. ``recompute``: as it is typed."""

    micro_batch_size: int
    recompute: str
    sequence_parallel: bool
