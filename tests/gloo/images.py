"""A small image-text data set on disk."""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (240, 240, 240)}
SIZES = ((32, 32), (48, 32), (32, 64), (64, 64))


def write_data(directory: Path, count: int) -> Path:
    """``count`` questions about pictures of one colour, in sizes that differ; every fifth has no picture."""
    directory.mkdir(parents=True, exist_ok=True)
    choose = random.Random(0)
    rows = []
    for i in range(count):
        name = list(COLOURS)[i % len(COLOURS)]
        Image.new("RGB", choose.choice(SIZES), COLOURS[name]).save(directory / f"{i}.png")
        question: Any = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": f"Which colour? {i}"}]
        answer = f"It is {name} {i * 7 % 13}."
        if i % 5 == 4:
            question, answer = f"Say {i}", f"{i} it is"
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    file = directory / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
