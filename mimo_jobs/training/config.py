"""The settings of a training run, grouped as they are typed: ``optimizer.lr=1e-5 dataset.max_length=8192``. No torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

Dir = Annotated[str, "directory"]
DataRef = Annotated[str, "file, directory or hub id"]

Schedule = Literal["cosine", "linear", "wsd", "constant"]
StateDtype = Literal["fp32", "bf16"]
Schema = Literal["auto", "messages", "llava", "sharegpt", "cord-v2", "caption"]


@dataclass(frozen=True)
class Dataset:
    """How samples are read.

    Args:
        schema: how a row becomes a conversation; auto looks at the columns
        split: split of a hub data set or of a directory
        subset: configuration of a hub data set
        images: directory that relative image paths start from; without it the data file's own
        max_length: tokens of a sample, image tokens included; a longer one is bad
        max_pixels: of an image; larger ones are scaled down. Without it the processor's own bound
        min_pixels: of an image; smaller ones are scaled up. Without it the processor's own bound
        on_bad: a sample that cannot be used: count, name and skip it, or stop the run
        shuffle: a new order every epoch, from the seed
        packing: put samples together to sequences of max_length tokens
        workers: processes of a rank that decode images and tokenise
        prefetch: batches that are made ahead
    """

    schema: Schema = "auto"
    split: str = "train"
    subset: str | None = None
    images: Dir | None = None
    max_length: int = 4096
    max_pixels: int | None = None
    min_pixels: int | None = None
    on_bad: Literal["skip", "stop"] = "skip"
    shuffle: bool = True
    packing: bool = False
    workers: int = 2
    prefetch: int = 4


@dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate.

    Args:
        lr: highest learning rate
        min_lr: learning rate at the end
        images_lr: highest learning rate of the images component; without it lr
        schedule: how the learning rate falls after the warm-up
        warmup_steps: steps over which the learning rate rises from zero
        decay_steps: with wsd, the last steps, over which it falls
        weight_decay: decoupled weight decay; not of biases and norms
        beta1: decay of the mean of gradients
        beta2: decay of the mean of squared gradients
        eps: added to the root of the second moment
        clip_grad: largest norm of the gradient of all components together; 0 leaves it
        state: gradients and moments of weights of 16 bits, which keep fp32 copies: fp32 (18 bytes a weight in all) or bf16 (12)
    """

    lr: float = 1e-5
    min_lr: float = 0.0
    images_lr: float | None = None
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    state: StateDtype = "fp32"


@dataclass(frozen=True)
class Saving:
    """Checkpoints to go on from.

    Args:
        directory: where they go; without it beside target, as TARGET.steps
        every: steps between two
        keep: how many of the newest stay
        background: write them while training goes on
    """

    directory: Dir | None = None
    every: int = 500
    keep: int = 2
    background: bool = True


@dataclass(frozen=True)
class Validation:
    """Loss on samples that are not trained on.

    Args:
        data: as the data of the training; without it there is no validation
        split: split of a hub data set or of a directory
        every: steps between two
        samples: how many of the first samples; 0 takes all
    """

    data: DataRef | None = None
    split: str = "validation"
    every: int = 100
    samples: int = 256


@dataclass(frozen=True)
class Logging:
    """What is said while it runs.

    Args:
        every: steps between two lines of metrics.jsonl
        tensorboard: write TensorBoard events
        wandb: Weights & Biases project
        mlflow: MLflow tracking URI; user and password are for MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
        name: name of the run at Weights & Biases and MLflow
        peak_tflops: dense matrix rate of one GPU in the precision used, for the utilisation; without it from the card's name
    """

    every: int = 1
    tensorboard: bool = True
    wandb: str | None = None
    mlflow: str | None = None
    name: str | None = None
    peak_tflops: float | None = None


@dataclass(frozen=True)
class Stop:
    """When a run that goes wrong ends by itself; a loss that is not finite always ends it.

    Args:
        max_loss: end when the loss of a step is above this
        spike: end when the loss of a step is this many times the median of the last 32
    """

    max_loss: float | None = None
    spike: float | None = None


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters, in the terms of PEFT's ``LoraConfig``.

    Args:
        rank: rank of an update
        alpha: the update is scaled by alpha / rank
        dropout: of the adapter's input
        targets: Hugging Face names of the projections, comma-separated: endings (q_proj,down_proj), language for all of the
            decoder, images for all of the vision tower
        rslora: scale by alpha / sqrt(rank)
        dora: weight-decomposed: a trained magnitude for every output
        adapter: PEFT directory to go on from; its rank, alpha and targets take the place of those here
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "language"
    rslora: bool = False
    dora: bool = False
    adapter: Dir | None = None
