"""The same jobs on GPUs (NCCL) and on CPUs (gloo), in fp32: one loss curve, and each goes on from the other's checkpoint.

One command: ``python -m pytest tests/gpu``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mimo_jobs.conversion.tiny import make_tiny
from tests.conversion_ranks import result, start_worker
from tests.gloo.images import write_data

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="no CUDA device"), pytest.mark.timeout(540)]

LAYOUTS: dict[int, dict[str, Any]] = {
    1: {"language": {}, "images": {}, "world_size": 1},
    2: {"language": {}, "images": {"rank_offset": 1}, "world_size": 2},
    4: {"language": {"tp": 2}, "images": {"dp": 2, "rank_offset": 2}, "world_size": 4},
}
GPU: dict[str, str] = {"TORCHDYNAMO_DISABLE": "1", "NVIDIA_TF32_OVERRIDE": "0"}
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
SETTINGS: dict[str, Any] = {
    "steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "recompute": "none",
    "saving": {"every": 4}, "dataset": {"workers": 0}, "logging": {"tensorboard": False},
}  # fmt: skip
RATE = 1e-4  # ten times as high, another number of threads alone makes 4e-4, another device 5e-4 (LoRA)
HALF = "step-00000004"


@pytest.mark.parametrize(
    ("job", "world", "packing"),
    [("sft", 1, False), ("lora", 1, True), ("sft", 2, True), ("lora", 2, False), ("sft", 4, True), ("lora", 4, False)],
)
def test_curves_of_nccl_and_gloo_are_one_and_each_reads_the_others_checkpoint(
    tmp_path: Path, job: str, world: int, packing: bool
) -> None:
    if world > GPUS:
        pytest.skip(f"needs {world} CUDA devices, found {GPUS}")
    make_tiny(str(tmp_path / "hf"))
    data = write_data(tmp_path / "data", 32)
    arguments = SETTINGS | dict(source=tmp_path / "hf", data=data, optimizer={"lr": RATE})
    arguments["dataset"] = SETTINGS["dataset"] | {"packing": packing, "max_length": 128}

    def started(name: str, environment: dict[str, str]) -> list[Any]:
        return start_worker(
            tmp_path / name, job, LAYOUTS[world], environment=environment, target=tmp_path / f"{name}.out", **arguments
        )

    curves = {}
    whole = {"gpu": started("gpu", GPU), "cpu": started("cpu", CPU)}
    for name, ranks in whole.items():
        curves[name] = _curve(tmp_path / name, ranks)
    for first, second in (("gpu", "cpu"), ("cpu", "gpu")):
        shutil.copytree(tmp_path / f"{first}.out.steps" / HALF, tmp_path / f"{first}-{second}.out.steps" / HALF)
    crossed = {"gpu-cpu": started("gpu-cpu", CPU), "cpu-gpu": started("cpu-gpu", GPU)}
    for name, ranks in crossed.items():
        curves[name] = _curve(tmp_path / name, ranks)
    print(f"{job} world {world} packing {packing}: {curves}")
    wanted = curves["cpu"]
    assert sorted(wanted) == list(range(1, 9)) and wanted[8] < wanted[1]
    assert curves["gpu"] == pytest.approx(wanted, rel=1e-4)
    for name in crossed:
        assert sorted(curves[name]) == [5, 6, 7, 8]
        assert curves[name] == pytest.approx({step: wanted[step] for step in curves[name]}, rel=1e-4)


def _curve(record: Path, ranks: list[Any]) -> dict[int, float]:
    """Step -> loss of a job that has to end well."""
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), (result(record), said[0][-3000:])
    lines = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
