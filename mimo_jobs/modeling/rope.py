"""Rotary position embeddings: interleaved multimodal for the decoder, two-axis for the vision tower."""

import torch
from torch import Tensor, nn


def inverse_frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    """``base ** (-2i / dim)``: fp32, shape (dim / 2,)."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


class InterleavedMRope(nn.Module):
    """Angles of ``Qwen3_5TextRotaryEmbedding``: frequency i turns with the t, h or w position as i mod 3 is 0, 1 or 2.

    megatron-core's ``MultimodalRotaryEmbedding`` gives t, h and w contiguous blocks of frequencies instead.
    """

    def __init__(self, dim: int, base: float, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(dim, base, device)  # not a buffer: never cast, never saved

    def forward(
        self, position_ids: Tensor, mrope_section: list[int], cp_group: object = None, **_unused: object
    ) -> Tensor:
        """Angles for each position.

        Args:
            position_ids: (3, batch, seq) positions along t, h and w, or (batch, seq) for text.
            mrope_section: how many frequencies turn with t, h and w.
            cp_group: for megatron-core's signature; this model has no context parallelism.

        Returns:
            fp32 (seq, batch, 1, dim), the two halves equal.
        """
        if position_ids.ndim == 2:
            position_ids = position_ids.expand(3, -1, -1)
        by_axis = position_ids[..., None].float() * self.inv_freq  # 3, batch, seq, dim / 2
        angles = by_axis[0].clone()
        for axis in (1, 2):
            taken = slice(axis, mrope_section[axis] * 3, 3)
            angles[..., taken] = by_axis[axis, ..., taken]
        return torch.cat((angles, angles), -1).transpose(0, 1).unsqueeze(2).contiguous()


class VisionRope(nn.Module):
    """Angles of ``Qwen3_5VisionRotaryEmbedding``: half of the frequencies turn with the row, half with the column."""

    def __init__(self, head_dim: int, base: float, device: torch.device) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(head_dim // 2, base, device)

    def forward(self, positions: Tensor) -> Tensor:
        """(patches, 2) rows and columns to fp32 angles (patches, 1, 1, head_dim)."""
        angles = (positions[..., None].float() * self.inv_freq).flatten(1)  # patches, head_dim / 2
        return torch.cat((angles, angles), -1)[:, None, None, :]
