"""The Qwen3.5 decoder as a megatron-core ``GPTModel``: embedding, hybrid layers, head."""

from functools import partial
from typing import Any, cast

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.typed_torch import apply_module
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from transformers import PreTrainedConfig

from mimo_jobs.layout import Component, padded_vocab, stage_layers
from mimo_jobs.modeling import kernels
from mimo_jobs.modeling.attention import GatedDeltaNet, GatedSelfAttention, ScaledDotProductAttention
from mimo_jobs.modeling.linear import ColumnParallelLinear, RowParallelLinear
from mimo_jobs.modeling.loss import Targets, linear_cross_entropy
from mimo_jobs.modeling.norms import GatedDeltaOutNorm, RMSNorm, parameter_device
from mimo_jobs.modeling.rope import InterleavedMRope

_BIAS_DROPOUT_ADD: Any = get_bias_dropout_add  # megatron-core annotates specs only


class LanguageModel(GPTModel):
    """``GPTModel`` with the interleaved multimodal rotary embedding of Qwen3.5.

    Takes position ids of shape (3, batch, seq); logits are (batch, seq, padded vocabulary / tp).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        rotary_base: float,
        rotary_percent: float,
        tokens: int,
        **kwargs: Any,
    ) -> None:
        """``tokens``: the vocabulary without what pads it to a multiple of tp."""
        super().__init__(config, *args, position_embedding_type="none", **kwargs)
        assert config.mrope_section is not None and config.kv_channels is not None
        self.position_embedding_type = "mrope"
        self.mrope_section = config.mrope_section
        rotary_dim = int(config.kv_channels * rotary_percent)
        self.rotary_pos_emb = InterleavedMRope(rotary_dim, rotary_base, parameter_device(config), config.params_dtype)
        self.tokens = tokens
        self.targets: Targets | None = None  # of the microbatch at hand, set by `Mimo`

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ``GPTModel.forward``; with `targets` the last stage returns the sum of their losses, an fp32 scalar, instead of logits."""
        processor = None if self.targets is None else partial(self._summed_loss, self.targets)
        return super().forward(*args, output_processor=processor, **kwargs)

    def _summed_loss(
        self, targets: Targets, *, hidden_states: Tensor, output_weight: Tensor | None, **_unused: object
    ) -> Tensor:
        """megatron-core's own path keeps the logits of all tokens, and counts the rows that pad the vocabulary as tokens."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp_group)
        weight = self.output_layer.weight if output_weight is None else output_weight
        chosen = hidden.flatten(0, 1).index_select(0, targets.places)
        return linear_cross_entropy(
            chosen, cast(Tensor, weight), targets.labels, self.tokens, cast(dist.ProcessGroup, self.tp_group)
        )

    def tie_embeddings_and_output_weights_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sharded_state_dict: ShardedStateDict,
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """Store a tied head that lives on its own stage as a replica of the embedding; in place.

        As megatron-core's, which takes the replica's data-parallel rank from ``parallel_state`` (language_module.py).
        """
        if not self.post_process or self.pre_process:
            return
        del sharded_state_dict[output_layer_weight_key]
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, metadata["dp_cp_group"].rank()),  # 0 is the embedding on the first stage
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class GatedMLP(MLP):
    """``MLP`` of one kind, down(silu(gate) * up), with the middle in one kernel."""

    def forward(self, hidden_states: Tensor, *_unused: object, **_: object) -> tuple[Tensor, Tensor | None]:
        """(seq, batch, hidden) to the same shape, and no bias."""
        both, _none = apply_module(self.linear_fc1)(hidden_states)
        gate, up = both.chunk(2, -1)
        return apply_module(self.linear_fc2)(kernels.swiglu(gate, up))


def language_spec(
    hf: PreTrainedConfig, config: TransformerConfig, component: Component, groups: ProcessGroupCollection | None
) -> ModuleSpec:
    """The spec from which ``MimoModel`` builds this rank's stage of the decoder.

    Args:
        hf: the whole model's config.
        config: from `mimo_jobs.modeling.config.language_config`.
        component: sizes of the language component.
        groups: this rank's groups; None on a rank outside the component, where the spec is never built.
    """
    text, stage = hf.text_config, groups.pp.rank() if groups else 0
    layers = stage_layers(text.num_hidden_layers, component.pp)[stage]
    params = dict(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[_layer_spec(text.layer_types[i]) for i in layers], layer_norm=RMSNorm
        ),
        vocab_size=padded_vocab(text.vocab_size, component.tp),
        tokens=text.vocab_size,
        max_sequence_length=text.max_position_embeddings,
        parallel_output=True,  # each tensor rank keeps its slice of the vocabulary
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        pre_process=stage == 0,
        post_process=stage == component.pp - 1,
        pg_collection=groups,
        rotary_base=text.rope_parameters["rope_theta"],
        rotary_percent=text.rope_parameters.get("partial_rotary_factor", 1.0),
        scatter_embedding_sequence_parallel=False,  # MimoModel scatters after the images are put in
    )
    return ModuleSpec(module=LanguageModel, params=params)


def _layer_spec(kind: str) -> ModuleSpec:
    """One decoder layer; ``kind`` is an entry of HF's ``layer_types``."""
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention={"full_attention": _gated_attention, "linear_attention": _gated_delta_net}[kind](),
            self_attn_bda=_BIAS_DROPOUT_ADD,
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(GatedMLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=_BIAS_DROPOUT_ADD,
        ),
    )


def _gated_attention() -> ModuleSpec:
    return ModuleSpec(
        module=GatedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ScaledDotProductAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )


def _gated_delta_net() -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=GatedDeltaOutNorm, out_proj=RowParallelLinear
        ),
    )
