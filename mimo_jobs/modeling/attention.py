"""Attention layers of Qwen3.5: scaled dot product on PyTorch, gated attention, Gated DeltaNet.

megatron-core's stock pieces need transformer-engine, flash-linear-attention or ``parallel_state``; these do not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import megatron.core.ssm.gated_delta_net.common as mcore_gdn
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as McoreGatedDeltaNet
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor

from mimo_jobs.modeling import kernels
from mimo_jobs.modeling.rope import rotate

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass
class Packed(PackedSeqParams):
    """Sequences one behind the other in a batch of one, each attended to for itself.

    ``qkv_format`` is not ``thd``: megatron-core (0.19.2, rope_utils.py) would ask the device for every length, in every layer, to find the
    angles of each token. Here these are given token by token.

    Attributes:
        lengths: of the sequences, on the host: nobody has to ask a device for them.
        chunks: for `kernels.gated_delta_rule`.
    """

    lengths: tuple[int, ...] = ()
    chunks: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Packed":
        """From the lengths, in order."""
        bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        return cls(
            "sbhd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths), lengths=tuple(lengths),
            chunks=kernels.chunks_of(lengths),
        )  # fmt: skip

    @cached_property
    def host_bounds(self) -> Tensor:
        """int64 (samples + 1,), on the host; the same object each time, by which flash-linear-attention knows it again."""
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0))


class ScaledDotProductAttention(MegatronModule):
    """The ``core_attention`` of both components on PyTorch: causal or full, grouped queries, packed sequences."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: object,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.tp_group = pg_collection.tp  # MegatronModule.sharded_state_dict reads it

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_unused: object,
    ) -> Tensor:
        """Attend; masks other than causal are not needed (right-padded batches) and are ignored.

        Args:
            query: (seq, batch, heads, head_dim); batch 1 with packed_seq_params.
            key: the same with kv heads.
            value: the same with kv heads.

        Returns:
            (seq, batch, heads * head_dim), in query's dtype.
        """
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, Packed)
            q, k, v = (t.squeeze(1) for t in (query, key, value))
            return self._attend_packed(q, k, v, causal, packed_seq_params).flatten(-2)[:, None]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # batch, heads, seq, head_dim
        return self._attend(q, k, v, causal).permute(2, 0, 1, 3).flatten(-2)

    def _attend_packed(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, packed: Packed) -> Tensor:
        """(tokens, heads, head_dim), as few kernels as there can be: one for sequences of one length, or where PyTorch has one for any."""
        lengths = packed.lengths
        if len(set(lengths)) == 1:
            q, k, v = (t.unflatten(0, (len(lengths), -1)).transpose(1, 2) for t in (query, key, value))
            return self._attend(q, k, v, causal).transpose(1, 2).flatten(0, 1)
        bounds: Any = packed.cu_seqlens_q
        out = kernels.packed_attention(query, key, value, bounds, max(lengths), causal, self.softmax_scale)
        if out is not None:
            return out
        q, k, v = (t.transpose(0, 1)[None].split(list(lengths), 2) for t in (query, key, value))
        parts = [self._attend(*part, causal) for part in zip(q, k, v, strict=True)]
        return torch.cat(parts, 2)[0].transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped)


class RotatedSelfAttention(SelfAttention):
    """``SelfAttention`` that turns queries and keys with `rope.rotate`; ``rotary_pos_emb`` is what that takes."""

    _turns: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As the base class's."""
        self._turns = rotary_pos_emb
        try:
            return super().forward(*args, rotary_pos_emb=None, **kwargs)
        finally:
            self._turns = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's, with query and key turned."""
        query, key, *rest = self.project(*args, **kwargs)
        if self._turns is not None:
            query, key = rotate(query, self._turns), rotate(key, self._turns)
        return query, key, *rest

    def project(self, *args: Any, **kwargs: Any) -> Any:
        """Query, key, value, and gate if there is one."""
        return super().get_query_key_value_tensors(*args, **kwargs)


class GatedSelfAttention(RotatedSelfAttention):
    """``SelfAttention`` with an output gate whose tp may exceed the number of key-value groups.

    megatron-core implements that case, but takes the gate's rank from ``parallel_state`` (attention.py, 0.19.2).
    """

    def project(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = True,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project to query, key, value and gate.

        The rows of ``linear_qkv`` are, per key-value group, [queries, gates, key, value].

        Args:
            hidden_states: (seq, batch, hidden).

        Returns:
            query and gate (seq, batch, local heads, head_dim); key and value (seq, batch, local groups, head_dim);
            in the order query, key, value, gate.
        """
        assert output_gate and split_qkv and key_value_states is None
        tp, groups = self.pg_collection.tp, self.config.num_query_groups
        assert groups is not None
        head_dim, heads_per_group = self.hidden_size_per_attention_head, self.config.num_attention_heads // groups
        mixed, _ = apply_module(self.linear_qkv)(hidden_states)
        ranks_per_group = max(1, tp.size() // groups)
        if ranks_per_group > 1:  # a group's rows are spread over ranks: gather all, keep the own group
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=tp)
            mixed = mixed.chunk(groups, -1)[tp.rank() // ranks_per_group]
        rows = [heads_per_group * head_dim, heads_per_group * head_dim, head_dim, head_dim]
        query, gate, key, value = mixed.unflatten(-1, (-1, sum(rows))).split(rows, -1)
        query, gate = query.unflatten(-1, (-1, head_dim)), gate.unflatten(-1, (-1, head_dim))
        if ranks_per_group > 1:
            own = tp.rank() % ranks_per_group
            query, gate = (t.chunk(ranks_per_group, 3)[own] for t in (query, gate))
        query, gate = query.flatten(2, 3), gate.flatten(2, 3)
        q_layernorm: Any = self.q_layernorm
        k_layernorm: Any = self.k_layernorm
        return q_layernorm(query), k_layernorm(key), value, gate


class GatedDeltaNet(McoreGatedDeltaNet):
    """megatron-core's Gated DeltaNet: on `kernels` where they run (``config.deterministic_mode`` off), else on its rule in plain PyTorch.

    Exact in mixed precision, and nothing in it waits for the device, also when samples are packed.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        with _without_fla_guard():
            super().__init__(config, *args, use_qk_l2norm=False, **kwargs)
        self.gated_delta_rule: Any = _torch_gated_delta_rule
        self.out_norm.tp_group = self.tp_group

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        packed_seq_params: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence, from the left; packed samples do not see one another.

        Args:
            hidden_states: (seq / tp under sequence parallelism, batch, hidden).

        Returns:
            The same shape, and no bias.
        """
        if not self.config.deterministic_mode:
            return self._forward_fused(hidden_states, packed_seq_params)
        if packed_seq_params is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self._forward_packed(hidden_states, packed_seq_params)

    def _forward_fused(self, hidden_states: Tensor, packed: Packed | None) -> tuple[Tensor, Tensor | None]:
        in_proj: Any = self.in_proj
        out_proj: Any = self.out_proj
        sizes: Any = (self.key_head_dim, self.value_head_dim, self.qk_dim_local_tp)
        projected, _ = in_proj(hidden_states)  # seq, batch, sections
        qkv, gate, beta, alpha = projected.transpose(0, 1).split(self.feat_dim_split, -1)
        out = kernels.gated_delta_rule(
            qkv, alpha, beta, self.A_log, self.dt_bias, self.conv1d.weight.squeeze(1), sizes,
            packed.cu_seqlens_q if packed else None, packed.host_bounds if packed else None, packed.chunks if packed else None,
        )  # fmt: skip
        out = self._apply_gated_norm(out, gate.unflatten(-1, (-1, self.value_head_dim)))
        return out_proj(out.flatten(2).transpose(0, 1).contiguous())

    def _forward_packed(self, hidden_states: Tensor, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """The torch rule knows no boundaries: between the projections, samples lie beside each other, right-padded."""
        in_proj: Any = self.in_proj
        out_proj: Any = self.out_proj
        projected, _ = in_proj(hidden_states)  # seq, 1, sections
        samples = projected[:, 0].split(list(packed.lengths))
        padded = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)  # samples, longest, sections
        batch, longest, _ = padded.shape
        qkv, gate, beta, alpha = padded.split(self.feat_dim_split, -1)
        gate = gate.unflatten(-1, (-1, self.out_norm.weight.numel()))
        mixed = F.conv1d(
            qkv.transpose(1, 2), self.conv1d.weight, self.conv1d.bias, padding=self.conv1d.padding, groups=qkv.shape[-1]
        )
        qkv = self.act_fn(mixed[..., :longest]).transpose(1, 2)
        prepare: Any = self._prepare_input_for_gated_delta_rule  # annotated as taking tuples
        query, key, value, gate, beta, alpha = prepare(qkv, gate, batch, longest, beta, alpha)
        decay, beta = self._compute_g_and_beta(self.A_log, self.dt_bias, alpha, beta)
        out, _ = self.gated_delta_rule(query, key, value, g=decay, beta=beta)
        out = self._gated_norm_and_a2a(out, gate, None, batch, longest)  # longest, samples, values
        joined = torch.cat([out[:length, i] for i, length in enumerate(packed.lengths)])[:, None]
        return out_proj(joined)

    def _apply_gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        """``x`` and ``gate`` of one shape, (..., width of a value head)."""
        out_norm: Any = self.out_norm
        return out_norm(x, gate)

    def _compute_g_and_beta(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, A_log_local_cp: Tensor, dt_bias_local_cp: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log decay (fp32) and write strength.

        ``A_log`` is exponentiated in fp32 as in Hugging Face; megatron-core takes the parameter's dtype.
        """
        decay = -A_log_local_cp.float().exp() * F.softplus(alpha.float() + dt_bias_local_cp.float())
        return decay, beta.sigmoid()


def _torch_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The chunked rule after the query-key norm, which megatron-core only has in flash-linear-attention's version."""
    return mcore_gdn.torch_chunk_gated_delta_rule(_l2_normalised(q), _l2_normalised(k), v, **kwargs)


def _l2_normalised(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()  # the gradient of a row of zeros overflows fp16
    return (wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + eps)).to(x.dtype)


@contextmanager
def _without_fla_guard() -> Iterator[None]:
    """Let ``GatedDeltaNet.__init__`` pass its check for flash-linear-attention, which its torch rule does not use."""
    had_fla, mcore_gdn.HAVE_FLA = mcore_gdn.HAVE_FLA, True
    try:
        yield
    finally:
        mcore_gdn.HAVE_FLA = had_fla
