"""``python -m benchmarks.headline`` in small: its commands in forked processes, without the seconds that imports and NeMo-Run take."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from benchmarks import headline
from benchmarks.headline_parts import Started
from launchers import base, local
from mimo_jobs import cli, worker
from recipes import RECIPES, quickstart

pytestmark = pytest.mark.gloo
FORK = multiprocessing.get_context("fork")
SMALL = [
    "--shape",
    "tiny",
    "--ranks",
    "2",
    "--backend",
    "gloo",
    "--steps",
    "2",
    "--resume-steps",
    "1",
    "--recipe-steps",
    "1",
]


class Command:
    """A command as `subprocess.Popen` has it, as far as the benchmark uses it."""

    def __init__(self, words: list[str], environment: dict[str, str], out: IO[bytes], err: IO[bytes]) -> None:
        self.process = FORK.Process(target=_command, args=(words, environment, out.fileno(), err.fileno()))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, _: int) -> None:
        self.process.terminate()


def _command(words: list[str], environment: dict[str, str], out: int, err: int) -> None:
    os.environ.update(environment)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    local.launch = _launch
    sys.exit(cli.main(words))


def _launch(job: base.Job, _: base.Watch) -> None:
    base.clear(job.record)
    (job.record / base.LOGS).mkdir(exist_ok=True)
    os.environ["MIMO_JOBS_LOGS"] = str(job.record / base.LOGS)
    ranks = [FORK.Process(target=_rank, args=(job, rank)) for rank in range(job.world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()


def _rank(job: base.Job, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world_size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    sys.exit(worker.main([str(job.file)]))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Started, "_begin", lambda _, *arguments: Command(*arguments))


def run(place: Path, *words: str) -> dict[str, Any]:
    headline.main([*SMALL, "--workdir", str(place), "--output", str(place / "result.json"), *words])
    return json.loads((place / "result.json").read_text())


@pytest.mark.usefixtures("forked")
def test_conversion_and_training_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "--only", "conversion", "training")
    assert not found["complete"] and list(tmp_path.iterdir()) == [tmp_path / "result.json"]
    verified, trained = found["conversion"]["verify"], found["training"]
    assert (verified["bit_exact"], verified["mismatches"], verified["of"]["mtp"]) == (103, 0, 15)
    assert "images on ranks of their own" in trained["planned"]["why"]
    assert list(trained["losses"]) == ["1", "2", "3"] and trained["resumed"]["at"] == 2
    assert trained["export"]["parity"]["equal"] == 103 and trained["export"]["as_before_training"]["mtp"] == 15
    assert "rank 1 was killed after step 2; nemo-run: qwen35vl_sft: rank 1 ended" in capsys.readouterr().out


@pytest.mark.usefixtures("forked")
def test_every_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quickstart.quickstart  # its chain has tests of its own

    @functools.wraps(whole)
    def begun(**fields: str) -> dict[str, Any]:
        return {name: step for name, step in whole(**fields).items() if name in ("make", "data", "import")}

    monkeypatch.setattr(quickstart, "quickstart", begun)
    found = run(tmp_path, "--only", "recipes")["recipes"]
    assert {name: one["rc"] for name, one in found.items()} == dict.fromkeys(RECIPES, 0)
    assert all(f"loss of {name}" in found[name] for name in ("qwen35vl_sft", "qwen35vl_lora"))


@pytest.mark.usefixtures("forked")
def test_a_command_that_fails_is_named_and_no_result_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--only", "training", "--set", "optimizer.lr=-1")
    said = str(ended.value)
    assert "exit code 2: nemo-run recipes.qwen35vl_sft" in said and "optimizer.lr=-1: expected at least 0" in said
    (work,) = tmp_path.iterdir()
    assert [p.name for p in work.iterdir()] == ["runs"] and str(work) in said


def test_the_plan_of_the_27b_on_8_ranks_as_a_command(tmp_path: Path) -> None:
    words = [
        "--backend",
        "gloo",
        "--only",
        "plan",
        "--workdir",
        str(tmp_path),
        "--output",
        str(tmp_path / "result.json"),
    ]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.headline", *words], cwd=headline.ROOT, check=True, capture_output=True
    )
    found = json.loads((tmp_path / "result.json").read_text())
    assert not found["complete"] and found["plan"]["covered_once"] == {
        "language": 850,
        "vision": 333,
        "head": 1,
        "mtp": 15,
    }
    assert len(found["plan"]["bytes_per_rank"]) == 8
    apart = found["plan"]["training on 8 H200, language TP 4, images apart"]
    assert apart["fits"] and apart["best"]["layout"]["images"]["rank_offset"] == 4
