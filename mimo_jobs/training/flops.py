"""Model FLOPs of a training step, from config.json, for the utilisation (MFU). Standard library only.

What is counted is what the model needs, not what an implementation does: matrix products, a multiplication and an addition as two
(PaLM, arXiv 2204.02311, appendix B); recomputed activations, padding, norms, softmax and rotations are not. Two kinds are kept apart:

* of **weights** (projections, MLPs, the depthwise convolution, the head): forward 2 per weight and token. The backward pass costs as
  much again for the gradient of the activations, and once more for that of the weights, where they are trained.
* of **mixing** (attention scores and values, the delta rule's state), which has no weights: the backward pass always costs twice the
  forward pass, because both factors want a gradient.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mimo_jobs.families.qwen35_vl import dims, layer_types

Training = Literal["trained", "lora", "passed", "frozen"]
# (of the weights, of the mixing) in forward passes: forward 1, gradient of activations 1, gradient of weights 1.
PASSES: Mapping[str, tuple[int, int]] = {"trained": (3, 3), "lora": (2, 3), "passed": (2, 3), "frozen": (1, 1)}

# Dense bf16 TFLOP/s by what torch.cuda.get_device_name says (nvidia.com and amd.com data sheets; without sparsity). First match wins.
PEAK_TFLOPS = (
    (r"GB200|GB300", 2500.0), (r"B200|B300", 2250.0),
    (r"H20\b", 148.0), (r"(H100|H200|H800).*NVL", 835.5), (r"(H100|H800).*PCIe", 756.0), (r"H100|H200|H800|GH200", 989.4),
    (r"A100|A800", 312.0), (r"A30\b", 165.0), (r"A40\b", 149.7), (r"A10\b", 125.0),
    (r"L40S", 362.05), (r"L40\b", 181.05), (r"L4\b", 121.0), (r"RTX 6000 Ada", 364.2), (r"MI300X|MI325X", 1307.4),
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Forward FLOPs of some input, of the weights and of the mixing. Add them, and give `passes` how they are trained."""

    weights: float = 0.0
    mixing: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.weights + other.weights, self.mixing + other.mixing)

    @property
    def forward(self) -> float:
        """FLOPs of one forward pass."""
        return self.weights + self.mixing

    def passes(self, training: Training) -> float:
        """FLOPs of a step: forward, and backward as far as it goes.

        Args:
            training: ``trained``; ``lora``: adapters alone, whose own few FLOPs are left out; ``passed``: frozen, but gradients flow
                through to something that is trained before it; ``frozen``: forward only.
        """
        weights, mixing = PASSES[training]
        return weights * self.weights + mixing * self.mixing


@dataclass(frozen=True)
class ModelFlops:
    """What a token and a patch cost; made by `of_config`. All numbers are forward FLOPs.

    Attributes:
        token: of the decoder's weights per token; head: of the output layer per token that has a loss.
        attention: of scores and values per layer sum, for each pair of a query and a key it sees.
        state: of the delta rule's state, per token.
        patch: of the vision tower's weights per patch, its share of the merger included.
        patch_attention: for each pair of patches of a frame.
    """

    token: float
    head: float
    attention: float
    state: float
    patch: float
    patch_attention: float

    def language(self, sequences: Iterable[int], losses: int | None = None) -> Work:
        """The decoder on sequences of so many tokens, packed ones given one by one, and its head on ``losses`` of them (None: all).

        Attention is causal: a sequence of n tokens has n (n + 1) / 2 pairs. Image tokens are tokens.
        """
        tokens = pairs = 0
        for n in sequences:
            tokens += n
            pairs += n * (n + 1) // 2
        return Work(
            self.token * tokens + self.head * (tokens if losses is None else losses),
            self.attention * pairs + self.state * tokens,
        )

    def images(self, frames: Iterable[int]) -> Work:
        """The vision tower on frames of so many patches (before merging); patches attend inside their frame, both ways."""
        patches = pairs = 0
        for n in frames:
            patches += n
            pairs += n * n
        return Work(self.patch * patches, self.patch_attention * pairs)


def of_config(config: Mapping[str, Any]) -> ModelFlops:
    """What the model of a Hugging Face config.json costs (dense Qwen3.5-VL).

    * full attention: 4 * heads * head_dim a pair and layer: scores and values, 2 each (PaLM, appendix B, has 12 * L * H * Q * T a
      token for forward and backward over all T keys; a causal mask leaves half).
    * Gated DeltaNet: 8 * value heads * key_dim * value_dim a token and layer: k k^T, v k^T, S (I - b k k^T) and S q, 2 each, as
      Megatron-LM counts it (training.py, num_floating_point_operations). The chunk rule in chunks of 64 does 6 % more at 128 x 128.
    * vision: 4 * hidden a pair and layer; the merger runs once for merge^2 patches.

    Raises:
        UserError: a field is missing or out of range.
    """
    d = dims(config)
    full = layer_types(config["text_config"]).count("full_attention")
    linear = d["layers"] - full
    mlp = 3 * d["hidden"] * d["ffn"]
    attention = d["hidden"] * (d["q_and_gate"] + 2 * d["kv"] + d["q"])
    delta = d["hidden"] * (d["gdn_qkv"] + 2 * d["gdn_value"] + 2 * d["gdn_value_heads"]) + d["gdn_conv"] * d["gdn_qkv"]
    block = d["v_hidden"] * (4 * d["v_hidden"] + 2 * d["v_ffn"])
    merger = d["v_merged"] * (d["v_merged"] + d["v_out"]) / d["v_merge"] ** 2
    return ModelFlops(
        token=2.0 * (d["layers"] * mlp + full * attention + linear * delta),
        head=2.0 * d["hidden"] * d["vocab"],
        attention=4.0 * full * d["q"],
        state=8.0 * linear * d["gdn_value_heads"] * d["gdn_key_dim"] * d["gdn_value_dim"],
        patch=2.0 * (d["v_depth"] * block + d["v_patch"] * d["v_hidden"] + merger),
        patch_attention=4.0 * d["v_depth"] * d["v_hidden"],
    )


def peak_tflops(card: str) -> float | None:
    """Dense bf16 TFLOP/s of a card by its name; None when it is not known."""
    return next((rate for name, rate in PEAK_TFLOPS if re.search(name, card, re.IGNORECASE)), None)


def utilisation(flops: float, seconds: float, gpus: int, tflops: float | None) -> float | None:
    """MFU, 0 to 1: model FLOPs of a step over what ``gpus`` allocated cards could have done; None without a rate."""
    if not tflops or seconds <= 0 or gpus < 1:
        return None
    return flops / (seconds * gpus * tflops * 1e12)
