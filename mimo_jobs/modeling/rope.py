"""Rotary position embeddings: interleaved multimodal for the decoder, two-axis for the vision tower.

Cosines and sines are taken once for all layers; megatron-core (0.19.2, rope_utils.py) takes them anew for each query and key.
"""

import torch
from torch import Tensor, nn


def inverse_frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    """``base ** (-2i / dim)``: fp32, shape (dim / 2,)."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def turns_of(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """What `rotate` takes.

    Args:
        angles: fp32 (..., dim / 2).
        dtype: to round cosines and sines to.

    Returns:
        (2, ..., dim): the cosines, and the sines with the sign of what they are multiplied with, for both halves of a head.
    """
    cosines, sines = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cosines, cosines), -1), torch.cat((-sines, sines), -1))).to(dtype)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` on the first ``dim`` of a head (``apply_rotary_pos_emb`` of Hugging Face), in x's dtype.

    Args:
        x: (seq, batch, heads, head_dim).
        turns: (2, seq, batch, 1, dim), from `turns_of`.
    """
    cosines, sines = turns.unbind()
    width = turns.shape[-1]
    own, rest = x[..., :width], x[..., width:]
    other = torch.cat((own[..., width // 2 :], own[..., : width // 2]), -1)
    turned = torch.addcmul(own * cosines, other, sines).to(x.dtype)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


class InterleavedMRope(nn.Module):
    """Angles of ``Qwen3_5TextRotaryEmbedding``: frequency i turns with the t, h or w position as i mod 3 is 0, 1 or 2.

    megatron-core's ``MultimodalRotaryEmbedding`` gives t, h and w contiguous blocks of frequencies instead.
    """

    def __init__(self, dim: int, base: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.inv_freq = inverse_frequencies(dim, base, device)  # not a buffer: never cast, never saved

    def forward(
        self, position_ids: Tensor, mrope_section: list[int], cp_group: object = None, **_unused: object
    ) -> Tensor:
        """The turn of each position.

        Args:
            position_ids: (3, batch, seq) positions along t, h and w, or (batch, seq) for text.
            mrope_section: how many frequencies turn with t, h and w.
            cp_group: for megatron-core's signature; this model has no context parallelism.

        Returns:
            (2, seq, batch, 1, dim) in the model's dtype, as `rotate` takes them.
        """
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, -1, -1)
        by_axis = position_ids[..., None].float() * self.inv_freq  # 3, batch, seq, dim / 2
        angles = by_axis[0].clone()
        for axis in (1, 2):
            taken = slice(axis, mrope_section[axis] * 3, 3)
            angles[..., taken] = by_axis[axis, ..., taken]
        return turns_of(angles.transpose(0, 1).unsqueeze(2), self.dtype)


class VisionRope(nn.Module):
    """Angles of ``Qwen3_5VisionRotaryEmbedding``: half of the frequencies turn with the row, half with the column."""

    def __init__(self, head_dim: int, base: float, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(head_dim // 2, base, device)

    def forward(self, positions: Tensor) -> Tensor:
        """(patches, 2) rows and columns to fp32 turns (2, patches, 1, 1, head_dim), as `rotate` takes them."""
        angles = (positions[..., None].float() * self.inv_freq).flatten(1)  # patches, head_dim / 2
        return turns_of(angles[:, None, None, :], torch.float32)  # as ``apply_rotary_pos_emb_vision`` has them
