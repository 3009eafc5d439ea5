"""Tokens without pixels are those of the model's own processor with pixels."""

import pickle
import random

import pytest
import torch

from mimo_jobs.errors import UserError
from mimo_jobs.training.config import Dataset as Settings
from mimo_jobs.training.data import BadSample, Conversation, Encoder
from mimo_jobs.training.data.images import read_image
from mimo_jobs.training.data.samples import ImageRef
from tests.unit.training.data import templates
from tests.unit.training.data.conftest import encoded, noise
from tests.unit.training.data.test_images import exif


def conversation(*images: bytes, text: str = "what is this?") -> Conversation:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]
    return Conversation(messages, [ImageRef(image) for image in images])


def check_law(encoder: Encoder, sample: Conversation) -> torch.Tensor:
    """encode == processor, pixels == processor, and both have the same grid."""
    done, (patches, grid) = encoder.encode(sample), encoder.pixels(sample)
    processor = encoder.processor
    text = processor.apply_chat_template(sample.messages, tokenize=False)
    theirs = processor(text=[text], images=[read_image(ref) for ref in sample.images] or None, return_tensors="pt")
    assert torch.equal(done.input_ids, theirs["input_ids"][0])
    assert torch.equal(done.image_grid_thw, grid)
    if sample.images:
        assert torch.equal(grid, theirs["image_grid_thw"]) and torch.equal(patches, theirs["pixel_values"])
    assert patches.dtype == torch.float32 and patches.shape == (int(grid.prod(1).sum()), encoder.features)
    assert int((done.input_ids == encoder.image_token_id).sum()) == int(grid.prod(1).sum()) // 4
    assert not bool((done.labels == encoder.image_token_id).any())
    return grid


def test_the_processors_own_tokens_for_many_sizes(processor_directory):
    encoder, draw = Encoder(processor_directory, Settings(max_length=100_000)), random.Random(0)
    sizes = [(draw.randint(2, 400), draw.randint(2, 400)) for _ in range(60)]
    sizes += [(1, 1), (1, 200), (200, 1), (8, 8), (15, 17), (16, 16), (24, 40), (256, 256), (257, 255), (3000, 20)]
    for width, height in sizes:
        check_law(encoder, conversation(encoded(noise(width, height))))


def test_several_images_no_images_and_every_template(with_template):
    images = [encoded(noise(48, 32)), encoded(noise(90, 20), "JPEG"), encoded(noise(48, 32, seed=1))]
    for template in (templates.QWEN2_5_VL, templates.QWEN3_5, templates.GENERATION):
        encoder = Encoder(with_template(template), Settings())
        for count in range(4):
            check_law(encoder, conversation(*images[:count]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_modes(processor_directory, mode):
    image = noise(48, 32, "L").convert("I").convert("I;16") if mode == "I;16" else noise(48, 32).convert(mode)
    check_law(
        Encoder(processor_directory, Settings()), conversation(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_images(processor_directory, orientation):
    image = encoded(noise(120, 30), "JPEG", exif=exif(orientation))
    grid = check_law(Encoder(processor_directory, Settings()), conversation(image))
    assert (grid[0, 1] < grid[0, 2]) == (orientation in (1, 3))


def test_bounds_on_pixels(processor_directory):
    image = encoded(noise(200, 100))
    counts = {}
    for name, settings in {
        "own": Settings(),
        "less": Settings(max_pixels=8 * 256),
        "more": Settings(min_pixels=50_000),
    }.items():
        grid = check_law(Encoder(processor_directory, settings), conversation(image))
        counts[name] = int(grid.prod()) * 64
    assert counts["less"] <= 8 * 256 < counts["own"] < 50_000 <= counts["more"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (Settings(max_pixels=100), "dataset.max_pixels=100"),
        (Settings(max_pixels=0), "dataset.max_pixels=0: expected at least 1"),
        (Settings(min_pixels=4000, max_pixels=3000), "dataset.min_pixels=4000 is more than dataset.max_pixels=3000"),
        (Settings(max_length=1), "dataset.max_length=1: expected at least 2"),
    ],
)
def test_settings_out_of_bounds(processor_directory, settings, reason):
    with pytest.raises(UserError, match=reason):
        Encoder(processor_directory, settings)


def test_a_directory_without_a_processor(tmp_path):
    for directory, reason in ((tmp_path / "none", "no such directory"), (tmp_path, "cannot be loaded")):
        with pytest.raises(UserError, match=reason):
            Encoder(str(directory), Settings())


def test_length_is_bounded_with_image_tokens(processor_directory):
    sample = conversation(encoded(noise(200, 100)))
    length = len(Encoder(processor_directory, Settings()).encode(sample).input_ids)
    assert len(Encoder(processor_directory, Settings(max_length=length)).encode(sample).input_ids) == length
    with pytest.raises(BadSample, match=f"{length} tokens are more than dataset.max_length={length - 1}"):
        Encoder(processor_directory, Settings(max_length=length - 1)).encode(sample)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<|im_start|>"])
@pytest.mark.parametrize("role", [0, 1])
def test_special_tokens_in_text_are_refused(processor_directory, token, role):
    sample = conversation(encoded(noise(48, 32)))
    sample.messages[role] = {"role": ("user", "assistant")[role], "content": f"see {token} here"}
    with pytest.raises(BadSample, match=f"the text of message {role + 1} holds the model's own token"):
        Encoder(processor_directory, Settings()).encode(sample)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (encoded(noise(1, 250)), "aspect ratio"),
        (b"nonsense", "cannot be read as an image"),
    ],
)
def test_unusable_images_are_bad_for_text_and_pixels_alike(processor_directory, image, reason):
    encoder, sample = Encoder(processor_directory, Settings()), conversation(image)
    for function in (encoder.encode, encoder.pixels):
        with pytest.raises(BadSample, match=reason):
            function(sample)


def test_a_truncated_image_is_found_with_its_pixels(processor_directory):
    encoder, sample = Encoder(processor_directory, Settings()), conversation(encoded(noise(64, 64))[:-500])
    encoder.encode(sample)
    with pytest.raises(BadSample, match="cannot be read as an image"):
        encoder.pixels(sample)


def test_a_template_that_leaves_images_out(with_template):
    encoder = Encoder(with_template(templates.QWEN3), Settings())
    with pytest.raises(BadSample, match="wrote 0 image tokens for 1 images"):
        encoder.encode(conversation(encoded(noise(48, 32))))


def test_pickles_and_fingerprint(processor_directory, with_template):
    encoder = Encoder(processor_directory, Settings())
    again = pickle.loads(pickle.dumps(encoder))
    sample = conversation(encoded(noise(48, 32)))
    assert again.fingerprint == encoder.fingerprint and len(pickle.dumps(encoder)) < 2000
    done, sent = encoder.encode(sample), pickle.loads(pickle.dumps(again.encode(sample)))
    assert all(torch.equal(getattr(done, f), getattr(sent, f)) for f in ("input_ids", "labels", "image_grid_thw"))
    others = [Settings(max_pixels=4096), Settings(max_length=9)]
    prints = {Encoder(processor_directory, other).fingerprint for other in others}
    prints.add(Encoder(with_template(templates.QWEN2_5_VL), Settings()).fingerprint)
    assert len(prints | {encoder.fingerprint}) == 4
    assert Encoder(processor_directory, Settings(shuffle=False, workers=0)).fingerprint == encoder.fingerprint
