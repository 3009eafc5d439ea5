"""Normalisation layers in the shape megatron-core builds them: ``(config, hidden_size, eps)``.

megatron-core's own ``WrappedTorchNorm`` refuses zero-centred weights and sequence parallelism.
Weights keep the value that Hugging Face stores: subtracting one from a bf16 number and adding it back is not exact.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mimo_jobs.modeling.kernels import gated_rms_norm, rms_norm


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where megatron-core puts the parameters of a module with this config."""
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


class RMSNorm(nn.Module):
    """``x / rms(x) * (1 + weight)`` in fp32, returned in x's dtype (``Qwen3_5RMSNorm``)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        # finalize_model_grads sums this gradient over tp, where each rank saw a part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


class GatedDeltaOutNorm(nn.Module):
    """``weight * (x / rms(x)) * silu(gate)`` (``Qwen3_5RMSNormGated``); the weight is not zero-centred.

    The weight is replicated over tp but multiplies tp-local heads, so each rank computes a part of its gradient.
    megatron-core sums such gradients for q_layernorm and k_layernorm by name only; here the sum is part of the graph
    (``tp_group`` is set by `GatedDeltaNet`). Without it the gradient is off by 0.66-0.92 relative at tp=2, in silence.
    """

    tp_group: torch.distributed.ProcessGroup | None = None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        weight = self.weight
        if self.tp_group is not None and self.tp_group.size() > 1:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return gated_rms_norm(x, gate, weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` built from a config (vision tower); computes in the widest dtype of its parameters."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=parameter_device(config))

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, self.bias.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)
