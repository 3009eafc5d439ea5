"""Compare the logits of two Hugging Face checkpoints with transformers: the same weights must give the same bits."""

import gc
from collections.abc import Callable
from typing import Any

from mimo_jobs.errors import JobFailed, UserError

PROMPT = "Describe the picture: 3 red squares, 14 blue lines, and the word Zürich."


def compare_logits(left: str, right: str, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Run both on a text and on an image with text, in float32 on the CPU, with ``right``'s processor.

    Returns ``{"max_abs_difference": {"text": .., "image": ..}, "positions": ..}``.

    Raises:
        JobFailed: a logit differs; the message names the input and the largest difference.
        UserError: a directory does not load, or lacks weights that its model needs.
    """
    import torch

    report = progress or (lambda phase, done, total: None)
    report("processor", 0, 4)
    inputs = _inputs(right)
    report("left", 1, 4)
    expected = _logits(left, inputs)
    report("right", 2, 4)
    found = _logits(right, inputs)
    report("compare", 3, 4)
    differences = {}
    for name in inputs:
        a, b = expected[name], found[name]
        differences[name] = float((a - b).abs().max())
        # Bits, not values: NaN equals itself and -0.0 is not 0.0.
        if a.shape != b.shape or not torch.equal(a.view(torch.int32), b.view(torch.int32)):
            unequal = int((a.view(torch.int32) != b.view(torch.int32)).sum())
            raise JobFailed(
                f"logits differ on the {name} input: {unequal} of {a.numel()}, max abs difference "
                f"{differences[name]:.3g} ({left} against {right})"
            )
    report("compare", 4, 4)
    return {"max_abs_difference": differences, "positions": {n: int(t.shape[1]) for n, t in expected.items()}}


def _inputs(directory: str) -> dict[str, Any]:
    """A text-only and an image+text batch, made by the checkpoint's own processor and chat template."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: the processor does not load: {error}") from error
    gradient = np.arange(96 * 64 * 3, dtype=np.uint32).reshape(96, 64, 3) * 37 % 256
    image = Image.fromarray(gradient.astype(np.uint8))
    question = {"type": "text", "text": PROMPT}
    made = {}
    for name, content in {"text": [question], "image": [{"type": "image"}, question]}.items():
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made[name] = processor(text=[text], images=[image] if name == "image" else None, return_tensors="pt")
    return made


def _logits(directory: str, inputs: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model, info = loaded
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: the model does not load: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            raise UserError(
                f"{directory}: {problem.replace('_', ' ')} on load: {', '.join(map(str, sorted(info[problem])))}"
            )
    with torch.no_grad():
        found = {name: model.eval()(**batch, use_cache=False).logits for name, batch in inputs.items()}
    del model
    gc.collect()
    return found
