"""A pipeline that trains: what of it has to run, and what becomes of the checkpoints of another run. Nothing is trained here."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from mimo_jobs import pipeline
from mimo_jobs.checkpoint.manifest import read_manifest, write_json, write_manifest
from mimo_jobs.checkpoint.peft_dir import MANIFEST_NAME as PEFT_MANIFEST
from mimo_jobs.conversion import identity
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.pipeline import Plan, Step
from mimo_jobs.training import saved
from mimo_jobs.training.tiny_data import make_data
from tests.adapter_files import make_adapter
from tests.conversion_ranks import convert
from tests.hf_files import config_of, make_hf
from tests.unit.test_recipes import built

SMALL = ("layout.language.tp=2", "layout.images.tp=1", "steps=4", "fsync=false")


class Chain:
    """The pipeline recipe in ``base`` with words as they are typed; a training that ran is one whose output says so."""

    def __init__(self, base: Path, train: str, *words: str) -> None:
        self.base, self.train, self.words = base, train, list(words)

    def steps(self) -> list[Step]:
        b = self.base
        given = [f"model={b}/hf", f"workdir={b}/w", f"data={b}/data", f"train={self.train}", *SMALL, *self.words]
        last = {word.partition("=")[0]: word for word in given}
        return built("qwen35vl_pipeline", *last.values())

    def plan(self, **more) -> Plan:
        return pipeline.make_plan("p", self.steps(), True, **more)

    def run(self, plan: Plan) -> None:
        for planned in plan.to_run:
            a = dict(planned.job_step.arguments)
            if planned.step.job in identity.TRAINING:
                self.trained(planned.job_step)
                continue
            a.pop("fsync")
            convert(self.base / f"r-{planned.step.name}", planned.step.name, **(a | {"layout": a["layout"]}))

    def trained(self, step: Step) -> None:
        a, target = step.arguments, Path(step.arguments["target"])
        made_of = identity.expected(step.job, a, {})
        assert made_of is not None
        if a["overwrite"]:
            saved.make_way(steps_of(target), made_of, identity.recorded(step.job, target))
            shutil.rmtree(target, ignore_errors=True)
        begun(target, made_of, a["steps"])
        if step.job == "lora":
            make_adapter(target, config_of(layers=2), a["lora"].targets, rank=a["lora"].rank)
            write_json(target / PEFT_MANIFEST, {"format": 1, "base": None, "identity": made_of})
            return
        shutil.copytree(a["source"], target)
        write_manifest(dataclasses.replace(read_manifest(target), identity=made_of), target)


def steps_of(target: Path) -> Path:
    return saved.steps_directory(target, None)


def begun(target: Path, made_of: dict, step: int) -> Path:
    """A checkpoint on the way to ``target``."""
    place = saved.checkpoint_directory(steps_of(target), step)
    place.mkdir(parents=True)
    (place / "a.distcp").write_bytes(b"1234")
    write_json(place / saved.RECORD, dataclasses.asdict(saved.Saved(step, made_of, {"a.distcp": 4})) | {"losses": []})
    return place


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both kinds of chain, done, to be copied."""
    base = tmp_path_factory.mktemp("chain")
    make_hf(base / "hf", config_of(layers=2))
    make_data(str(base / "data"), samples=8)
    for train in ("sft", "lora"):
        chain = Chain(base, train)
        plan = chain.plan()
        assert [p.preflight is not None for p in plan.steps] == [True, True, True], "planned from the import's source"
        chain.run(plan)
        shutil.move(base / "w", base / train)
    return base


@pytest.fixture(params=["sft", "lora"])
def chain(finished, tmp_path, request):
    for name in ("hf", "data"):
        shutil.copytree(finished / name, tmp_path / name, copy_function=shutil.copy2)
    shutil.copytree(finished / request.param, tmp_path / "w", copy_function=shutil.copy2)
    return Chain(tmp_path, request.param)


def decided(plan: Plan) -> str:
    """``s`` for a step that is skipped, ``o`` for one that overwrites, ``r`` for one that simply runs."""
    return "".join("s" if p.skip else "o" if p.job_step.arguments.get("overwrite") else "r" for p in plan.steps)


CHANGES = {  # what -> (words, change, decisions, reason of the first step that runs)
    "nothing": ((), None, "sss", ""),
    "another layout": (("layout.language.tp=1", "layout.images.dp=2"), None, "sss", ""),
    "how a batch is worked off": (("micro_batch_size=2", "recompute=none", "sequence_parallel=true", "dataset.workers=0"), None, "sss", ""),
    "what is written of it": (("saving.every=1", "logging.every=3", "validation.every=9", "stop.spike=5"), None, "sss", ""),
    "the learning rate": (("optimizer.lr=2e-5",), None, "soo", "optimizer.lr was {lr}, now 2e-05"),
    "the number of steps": (("steps=5",), None, "soo", "steps was 4, now 5"),
    "the length of samples": (("dataset.max_length=99",), None, "soo", "dataset.max_length was 4096, now 99"),
    "two settings": (("optimizer.lr=2e-5", "seed=1"), None, "soo", "seed was 0, now 1"),
    "the data touched": ((), lambda b: os.utime(b / "data/train.jsonl", (1, 1)), "soo", "the data changed"),
    "the source touched": ((), lambda b: os.utime(next(b.glob("hf/*.safetensors")), (1, 1)), "ooo", "the source changed"),
    "a cast at the end": (("export.dtype=fp32",), None, "sso", "dtype was none, now F32"),
    "no export": ((), lambda b: shutil.rmtree(b / "w/hf"), "ssr", ""),
    "no checkpoint": ((), lambda b: shutil.rmtree(b / "w/mimo"), "rss", ""),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_training_and_what_is_behind_it_run_again_when_they_would_make_something_else(chain, what):
    words, change, expected, reason = CHANGES[what]
    chain.words += words
    if change:
        change(chain.base)
    plan = chain.plan()
    assert decided(plan) == expected, [p.why for p in plan.steps]
    first = next((p for p in plan.steps if not p.skip), None)
    lr = {"sft": "1e-05", "lora": "0.0001"}[chain.train]
    assert first is None or reason.format(lr=lr) in first.why, first.why
    chain.run(plan)
    assert decided(chain.plan()) == "sss"


def test_a_secret_is_refused_although_its_step_is_done_and_would_only_be_recorded(chain):
    assert decided(chain.plan()) == "sss"
    chain.words = ["logging.mlflow=https://me:hunter2@host"]
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_PASSWORD"):
        chain.plan()


def test_checkpoints_on_the_way_to_a_target_that_is_replaced_go_with_it(chain):
    target = chain.base / "w" / chain.train
    chain.words = ["optimizer.lr=2e-5", "steps=3"]
    chain.run(chain.plan())
    assert [s for s, _ in saved.completed(steps_of(target))] == [3]
    assert sorted(p.name for p in target.parent.iterdir() if chain.train in p.name) == [
        chain.train,
        f"{chain.train}.steps",
    ]


def test_checkpoints_of_a_run_that_did_not_end_are_set_aside_and_said_so(chain):
    target = chain.base / "w" / chain.train
    shutil.rmtree(target)
    chain.words = ["optimizer.lr=2e-5"]
    plan = chain.plan()
    why = plan.steps[1].why
    assert decided(plan) == "soo" and "checkpoints up to step 4 of the run before are set aside" in why, why
    assert "optimizer.lr was" in why
    chain.run(plan)
    (aside,) = target.parent.glob(f"{target.name}.steps.of-*")
    assert [s for s, _ in saved.completed(aside)] == [4]
    assert decided(chain.plan()) == "sss"


def test_way_is_made_without_touching_what_is_not_a_checkpoint(tmp_path):
    root = tmp_path / "mine"
    for number in range(2):
        begun(tmp_path / "x", {"lr": 1}, 5)
        shutil.copytree(steps_of(tmp_path / "x"), root, dirs_exist_ok=True)
        shutil.rmtree(steps_of(tmp_path / "x"))
        (root / "notes.txt").write_text("mine")
        said = saved.make_way(root, {"lr": 2}, None)
        assert "lr was 1, now 2" in said and len(list(tmp_path.glob("mine.of-*"))) == number + 1, (
            "nothing is written over"
        )
        assert [p.name for p in root.iterdir()] == ["notes.txt"]
    assert saved.make_way(root, {"lr": 2}, None) == ""
    begun(tmp_path / "x", {"lr": 1}, 5)
    assert "they were removed" in saved.make_way(steps_of(tmp_path / "x"), {"lr": 2}, {"lr": 1})
    assert saved.make_way(steps_of(tmp_path / "x"), {"lr": 2}, None) == ""


def test_a_run_that_did_not_end_goes_on(chain):
    target = chain.base / "w" / chain.train
    shutil.rmtree(target)
    plan = chain.plan()
    assert decided(plan) == "srs" and plan.steps[1].why == "goes on after step 4"


def test_a_checkpoint_that_is_not_whole_blocks_nothing(chain):
    target = chain.base / "w" / chain.train
    shutil.rmtree(target)
    for path in steps_of(target).rglob("*.distcp"):
        path.write_bytes(b"")
    chain.words = ["optimizer.lr=2e-5"]
    assert decided(chain.plan()) == "sro"


def test_what_a_training_did_not_write_is_not_replaced_unasked(chain):
    target = chain.base / "w" / chain.train
    (target / {"sft": "mimo.json", "lora": PEFT_MANIFEST}[chain.train]).unlink()
    with pytest.raises(UserError, match="not from this pipeline; give another workdir"):
        chain.plan()


def test_is_complete_agrees_with_the_plan(chain):
    for step in chain.steps():
        plain = json.loads(json.dumps(step.plain()))  # as the batch host has it
        assert identity.is_complete(step.job, plain)
    chain.words = ["optimizer.lr=2e-5", "export.dtype=fp32"]
    assert [identity.is_complete(s.job, s.plain()) for s in chain.steps()] == [True, False, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sft.layout.language.tp=3",), "layout.language.tp=3 does not divide"),
        (("export.layout.language.tp=3",), "layout.language.tp=3 does not divide"),
        (("global_batch_size=3", "micro_batch_size=2"), "set global_batch_size=4"),
        (("optimizer.warmup_steps=4",), "the run has 4 steps"),
        (("layout.language.cp=2",), "training does not have it|does not divide"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_the_import_ran(finished, tmp_path, words, said):
    for name in ("hf", "data"):
        shutil.copytree(finished / name, tmp_path / name)
    with pytest.raises(UsageError, match=said):
        Chain(tmp_path, "sft", *words).plan()


def test_a_training_of_an_existing_checkpoint_is_planned_from_its_files(finished, tmp_path):
    for name in ("hf", "data"):
        shutil.copytree(finished / name, tmp_path / name, copy_function=shutil.copy2)
    chain = Chain(tmp_path, "sft")
    chain.run(dataclasses.replace(plan := chain.plan(), steps=plan.steps[:1]))
    plan = chain.plan()
    assert decided(plan) == "srr"
    assert [p.preflight is not None for p in plan.steps] == [False, True, True]
    assert plan.steps[1].preflight.steps == 4 and plan.steps[1].preflight.samples == 8
