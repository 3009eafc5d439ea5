"""A tiny image-text set, drawn here: coloured images of several sizes and what can be said of them. For the quickstart and tests."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from mimo_jobs.errors import UserError

FILE = "train.jsonl"
SAMPLES = 64
COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (31, 80, 200), "white": (240, 240, 240)}
SIZES = ((32, 32), (48, 32), (32, 64), (64, 64))
TEXT_ONLY = 8  # every so many samples one without an image


def make_data(target: str, samples: int = SAMPLES, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Write ``train.jsonl`` and its images to a directory, the same bytes for the same seed; returns counts.

    Raises:
        UserError: ``target`` exists, unless ``overwrite`` and it is such a data set.
    """
    final = Path(target)
    if final.exists() and not (overwrite and (final / FILE).is_file()):
        raise UserError(f"{final}: exists; choose another target" + ("" if overwrite else ", or give overwrite=true"))
    staging = final.with_name(f".{final.name}.partial-data")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    draw = random.Random(seed)
    with open(staging / FILE, "w") as file:
        for number in range(samples):
            file.write(json.dumps({"messages": _sample(staging, number, draw)}) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.rename(staging, final)
    return {"target": str(final), "samples": samples}


def _sample(directory: Path, number: int, draw: random.Random) -> list[dict[str, Any]]:
    name, colour = list(COLOURS.items())[draw.randrange(len(COLOURS))]
    if number % TEXT_ONLY == TEXT_ONLY - 1:
        return [{"role": "user", "content": f"Say {name}."}, {"role": "assistant", "content": f"{name.capitalize()}."}]
    width, height = draw.choice(SIZES)
    image = f"{number:04d}.png"
    Image.new("RGB", (width, height), colour).save(directory / image)
    question = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    answer = f"A {name} rectangle." if width != height else f"A {name} square."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
