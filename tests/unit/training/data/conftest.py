"""A tiny checkpoint's processor, data sets made on the spot, and a cache of the datasets library that ends with the tests."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def processor_directory(tmp_path_factory) -> str:
    from mimo_jobs.conversion.tiny import make_tiny

    directory = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny(str(directory))
    for weights in directory.glob("*.safetensors*"):
        weights.unlink()
    return str(directory)


@pytest.fixture
def with_template(processor_directory, tmp_path):
    """A copy of the processor with another chat template."""

    def make(template: str) -> str:
        directory = tmp_path / "processor"
        shutil.copytree(processor_directory, directory, dirs_exist_ok=True)
        (directory / "chat_template.jinja").write_text(template)
        return str(directory)

    return make


@pytest.fixture
def picture(tmp_path):
    """Writes a picture of noise; returns its path."""

    def make(name: str = "a.png", width: int = 48, height: int = 32, mode: str = "RGB", **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(width, height, mode).save(path, **options)
        return path

    return make


@pytest.fixture(scope="session")
def merging_processor(processor_directory, tmp_path_factory) -> Path:
    """The processor with a tokenizer that merges characters, as real ones do, also over the borders of an answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoProcessor, Qwen3_5Tokenizer

    from mimo_jobs.conversion.tiny import SPECIAL_TOKENS

    processor = AutoProcessor.from_pretrained(processor_directory, local_files_only=True)
    backend = processor.tokenizer.backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    corpus = [
        Path(__file__).with_name(f"{name}.py").read_text() for name in ("templates", "test_labels", "test_schemas")
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    processor.tokenizer = Qwen3_5Tokenizer(
        vocab=model["vocab"], merges=list(map(tuple, model["merges"])), additional_special_tokens=list(SPECIAL_TOKENS)
    )
    directory = tmp_path_factory.mktemp("merging")
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    processor.save_pretrained(directory)
    return directory


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(question: str = "what is this?", answer: str = "a cat", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def llava_row(image: str | None, answer: str = "a cat"):
    row = {
        "conversations": [
            {"from": "human", "value": ("<image>\n" if image else "") + "what is this?"},
            {"from": "gpt", "value": answer},
        ]
    }
    return row | ({"image": image} if image else {})
