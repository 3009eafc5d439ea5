"""What a run trains is what transformers would: the curve of its loss, the exported model, adapters, packed samples, resumed epochs."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mimo_jobs.checkpoint.manifest import read_manifest
from mimo_jobs.conversion.tiny import make_tiny
from mimo_jobs.training import loop
from mimo_jobs.training.config import Optimizer
from tests.conversion_ranks import convert
from tests.gloo.batches import tiny
from tests.gloo.curves import LAYOUTS, batch_of, curve, largest_difference
from tests.gloo.images import write_data
from tests.gloo.jobs import DATA_PARALLEL, DISJOINT, DISJOINT_PP, FAN_IN, ONE, train
from tests.gloo.training import exact_run, samples_of_a_run

pytestmark = pytest.mark.gloo

SAMPLES = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint in fp32, so that an export in its own dtype loses nothing."""
    path = tmp_path_factory.mktemp("model") / "hf"
    make_tiny(str(path))
    for file in path.glob("*.safetensors"):
        save_file({n: t.float() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def mimo(model: Path) -> Path:
    """The same as a MIMO checkpoint."""
    convert(model.parent / "import", "import", FAN_IN, model=str(model), target=str(model.parent / "mimo"))
    return model.parent / "mimo"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), SAMPLES)


def loss_in_transformers(model: Any, directory: Path, data: Path) -> float:
    """Mean loss over what the assistant says and its end token, each sample by itself through the processor of the checkpoint."""
    processor = AutoProcessor.from_pretrained(directory)
    total, count = 0.0, 0
    for row in map(json.loads, data.read_text().splitlines()):
        for message in row["messages"]:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = Image.open(data.parent / part["image"])
        whole, asked = (
            processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=prompt
            )
            for messages, prompt in ((row["messages"], False), (row["messages"][:1], True))
        )
        start, stop = asked["input_ids"].shape[1], whole["input_ids"].shape[1] - 1  # the newline after the end token
        ids = whole["input_ids"]
        whole["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            logits = model(**whole).logits[0, start - 1 : stop - 1]
        total += F.cross_entropy(logits.double(), ids[0, start:stop], reduction="sum").item()
        count += stop - start
    return total / count


def loaded(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def test_three_layouts_have_the_loss_curve_of_transformers() -> None:
    """25 steps here, 50 in benchmarks/training_parity.py; against AdamW, clipping and a cosine in fp64."""
    config, model = tiny()
    batch, steps, settings = 4, 25, Optimizer(lr=1e-3, warmup_steps=5, weight_decay=0.1)
    samples = samples_of_a_run(config, 20)
    exact = exact_run(model, [s for i in range(steps) for s in batch_of(samples, batch, i)], batch, steps, settings)
    curves = {
        n: curve(layout, config, model.state_dict(), samples, batch, steps, settings) for n, layout in LAYOUTS.items()
    }
    assert exact[-1] < 0.7 * exact[0]
    assert {n: d for n, c in curves.items() if not (d := largest_difference(c, exact)) < 1e-4} == {}
    one = curves["one rank"]
    assert {n: d for n, c in curves.items() if not (d := largest_difference(c, one)) < 1e-4} == {}


@pytest.mark.parametrize(
    ("source", "trained", "exported"), [("hf", FAN_IN, DISJOINT_PP), ("mimo", DISJOINT_PP, FAN_IN)]
)
def test_an_export_has_the_loss_of_the_model_that_was_trained(
    source: str, trained: dict, exported: dict, model: Path, mimo: Path, data: Path, tmp_path: Path
) -> None:
    beginning = model if source == "hf" else mimo
    done = train(
        tmp_path / "record", trained, source=beginning, data=data, target=tmp_path / "sft", steps=4,
        validation={"data": str(data), "every": 0, "samples": 0},
    )  # fmt: skip
    assert done.summary["loss"] < done.summary["first_loss"]
    convert(tmp_path / "export", "export", exported, source=str(tmp_path / "sft"), target=str(tmp_path / "out"))
    loss = loss_in_transformers(loaded(tmp_path / "out"), tmp_path / "out", data)
    assert loss == pytest.approx(done.history.validation[4], rel=1e-5)
    before, after = (
        {n: t for file in place.glob("*.safetensors") for n, t in load_file(file).items()}
        for place in (model, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    carried = {n for n in before if n.startswith("mtp.")}
    assert carried and {n for n in carried if before[n].numpy().tobytes() != after[n].numpy().tobytes()} == set()
    assert [n for n in before.keys() - carried if torch.equal(before[n], after[n])] == []


def test_adapters_memorise_32_samples_and_mean_the_same_to_peft_and_merged(
    model: Path, mimo: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", 32)
    done = train(
        tmp_path / "record", job="lora", source=mimo, data=data, target=tmp_path / "adapter", steps=60, global_batch_size=16,
        micro_batch_size=16, optimizer={"lr": 1e-2, "warmup_steps": 5}, saving={"every": 0}, lora={"rank": 16, "alpha": 32.0},
        validation={"data": str(data), "every": 0, "samples": 0}, timeout=200,
    )  # fmt: skip
    assert done.losses[0] > 5 and max(done.losses[-2:]) < 0.1
    validation = done.history.validation[60]
    assert validation < 0.1
    adapted = peft.PeftModel.from_pretrained(loaded(model), str(tmp_path / "adapter")).eval()
    assert loss_in_transformers(adapted, model, data) == pytest.approx(validation, rel=1e-4)
    convert(
        tmp_path / "export", "export", FAN_IN, source=str(mimo), target=str(tmp_path / "merged"), adapter=str(tmp_path / "adapter")
    )  # fmt: skip
    assert loss_in_transformers(loaded(tmp_path / "merged"), model, data) == pytest.approx(validation, rel=1e-4)


def test_packed_samples_have_the_loss_of_samples_alone(model: Path, data: Path, tmp_path: Path) -> None:
    """All samples in one step, with several sequences of several samples in a micro-batch."""
    common: dict[str, Any] = dict(source=model, data=data, steps=None, saving={"every": 0})
    packed = train(
        tmp_path / "packed", DISJOINT, target=tmp_path / "p", global_batch_size=6, dataset={"packing": True, "max_length": 150}, **common
    )  # fmt: skip
    alone = train(tmp_path / "alone", target=tmp_path / "a", global_batch_size=12, **common)
    ours, theirs = packed.history.steps[1], alone.history.steps[1]
    assert ours["samples"] == theirs["samples"] == SAMPLES and ours["tokens"] == theirs["tokens"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("job", ["sft", "lora"])
def test_validation_does_not_change_what_is_trained(job: str, model: Path, data: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = dict(job=job, source=model, data=data, steps=3)
    if job == "lora":
        common["lora"] = {"rank": 4, "dropout": 0.2}
    validation = {"data": str(data), "every": 1, "samples": 5}
    plain = train(tmp_path / "r0", FAN_IN, target=tmp_path / "without", **common)
    watched = train(tmp_path / "r1", FAN_IN, target=tmp_path / "with", validation=validation, **common)
    assert plain.losses == watched.losses
    assert list(watched.history.validation) == [1, 2, 3]
    if job == "sft":
        assert read_manifest(tmp_path / "without").digests == read_manifest(tmp_path / "with").digests
    else:
        ours, theirs = (tmp_path / n / "adapter_model.safetensors" for n in ("without", "with"))
        assert ours.read_bytes() == theirs.read_bytes()


def _ahead(_rank: int) -> None:
    loop._runs_ahead = lambda _device: True


def test_a_step_launched_before_the_last_ones_numbers_are_read_changes_nothing(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """As on a GPU: with checkpoints and validation between steps, and a run that is stopped and goes on."""
    common: dict[str, Any] = dict(
        source=model, data=data, steps=7, saving={"every": 3}, validation={"data": str(data), "every": 5, "samples": 4},
        global_batch_size=4,
    )  # fmt: skip
    plain = train(tmp_path / "r0", FAN_IN, target=tmp_path / "plain", **common)
    ahead = train(tmp_path / "r1", FAN_IN, target=tmp_path / "ahead", before=_ahead, **common)
    names = ("loss", "grad_norm", "lr", "tokens", "samples")
    assert [[s[n] for n in names] for s in plain.history.steps.values()] == [
        [s[n] for n in names] for s in ahead.history.steps.values()
    ]
    assert list(ahead.history.steps) == [1, 2, 3, 4, 5, 6, 7] and ahead.history.validation == plain.history.validation
    stop = watched(tmp_path / "ids", 1)

    def before(rank: int) -> None:
        _ahead(rank)
        stop(rank)

    first = train(tmp_path / "r2", FAN_IN, target=tmp_path / "stopped", before=before, **common)
    assert first.error["message"] == "interrupted" and list(first.history.steps) == [1, 2]
    rest = train(tmp_path / "r2", FAN_IN, target=tmp_path / "stopped", before=_ahead, **common)
    assert rest.losses == plain.losses
    digests = [read_manifest(tmp_path / n).digests for n in ("plain", "ahead", "stopped")]
    assert digests[0] == digests[1] == digests[2]


# ------------------------------------------------------------------------------------------- every sample once an epoch


def watched(file: Path, stop_after: int | None = None) -> Callable[[int], None]:
    """Have rank 0 write down the samples of each step that is trained; it is told to stop once ``stop_after`` are."""

    def before(rank: int) -> None:
        log = loop._log

        def noted(run: Any, launched: Any, *rest: Any) -> None:
            step = launched.step
            if rank == 0:
                ids = [step.table.ids[s] for row in step.table.rows for s in row]
                with file.open("a") as out:
                    out.write(json.dumps([run.done, ids]) + "\n")
                if run.done == stop_after:
                    os.kill(os.getpid(), signal.SIGTERM)
            log(run, launched, *rest)

        loop._log = noted

    return before


def trained_ids(file: Path) -> dict[int, list[str]]:
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "a step was trained twice, or not at all"
    return dict(found)


EPOCHS = {
    "not divisible": (1.0, None, 5, {}, Counter({1: 12})),
    "half an epoch": (0.5, None, 4, {}, Counter({1: 6})),
    "two and a half, packed": (2.5, None, 2, {"packing": True, "max_length": 150}, None),
    "steps beyond the epochs": (1.0, 5, 4, {}, Counter({1: 4, 2: 8})),
    "a batch larger than the data": (1.0, None, 32, {}, Counter({1: 12})),
}


@pytest.mark.parametrize("name", EPOCHS)
def test_an_epoch_has_every_sample_once(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    epochs, steps, batch, dataset, expected = EPOCHS[name]
    done = train(
        tmp_path / "record", DISJOINT, source=model, data=data, target=tmp_path / "sft", steps=steps, epochs=epochs,
        global_batch_size=batch, micro_batch_size=1, dataset=dataset, saving={"every": 0}, before=watched(tmp_path / "ids"),
    )  # fmt: skip
    trained = trained_ids(tmp_path / "ids")
    assert len(trained) == done.summary["steps"]
    times = Counter(i for ids in trained.values() for i in ids)
    if expected is not None:
        assert Counter(times.values()) == expected
    else:  # a fraction of the sequences, whose samples are not as many
        assert len(times) == SAMPLES and set(times.values()) <= {2, 3} and 3 in times.values()
    in_order = [i for step in sorted(trained) for i in trained[step]]
    assert len(set(in_order[:SAMPLES])) == min(SAMPLES, len(in_order))


@pytest.mark.parametrize("packing", [False, True], ids=["one a row", "packed"])
def test_a_run_goes_on_with_the_same_samples_under_another_data_parallel_size(
    packing: bool, model: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", 11)
    common: dict[str, Any] = dict(
        source=model, data=data, steps=None, epochs=2.0, global_batch_size=2 if packing else 4, micro_batch_size=1,
        dataset={"packing": packing, "max_length": 150},
    )  # fmt: skip
    whole = train(tmp_path / "r0", ONE, target=tmp_path / "whole", before=watched(tmp_path / "ids"), **common)
    wanted = trained_ids(tmp_path / "ids")
    assert set(Counter(i for ids in wanted.values() for i in ids).values()) == {2}
    first = train(
        tmp_path / "r1", ONE, target=tmp_path / "sft", before=watched(tmp_path / "again", stop_after=2), **common
    )
    assert first.codes == [1] and first.error["message"] == "interrupted" and first.error["transient"]
    stopped_at = len(trained_ids(tmp_path / "again"))
    assert 2 <= stopped_at < len(wanted)
    rest = train(tmp_path / "r1", DATA_PARALLEL, target=tmp_path / "sft", before=watched(tmp_path / "again"), **common)
    assert rest.history.resumed == [stopped_at]
    assert trained_ids(tmp_path / "again") == wanted
    assert rest.losses == pytest.approx(whole.losses, rel=1e-3)
    assert {n: v["lr"] for n, v in rest.history.steps.items()} == {n: v["lr"] for n, v in whole.history.steps.items()}


# ------------------------------------------------------------------------------------------------- less usual runs go on


TP2_PP2 = {"language": {"tp": 2, "pp": 2}, "images": {"rank_offset": 4}, "world_size": 5}
RESUMED: dict[str, tuple[dict, dict[str, Any]]] = {
    "adapters with dropout": (
        FAN_IN,
        {"job": "lora", "lora": {"rank": 4, "dropout": 0.3, "targets": "language,images"}},
    ),
    "adapters of images alone": (DISJOINT, {"job": "lora", "lora": {"rank": 4, "targets": "images"}}),
    "tied embeddings at tp2 pp2": (TP2_PP2, {"sequence_parallel": True}),
    "language frozen, no checkpoints on the way, keep=1": (
        DISJOINT_PP,
        {"freeze": "language", "saving": {"every": 0, "keep": 1}},
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_ends_with_the_same_bits(name: str, model: Path, mimo: Path, data: Path, tmp_path: Path) -> None:
    layout, arguments = RESUMED[name]
    common: dict[str, Any] = dict(source=mimo, data=data, steps=5, optimizer={"warmup_steps": 2}, **arguments)
    whole = train(tmp_path / "r0", layout, target=tmp_path / "whole", **common)
    stopped = train(
        tmp_path / "r1", layout, target=tmp_path / "out", before=watched(tmp_path / "ids", stop_after=2), **common
    )
    assert stopped.error["message"] == "interrupted"
    rest = train(tmp_path / "r1", layout, target=tmp_path / "out", **common)
    assert rest.summary["steps"] == 5 and rest.losses == whole.losses
    assert rest.losses[-1] < rest.losses[0]
    assert [v["lr"] for v in rest.history.steps.values()] == [v["lr"] for v in whole.history.steps.values()]
    if "lora" in arguments:
        ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "out"))
        assert {n for n in ours if not torch.equal(ours[n], theirs[n])} == set() and ours.keys() == theirs.keys()
        assert {n for n in ours if "lora_B" in n and not ours[n].any()} == set()
        return
    begun, ours, theirs = (read_manifest(place).digests for place in (mimo, tmp_path / "whole", tmp_path / "out"))
    assert ours == theirs
    trained = {n for n in ours if ours[n] != begun[n]}
    live = {n for n in ours if not n.startswith("mtp.")}
    assert trained == ({n for n in live if ".visual." in n} if "freeze" in arguments else live)


def test_adapters_go_on_from_a_peft_directory(model: Path, data: Path, tmp_path: Path) -> None:
    validation = {"data": str(data), "every": 0, "samples": 0}
    first = train(
        tmp_path / "r0", job="lora", source=model, data=data, target=tmp_path / "first", steps=2, lora={"rank": 4, "alpha": 6.0}, validation=validation
    )  # fmt: skip
    second = train(
        tmp_path / "r1", FAN_IN, job="lora", source=model, data=data, target=tmp_path / "second", steps=1, global_batch_size=SAMPLES,
        lora={"adapter": str(tmp_path / "first")}, saving={"every": 0},
    )  # fmt: skip
    assert second.losses[0] == pytest.approx(first.history.validation[2], rel=1e-5)
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)


def test_one_sample_is_enough(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 1)
    done = train(
        tmp_path / "record", DATA_PARALLEL, source=model, data=data, target=tmp_path / "sft", steps=None, epochs=1.0
    )
    assert done.summary["steps"] == 1 and done.history.steps[1]["samples"] == 1
    values = done.history.steps[1]
    assert values["tokens_per_second"] == pytest.approx(values["tokens"] / values["seconds"])
    assert values["tokens_per_second_per_gpu"] == pytest.approx(values["tokens_per_second"] / 2)
