"""Records of runs as they would lie on disk, with invented numbers, for what reads them."""

import math
import random
from pathlib import Path
from typing import Any

from mimo_jobs import records
from mimo_jobs.records import RunRecord, StepRecord
from mimo_jobs.training import history

BEGIN = 1795340000.0
SPLIT = {
    "language": {"tp": 4, "pp": 2, "dp": 2, "cp": 1, "ep": 1, "etp": None, "rank_offset": None},
    "images": {"tp": 2, "pp": 1, "dp": 4, "cp": 1, "ep": 1, "etp": None, "rank_offset": None},
    "world_size": 24,
}
CERTIFICATE = {
    "left": "/models/Qwen3.5-9B", "right": "/work/sft/hf", "equal": True, "tensors": 760, "bytes": 19_300_000_000, "bit_exact": 760,
    "different": {}, "only_left": [], "only_right": [], "same_files": True, "same_metadata": True, "same_config": True, "versions": {},
}  # fmt: skip


def write_run(root: Path, steps: dict[str, tuple[str, dict[str, Any]]], **about: Any) -> RunRecord:
    """RUN.json of a run; ``steps``: name -> (job, arguments)."""
    made = []
    for i, (name, (job, arguments)) in enumerate(steps.items(), 1):
        directory = records.step_directory(root, i, name, len(steps))
        directory.mkdir(parents=True, exist_ok=True)
        made.append(StepRecord(name, job, arguments, directory, f"{root.name}-{i}"))
    run = RunRecord(
        root,
        made,
        {"run_id": root.name, "recipe": "qwen35vl_sft", "executor": "local", "host": "login01", "pid": 0} | about,
    )
    run.write()
    return run


def happened(step: StepRecord, *events: tuple[float, str, dict[str, Any]]) -> None:
    """Append events at given times (seconds after `BEGIN`)."""
    import json

    for at, event, fields in events:
        records.add_line(
            step.directory / records.EVENTS, json.dumps({"time": BEGIN + at, "event": event, **fields}) + "\n"
        )


def training_lines(steps: range, seed: int = 0, start: float = 4000.0, images: bool = True) -> list[str]:
    """Lines of metrics.jsonl as a run of 24 GPUs would write them."""
    draw, lines, at = random.Random(seed), [], BEGIN + start
    whole = 4000
    for step in steps:
        seconds = {"images": 0.21, "language": 1.42, "waiting": 0.14, "data": 0.012, "optimizer": 0.09}
        seconds = {n: v * draw.lognormvariate(0, 0.05) for n, v in seconds.items()}
        if step % 997 == 0:
            seconds["data"] += 3.0
        total = sum(seconds.values())
        at += total
        tokens = int(262144 * draw.uniform(0.93, 1.0))
        rate = min(1.0, step / 200) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / whole))))
        values = {
            "loss": 0.62 + 1.5 * math.exp(-step / 300) + 0.35 * math.exp(-step / 2500) + draw.gauss(0, 0.045), "grad_norm": draw.lognormvariate(-0.2, 0.25) * (40 if step in (1210, 2875) else 1),
            "lr": 1e-5 * rate, "tokens": tokens, "samples": 128, "seconds": total, "tokens_per_second": tokens / total,
            "tokens_per_second_per_gpu": tokens / total / 24, "mfu": 0.41 * 1.87 / total, "skipped": step // 700, "memory_bytes": 61_300_000_000 + step * 1000,
            **{f"seconds.{n}": v for n, v in seconds.items()},
        }  # fmt: skip
        if images:
            values["lr_images"] = 0.2e-5 * rate
        lines.append(history.line(at, {"step": step, **values}))
        if step % 250 == 0:
            lines.append(
                history.line(
                    at,
                    {
                        "step": step,
                        "validation_loss": 0.70
                        + 1.4 * math.exp(-step / 320)
                        + 0.3 * math.exp(-step / 2400)
                        + draw.gauss(0, 0.008),
                        "validation_tokens": 81920,
                    },
                )
            )
        if step % 500 == 0:
            lines.append(
                history.line(
                    at, {"step": step, "event": f"saved in 0.4 s, written in 11.2 s: step-{step}", "kind": "checkpoint"}
                )
            )
        if step % 700 == 0:
            lines.append(
                history.line(
                    at,
                    {
                        "step": step,
                        "event": f"cord-v2/train/{step * 128 + 5}: the image is cut short (12,288 of 40,112 bytes)",
                        "kind": "bad sample",
                    },
                )
            )
    return lines


def chain(root: Path, last: int = 3200, state: str = "done") -> RunRecord:
    """A pipeline on a cluster: imported, trained with two resumptions, exported, verified; or at an earlier ``state``."""
    layout = {"layout": SPLIT}
    run = write_run(
        root,
        {
            "import": ("import_hf", {"model": "/models/Qwen3.5-9B", "target": "/work/sft/mimo", **layout}),
            "train": ("sft", {"source": "/work/sft/mimo", "target": "/work/sft/trained", "data": "naver-clova-ix/cord-v2", "steps": 4000, **layout,
                              "optimizer": {"lr": 1e-5, "images_lr": 2e-6, "schedule": "cosine"}, "logging": {"every": 1, "tensorboard": True}}),
            "export": ("export_hf", {"source": "/work/sft/trained", "target": "/work/sft/hf", **layout}),
            "verify": ("verify", {"left": "/models/Qwen3.5-9B", "right": "/work/sft/hf"}),
        },
        executor="slurm:eos", cluster="eos", uid=1000,
        profile={"account": "research", "partition": "batch", "gpus_per_node": 8, "time": "04:00:00"},
        versions={"python": "3.12.1", "torch": "2.15.0", "megatron-core": "0.19.2", "transformers": "5.23.0"},
        code={"commit": "77e74ff2a9981738fa9a6017fd9bdcf19075303f", "dirty": ["mimo_jobs/layout.py", "mimo_jobs/worker.py"]},
        command=["recipes.qwen35vl_sft", "model=/models/Qwen3.5-9B", "--executor", "slurm:eos"],
    )  # fmt: skip
    imported, trained, exported, verified = run.steps
    gpus = {"gpus": 24, "nodes": "pool0-[0121-0123]"}
    happened(
        imported,
        (0, "submitting", {"title": "m"}),
        (1, "submitted", {"job_id": 88120}),
        (3600, "started", {"job_id": 88120, **gpus}),
        (3690, "done", {}),
    )
    happened(
        trained, (2, "submitting", {"title": "m"}), (3, "submitted", {"job_id": 88121, "after": 88120}), (3900, "started", {"job_id": 88121, **gpus}),
        (7400, "requeued", {"job_id": 88121, "reason": "its time limit was near", "progress": 1500}), (7900, "started", {"job_id": 88121, **gpus}),
        (9100, "retry", {"reason": "rank 11 ended unexpectedly (killed, or out of memory?)"}),
    )  # fmt: skip
    start = {"config": {"card": "NVIDIA H100 80GB HBM3", "gpus": 24, "peak_tflops": 989.4}}
    with (trained.directory / history.FILE).open("w") as file:
        file.write(history.line(BEGIN + 3990, {"start": 0, **start}))
        file.writelines(training_lines(range(1, min(last, 1560))))
        if last > 1560:
            file.write(history.line(BEGIN + 7990, {"start": 1500, **start}))
            file.writelines(training_lines(range(1501, min(last, 2110)), 1, 8000))
            file.write(history.line(BEGIN + 9190, {"start": 2000, **start}))
            file.writelines(training_lines(range(2001, last), 2, 9200))
    note = "loss 0.701 · grad 0.83 · lr 4.1e-06 · 5.8k tok/s/GPU · MFU 41 % · images 11 % language 76 % waiting 8 %"
    records.write_json(
        trained.directory / "progress.json",
        {"phase": "train", "done": last - 1, "total": 4000, "unit": "steps", "note": note},
    )
    if state == "failed":
        happened(
            trained,
            (
                12000,
                "failed",
                {
                    "exit_code": 1,
                    "reason": "rank 5: loss is nan at step 3200 (of 262,144 tokens)\n  the last checkpoint is /work/sft/trained.steps/step-3000\n  rank log: logs/language.tp1.pp0.log",
                },
            ),
        )
    if state == "done":
        happened(trained, (12000, "done", {}))
        happened(
            exported,
            (3, "submitted", {"job_id": 88122, "after": 88121}),
            (12100, "started", {"job_id": 88122, **gpus}),
            (12160, "done", {}),
        )
        happened(
            verified,
            (3, "submitted", {"job_id": 88123, "after": 88122}),
            (12200, "started", {"job_id": 88123, "gpus": 0, "nodes": "cpu-7"}),
            (12230, "done", {}),
        )
        records.write_json(
            exported.directory / "result.json",
            {
                "status": "ok",
                "summary": {
                    "tensors": 760,
                    "parity": {"verified": True, "equal": 760, "cast": 0, "unknown": 0},
                    "certificate": "/work/sft/hf/parity.json",
                },
            },
        )
        records.write_json(verified.directory / "result.json", {"status": "ok", "summary": CERTIFICATE})
    return run
