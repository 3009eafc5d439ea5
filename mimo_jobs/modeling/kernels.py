"""Fused kernels: flash-linear-attention's where they can run, the same in plain PyTorch elsewhere.

They can run on a GPU in 16 bits. fp32 stays on PyTorch also there: Gated DeltaNet's kernels compute in TF32 (1.5e-3 relative off the
reference, measured on H100), and fp32 is what results are compared in.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn as _varlen_attn
except ImportError:
    _varlen_attn = None
try:
    from fla import __version__ as _fla_version  # pyright: ignore[reportMissingImports]
    from fla.modules.activations import swiglu as _fla_swiglu  # pyright: ignore[reportMissingImports]
    from fla.modules.convolution import causal_conv1d  # pyright: ignore[reportMissingImports]
    from fla.modules.fused_cross_entropy.ops import cross_entropy_bwd, cross_entropy_fwd  # pyright: ignore[reportMissingImports]
    from fla.modules.fused_norm_gate import rms_norm_gated as _fla_rms_norm_gated  # pyright: ignore[reportMissingImports]
    from fla.modules.layernorm import rms_norm as _fla_rms_norm  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]
except ImportError:  # an extra, `gpu`
    _fla_swiglu = _fla_rms_norm_gated = _fla_rms_norm = causal_conv1d = chunk_gated_delta_rule = None
    cross_entropy_bwd = cross_entropy_fwd = None
    _fla_version = ""

CHUNK = 64  # tokens; of the convolution and the delta rule in versions that `_KNOWS_CHUNKS`
_KNOWS_CHUNKS = _fla_version.startswith("0.6.")
DEVICES = frozenset({"cuda"})
_NO_LABEL = -(1 << 40)  # further than any label is from a rank's rows
_VARLEN: Callable[..., Any] | None = _varlen_attn
_VARLEN_TAKES = frozenset(inspect.signature(_varlen_attn).parameters) if _varlen_attn is not None else frozenset[str]()


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether fused kernels take tensors of a dtype on a kind of device."""
    return chunk_gated_delta_rule is not None and device in DEVICES and dtype in (torch.bfloat16, torch.float16)


def take(x: Tensor) -> bool:
    """Whether fused kernels take this tensor."""
    return available(x.device.type, x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis, computed in fp32, in x's dtype; ``weight`` is fp32."""
    if take(x):
        return _call(_fla_rms_norm, x, weight, None, eps=eps)
    return (_rms_normalised(x, eps) * weight).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / rms(x)) * silu(gate)`` over the last axis, in x's dtype (``Qwen3_5RMSNormGated``)."""
    if take(x):
        return _call(_fla_rms_norm_gated, x, gate, weight, None, activation="silu", eps=eps)
    normalised = weight * _rms_normalised(x, eps).to(x.dtype)
    return (normalised * F.silu(gate.float())).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return _call(_fla_swiglu, gate, up) if take(gate) else F.silu(gate) * up


def gated_delta_rule(
    qkv: Tensor, alpha: Tensor, beta: Tensor, decay: Tensor, bias: Tensor, weight: Tensor, sizes: tuple[int, int, int],
    bounds: Tensor | None, host_bounds: Tensor | None, chunks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The mixing of Gated DeltaNet between its projections, where `available`.

    Args:
        qkv: (batch, seq, 2 * keys + values), before the convolution.
        alpha: (batch, seq, value heads); ``beta``: the same; both as projected.
        decay: (value heads,), ``A_log``; ``bias``: (value heads,), ``dt_bias``.
        weight: (2 * keys + values, kernel), of the convolution.
        sizes: width of a key head, width of a value head, and all keys of this rank.
        bounds: int (samples + 1,), where packed samples begin and end, with batch 1; ``host_bounds``: the same on the host.
        chunks: `chunks_of` them, in the bounds' dtype and on their device; made by flash-linear-attention itself they would have the
            host wait for the device. Versions that may go through samples in others make their own.

    Returns:
        (batch, seq, value heads, width of a value head), in qkv's dtype.
    """
    key_head, value_head, keys = sizes
    chunks = chunks if _KNOWS_CHUNKS else None
    mixed, _ = _call(
        causal_conv1d,
        x=qkv, weight=weight, activation="silu", cu_seqlens=bounds, cu_seqlens_cpu=host_bounds, chunk_indices=chunks,
    )  # fmt: skip
    query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], -1)
    out, _ = _call(
        chunk_gated_delta_rule,
        query.unflatten(-1, (-1, key_head)), key.unflatten(-1, (-1, key_head)), value.unflatten(-1, (-1, value_head)),
        g=alpha, beta=beta, A_log=decay, dt_bias=bias, cu_seqlens=bounds, cu_seqlens_cpu=host_bounds, chunk_indices=chunks,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip
    return out


def chunks_of(lengths: Sequence[int]) -> Tensor:
    """The chunks in which flash-linear-attention goes through packed samples: int32 (chunks, 2), the sample and which of its chunks (fla 0.6, ops/utils/index.py)."""
    counts = [-(-length // CHUNK) for length in lengths]
    return torch.tensor(
        [(sample, chunk) for sample, count in enumerate(counts) for chunk in range(count)], dtype=torch.int32
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, where `available`: the logarithm of its logits' summed exponentials, and the logit of its label.

    Args:
        logits: (tokens, vocabulary), rows contiguous; computed with in fp32.
        labels: int64 (tokens,); outside of the vocabulary the label's logit is 0.

    Returns:
        Two fp32 (tokens,).
    """
    losses, _, log_sums, *_ = _call(cross_entropy_fwd, logits, labels, ignore_index=_NO_LABEL)
    return log_sums, log_sums - losses


def cross_entropy_gradient(logits: Tensor, labels: Tensor, log_sums: Tensor) -> None:
    """Put the gradient of the sum of ``log_sums`` less the labels' logits in place of ``logits``; arguments as of `cross_entropy`."""
    one = log_sums.new_ones(()).expand_as(log_sums)
    _call(cross_entropy_bwd, logits, labels, log_sums, one, ignore_index=_NO_LABEL, inplace_backward=True)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, scale: float | None
) -> Tensor | None:
    """Attention within each of several sequences in one FlashAttention kernel; None where PyTorch has none for these tensors.

    Args:
        q: (tokens, heads, width of a head); ``k``, ``v``: the same with key-value heads.
        bounds: int32 (sequences + 1,), where they begin and end, on the device.

    Returns:
        (tokens, heads, width of a head).
    """
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {"window_size": (-1, 0 if causal else -1), "scale": scale}
    if grouped:
        options["enable_gqa"] = True
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    # torch 2.10 has neither windows nor a scale, 2.11 no groups.
    if _VARLEN is None or not q.is_cuda or not fits or not options.keys() <= _VARLEN_TAKES:
        return None
    return _VARLEN(q, k, v, bounds, bounds, longest, longest, **options)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)  # these packages have no types


def _rms_normalised(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
