"""How a row becomes a conversation: one function a schema. A row that does not fit is a BadSample."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from mimo_jobs.training.data.images import image_ref
from mimo_jobs.training.data.samples import BadSample, Conversation, ImageRef, Message

Row = dict[str, Any]

PLACEHOLDER = "<image>"
CORD_INSTRUCTION = "Extract the content of this receipt as JSON."
CAPTION_INSTRUCTION = "Describe this image."

_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")  # of a part that holds its image
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT_ROLES |= {"chatgpt": "assistant", "model": "assistant", "observation": "tool", "tool": "tool"}
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def messages(row: Row, base: str) -> Conversation:
    """OpenAI's and Hugging Face's chat format: content is a string or parts; images are inline or in ``images``.

    In strings ``<image>`` stands for an image when the row has an images column.
    """
    waiting, found, done = _images(row, base), [], []
    column = bool(waiting) or _has(row, "images") or _has(row, "image")
    given = _take(row, "messages", list)
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise BadSample(f"{where} is a {type(message).__name__}, expected an object with role and content")
        role = message.get("role")
        if role not in _ROLES:
            raise BadSample(f"{where}.role is {role!r}, expected one of {', '.join(_ROLES)}")
        content, inline = _content(message.get("content"), f"{where}.content", base, column)
        for image in inline:
            found.append(_placed(image, waiting, len(found)))
        kept = {key: message[key] for key in ("name", "tool_calls", "tool_call_id") if message.get(key)}
        thoughts = next((m for k in ("reasoning_content", "reasoning", "thinking") if (m := message.get(k))), None)
        if role == "assistant" and isinstance(thoughts, str):
            kept["reasoning_content"] = thoughts
        done.append({"role": role, "content": content} | kept)
    if column and len(waiting) != len(found) and not _inline(given):
        raise BadSample(f"{len(found)} image placeholders for {len(waiting)} images")
    return _checked(done, found)


def llava(row: Row, base: str) -> Conversation:
    """LLaVA: ``conversations`` of from (human, gpt) and value; every ``<image>`` stands for an image of ``image``."""
    return _from_value(row, base, _LLAVA_ROLES)


def sharegpt(row: Row, base: str) -> Conversation:
    """ShareGPT: as LLaVA with more roles, ``system`` beside the conversation, and ``images``."""
    conversation = _from_value(row, base, _SHAREGPT_ROLES)
    if isinstance(system := row.get("system"), str) and system and conversation.messages[0]["role"] != "system":
        first = {"role": "system", "content": system}
        return Conversation([first, *conversation.messages], conversation.images)
    return conversation


def cord_v2(row: Row, base: str) -> Conversation:
    """CORD v2 receipts: the answer is the compact JSON of ``gt_parse`` in ``ground_truth``."""
    truth = _take(row, "ground_truth", (str, dict))
    try:
        parsed = json.loads(truth) if isinstance(truth, str) else truth
    except ValueError as error:
        raise BadSample(f"ground_truth is not JSON: {error}") from error
    answer = parsed.get("gt_parse", parsed.get("gt_parses")) if isinstance(parsed, dict) else None
    if not answer:
        raise BadSample("ground_truth has no gt_parse")
    return _ask(row, base, CORD_INSTRUCTION, json.dumps(answer, ensure_ascii=False, separators=(",", ":")))


def caption(row: Row, base: str) -> Conversation:
    """An image and its ``caption`` (or ``text``)."""
    key = "caption" if _has(row, "caption") else "text"
    text = _take(row, key, (str, list))
    if isinstance(text, list):  # several captions of one image: the first, so that a sample is the same every epoch
        text = text[0] if text and isinstance(text[0], str) else ""
    if not text.strip():
        raise BadSample(f"{key} is empty")
    return _ask(row, base, CAPTION_INSTRUCTION, text)


SCHEMAS: dict[str, Callable[[Row, str], Conversation]] = {
    "messages": messages,
    "llava": llava,
    "sharegpt": sharegpt,
    "cord-v2": cord_v2,
    "caption": caption,
}
NEEDS = {
    "messages": "messages",
    "llava": "conversations (from, value) and image",
    "sharegpt": "conversations (from, value)",
    "cord-v2": "image and ground_truth",
    "caption": "image and caption or text",
}


def schema_of(columns: Iterable[str]) -> str | None:
    """The schema whose columns these are, or None."""
    names = set(columns)
    picture = bool(names & {"image", "images", "file_name"})
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "llava" if "image" in names else "sharegpt"
    if "ground_truth" in names and picture:
        return "cord-v2"
    return "caption" if picture and names & {"caption", "text"} else None


def fits(schema: str, columns: Iterable[str]) -> bool:
    """Whether a data set with these columns can hold rows of the schema."""
    names = set(columns)
    if schema in ("llava", "sharegpt"):
        return "conversations" in names
    if schema == "messages":
        return "messages" in names
    return schema == schema_of(names - {"messages", "conversations"})


def _has(row: Row, key: str) -> bool:
    return row.get(key) is not None


def _take(row: Row, key: str, kind: type | tuple[type, ...]) -> Any:
    value = row.get(key)
    if value is None:
        raise BadSample(f"{key} is missing or null")
    if kind is list and isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        # a list of objects, as older versions of the datasets library store it
        value = [dict(zip(value, fields, strict=False)) for fields in zip(*value.values(), strict=False)]
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise BadSample(f"{key} is a {type(value).__name__}, expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def _images(row: Row, base: str) -> list[ImageRef]:
    value = next((row[key] for key in ("images", "image", "file_name") if _has(row, key)), None)
    if value is None:
        return []
    return [image_ref(one, base) for one in (value if isinstance(value, list) else [value])]


def _parts(text: str) -> str | list[Message]:
    """Text with ``<image>`` as parts. Newlines around a placeholder belong to it: the template has its own."""
    if PLACEHOLDER not in text:
        return text
    parts: list[Message] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        if number:
            parts.append({"type": "image"})
        if piece := piece.strip("\n"):
            parts.append({"type": "text", "text": piece})
    return parts


def _content(content: Any, where: str, base: str, placeholders: bool) -> tuple[str | list[Message], list[Any]]:
    """(content, of each image part: an ImageRef, an index of the images column, or None for the next one of it)."""
    if content is None or isinstance(content, str):
        parts = _parts(content or "") if placeholders else content or ""
        return parts, [None] * _count(parts)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadSample(f"{where} is a {type(content).__name__}, expected a string or a list of parts")
    parts, images = [], []
    for number, part in enumerate(content):
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            value = next((v for key in _IMAGE_KEYS if (v := part.get(key)) is not None), None)
            index = part.get("index")
            images.append(image_ref(value, base) if value is not None else index if isinstance(index, int) else None)
            parts.append({"type": "image"})
        else:
            raise BadSample(f"{where}[{number}] is a part of type {kind!r}, expected text (with a text) or image")
    return parts, images


def _count(content: str | list[Message]) -> int:
    return 0 if isinstance(content, str) else sum(part["type"] == "image" for part in content)


def _placed(image: Any, waiting: list[ImageRef], place: int) -> ImageRef:
    if isinstance(image, ImageRef):
        return image
    index = place if image is None else image
    if not 0 <= index < len(waiting):
        raise BadSample(f"image placeholder {index + 1}, but there are {len(waiting)} images")
    return waiting[index]


def _inline(given: list[Any]) -> bool:
    """Whether messages hold images themselves; an images column beside them then repeats them."""
    contents = [m.get("content") for m in given if isinstance(m, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get(key) is not None for part in parts for key in _IMAGE_KEYS)


def _from_value(row: Row, base: str, roles: dict[str, str]) -> Conversation:
    images, done = _images(row, base), []
    for number, turn in enumerate(_take(row, "conversations", list)):
        where = f"conversations[{number}]"
        if not isinstance(turn, dict):
            raise BadSample(f"{where} is a {type(turn).__name__}, expected an object with from and value")
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in roles:
            raise BadSample(f"{where}.from is {speaker!r}, expected one of {', '.join(roles)}")
        if not isinstance(value, str):
            raise BadSample(f"{where}.value is a {type(value).__name__}, expected a string")
        done.append({"role": roles[speaker], "content": _parts(value)})
    count = sum(_count(message["content"]) for message in done)
    if count != len(images):
        raise BadSample(f"{count} {PLACEHOLDER} placeholders for {len(images)} images")
    return _checked(done, images)


def _ask(row: Row, base: str, instruction: str, answer: str) -> Conversation:
    images = _images(row, base)
    if not images:
        raise BadSample("image is missing or null")
    question = [*({"type": "image"} for _ in images), {"type": "text", "text": instruction}]
    return _checked([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], images)


def _checked(done: list[Message], images: list[ImageRef]) -> Conversation:
    """Assistant contents as strings; there is one, and none is empty."""
    for number, message in enumerate(done):
        if message["role"] != "assistant":
            continue
        content = message["content"]
        if _count(content):
            raise BadSample(f"message {number + 1}, of the assistant, has an image: only text can be learned")
        if not isinstance(content, str):
            message["content"] = "".join(part["text"] for part in content)
        if not message["content"].strip() and not message.get("tool_calls"):
            raise BadSample(f"message {number + 1}, of the assistant, is empty")
    if not any(message["role"] == "assistant" for message in done):
        raise BadSample(f"no message of the assistant among {len(done)}")
    return Conversation(done, images)
