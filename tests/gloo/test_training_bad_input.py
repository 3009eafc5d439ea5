"""What goes wrong in a fine-tuning run: a clear word, an exit code, nothing lost, nobody left waiting."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimo_jobs.conversion.tiny import Shape, make_tiny
from mimo_jobs.training import checkpoints, loop, run
from mimo_jobs.training.data import loader
from mimo_jobs.training.saved import completed, read
from tests.gloo.images import write_data
from tests.gloo.jobs import DATA_PARALLEL, DISJOINT, FAN_IN, Ended, Job, settings, train

pytestmark = pytest.mark.gloo

SAMPLES = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    make_tiny(str(path))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", SAMPLES)


def failed(ended: Ended, code: int, message: str, transient: bool = False) -> None:
    """All ranks end with the code; result.json has the message, on a screen, and the log no traceback."""
    assert set(ended.codes) == {code}, f"{ended.codes}\n{ended.said[-4000:]}"
    error = ended.error
    assert message in error["message"], error
    assert (error["exit_code"], error["transient"]) == (code, transient)
    assert len(error["message"]) < 1500 and error["message"].count("\n") < 12
    assert "Traceback" not in ended.said, ended.said[-4000:]


def rows_of(data: Path) -> list[dict]:
    return [json.loads(line) for line in data.read_text().splitlines()]


def write_rows(data: Path, rows: list[dict]) -> None:
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------ before it starts


def no_answers(data: Path) -> None:
    write_rows(data, [{"messages": row["messages"][:1]} for row in rows_of(data)])


def image_tokens_in_text(data: Path) -> None:
    rows = rows_of(data)
    for row in rows:
        row["messages"][0]["content"] = "<|vision_start|><|image_pad|><|vision_end|> what is it?"
    write_rows(data, rows)


def unreadable_first(data: Path) -> None:
    for name in ("0.png", "1.png"):
        (data.parent / name).write_bytes(b"no image")


DATA: dict[str, tuple[Callable[[Path], Any], dict[str, Any], int, str]] = {
    "empty": (lambda data: data.write_text(""), {}, 1, "no rows in it"),
    "missing": (lambda data: data.unlink(), {}, 1, "train.jsonl"),
    "no assistant": (no_answers, {}, 1, "no message of the assistant"),
    "image tokens without images": (image_tokens_in_text, {}, 1, "holds the model's own token <|image_pad|>"),
    "unreadable image, stop": (
        unreadable_first, {"dataset": {"on_bad": "stop", "shuffle": False}}, 1, "train.jsonl:1: ",
    ),
    "too long, stop": (lambda data: None, {"dataset": {"on_bad": "stop", "max_length": 20}}, 1, "more than dataset.max_length=20"),
    "all too long": (lambda data: None, {"dataset": {"max_length": 20}}, 1, "samples are bad"),
    "all too long, packed": (lambda data: None, {"dataset": {"max_length": 20, "packing": True}}, 1, "samples are bad"),
    "too long, packed, stop": (
        lambda data: None, {"dataset": {"on_bad": "stop", "max_length": 45, "packing": True}}, 1, "set dataset.on_bad=skip",
    ),
    "columns of no schema": (lambda data: write_rows(data, [{"a": 1, "b": 2}]), {}, 1, "fit no schema"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_unusable_data_is_named(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    spoil, changes, code, message = DATA[name]
    spoil(data)
    ended = train(tmp_path / "record", DISJOINT, source=model, data=data, target=tmp_path / "sft", **changes)
    failed(ended, code, message)
    if "stop" in name:
        assert "set dataset.on_bad=skip to go on without it" in ended.error["message"]
    assert not (tmp_path / "sft").exists() and completed(Path(f"{tmp_path}/sft.steps")) == []


def ahead(_rank: int) -> None:
    """As on a GPU."""
    loop._runs_ahead = lambda _device: True


def test_a_step_without_a_good_sample_is_left_out_also_where_steps_run_ahead(
    model: Path, data: Path, tmp_path: Path
) -> None:
    for name in ("2.png", "3.png", "12.png", "13.png"):
        (data.parent / name).write_bytes(b"no image")
    runs = {}
    for name, before in (("plain", lambda _rank: None), ("ahead", ahead)):
        ended = train(
            tmp_path / name, DISJOINT, source=model, data=data, target=tmp_path / f"{name}.out", before=before,
            dataset={"shuffle": False}, global_batch_size=2, micro_batch_size=1, steps=8, saving={"every": 2, "keep": 9},
        )  # fmt: skip
        assert ended.codes == [0, 0], ended.said[-4000:]
        assert [e.text.split(":")[0] for e in ended.history.events if "left out" in e.text] == [
            f"step {number} was left out" for number in (2, 7)
        ]
        losses = {number: values["loss"] for number, values in ended.history.steps.items()}
        saved = completed(Path(f"{tmp_path / name}.out.steps"))
        runs[name] = losses, [step for step, _ in saved], [read(place).losses for _, place in saved]
    assert runs["plain"] == runs["ahead"]
    assert list(runs["plain"][0]) == [1, 3, 4, 5, 6, 8] and runs["plain"][1] == [8, 6, 4, 2]


def test_the_step_before_a_bad_sample_is_told_where_steps_run_ahead(model: Path, data: Path, tmp_path: Path) -> None:
    (data.parent / "13.png").write_bytes(b"no image")
    ended = train(
        tmp_path / "record", DISJOINT, source=model, data=data, target=tmp_path / "sft", before=ahead,
        dataset={"on_bad": "stop", "shuffle": False},
    )  # fmt: skip
    failed(ended, 1, "bad sample in step 4: train.jsonl:14: ")
    assert list(ended.history.steps) == [1, 2, 3]


SETTINGS: dict[str, tuple[dict[str, Any], int, str]] = {
    "batch not divisible": ({"global_batch_size": 5}, 2, "global_batch_size=5"),
    "keep=0": ({"saving": {"keep": 0}}, 2, "saving.keep=0"),
    "warm-up longer than the run": ({"optimizer": {"warmup_steps": 6}}, 2, "optimizer.warmup_steps=6"),
    "no steps": ({"steps": 0}, 2, "steps=0"),
    "wrong target names": ({"job": "lora", "lora": {"targets": "q_prj"}}, 2, "q_prj"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_setting_is_a_usage_error(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    changes, code, message = SETTINGS[name]
    failed(
        train(tmp_path / "record", DATA_PARALLEL, source=model, data=data, target=tmp_path / "sft", **changes),
        code,
        message,
    )


def test_sources_that_are_no_checkpoint_or_another_model(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "neither").mkdir()
    failed(
        train(tmp_path / "r0", source=tmp_path / "neither", data=data, target=tmp_path / "a"),
        1,
        str(tmp_path / "neither"),
    )
    make_tiny(str(tmp_path / "wide"), shape=Shape(ffn=128))
    for file in (tmp_path / "wide").glob("*.safetensors*"):
        file.unlink()
    for file in model.glob("*.safetensors*"):
        (tmp_path / "wide" / file.name).write_bytes(file.read_bytes())
    ended = train(tmp_path / "r1", FAN_IN, source=tmp_path / "wide", data=data, target=tmp_path / "b")
    failed(ended, 1, "config.json calls for")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    ended = train(tmp_path / "r2", source=model, data=data, target=tmp_path / "there")
    failed(ended, 1, "exists; choose another target")
    assert (tmp_path / "there" / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------- while it runs


@pytest.mark.parametrize("packing", [False, True], ids=["one a row", "packed"])
def test_bad_samples_are_counted_named_and_left_out(packing: bool, model: Path, data: Path, tmp_path: Path) -> None:
    unreadable_first(data)
    rows = rows_of(data)
    rows[6]["messages"][0]["content"].append({"type": "text", "text": "long " * 100})
    write_rows(data, rows)
    ended = train(
        tmp_path / "record", DISJOINT, source=model, data=data, target=tmp_path / "sft", steps=None, epochs=1.0,
        dataset={"max_length": 200, "packing": packing}, micro_batch_size=1, global_batch_size=2,
    )  # fmt: skip
    assert ended.summary["skipped"] == 3
    assert sum(v["samples"] for v in ended.history.steps.values()) == SAMPLES - 3
    events = [e.text for e in ended.history.events if e.kind == "bad sample"]
    for number in (1, 2, 7):
        assert any(f"train.jsonl:{number}:" in text for text in events), events
        assert f"bad sample, left out: train.jsonl:{number}:" in ended.said


def full_disk_run(model: Path, data: Path, base: Path, job: str, limit: int) -> Ended:
    """A run whose rank 1 cannot write what it has to in the checkpoint after step 4; the one after step 2 is there."""

    def before(rank: int) -> None:
        save = checkpoints.Checkpoints.save

        def limited(self: Any, saved: Any) -> None:
            if rank == 0 and saved.step == 4:
                self.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            save(self, saved)

        checkpoints.Checkpoints.save = limited

    return train(base / "record", FAN_IN, job=job, source=model, data=data, target=base / "out", before=before)


@pytest.mark.parametrize(("job", "limit"), [("sft", 100_000), ("lora", 30_000), ("sft", 3000)])
def test_a_full_disk_at_a_checkpoint_leaves_the_earlier_one_to_go_on_from(
    job: str, limit: int, model: Path, data: Path, tmp_path: Path
) -> None:
    ended = full_disk_run(model, data, tmp_path, job, limit)
    assert set(ended.codes) == {1}, ended.said[-3000:]
    error = ended.error
    assert "step-00000004.partial" in error["message"] and "File too large" in error["message"], error
    assert not error["transient"] and error["exit_code"] == 1
    ((step, directory),) = completed(Path(f"{tmp_path}/out.steps"))
    assert step == 2 and read(directory).step == 2
    again = train(tmp_path / "again", FAN_IN, job=job, source=model, data=data, target=tmp_path / "out")
    assert again.summary["steps"] == 6 and again.history.resumed == [2]


def test_a_full_disk_at_the_end_names_the_target_and_a_later_start_publishes(
    model: Path, data: Path, tmp_path: Path
) -> None:
    def before(_rank: int) -> None:
        publish = run._publish

        def limited(*args: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return publish(*args)

        run._publish = limited

    arguments: dict[str, Any] = dict(source=model, data=data, target=tmp_path / "sft", steps=2)
    ended = train(tmp_path / "record", FAN_IN, before=before, **arguments)
    assert ended.codes == [1, 1] and "make room and start again" in ended.error["message"], ended.said[-3000:]
    assert str(tmp_path) in ended.error["message"] and not (tmp_path / "sft").exists()
    again = train(tmp_path / "record", FAN_IN, **arguments)
    assert again.summary["steps"] == 2 and (tmp_path / "sft" / "mimo.json").exists()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_steps_of_another_run_are_refused_with_what_differs(model: Path, data: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = dict(
        source=model, data=data, target=tmp_path / "sft", saving={"directory": str(tmp_path / "steps")}
    )
    assert train(tmp_path / "r0", steps=2, **common).codes == [0]
    common["target"] = tmp_path / "other"
    ended = train(tmp_path / "r1", steps=2, optimizer={"lr": 2e-3}, seed=4, **common)
    failed(ended, 1, "optimizer.lr was 0.001, now 0.002")
    assert "seed was 0, now 4" in ended.error["message"]


def poisoned(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("layers.1.mlp.down_proj.weight"):
                tensor[3, 5] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    return target


STOPPED: dict[str, tuple[dict[str, Any], str, int]] = {
    "not a number in the weights": ({"poison": True}, "step 1: the loss is nan", 0),
    "a learning rate that explodes": (
        {"optimizer": {"lr": 1e30, "clip_grad": 0.0}, "saving": {"every": 1}},
        "step 2: the loss is ",
        1,
    ),
    "max_loss": ({"stop": {"max_loss": 1e-3}}, "above stop.max_loss=0.001", 0),
    "spike": (
        {"optimizer": {"lr": 3.0, "warmup_steps": 4}, "stop": {"spike": 1.01}},
        "above stop.spike=1.01 times the median",
        0,
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_loss_that_goes_wrong_stops_the_run_before_it_is_saved(
    name: str, model: Path, data: Path, tmp_path: Path
) -> None:
    changes, message, saved = STOPPED[name]
    changes = dict(changes)
    source = poisoned(model, tmp_path / "nan") if changes.pop("poison", False) else model
    changes.setdefault("saving", {"every": 0})
    ended = train(tmp_path / "record", DISJOINT, source=source, data=data, target=tmp_path / "sft", **changes)
    failed(ended, 1, message)
    assert "Its samples: train.jsonl:" in ended.error["message"]
    assert any("samples: train.jsonl:" in e.text for e in ended.history.events if e.kind == "warning")
    assert len(completed(Path(f"{tmp_path}/sft.steps"))) <= saved and not (tmp_path / "sft").exists()


# ------------------------------------------------------------------------------------------------------- faults of ranks


def at_step(number: int, do: Callable[[int], None]) -> Callable[[int], None]:
    """Have every rank call ``do(rank)`` in the midst of a step."""

    def before(rank: int) -> None:
        check = loop._check

        def faulty(run: Any, step: Any, loss: float, norm: float) -> None:
            if run.done + 1 == number:
                do(rank)
            check(run, step, loss, norm)

        loop._check = faulty

    return before


def die(victim: int) -> Callable[[int], None]:
    return lambda rank: os.kill(os.getpid(), signal.SIGKILL) if rank == victim else None


def raise_error(victim: int) -> Callable[[int], None]:
    def do(rank: int) -> None:
        if rank == victim:
            raise RuntimeError("made up")

    return do


def die_while_writing(victim: int) -> Callable[[int], None]:
    def before(rank: int) -> None:
        write = checkpoints._Writing._write

        def killed(self: Any, arguments: Any) -> None:
            if rank == victim and self.saved.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, arguments)

        checkpoints._Writing._write = killed

    return before


# In step 5 the checkpoint of step 2 is published for certain: that of step 4 waits for it.
RANKS: dict[str, tuple[Callable[[int], None], str, bool, int | None]] = {
    "killed in a step": (at_step(5, die(1)), "rank 1 ended unexpectedly", True, 1),
    "rank 0 killed in a step": (at_step(5, die(0)), "rank 0 ended unexpectedly", True, 0),
    "killed while it writes": (die_while_writing(1), "rank 1 ended unexpectedly", True, 1),
    "a defect in a step": (at_step(5, raise_error(1)), "RuntimeError: made up (a defect, at ", False, None),
}


@pytest.mark.parametrize("name", RANKS)
def test_a_rank_that_fails_ends_all_in_bounded_time(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    before, message, transient, killed = RANKS[name]
    ended = train(
        tmp_path / "record", FAN_IN, source=model, data=data, target=tmp_path / "sft", before=before, timeout=40
    )
    assert ended.codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(2)], ended.said[-4000:]
    assert message in ended.error["message"] and ended.error["transient"] == transient, ended.error
    saved = completed(Path(f"{tmp_path}/sft.steps"))
    assert [step for step, _ in saved] == [2] and read(saved[0][1]).step == 2


def test_a_data_worker_that_is_killed_ends_the_run(model: Path, data: Path, tmp_path: Path) -> None:
    def children(job: Job) -> list[int]:
        """Processes that the fork server of rank 1 started."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, group = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[2])
                line = (stat.parent / "cmdline").read_text()
            except OSError:
                continue
            if group == job.pids[1] and pid != group and "forkserver" in line:
                found.append(pid)
        return sorted(found)

    arguments = settings(dict(source=model, data=data, target=tmp_path / "sft", steps=400, dataset={"workers": 2}))
    with Job(tmp_path / "record", "sft", FAN_IN, **arguments) as job:
        job.wait_until(lambda: (tmp_path / "record" / "metrics.jsonl").exists() and len(children(job)) >= 3)
        os.kill(children(job)[-1], signal.SIGKILL)
        begun = time.monotonic()
        ended = job.end(60)
        assert time.monotonic() - begun < 40
        failed(ended, 1, "a process that reads data ended")
        deadline = time.monotonic() + 30
        while (left := children(job)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], [
            Path(f"/proc/{pid}/status").read_text()[:200] + Path(f"/proc/{pid}/cmdline").read_text() for pid in left
        ]


@pytest.mark.parametrize("victims", [{0, 1}, {0}, {1}])
@pytest.mark.parametrize("start", [lambda _rank: None, ahead])
def test_a_defect_in_a_data_worker_is_shown_with_its_sample(
    start: Callable[[int], None], victims: set[int], model: Path, data: Path, tmp_path: Path
) -> None:
    def before(rank: int) -> None:
        start(rank)
        load = loader._Work.load

        def broken(self: Any, want: Any) -> Any:
            if rank in victims and 7 in want.samples:
                raise ZeroDivisionError("made up")
            return load(self, want)

        loader._Work.load = broken

    ended = train(
        tmp_path / "record", FAN_IN, source=model, data=data, target=tmp_path / "sft", before=before, timeout=40
    )
    assert ended.codes == [1, 1]
    assert "a defect" in ended.error["message"] and "ZeroDivisionError: made up" in ended.said
    assert not ended.error["transient"]
