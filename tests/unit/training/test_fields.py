"""The settings of a training as they are typed: floats, groups, data, and the fields of a pipeline's steps."""

import json
from pathlib import Path

import pytest

from launchers.base import Job
from mimo_jobs import overrides, pipeline
from mimo_jobs.errors import UsageError
from mimo_jobs.records import StepRecord
from mimo_jobs.worker import read_job
from tests.unit.test_recipes import built


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("optimizer.lr=2", "optimizer.lr", 2.0),
        ("epochs=.5", "epochs", 0.5),
        ("epochs=3.", "epochs", 3.0),
        ("optimizer.images_lr=none", "optimizer.images_lr", None),
        ("optimizer.images_lr=+2E-6", "optimizer.images_lr", 2e-6),
        ("optimizer.min_lr=0", "optimizer.min_lr", 0.0),
        ("optimizer.schedule=wsd", "optimizer.schedule", "wsd"),
        ("saving.background=false", "saving.background", False),
        ("saving.directory=~/steps", "saving.directory", str(Path.home() / "steps")),
        ("dataset.images=images", "dataset.images", str(Path.cwd() / "images")),
        ("validation.data=valid.jsonl", "validation.data", str(Path.cwd() / "valid.jsonl")),
        ("stop.spike=3", "stop.spike", 3.0),
        ("steps=none", "steps", None),
        ("data=naver-clova-ix/cord-v2", "data", "naver-clova-ix/cord-v2"),
        ("data=cord-v2", "data", "cord-v2"),
        ("data=my/train.jsonl", "data", str(Path.cwd() / "my/train.jsonl")),
        ("data=./my/set", "data", str(Path.cwd() / "my/set")),
        ("data=~/set", "data", str(Path.home() / "set")),
        ("data=tests/unit", "data", str(Path.cwd() / "tests/unit")),  # it is there
        ("data=a/b/c", "data", str(Path.cwd() / "a/b/c")),
    ],
)
@pytest.mark.parametrize("name", ["qwen35vl_sft", "qwen35vl_lora"])
def test_a_setting_of_a_training_reaches_its_group(name, given, path, value):
    (step,) = built(name, given)
    found = overrides.flat(step.arguments)[path]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "given",
    [
        *(f"optimizer.lr={v}" for v in ("nan", "inf", "-inf", "1e999", "1e", "0x1", "1_0", "", "none", "true", "1,5", "١")),
        "epochs=two", "optimizer.schedule=cos", "saving.keep=1.5", "dataset.workers=two", "optimizer=1", "optimizer.rl=1",
    ],
)  # fmt: skip
def test_a_setting_that_is_none_is_refused(given):
    with pytest.raises(UsageError, match=r"expected|group of fields|did you mean"):
        built("qwen35vl_sft", given)


def test_defaults_of_a_group_are_the_jobs_own():
    for name, lr in (("qwen35vl_sft", 1e-5), ("qwen35vl_lora", 1e-4)):
        (step,) = built(name)
        assert step.arguments["optimizer"].lr == overrides.defaults(name)["optimizer.lr"] == lr
        assert overrides.recipe_fields(name)["optimizer.lr"].default == lr


PIPELINE = ("model=/m", "workdir=/w")


@pytest.mark.parametrize(
    ("given", "chain", "sources"),
    [
        ((), "import export verify", {"export": ("/w/mimo", None)}),
        (("data=/d.jsonl", "train=sft"), "import sft export", {"sft": ("/w/mimo", None), "export": ("/w/sft", None)}),
        (("data=/d.jsonl", "train=lora"), "import lora export", {"lora": ("/w/mimo", None), "export": ("/w/mimo", "/w/lora")}),
    ],
)  # fmt: skip
def test_a_pipeline_trains_between_import_and_export(given, chain, sources):
    steps = {s.name: s for s in built("qwen35vl_pipeline", *PIPELINE, *given)}
    assert " ".join(steps) == chain
    for name, (source, adapter) in sources.items():
        assert (steps[name].arguments["source"], steps[name].arguments.get("adapter")) == (source, adapter)
    assert steps["export"].arguments["target"] == "/w/hf" and steps["export"].arguments["verify"] is True


def test_fields_of_a_pipeline_reach_the_steps_that_have_them():
    given = (
        "optimizer.lr=1e-3",
        "lora.rank=4",
        "lora.lora.alpha=9",
        "lora.seed=3",
        "layout.images.tp=1",
        "export.layout.language.tp=2",
    )
    steps = {s.name: s.arguments for s in built("qwen35vl_pipeline", *PIPELINE, "data=/d", "train=lora", *given)}
    train = steps["lora"]
    assert (train["optimizer"].lr, train["lora"].rank, train["lora"].alpha, train["seed"]) == (1e-3, 4, 9.0, 3)
    assert [a["layout"].images.tp for a in steps.values()] == [1, 1, 1]
    assert [a["layout"].language.tp for a in steps.values()] == [4, 4, 2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("data=/d",), "nothing is trained on it; set train=sft or train=lora"),
        (("train=sft",), "train=sft needs data="),
        (("sft.optimizer.lr=1e-3",), "sft.optimizer.lr: is a field of sft, but the steps of this chain are import, export, verify; set train=sft"),
        (("optimizer.lr=1e-3",), "is a field of sft and lora.*set train=sft or train=lora"),
        (("data=/d", "train=lora", "freeze=images"), "freeze: is a field of sft.*import, lora, export; set train=sft"),
        (("data=/d", "train=sft", "lora.rank=2"), "lora.rank: is a field of lora.*set train=lora"),
        (("data=/d", "train=sft", "verify.mtp=drop"), "verify.mtp: is a field of verify"),
        (("data=/d", "train=sft", "sft.optimiser.lr=1"), "did you mean"),
        (("data=/d", "train=full"), "train='full': expected none or sft or lora"),
    ],
)  # fmt: skip
def test_fields_of_a_step_that_is_not_in_the_chain_are_refused_with_the_way_out(given, said):
    with pytest.raises(UsageError, match=said):
        built("qwen35vl_pipeline", *PIPELINE, *given)


@pytest.mark.parametrize("name", ["qwen35vl_sft", "qwen35vl_lora"])
def test_a_training_survives_json_the_worker_and_the_record(name, tmp_path):
    (step,) = built(name, "optimizer.lr=3e-5", "stop.spike=2.5")
    plain = step.plain() | {"epochs": 2}  # JSON of others may write whole numbers without a point
    Job(step.job, plain, step.world_size, tmp_path / "record", "id").write()
    read = read_job(tmp_path / "record" / "JOB.json")["arguments"]
    assert read == dict(step.arguments) | {"epochs": 2.0} and type(read["epochs"]) is float
    recorded = StepRecord("train", step.job, json.loads(json.dumps(step.plain())), tmp_path, "id")
    assert pipeline.step_of(recorded) == pipeline.Step("train", step.job, step.arguments)
