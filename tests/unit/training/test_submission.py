"""What a submission says of a training: GPU memory against the profile's card, and time to save before the limit."""

from types import SimpleNamespace
from typing import Any

import pytest

from launchers.base import Job
from launchers.profiles import Profile
from launchers.slurm import _own_mounts
from mimo_jobs import submission
from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.pipeline import Plan, Planned, Step
from mimo_jobs.training.memory import Memory

GB = 10**9
APART = {"language": {"tp": 1}, "images": {"tp": 1}}
COLOCATED: dict[str, Any] = {"language": {}, "images": {}, "world_size": 1}


def plan_of(language: Memory, images: Memory, layout: dict, job: str = "sft", step_bytes: int = 0) -> Plan:
    step = Step("train", job, {"layout": as_layout(layout)})
    needs = {"language": language, "images": images}
    made = SimpleNamespace(memory=needs, held={n: m.weights for n, m in needs.items()}, step_bytes=step_bytes)
    return Plan("p", [Planned(step, preflight=made)])


@pytest.mark.parametrize(
    ("language", "images", "layout", "warned", "noted"),
    [
        (Memory(20 * GB, 20 * GB, 20 * GB, 10 * GB), Memory(GB, 0, 0, GB), APART, "", "at most about 70 GB (language 70 GB, images 2 GB) on one H100 of 80 GB: fits"),
        (Memory(20 * GB, 20 * GB, 20 * GB, 30 * GB), Memory(GB, 0, 0, GB), APART, "", "may need 90 GB .*lower micro_batch_size or dataset.max_length, set recompute=full"),
        (Memory(30 * GB, 30 * GB, 30 * GB, 0), Memory(GB, 0, 0, GB), APART, "need 90 GB, one H100 of 80 GB has less.*qwen35vl_lora", ""),
        (Memory(50 * GB, 0, 0, 0), Memory(40 * GB, 0, 0, 0), COLOCATED, "need 90 GB", ""),
        (Memory(50 * GB, 0, 0, 0), Memory(40 * GB, 0, 0, 0), APART, "", "fits"),
    ],
)  # fmt: skip
def test_memory_is_compared_with_the_card_of_the_profile(language, images, layout, warned, noted):
    import re

    plan = plan_of(language, images, layout)
    submission._check_memory(plan, Profile(gpu="H100"))
    assert bool(plan.warnings) is bool(warned) and re.search(warned, " ".join(plan.warnings))
    assert bool(plan.notes) is bool(noted) and re.search(
        noted.replace("(", r"\(").replace(")", r"\)"), " ".join(plan.notes)
    )


def test_nothing_is_said_where_the_card_is_not_known():
    plan = plan_of(Memory(900 * GB, 0, 0, 0), Memory(0, 0, 0, 0), APART)
    submission._check_memory(plan, Profile())
    assert not plan.warnings and not plan.notes


@pytest.mark.parametrize(
    ("step_bytes", "nodes", "signal", "said"),
    [
        (20 * GB, 1, "USR1@60", ""),
        (
            378 * GB,
            1,
            "USR1@60",
            "a checkpoint is 378 GB, at 1 GB/s a node 378 s to write.*set executor.signal=USR1@840",
        ),
        (378 * GB, 1, "USR1@840", ""),
        (378 * GB, 16, "USR1@60", ""),
    ],
)
def test_a_checkpoint_that_takes_longer_than_the_warning_of_the_limit_is_told(step_bytes, nodes, signal, said):
    import re

    plan = plan_of(Memory(0, 0, 0, 0), Memory(0, 0, 0, 0), APART, step_bytes=step_bytes)
    requests: Any = {"train": SimpleNamespace(nodes=nodes)}
    submission._check_signals(plan, Profile(signal=signal), requests)
    assert bool(plan.notes) is bool(said) and re.search(said, " ".join(plan.notes))


def test_a_container_sees_the_images_beside_the_data_and_what_the_groups_name(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("")
    arguments = {
        "source": "/models/mimo", "data": f"{tmp_path}/set/train.jsonl", "target": "/work/out", "saving": {"directory": "/scratch/steps", "every": 5},
        "dataset": {"images": "/images", "split": "train"}, "lora": {"adapter": "/adapters/a"}, "validation": {"data": f"{tmp_path}/set"},
    }  # fmt: skip
    mounted = [m.partition(":")[0] for m in _own_mounts(Job("lora", arguments, 1, tmp_path / "runs/r/1-lora", "id"))]
    assert mounted[1:] == ["/models/mimo", f"{tmp_path}/set", "/work", "/scratch", "/images", "/adapters/a"]
