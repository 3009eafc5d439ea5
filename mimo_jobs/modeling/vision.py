"""The Qwen3.5 vision tower on megatron-core layers: patch embedding, transformer blocks, merger.

Reference: ``Qwen3_5VisionModel`` in transformers. The position helpers are transformers' own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from mimo_jobs.modeling.attention import Packed, RotatedSelfAttention, ScaledDotProductAttention
from mimo_jobs.modeling.linear import ColumnParallelLinear, RowParallelLinear
from mimo_jobs.modeling.norms import LayerNorm, parameter_device
from mimo_jobs.modeling.rope import VisionRope
from mimo_jobs.modeling.tensors import moved

_BIAS_DROPOUT_ADD: Any = get_bias_dropout_add  # megatron-core annotates specs only


@dataclass(frozen=True)
class Padding:
    """Equal-size communication for images of different sizes.

    Attributes:
        rows: int64 (tokens,), the row of the output that each token goes to; the others are zero.
        length: rows of the output, the same on every rank of the component.
    """

    rows: Tensor
    length: int


@dataclass(frozen=True)
class Patches:
    """What the sizes of the images say of their patches; made where the sizes are, on the host.

    Attributes:
        positions: int64 (patches, 2), row and column.
        taps: int64 (patches, 4), entries of the learned square table of positions to be mixed; weights: fp32 of the same shape.
        frames: patches attend within their own frame of their own image.
    """

    positions: Tensor
    taps: Tensor
    weights: Tensor
    frames: Packed

    @classmethod
    def of(cls, grid_thw: Tensor, vision: PreTrainedConfig) -> "Patches":
        """From int64 (images, 3): frames, patch rows and patch columns of each image."""
        grid_thw = grid_thw.cpu()
        merge = vision.spatial_merge_size
        taps, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=int(vision.num_position_embeddings**0.5),
            mode="bilinear",
            align_corners=True,
            spatial_merge_size=merge,
        )
        frames = Packed.of([rows * columns for count, rows, columns in grid_thw.tolist() for _ in range(count)])
        return cls(get_vision_position_ids(grid_thw, merge), taps, weights, frames)

    def to(self, device: torch.device) -> "Patches":
        """On a device."""
        return moved(self, lambda t: t.to(device))


class VisionTower(MegatronModule):
    """Patches to image tokens of the decoder's width."""

    def __init__(self, config: TransformerConfig, vision: PreTrainedConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config)
        self.vision = vision
        self.pg_collection, self.tp_group = pg_collection, pg_collection.tp
        placed: dict[str, Any] = dict(dtype=config.params_dtype, device=parameter_device(config))
        # HF's Conv3d has stride == kernel: a linear map of the flattened patch.
        patch_features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.patch_embed = nn.Linear(patch_features, vision.hidden_size, **placed)
        self.pos_embed = nn.Embedding(vision.num_position_embeddings, vision.hidden_size, **placed)
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[_layer_spec()] * vision.depth, layer_norm=None),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.merger = PatchMerger(config, vision, pg_collection.tp)
        assert config.kv_channels is not None
        rope_base = (vision.rope_parameters or {}).get("rope_theta", 10000.0)
        self.rope = VisionRope(config.kv_channels, rope_base, parameter_device(config))

    def forward(
        self,
        pixel_values: Tensor | None,
        grid_thw: Tensor | None = None,
        padding: Padding | None = None,
        patches: Patches | None = None,
    ) -> Tensor:
        """Encode images of any sizes in one packed sequence.

        Args:
            pixel_values: (patches, channels * temporal patch * patch * patch), as HF's image processor makes them;
                None where this rank has no image, only padding.
            grid_thw: int64 (images, 3): frames, patch rows, patch columns of each image; not needed with patches.
            padding: spread the tokens over a longer output.

        Returns:
            (patches / spatial_merge_size**2, out_hidden_size) in the parameters' dtype, image after image; or
            (padding.length, out_hidden_size).
        """
        if pixel_values is None:
            assert padding is not None
            return self._blank(padding.length).requires_grad_(torch.is_grad_enabled())
        if patches is None:
            assert grid_thw is not None
            patches = Patches.of(grid_thw, self.vision).to(pixel_values.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained):
            tokens = self._encode(pixel_values, patches)
            if padding is not None:
                tokens = self._blank(padding.length).index_copy(0, padding.rows, tokens)
        # The pipeline sends a gradient back also to a frozen tower, where it ends.
        return tokens if tokens.requires_grad else tokens.requires_grad_(torch.is_grad_enabled())

    @property
    def trained(self) -> bool:
        """Whether any parameter of the tower trains."""
        return any(p.requires_grad for p in self.parameters())

    def _blank(self, length: int) -> Tensor:
        weight = self.patch_embed.weight
        return torch.zeros(length, self.vision.out_hidden_size, dtype=weight.dtype, device=weight.device)

    def _encode(self, pixel_values: Tensor, patches: Patches) -> Tensor:
        hidden = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden = hidden + (self.pos_embed(patches.taps) * patches.weights[:, :, None]).sum(1).to(hidden.dtype)
        turns = self.rope(patches.positions)
        hidden = self.decoder(
            hidden[:, None], attention_mask=None, rotary_pos_emb=turns, packed_seq_params=patches.frames
        )
        return self.merger(hidden[:, 0])


class PatchMerger(MegatronModule):
    """Merge each square of patches into one token of the decoder's width."""

    def __init__(self, config: TransformerConfig, vision: PreTrainedConfig, tp_group: torch.distributed.ProcessGroup):
        super().__init__(config=config)
        self.tp_group = tp_group
        self.merged_size = vision.hidden_size * vision.spatial_merge_size**2
        shared: dict[str, Any] = dict(
            config=config, init_method=config.init_method, bias=True, skip_bias_add=False, tp_group=tp_group
        )
        self.norm = LayerNorm(config, vision.hidden_size, config.layernorm_epsilon)
        self.linear_fc1 = ColumnParallelLinear(self.merged_size, self.merged_size, gather_output=False, **shared)
        self.linear_fc2 = RowParallelLinear(self.merged_size, vision.out_hidden_size, input_is_parallel=True, **shared)

    def forward(self, hidden: Tensor) -> Tensor:
        """(patches, hidden) to (patches / spatial_merge_size**2, out_hidden_size)."""
        merged, _ = self.linear_fc1(self.norm(hidden).view(-1, self.merged_size))
        return self.linear_fc2(F.gelu(merged))[0]


class BiasedMLP(MLP):
    """``MLP`` that adds its last bias itself.

    megatron-core's (0.19.2) hands it on beside its output; recomputing it then makes the parameter an output of the recomputed part,
    which asks for itself without end.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(patches, 1, hidden) to the same shape, and no bias."""
        out, bias = super().forward(*args, **kwargs)
        return out if bias is None else out + bias, None


def vision_spec(hf: PreTrainedConfig, config: TransformerConfig, groups: ProcessGroupCollection | None) -> ModuleSpec:
    """The spec of the tower; ``groups`` is None on a rank outside the component, where it is never built."""
    return ModuleSpec(module=VisionTower, params=dict(config=config, vision=hf.vision_config, pg_collection=groups))


def _layer_spec() -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=ScaledDotProductAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=ModuleSpec(
                module=RotatedSelfAttention, params={"attn_mask_type": AttnMaskType.no_mask}, submodules=attention
            ),
            self_attn_bda=_BIAS_DROPOUT_ADD,
            pre_mlp_layernorm=LayerNorm,
            mlp=partial(BiasedMLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=_BIAS_DROPOUT_ADD,
        ),
    )
