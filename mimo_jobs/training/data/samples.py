"""What a sample is on its way from a row of a data set to the tokens of a model."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


class BadSample(Exception):
    """A sample that cannot be trained on: the data's fault, not a defect. ``str()`` is the reason, in words for the user."""


@dataclass(frozen=True)
class ImageRef:
    """An image that was not read yet: its encoded bytes, or the path of its file."""

    data: bytes | None = field(default=None, repr=False)
    path: str | None = None

    @property
    def name(self) -> str:
        return self.path or f"image of {len(self.data or b'')} bytes"


@dataclass(frozen=True)
class Conversation:
    """A conversation in the chat format of transformers.

    Args:
        messages: ``{"role", "content"}``, content a string or parts ``{"type": "text", "text"}`` and ``{"type": "image"}``;
            of an assistant always a string; optionally ``reasoning_content`` and ``tool_calls``
        images: as many as there are image parts, in their order
    """

    messages: list[Message]
    images: list[ImageRef] = field(default_factory=list)
