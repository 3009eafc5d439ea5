"""How much GPU memory a rank needs to train, from config.json and a layout. Standard library only.

What is exact is counted: weights, gradients and optimizer state. Activations are an estimate for a micro-batch of samples of
``dataset.max_length`` tokens, as many of them image tokens as there can be; real samples are shorter. Workspaces of libraries, the
CUDA context (about 1 GB) and fragments of the allocator come on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_jobs.families.qwen35_vl import dims
from mimo_jobs.layout import HEAD_BLOCK_BYTES, IMAGES, LANGUAGE, ResolvedLayout, stage_layers

GRADIENT = 4  # bytes of a trained parameter: fp32, whole on every rank (megatron-core's DistributedDataParallel)
MOMENTS = 8  # two fp32 moments, shared out over the data parallel ranks (its distributed optimizer)
NARROW = 2  # optimizer.state=bf16: bytes of a gradient, and of each moment, of a parameter of 16 bits
MASTER = 4  # an fp32 copy beside weights of 16 bits, shared out too
BACKWARD = 2  # in the backward pass of a layer its gradients lie beside what it computed


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank of a component."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def certain(self) -> int:
        """What is there whatever the data."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.certain + self.activations


def state(elements: int, trained: int, adapters: int, dp: int, itemsize: int, narrow: bool = False) -> Memory:
    """Memory of a rank before any activation.

    Args:
        elements: parameters of the model that it holds; ``trained``: of them, those that train.
        adapters: parameters of adapters, which are fp32.
        itemsize: bytes of a parameter.
        narrow: optimizer.state is bf16.
    """
    master = MASTER if itemsize < 4 else 0
    gradient, moments = (NARROW, 2 * NARROW) if narrow and master else (GRADIENT, MOMENTS)
    optimizer = trained * (moments + master) + adapters * MOMENTS
    return Memory(elements * itemsize + 4 * adapters, gradient * trained + GRADIENT * adapters, -(-optimizer // dp), 0)


def activations(
    config: Mapping[str, Any], layout: ResolvedLayout, *, micro_batch_size: int, max_length: int, itemsize: int,
    recompute: str, sequence_parallel: bool, images_train: bool = True, head_trains: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Component -> bytes of activations of a rank at the worst moment of a step.

    With full recomputation a layer keeps its input alone, and one layer at a time has everything. Without it every layer does; selective
    recomputation keeps all but what is inside the MLP. Stage s of a
    pipeline of p stages has p - s micro-batches under way, so the first one keeps most. The head is on the last stage: a block of logits
    (`modeling.loss`: in the weights' dtype, in fp32, and their gradient), and the gradient of its weight in its dtype, in fp32 too where
    it is a sum over several blocks (as many as there are with flash-linear-attention's kernels).

    Args:
        images_train: the images component has something that trains; head_trains: the head does.
    """
    d = dims(config)
    language, images = layout.components[LANGUAGE], layout.components[IMAGES]
    tokens = micro_batch_size * max_length
    inputs = tokens * d["hidden"] * itemsize // (language.tp if sequence_parallel else 1)
    mixer = max(d["q_and_gate"] + 2 * d["kv"] + 2 * d["q"], d["gdn_qkv"] * 2 + 3 * d["gdn_value"])
    mlp = tokens * itemsize * 3 * d["ffn"] // language.tp
    inside = 4 * inputs + tokens * itemsize * mixer // language.tp + mlp
    a_layer = {"none": inside, "selective": inside - mlp, "full": inputs}[recompute]
    vocab = -(-d["vocab"] // language.tp)
    head = min(tokens * vocab * (itemsize + 4 + itemsize), HEAD_BLOCK_BYTES)
    if head_trains:
        blocks = tokens * vocab * itemsize > HEAD_BLOCK_BYTES
        head += vocab * d["hidden"] * (itemsize + 4 * blocks)
    stages = []
    for stage, layers in enumerate(stage_layers(d["layers"], language.pp)):
        under_way = language.pp - stage
        kept = len(layers) * under_way * a_layer
        stages.append(kept + BACKWARD * inside + (head if stage == language.pp - 1 else 0))
    # Image tokens of the samples that one replica of the images component works on, each merge^2 patches.
    patches = tokens * language.dp // images.dp * d["v_merge"] ** 2
    v_inputs = patches * d["v_hidden"] * itemsize
    v_mlp = patches * itemsize * 2 * d["v_ffn"] // images.tp
    v_inside = 4 * v_inputs + patches * itemsize * 4 * d["v_hidden"] // images.tp + v_mlp
    if not images_train:  # nothing is kept for a backward pass
        return {LANGUAGE: max(stages), IMAGES: v_inside + patches * d["v_patch"] * itemsize}
    kept = d["v_depth"] * {"none": v_inside, "selective": v_inside - v_mlp, "full": v_inputs}[recompute]
    merged = BACKWARD * patches * (d["v_patch"] + d["v_hidden"]) * itemsize
    # On ranks of their own the images are the first stage of a pipeline, before the language's.
    under_way = 1 if layout.colocated else language.pp + 1
    return {LANGUAGE: max(stages), IMAGES: under_way * kept + BACKWARD * v_inside + merged}
