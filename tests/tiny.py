"""A tiny random Qwen3.5-VL of Hugging Face in which every weight matters."""

import inspect
from typing import Any

import torch
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5 import modeling_qwen3_5

# The reference computes in plain PyTorch, on any device and in fp64, also where flash-linear-attention is installed.
modeling_qwen3_5.torch_chunk_gated_delta_rule = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)


def tiny_config(
    *,
    tied: bool = False,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    key_heads: int = 2,
    values_per_key: int = 2,
    vocab_size: int = 320,
) -> dict[str, Any]:
    """The config.json of a model with all layer kinds (every fourth layer is full attention), as a dict.

    Sizes are chosen so that no two axes of a tensor agree by accident. The last 10 ids are special tokens.
    """
    special = vocab_size - 10
    rope = dict(
        rope_type="default",
        rope_theta=10000.0,
        partial_rotary_factor=0.5,
        mrope_section=[3, 3, 2],
        mrope_interleaved=True,
    )
    config = Qwen3_5Config(
        architectures=["Qwen3_5ForConditionalGeneration"],
        text_config=dict(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=32,
            linear_num_key_heads=key_heads,
            linear_num_value_heads=key_heads * values_per_key,
            linear_key_head_dim=16,
            linear_value_head_dim=24,
            linear_conv_kernel_dim=4,
            max_position_embeddings=512,
            rope_parameters=rope,
            tie_word_embeddings=tied,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=48,
            intermediate_size=80,
            num_heads=4,
            in_channels=3,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=64,
            num_position_embeddings=16,
        ),
        image_token_id=special,
        video_token_id=special + 1,
        vision_start_token_id=special + 2,
        vision_end_token_id=special + 3,
        tie_word_embeddings=tied,
    )
    return config.to_dict()


def tiny_model(config: dict[str, Any], seed: int = 0) -> Qwen3_5ForConditionalGeneration:
    """The fp32 model in eval mode; no parameter is at a value (0, 1) under which an error would not show.

    Logits are of scale 4. (With a tied head five times as large transformers itself is 1e-4 off its own fp64.)
    """
    torch.manual_seed(seed)
    model = Qwen3_5ForConditionalGeneration._from_config(Qwen3_5Config.from_dict(config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "A_log" in name:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 8).log())
            elif parameter.ndim >= 2:
                scale = 0.5 if "embed" in name and not (config["tie_word_embeddings"] and "tokens" in name) else 0.1
                parameter.copy_(torch.randn_like(parameter) * scale)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
