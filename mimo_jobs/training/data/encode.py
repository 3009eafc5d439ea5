"""Conversations as tokens, labels and patches: what the model's own processor makes, without pixels where sizes do."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from mimo_jobs.errors import UserError
from mimo_jobs.training.config import Dataset as Settings
from mimo_jobs.training.data.images import image_size, read_image
from mimo_jobs.training.data.samples import BadSample, Conversation, ImageRef, Message
from mimo_jobs.training.data.spans import GENERATION, Span, generation_spans, marked_spans

IGNORED = -100
_VERSION = "1"  # of the rules here: raise it when the tokens or labels of a sample change


@dataclass(frozen=True)
class Encoded:
    """The text side of a sample.

    Args:
        input_ids: int64[tokens], image tokens included
        labels: int64[tokens], shifted: the token to predict after ``input_ids[t]``, or -100
        image_grid_thw: int64[images, 3], patches of each image
    """

    input_ids: Tensor
    labels: Tensor
    image_grid_thw: Tensor

    def __reduce__(self) -> Any:
        # torch would send each small tensor from a worker as a file descriptor of its own, of which there are 1024
        return _encoded, (self.input_ids.numpy(), self.labels.numpy(), self.image_grid_thw.numpy())


def _encoded(*arrays: Any) -> Encoded:
    return Encoded(*(torch.from_numpy(array) for array in arrays))


class Encoder:
    """Makes samples of conversations with the processor of a checkpoint. Pickles as its arguments.

    Args:
        processor_directory: has the tokenizer, the chat template and the image processor's settings
        settings: max_length, min_pixels and max_pixels count

    Raises:
        UserError: the directory has no processor of the Qwen-VL kind, or a setting is out of bounds.
    """

    def __init__(self, processor_directory: str, settings: Settings) -> None:
        self.directory, self.settings = processor_directory, settings
        self.processor = _load(processor_directory)
        self.tokenizer, self.image_processor = self.processor.tokenizer, self.processor.image_processor
        self.template = _template(self.processor, processor_directory)
        self._limit_pixels()
        self.merge = int(self.image_processor.merge_size)
        self.patch = int(self.image_processor.patch_size)
        self.features = 3 * int(self.image_processor.temporal_patch_size) * self.patch**2
        self.image_token_id = int(self.processor.image_token_id)
        self._marks_itself = bool(GENERATION.search(self.template))
        self.ends = self._end_tokens()
        if settings.max_length < 2:
            raise UserError(f"dataset.max_length={settings.max_length}: expected at least 2 tokens")

    def __reduce__(self) -> Any:
        return Encoder, (self.directory, self.settings)

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokens and labels; of images only the headers are read. Loss is on what the assistant wrote and its end tokens.

        Raises:
            BadSample: too long, nothing to learn, an unusable image, or text that holds the model's own special tokens.
        """
        self._check_text(conversation.messages)
        grids = self.grids(conversation.images)
        text, spans = self._render(conversation.messages)
        found = self.tokenizer(
            text,
            return_offsets_mapping=True,
            verbose=False,  # longer than the model's maximum: max_length decides
            add_special_tokens=not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token)),
        )
        # numpy: ten times faster than torch for so few numbers
        ids = np.array(found["input_ids"], np.int64)
        images = ids == self.image_token_id
        if images.sum() != len(grids):
            raise BadSample(f"the chat template wrote {images.sum()} image tokens for {len(grids)} images")
        learned = _overlaps(found["offset_mapping"], spans) & ~images
        repeats = np.ones_like(ids)
        repeats[images] = grids.prod(1).numpy() // self.merge**2
        length = int(repeats.sum())
        if length > self.settings.max_length:
            raise BadSample(f"{length} tokens are more than dataset.max_length={self.settings.max_length}")
        ids, learned = ids.repeat(repeats), learned.repeat(repeats)
        labels = np.full_like(ids, IGNORED)
        labels[:-1] = np.where(learned[1:], ids[1:], IGNORED)
        if not (labels != IGNORED).any():
            raise BadSample("no token of the assistant to learn from")
        return Encoded(torch.from_numpy(ids), torch.from_numpy(labels), grids)

    def grids(self, images: Sequence[ImageRef]) -> Tensor:
        """int64[images, 3]: patches of each image, from its size alone.

        Raises:
            BadSample: an image is missing, damaged, or too long and thin for the model.
        """
        rows = [self._grid(ref, *image_size(ref)) for ref in images]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def pixels(self, conversation: Conversation) -> tuple[Tensor, Tensor]:
        """(float32[patches, features], int64[images, 3]) by the model's own image processor.

        Raises:
            BadSample: an image is missing or damaged.
        """
        if not conversation.images:
            return torch.empty(0, self.features), torch.empty(0, 3, dtype=torch.int64)
        expected = self.grids(conversation.images)
        decoded = [read_image(ref) for ref in conversation.images]
        done = self.image_processor(decoded, return_tensors="pt")
        grids = done["image_grid_thw"].to(torch.int64)
        # both follow from the size in the header; should they part, every later image would be shifted
        assert torch.equal(grids, expected), f"grids of pixels {grids.tolist()}, of sizes {expected.tolist()}"
        return done["pixel_values"].to(torch.float32), grids

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all that decides the tokens of a conversation."""
        import transformers

        parts = [
            _VERSION,
            transformers.__version__,
            self.tokenizer.backend_tokenizer.to_str(),
            json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            self.template,
            self.image_processor.to_json_string(),
            str(self.settings.max_length),
            *self.ends,
        ]
        return blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def _grid(self, ref: ImageRef, height: int, width: int) -> tuple[int, int, int]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        size, factor = self.image_processor.size, self.patch * self.merge
        try:
            height, width = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            raise BadSample(f"{ref.name}: {width} x {height} pixels: {error}") from None
        return 1, height // self.patch, width // self.patch

    def _limit_pixels(self) -> None:
        """The size rule is the one of Qwen2-VL's image processor and its successors: bounds on the number of pixels."""
        processor, settings = self.image_processor, self.settings
        size = {key: processor.size[key] for key in ("shortest_edge", "longest_edge")}
        for name, value, key in (
            ("min_pixels", settings.min_pixels, "shortest_edge"),
            ("max_pixels", settings.max_pixels, "longest_edge"),
        ):
            if value is not None:
                if value < 1:
                    raise UserError(f"dataset.{name}={value}: expected at least 1 pixel")
                size[key] = value
        low, high = size["shortest_edge"], size["longest_edge"]
        cell = (int(processor.patch_size) * int(processor.merge_size)) ** 2
        if low > high:
            raise UserError(
                f"dataset.min_pixels={low} is more than dataset.max_pixels={high} "
                f"({'both set' if settings.min_pixels and settings.max_pixels else 'one is the processor' + chr(39) + 's'})"
            )
        if high < cell:
            raise UserError(f"dataset.max_pixels={high}: expected at least {cell}, the pixels of one image token")
        processor.size = type(processor.size)(**size)

    def _end_tokens(self) -> tuple[str, ...]:
        """Tokens that end a turn: the tokenizer's, and those at which the model's generation ends."""
        tokens = [self.tokenizer.eos_token] if self.tokenizer.eos_token else []
        if "<|im_end|>" in self.tokenizer.get_vocab():
            tokens.append("<|im_end|>")
        file = Path(self.directory, "generation_config.json")
        ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        for one in ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []:
            tokens.append(self.tokenizer.convert_ids_to_tokens(one))
        return tuple(sorted({token for token in tokens if token}))

    def _check_text(self, messages: Sequence[Message]) -> None:
        names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
        tokens = [token for name in names if isinstance(token := getattr(self.processor, name, None), str)]
        tokens += [*self.ends, "<|im_start|>"]
        for number, message in enumerate(messages):
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
            texts.append(message.get("reasoning_content") or "")
            for token in tokens:
                if any(token in text for text in texts):
                    raise BadSample(f"the text of message {number + 1} holds the model's own token {token}")

    def _render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        if self._marks_itself:
            text, spans = self._apply(messages, mark=True)
            return text, generation_spans(text, spans, self.ends)
        return marked_spans(messages, lambda m: self._apply(m)[0], lambda: self._prompt(messages), self.ends)

    def _prompt(self, messages: Sequence[Message]) -> str:
        text, asking = self._apply(messages)[0], self._apply(messages, prompt=True)[0]
        return asking[len(text) :] if asking.startswith(text) else ""

    def _apply(self, messages: Sequence[Message], prompt: bool = False, mark: bool = False) -> tuple[str, list[Span]]:
        """The rendering that ``processor.apply_chat_template`` gives, and the spans of ``{% generation %}``."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=mark,
                **self.tokenizer.special_tokens_map,
            )
        except jinja2.TemplateError as error:
            raise BadSample(f"the chat template refuses it: {error}") from None
        except (TypeError, KeyError, AttributeError) as error:  # raised inside the template by what the row holds
            raise BadSample(f"the chat template cannot render it: {type(error).__name__}: {error}") from None
        found: Any = spans[0] if mark else []
        return texts[0], found


def _overlaps(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """bool[tokens]: whether a token has a character in one of the spans; both ascend."""
    done, place = [], 0
    for start, stop in offsets:
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        done.append(place < len(spans) and stop > start and stop > spans[place][0])
    return np.array(done, bool)


def _load(directory: str) -> Any:
    from transformers import AutoProcessor

    if not Path(directory).is_dir():
        raise UserError(f"processor directory {directory}: no such directory")
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"processor directory {directory}: cannot be loaded: {str(error)[:500]}") from error
    images, tokenizer = getattr(processor, "image_processor", None), getattr(processor, "tokenizer", None)
    needed = ("merge_size", "patch_size", "temporal_patch_size", "get_number_of_image_patches")
    if images is None or tokenizer is None or not all(hasattr(images, name) for name in needed):
        raise UserError(
            f"processor directory {directory}: a {type(processor).__name__}, expected one of the Qwen-VL kind"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"processor directory {directory}: no tokenizer.json: labels need a fast tokenizer")
    if not images.do_resize or not {"shortest_edge", "longest_edge"} <= set(dict(images.size)):
        raise UserError(
            f"processor directory {directory}: the image processor has no bounds on pixels, but {images.size}"
        )
    return processor


def _template(processor: Any, directory: str) -> str:
    found = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get("default")
    if not found:
        raise UserError(f"processor directory {directory}: no chat template; put a chat_template.jinja into it")
    return found
