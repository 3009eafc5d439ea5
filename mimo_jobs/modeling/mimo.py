"""``MimoModel`` whose image tokens go to places that the batch names, so that images of any sizes work in every layout.

megatron-core's own placement counts image tokens on the device (a synchronisation a microbatch) and expects each rank's
tokens without padding, which its fan-in communication cannot carry when images differ in size.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.models.mimo import MimoModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from mimo_jobs.layout import IMAGES
from mimo_jobs.modeling.attention import Packed
from mimo_jobs.modeling.loss import Targets


@dataclass(frozen=True)
class ImagePlaces:
    """Where the image tokens of a microbatch stand in the decoder's input.

    Attributes:
        rows: int64 (tokens,), rows of what arrives from the images component; the others are padding.
        positions: int64 (tokens,), places in the flattened (seq, batch) input: ``seq_index * batch + batch_index``.
    """

    rows: Tensor
    positions: Tensor


class Mimo(MimoModel):
    """``MimoModel`` that takes `ImagePlaces` and `Targets`; without the former it places image tokens as megatron-core does."""

    _places: ImagePlaces | None = None

    def forward(
        self, *args: Any, image_places: ImagePlaces | None = None, targets: Targets | None = None, **kwargs: Any
    ) -> Any:
        """As ``MimoModel.forward``, with ``image_places`` for the decoder's first stage and ``targets`` for its last."""
        language: Any = None if self.language_model is None else unwrap_model(self.language_model)  # pyright: ignore[reportArgumentType]
        self._places = image_places
        if language is not None:
            language.targets = targets
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._places = None
            if language is not None:
                language.targets = None

    def get_text_embeddings(self, input_ids: Tensor, position_ids: Tensor, special_token_ids: dict[str, int]) -> Tensor:
        """Embeddings of every token, image tokens included: (seq, batch, hidden)."""
        if self._places is None:
            return super().get_text_embeddings(input_ids, position_ids, special_token_ids)
        language: Any = unwrap_model(self.language_model)  # pyright: ignore[reportArgumentType]
        return language.embedding(input_ids=input_ids, position_ids=None)

    def align_embeddings_by_token_positions(
        self, modality_embeddings: dict[str, Tensor], input_ids: Tensor, special_token_ids: dict[str, int]
    ) -> Tensor:
        """Put the image tokens in their places: (seq, batch, hidden)."""
        if self._places is None:
            return super().align_embeddings_by_token_positions(modality_embeddings, input_ids, special_token_ids)
        text, images = modality_embeddings["text"], modality_embeddings.get(IMAGES)
        if images is None:
            return text
        tokens = images.index_select(0, self._places.rows).to(text.dtype)
        return text.flatten(0, 1).index_copy(0, self._places.positions, tokens).view_as(text)

    def _build_packed_seq_params(self, packing_kwargs: dict[str, Packed] | None) -> Packed | None:
        return None if packing_kwargs is None else packing_kwargs["packed"]

    def zero_grad_buffer(self) -> None:
        """Zero the gradients of the components that train; frozen ones have no buffer."""
        for module in self._active_ddp_modules():
            module.zero_grad_buffer()
