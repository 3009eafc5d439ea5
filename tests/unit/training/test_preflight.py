"""What is said of a fine-tuning before it starts: settings, data, disk, memory."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.errors import UserError
from mimo_jobs.training import memory, preflight
from mimo_jobs.training.config import Dataset
from mimo_jobs.training.preflight import MASTER, check_training, look_at
from mimo_jobs.training.saved import checkpoint_directory
from mimo_jobs.training.tiny_data import make_data
from tests.adapter_files import make_adapter
from tests.hf_files import config_of, make_hf
from tests.unit.test_recipes import built
from tests.unit.test_rules import PUBLISHED
from tests.unit.test_rules import config_of as published

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
NO_ANSWER = {"messages": [{"role": "user", "content": "a"}]}
SMALL = ("layout.language.tp=1", "layout.images.tp=1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    base = tmp_path_factory.mktemp("inputs")
    make_hf(base / "hf", config_of(layers=4))
    make_data(str(base / "data"), samples=20)
    make_adapter(base / "adapter", config_of(layers=4), "q_proj,v_proj", rank=3)
    make_adapter(base / "dora", config_of(layers=4), "q_proj", rank=3, use_dora=True)
    make_adapter(base / "other", config_of(layers=4, hidden=128), "q_proj", rank=3)
    return base


def checked(inputs, target, recipe, *words):
    """The preflight of a recipe with words as they are typed."""
    given = {"source": f"{inputs}/hf", "data": f"{inputs}/data", "target": str(target)}
    given |= {w.partition("=")[0]: w.partition("=")[2] for w in (*SMALL, *words)}
    (step,) = built(recipe, *(f"{name}={value}" for name, value in given.items()))
    return check_training(step.arguments)


REFUSED = [
    ("micro_batch_size=0", "micro_batch_size=0: expected an integer of at least 1"),
    ("global_batch_size=3 micro_batch_size=2", "global_batch_size=3 is no multiple"),
    ("layout.images.dp=2 layout.language.dp=3", "one must divide the other"),
    ("steps=0", "steps=0: expected at least 1"),
    ("epochs=0", "epochs=0: expected more than 0"),
    ("optimizer.lr=-1", "optimizer.lr=-1: expected at least 0"),
    ("optimizer.min_lr=1", "optimizer.lr=.* is below optimizer.min_lr=1"),
    ("optimizer.images_lr=0 optimizer.min_lr=1e-6", "optimizer.images_lr=0 is below"),
    ("optimizer.beta2=1", "optimizer.beta2=1: expected less than 1"),
    ("optimizer.eps=0", "optimizer.eps=0: expected more than 0"),
    ("steps=5 optimizer.warmup_steps=5", "the run has 5 steps"),
    ("global_batch_size=4 optimizer.warmup_steps=5", "the run has 5 steps"),  # 20 samples
    ("steps=5 optimizer.schedule=wsd", "decay_steps=0: schedule=wsd needs between 1 and 5"),
    ("dataset.max_length=1", "dataset.max_length=1: expected at least 2"),
    ("dataset.min_pixels=9 dataset.max_pixels=8", "dataset.min_pixels=9 is above"),
    ("dataset.workers=-1", "dataset.workers=-1: expected at least 0"),
    ("dataset.images=/no/such", "dataset.images=/no/such: no such directory"),
    ("saving.keep=0", "saving.keep=0: expected at least 1"),
    ("logging.every=0", "logging.every=0: expected at least 1"),
    ("logging.mlflow=https://me:secret@host", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    ("stop.spike=1", "stop.spike=1: expected more than 1"),
    ("validation.data=/no/such.jsonl", "/no/such.jsonl: no such file"),
    ("dataset.schema=llava", "do not fit dataset.schema=llava"),
    ("layout.language.tp=3", "layout.language.tp=3 does not divide"),
    ("target={inputs}/hf", "lie in one another"),
    ("source={inputs}/data", "config.json"),
]


@pytest.mark.parametrize(("beta", "value"), [("beta1", "0.995"), ("beta2", "0.999")])
def test_moments_of_16_bits_cannot_follow_every_beta(inputs, tmp_path, beta, value):
    words = ("optimizer.state=bf16", f"optimizer.{beta}={value}")
    with pytest.raises(UserError, match=f"optimizer.{beta}={value}: with optimizer.state=bf16 at most 0.99"):
        checked(inputs, tmp_path / "t", "qwen35vl_sft", *words)
    checked(inputs, tmp_path / "t", "qwen35vl_sft", *words, "precision=fp32")
    checked(inputs, tmp_path / "t", "qwen35vl_lora", *words)


@pytest.mark.parametrize(("words", "said"), REFUSED)
@pytest.mark.parametrize("recipe", ["qwen35vl_sft", "qwen35vl_lora"])
def test_what_cannot_be_trained_is_refused(inputs, tmp_path, recipe, words, said):
    with pytest.raises(UserError, match=said):
        checked(inputs, tmp_path / "t", recipe, *words.format(inputs=inputs).split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("lora.rank=0", "lora.rank=0: expected an integer of at least 1"),
        ("lora.alpha=0", "lora.alpha=0: expected a number above 0"),
        ("lora.dropout=1", "lora.dropout=1: expected a number of at least 0 and below 1"),
        ("lora.dora=true lora.dropout=0.1", "lora.dropout=0.1 is not implemented"),
        ("lora.adapter={inputs}/dora lora.dropout=0.1", "lora.dropout=0.1 is not implemented"),
        ("lora.targets=q_prj", "did you mean 'q_proj'"),
        ("lora.targets=,", "lora.targets is empty"),
        ("lora.targets=q_proj layout.language.pp=2", "stage 0|stage 1"),
        ("lora.adapter=/no/such", "is no directory with an adapter_config.json"),
        ("lora.adapter={inputs}/other", "it was trained on another model"),
    ],
)
def test_adapters_that_cannot_be_are_refused(inputs, tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        checked(inputs, tmp_path / "t", "qwen35vl_lora", *words.format(inputs=inputs).split())


def test_an_adapter_to_go_on_from_brings_its_own_rank_and_targets(inputs, tmp_path):
    whole = checked(inputs, tmp_path / "t", "qwen35vl_lora").trained
    own = checked(inputs, tmp_path / "t", "qwen35vl_lora", f"lora.adapter={inputs}/adapter").trained
    assert own == checked(inputs, tmp_path / "t", "qwen35vl_lora", "lora.rank=3", "lora.targets=q_proj,v_proj").trained
    assert 0 < own < whole


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("global_batch_size=4", 5), ("global_batch_size=8", 3), ("global_batch_size=4 epochs=2.5", 13), ("steps=7", 7),
        ("dataset.packing=true", None), ("dataset.packing=true steps=2", 2),
    ],
)  # fmt: skip
def test_the_number_of_steps_is_that_of_the_run(inputs, tmp_path, words, steps):
    made = checked(inputs, tmp_path / "t", "qwen35vl_sft", *words.split())
    assert (made.steps, made.samples) == (steps, 20)


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "on_bad", "said"),
    [
        ([], "skip", "no rows in it"),
        (["", " "], "skip", "no rows in it"),
        (["{"], "skip", r"t\.jsonl:1: damaged JSON"),
        ([GOOD, "nonsense"], "skip", r"t\.jsonl:2: damaged JSON"),
        (["[1]"], "skip", r"t\.jsonl:1"),
        ([{"text": "a"}], "skip", r"its columns \(text\) fit no schema"),
        (
            [NO_ANSWER] * 3,
            "skip",
            r"all of the first 3 rows cannot be used, e.g. t\.jsonl:1: no message of the assistant",
        ),
        ([GOOD, NO_ANSWER], "stop", r"dataset.on_bad=stop, and a row cannot be used, e.g. t\.jsonl:2"),
        ([GOOD, NO_ANSWER], "skip", None),
        ([GOOD, "", GOOD], "skip", None),
    ],
)
def test_the_first_rows_are_tried(tmp_path, rows, on_bad, said):
    path = write(tmp_path / "t.jsonl", *rows)
    if said is None:
        assert look_at(str(path), Dataset(on_bad=on_bad)) == (2, [])
        return
    with pytest.raises(UserError, match=said):
        look_at(str(path), Dataset(on_bad=on_bad))


def test_data_sets_that_cannot_be_looked_into_say_what_will_be_done(tmp_path):
    count, notes = look_at("owner/name", Dataset())
    assert count is None and "is a hub data set" in notes[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in it ends in"):
        look_at(str(tmp_path / "empty"), Dataset())
    write(tmp_path / "both/train.jsonl", GOOD)
    write(tmp_path / "both/validation.jsonl", GOOD, GOOD)
    assert [look_at(str(tmp_path / "both"), Dataset(split=s))[0] for s in ("train", "validation")] == [1, 2]


def test_parquet_is_counted_and_a_damaged_file_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert look_at(str(tmp_path / "a.parquet"), Dataset()) == (2, [])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
        look_at(str(tmp_path / "b.parquet"), Dataset())


def test_notes_say_what_does_nothing(inputs, tmp_path):
    words = ("sequence_parallel=true", "optimizer.decay_steps=2", "steps=5")
    notes = " ".join(checked(inputs, tmp_path / "t", "qwen35vl_sft", *words).notes)
    assert (
        "sequence_parallel=true does nothing" in notes
        and "is for schedule=wsd" in notes
        and "saving.every=500" in notes
    )


@pytest.mark.parametrize(("recipe", "itemsize"), [("qwen35vl_sft", 2), ("qwen35vl_lora", 4)])
def test_the_disk_must_hold_the_target_and_one_checkpoint_more_than_are_kept(
    inputs, tmp_path, recipe, itemsize, monkeypatch
):
    words = ("saving.keep=3", "saving.every=2", "steps=9")
    made = checked(inputs, tmp_path / "t", recipe, *words)
    count = made.parameters if recipe == "qwen35vl_sft" else made.trained
    assert made.step_bytes == itemsize * count + MASTER * made.trained
    assert made.disk_needed == itemsize * count + 4 * made.step_bytes
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(0, 0, made.disk_needed - 1))
    with pytest.raises(UserError, match=r"needs .*free"):
        checked(inputs, tmp_path / "t", recipe, *words)


def test_moments_of_16_bits_make_checkpoints_smaller(inputs, tmp_path):
    wide, narrow = (checked(inputs, tmp_path / "t", "qwen35vl_sft", f"optimizer.state={s}") for s in ("fp32", "bf16"))
    assert wide.step_bytes - narrow.step_bytes == 4 * wide.trained
    full = checked(inputs, tmp_path / "t", "qwen35vl_sft", "optimizer.state=bf16", "precision=fp32")
    adapters = checked(inputs, tmp_path / "t", "qwen35vl_lora", "optimizer.state=bf16")
    assert [made.step_bytes for made in (full, adapters)] == [(4 + MASTER) * made.trained for made in (full, adapters)]


@pytest.mark.parametrize(
    ("words", "there", "most"),
    [("", 0, 3), ("steps=9 saving.every=0", 0, 3), ("steps=9 saving.every=0 saving.keep=1", 0, 2), ("saving.keep=4", 2, 5)],
)  # fmt: skip
def test_a_run_needs_room_for_the_checkpoints_it_keeps_and_the_one_it_writes(inputs, tmp_path, words, there, most):
    """Also a short one, which may be stopped, and so write one, again and again."""
    for step in range(1, there + 1):
        checkpoint_directory(tmp_path / "t.steps", step).mkdir(parents=True)
    made = checked(inputs, tmp_path / "t", "qwen35vl_sft", *words.split())
    assert made.disk_needed == 2 * made.parameters + most * made.step_bytes


def test_checkpoints_on_another_disk_make_no_room_for_the_target(inputs, tmp_path, monkeypatch):
    recipe, scratch = "qwen35vl_sft", tmp_path / "scratch"
    words = (f"saving.directory={scratch}", "saving.keep=1")
    checkpoint_directory(scratch, 3).mkdir(parents=True)
    (checkpoint_directory(scratch, 3) / "a.distcp").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(preflight, "_device", lambda place: scratch in (place, *place.parents))
    made = checked(inputs, tmp_path / "t", recipe, *words)
    assert made.disk_needed == 2 * made.parameters
    free = {scratch: 2 * made.step_bytes - (1 << 20), tmp_path: made.disk_needed}
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free[place]))
    checked(inputs, tmp_path / "t", recipe, *words)
    for place in free:
        free[place] -= 1
        with pytest.raises(UserError, match=rf"but {place} has"):
            checked(inputs, tmp_path / "t", recipe, *words)
        free[place] += 1


def of_published(size, layout, **settings):
    given = dict(micro_batch_size=1, max_length=4096, itemsize=2, recompute="full", sequence_parallel=False)
    return memory.activations(published(*PUBLISHED[size]), as_layout(layout).resolve(), **(given | settings))


def test_activations_grow_and_shrink_with_what_they_are_made_of():
    apart = {"language": {"tp": 2}, "images": {"tp": 2}}
    base = of_published("9B", apart)
    for settings, more in (
        ({"micro_batch_size": 2}, True), ({"max_length": 8192}, True), ({"recompute": "none"}, True), ({"recompute": "selective"}, True), ({"sequence_parallel": True}, False),
        ({"itemsize": 4}, True),
    ):  # fmt: skip
        other = of_published("9B", apart, **settings)
        assert (other["language"] > base["language"]) is more, settings
    assert of_published("9B", {"language": {"tp": 4}, "images": {"tp": 2}})["language"] < base["language"]
    assert of_published("9B", apart, images_train=False)["images"] < base["images"]
    assert of_published("9B", apart, recompute="none")["language"] > 2 * base["language"]
    assert of_published("9B", apart, head_trains=False)["language"] < base["language"]


def test_state_is_shared_out_over_replicas_as_megatron_core_does():
    one, four = (memory.state(1000, 1000, 0, dp, 2) for dp in (1, 4))
    assert (one.weights, one.gradients, one.optimizer) == (2000, 4000, 12000)
    assert (four.weights, four.gradients, four.optimizer) == (2000, 4000, 3000)
    assert memory.state(1000, 1000, 0, 1, 4).optimizer == 8000, "weights in fp32 are their own master copy"
    assert memory.state(1000, 0, 10, 1, 2) == memory.Memory(2040, 40, 80, 0)


def test_what_does_not_train_needs_no_gradients(inputs, tmp_path):
    held = checked(inputs, tmp_path / "t", "qwen35vl_sft").memory
    assert held["images"].gradients > 0 and held["language"].optimizer == 12 * held["language"].gradients // 4
    frozen = checked(inputs, tmp_path / "t", "qwen35vl_sft", "freeze=images")
    assert frozen.memory["images"].gradients == frozen.memory["images"].optimizer == 0
    assert frozen.trained < frozen.parameters
    adapters = checked(inputs, tmp_path / "t", "qwen35vl_lora").memory
    assert adapters["images"].gradients == 0 < adapters["language"].gradients < held["language"].gradients
