"""Images: what a column may hold, their size without decoding, and their pixels. Upright, as EXIF says."""

import base64
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from mimo_jobs.training.data.samples import BadSample, ImageRef

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def image_ref(value: Any, base: str) -> ImageRef:
    """The image that a column or a message part holds: bytes, a path, a ``data:`` URL, ``{"bytes", "path"}`` or a PIL image.

    Args:
        base: directory that relative paths start from

    Raises:
        BadSample: it is none of these.
    """
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not len(value):
            raise BadSample("the image has no bytes")
        return ImageRef(data=bytes(value))
    if isinstance(value, str):
        return _from_text(value, base)
    if isinstance(value, dict):
        for key in ("bytes", "path", "url", "image", "image_url"):
            if value.get(key) is not None:
                found = image_ref(value[key], base)
                return ImageRef(found.data, str(value["path"])) if key == "bytes" and value.get("path") else found
        raise BadSample(f"an image without bytes and path: its fields are {sorted(map(str, value)) or 'none'}")
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, format="TIFF" if value.mode in ("CMYK", "YCbCr", "LAB", "F") else "PNG")
        return ImageRef(data=stream.getvalue())
    raise BadSample(f"an image that is a {type(value).__name__}, expected a path, bytes or {{bytes, path}}")


def _from_text(value: str, base: str) -> ImageRef:
    if value.startswith("data:"):
        try:
            return ImageRef(data=base64.b64decode(value.split(",", 1)[1], validate=True))
        except (IndexError, ValueError) as error:
            raise BadSample("a data: URL of an image that is not base64") from error
    if value.startswith(("http://", "https://", "s3://", "gs://")):
        raise BadSample(f"the image {value[:80]} is a URL: training reads no network; download it first")
    path = unquote(urlsplit(value).path) if value.startswith("file://") else value
    if not path or "\0" in path:
        raise BadSample("the path of an image is empty or has a zero byte")
    return ImageRef(path=str(Path(base, path)))


def image_size(ref: ImageRef) -> tuple[int, int]:
    """(height, width) of the upright image, from the file's header alone.

    Raises:
        BadSample: the file is missing or no image.
    """
    with _opened(ref) as image:
        height, width = image.height, image.width
        return (width, height) if _orientation(image) >= 5 else (height, width)


def read_image(ref: ImageRef) -> Image.Image:
    """The upright first frame, in a mode from which the image processor makes RGB (16-bit ones are scaled to 8).

    Raises:
        BadSample: the file is missing, no image, or damaged.
    """
    with _opened(ref) as image:
        orientation, size = _orientation(image), image.size
        image.load()
        if image.size != size:  # formats that hold several sizes; the text was counted with the one of the header
            raise BadSample(f"{ref.name}: the header says {size} pixels, the image has {image.size}")
        upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image.copy()
        if upright.mode.startswith("I"):  # PIL would clip, not scale: a white image
            pixels = np.asarray(upright).astype(np.int64)
            shift = 8 if upright.mode != "I" or pixels.max(initial=0) > 255 else 0
            return Image.fromarray((pixels >> shift).clip(0, 255).astype(np.uint8))
        return upright if upright.mode in _PLAIN_MODES else upright.convert("RGB")


@contextmanager
def _opened(ref: ImageRef) -> Iterator[Image.Image]:
    """Any exception of PIL's readers is a BadSample: damaged files make them raise all kinds."""
    try:
        with _stream(ref) as stream, Image.open(stream) as image:
            if min(image.size) < 1:
                raise BadSample(f"{ref.name}: an image of {image.width} x {image.height} pixels")
            yield image
    except BadSample:
        raise
    except FileNotFoundError:
        raise BadSample(f"no image {ref.name}") from None
    except Exception as error:
        raise BadSample(f"{ref.name} cannot be read as an image: {type(error).__name__}: {error}") from None


@contextmanager
def _stream(ref: ImageRef) -> Iterator[BinaryIO]:
    if ref.data is not None:
        yield io.BytesIO(ref.data)
        return
    with open(ref.path or "", "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadSample(f"{ref.name}: not a regular file")
        yield file


def _without_waiting(path: str, flags: int) -> int:
    """As ``open`` does, but a pipe that nobody writes to is opened at once."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _orientation(image: Image.Image) -> int:
    """1 to 8. Of a PNG it is in a chunk that may follow the pixels: PIL would decode them all to find it."""
    if image.format == "TIFF":
        return 1  # PIL's TIFF reader turns the image itself, its size too
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info) and not _has_late_exif(image):
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _has_late_exif(image: Any) -> bool:
    stream, start = image.fp, image.fp.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            if head[4:] == b"eXIf":
                return True
            stream.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
        return False
    finally:
        stream.seek(start)
