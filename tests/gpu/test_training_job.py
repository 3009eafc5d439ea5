"""Whole training jobs on GPUs, as worker processes: bf16 SFT and LoRA, interrupted, resumed, exported, loaded by transformers."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_jobs.conversion.tiny import make_tiny
from tests.conversion_ranks import convert, result, start_worker
from tests.gloo.images import write_data

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="no CUDA device"), pytest.mark.timeout(540)]

STEPS = 30  # a step of it takes milliseconds: it is not to be over before the signal comes
ONE: dict[str, Any] = {"language": {}, "images": {}, "world_size": 1}
LAYOUTS = {
    1: ONE,
    2: {"language": {}, "images": {"rank_offset": 1}, "world_size": 2},
    4: {"language": {"tp": 2}, "images": {"dp": 2, "rank_offset": 2}, "world_size": 4},
}
SETTINGS: dict[str, Any] = {
    "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 4, "precision": "bf16", "recompute": "full",
    "saving": {"every": 10}, "dataset": {"workers": 2}, "logging": {"tensorboard": False},
}  # fmt: skip


@pytest.mark.parametrize("job", ["sft", "lora"])
def test_a_run_is_interrupted_goes_on_and_its_export_has_its_loss(tmp_path: Path, job: str) -> None:
    layout = LAYOUTS[max(n for n in LAYOUTS if n <= GPUS)]
    make_tiny(str(tmp_path / "hf"))
    data = write_data(tmp_path / "data", 32)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    rate = {"sft": 2e-3, "lora": 1e-2}[job]
    arguments = SETTINGS | dict(
        source=tmp_path / "hf", data=data, target=tmp_path / "trained", optimizer={"lr": rate},
        validation={"data": str(data), "split": "train", "every": 0, "samples": 0},
    )  # fmt: skip
    record = tmp_path / "record"
    ranks = start_worker(record, job, layout, **arguments)
    _wait_for_step(record, 3)
    ranks[-1].send_signal(signal.SIGUSR1)
    assert _ended(record, ranks, 120) == [1] * len(ranks)
    assert result(record)["error"]["transient"], result(record)
    assert _ended(record, start_worker(record, job, layout, **arguments), 240) == [0] * len(ranks)
    summary = result(record)["summary"]
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert sorted(steps) == list(range(1, STEPS + 1)) and steps[STEPS]["loss"] < 0.7 * steps[1]["loss"]
    assert steps[STEPS]["memory_bytes"] > 0 and 0 < steps[STEPS]["mfu"] < 1
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
    convert(tmp_path / "r1", "import", ONE, model=str(tmp_path / "hf"), target=str(tmp_path / "mimo"))
    source = {"sft": "trained", "lora": "mimo"}[job]
    adapter = {"adapter": str(tmp_path / "trained")} if job == "lora" else {}
    convert(tmp_path / "r2", "export", ONE, source=str(tmp_path / source), target=str(tmp_path / "out"), **adapter)
    loss = _loss_of_transformers(tmp_path / "out", data)
    print(
        f"{job}: loss {steps[1]['loss']:.4f} -> {steps[STEPS]['loss']:.4f}, validation {validated:.4f}, transformers {loss:.4f}; {summary}"
    )
    assert loss == pytest.approx(validated, rel=2e-2)


def _loss_of_transformers(directory: Path, data: Path) -> float:
    """Mean loss of the exported model on the whole data set, in fp32 on the CPU: on a GPU its kernels would compute in TF32."""
    import torch.nn.functional as F
    from transformers import AutoModelForImageTextToText

    from mimo_jobs.training.config import Dataset
    from mimo_jobs.training.data import Encoder, open_source

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    encoder, source = Encoder(str(directory), Dataset()), open_source(str(data), Dataset())
    total, count = 0.0, 0
    for i in range(len(source)):
        sample = encoder.encode(source.conversation(i))
        pixels, grid = encoder.pixels(source.conversation(i))
        ids = sample.input_ids[None]
        images: dict[str, Any] = {}
        if len(grid):
            images = dict(
                pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=(ids == model.config.image_token_id).int()
            )  # fmt: skip
        with torch.no_grad():
            logits = model(input_ids=ids, **images).logits[0]
        total += F.cross_entropy(logits.float(), sample.labels, ignore_index=-100, reduction="sum").item()
        count += int((sample.labels != -100).sum())
    return total / count


def _ended(record: Path, ranks: list[Any], timeout: float) -> list[int]:
    """Exit codes; pytest shows what was printed here if they are not those."""
    for rank in ranks:
        try:
            said = rank.communicate(timeout=timeout)[1]
        except subprocess.TimeoutExpired:
            print(f"rank {rank.pid} did not end")
            rank.kill()
            said = rank.communicate()[1]
        print(said[-4000:])
    print(*(line for line in (record / "metrics.jsonl").read_text().splitlines()[-3:]), sep="\n")
    return [rank.returncode for rank in ranks]


def _wait_for_step(record: Path, step: int, timeout: float = 200) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        file = record / "metrics.jsonl"
        if file.exists() and f'"step": {step}' in file.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {timeout:g} s")
