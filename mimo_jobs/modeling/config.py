"""Hugging Face ``config.json`` to megatron-core ``TransformerConfig``, one function a component.

Sources: ``transformers/models/qwen3_5/{configuration,modeling}_qwen3_5.py`` for what the numbers mean, and
``megatron/core/transformer/transformer_config.py`` for what megatron-core calls them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import CONFIG_MAPPING, PreTrainedConfig

from mimo_jobs.errors import UserError, did_you_mean
from mimo_jobs.layout import Component, check_divides, stage_layers

_ACTIVATIONS = {
    "text_config": {"silu": F.silu},
    "vision_config": {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")},
}


def parse_hf_config(hf_config: Mapping[str, Any]) -> PreTrainedConfig:
    """A config.json as the typed object of transformers, which fills in every default that the file leaves out.

    Raises:
        UserError: ``model_type`` is unknown to the installed transformers, or names no vision-language model.
    """
    model_type = hf_config.get("model_type", "")
    if model_type not in CONFIG_MAPPING:
        known = did_you_mean(model_type, CONFIG_MAPPING.keys())
        raise UserError(f"config.json: model_type={model_type!r} is unknown to the installed transformers{known}")
    parsed = CONFIG_MAPPING[model_type].from_dict(dict(hf_config))
    if not hasattr(parsed, "text_config") or not hasattr(parsed, "vision_config"):
        raise UserError(f"config.json: model_type={model_type!r} has no text_config and vision_config")
    return parsed


def language_config(
    hf: PreTrainedConfig,
    component: Component,
    *,
    pp_rank: int,
    dtype: torch.dtype,
    sequence_parallel: bool,
    **more: Any,
) -> TransformerConfig:
    """The decoder: hybrid of Gated DeltaNet and gated attention layers, RMSNorm with a (1 + w) weight.

    Args:
        hf: the whole model's config.
        component: sizes of the language component.
        pp_rank: this rank's pipeline stage; an images-only rank passes 0.
        dtype: of parameters, activations and pipeline messages.
        sequence_parallel: split activations between layers along the sequence over tp.
        more: further ``TransformerConfig`` fields, e.g. recomputation.

    Raises:
        UserError: tp does not divide a head count, or the config asks for what this model does not implement.
    """
    text = hf.text_config
    _check_language(text, component)
    gated_delta_net = [int(kind == "linear_attention") for kind in text.layer_types]
    fields = _common(component.tp, dtype) | dict(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=text.attention_bias,
        gated_linear_unit=True,
        activation_func=_activation("text_config", text.hidden_act),
        qk_layernorm=True,
        attention_output_gate=True,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=gated_delta_net,
        linear_conv_kernel_dim=text.linear_conv_kernel_dim,
        linear_key_head_dim=text.linear_key_head_dim,
        linear_value_head_dim=text.linear_value_head_dim,
        linear_num_key_heads=text.linear_num_key_heads,
        linear_num_value_heads=text.linear_num_value_heads,
        mrope_section=list(text.rope_parameters.get("mrope_section", (11, 11, 10))),
        sequence_parallel=sequence_parallel and component.tp > 1,
        pipeline_model_parallel_size=component.pp,
        pipeline_model_parallel_layout=_pipeline_stages(text.num_hidden_layers, component.pp, pp_rank),
        expert_model_parallel_size=component.ep,
        expert_tensor_parallel_size=component.etp,
    )
    return TransformerConfig(**(fields | more))


def vision_config(hf: PreTrainedConfig, component: Component, *, dtype: torch.dtype, **more: Any) -> TransformerConfig:
    """The vision tower's blocks: LayerNorm, biases everywhere, attention inside one frame only.

    Args and errors: as `language_config`.
    """
    vision = hf.vision_config
    check_divides("images", "tp", component.tp, "vision_config.num_heads", vision.num_heads)
    check_divides("images", "tp", component.tp, "vision_config.intermediate_size", vision.intermediate_size)
    fields = _common(component.tp, dtype) | dict(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        kv_channels=vision.hidden_size // vision.num_heads,
        normalization="LayerNorm",
        layernorm_epsilon=1e-6,  # Qwen3_5VisionBlock writes the number out
        add_bias_linear=True,
        add_qkv_bias=True,
        gated_linear_unit=False,
        activation_func=_activation("vision_config", vision.hidden_act),
        hetereogenous_dist_checkpoint=True,  # one checkpoint key a layer, as the hybrid decoder has
    )
    return TransformerConfig(**(fields | more))


def _common(tp: int, dtype: torch.dtype) -> dict[str, Any]:
    """What both components share: no dropout, no fused kernels (they need apex or transformer-engine)."""
    return dict(
        tensor_model_parallel_size=tp,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every weight comes from a checkpoint
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        variable_seq_lengths=True,
        batch_p2p_comm=True,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths even on a dense model
        calculate_per_token_loss=True,
    )


class _Stages(PipelineParallelLayerLayout):
    """A layer layout that knows its own rank.

    The parent asks ``parallel_state`` for the rank when a caller leaves it out (all callers do), and we have none.
    """

    def __init__(self, stages: list[list[LayerType]], pp_rank: int) -> None:
        super().__init__(stages, len(stages))
        self.pp_rank = pp_rank

    def get_num_layers_to_build(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None) -> int:
        return super().get_num_layers_to_build(layer_type, vp_stage, self.pp_rank if pp_rank is None else pp_rank)

    def get_layer_offset(self, layer_type=LayerType.decoder, vp_stage=None, pp_rank=None) -> int:
        return super().get_layer_offset(layer_type, vp_stage, self.pp_rank if pp_rank is None else pp_rank)


def _pipeline_stages(num_layers: int, pp: int, pp_rank: int) -> _Stages | None:
    """`mimo_jobs.layout.stage_layers` in megatron-core's terms; also covers what its first/last-stage fields cannot."""
    if pp == 1:
        return None
    stages = [[LayerType.decoder] * len(layers) for layers in stage_layers(num_layers, pp)]
    stages[0].insert(0, LayerType.embedding)
    stages[-1].append(LayerType.loss)
    return _Stages(stages, pp_rank)


def _activation(section: str, name: str) -> Any:
    known = _ACTIVATIONS[section]
    if name not in known:
        raise UserError(f"config.json: {section}.hidden_act={name!r} is not one of {', '.join(known)}")
    return known[name]


def _check_language(text: PreTrainedConfig, component: Component) -> None:
    tp, groups = component.tp, text.num_key_value_heads
    for name in ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads", "intermediate_size"):
        check_divides("language", "tp", tp, f"text_config.{name}", getattr(text, name))
    if tp < groups:
        check_divides("language", "tp", tp, "text_config.num_key_value_heads", groups)
    elif tp % groups:
        raise UserError(
            f"layout.language.tp={tp} is no multiple of text_config.num_key_value_heads={groups}; "
            f"set layout.language.tp to a divisor or a multiple of {groups}"
        )
    if component.cp > 1:
        raise UserError(f"layout.language.cp={component.cp}: context parallelism is not implemented; set it to 1")
    if component.pp > text.num_hidden_layers:
        raise UserError(f"layout.language.pp={component.pp} exceeds num_hidden_layers={text.num_hidden_layers}")
    if (kind := text.rope_parameters.get("rope_type", "default")) != "default":
        raise UserError(f"config.json: text_config.rope_parameters.rope_type={kind!r} is not implemented")
