"""Images are upright and eight bits deep, their sizes known without decoding, and damage is a bad sample."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mimo_jobs.training.data.images import image_ref, image_size, read_image
from mimo_jobs.training.data.samples import BadSample, ImageRef
from tests.unit.training.data.conftest import encoded, noise


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_sizes_and_pixels_are_upright_as_exif_says(kind, orientation):
    data = encoded(noise(20, 12), kind, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    read = read_image(ImageRef(data))
    assert image_size(ImageRef(data)) == (expected.height, expected.width) == (read.height, read.width)
    assert np.array_equal(np.asarray(read), np.asarray(expected))
    if orientation in (5, 6, 7, 8):
        assert read.size == (12, 20)


def test_exif_behind_the_pixels_of_a_png_counts():
    data = encoded(noise(20, 12))
    payload = b"eXIf" + exif(6).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(payload) - 4) + payload + struct.pack(">I", zlib.crc32(payload))
    data = data[:-12] + chunk + data[-12:]
    assert image_size(ImageRef(data)) == (20, 12)
    assert read_image(ImageRef(data)).size == (12, 20)


def test_sizes_need_no_pixels(monkeypatch):
    refs = [ImageRef(encoded(noise(20, 12), kind, exif=exif(6))) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert [image_size(ref) for ref in refs] == [(20, 12)] * 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_of_eight_bits_is_read(mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    image = noise(20, 12)
    if mode == "LAB":
        from PIL import ImageCms

        transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        image = ImageCms.applyTransform(image, transform)
        assert image is not None
    try:
        read = read_image(ImageRef(encoded(image if mode == "LAB" else image.convert(mode), kind)))
    except BadSample as error:  # what PIL itself does not convert
        assert mode == "LAB" and "conversion" in str(error)
    else:
        assert read.size == (20, 12)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    read = np.asarray(read_image(ImageRef(encoded(Image.fromarray(deep)))))
    assert read.dtype == np.uint8 and np.array_equal(read, (deep >> 8).astype(np.uint8))


def test_an_animation_is_its_first_frame():
    frames = [noise(20, 12, "P", seed=i) for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    read = read_image(ImageRef(data))
    assert np.array_equal(np.asarray(read.convert("RGB")), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def _png_of_no_width() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize(
    "data",
    [
        encoded(noise(64, 64))[:-200],
        encoded(noise(64, 64), "JPEG")[:-400],
        encoded(noise(64, 64))[:20],
        b"not an image",
        b"\xff\xfe\x00non-utf8",
        _png_of_no_width(),
        encoded(noise(64, 64))[:60] + bytes(400),
    ],
)
def test_damaged_images_are_bad_samples(data):
    with pytest.raises(BadSample, match=r"cannot be read as an image|pixels"):
        read_image(ImageRef(data))


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_a_bad_sample_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for name, reason in (
        ("none.png", f"no image {tmp_path}/none.png"),
        ("pipe", f"{tmp_path}/pipe: not a regular file"),
        ("link", f"{tmp_path}/link: not a regular file"),
        ("/dev/zero", "/dev/zero: not a regular file"),
        ("directory", f"{tmp_path}/directory"),
    ):
        for read in (image_size, read_image):
            with pytest.raises(BadSample, match=reason):
                read(image_ref(name, str(tmp_path)))


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="bomb"):
        image_size(ImageRef(encoded(noise(64, 64))))
