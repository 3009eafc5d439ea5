"""How far a step is: written without holding anybody up, shown where nothing can be redrawn, and asked for."""

import io
import json
import os
import time

import pytest
from rich.console import Console

from mimo_jobs import cli, console, records
from mimo_jobs.parallel import progress
from mimo_jobs.parallel.world import World
from mimo_jobs.records import read_json

NOTE = "loss 1.234 · grad 0.87 · lr 9.8e-06 · 12.3k tok/s/GPU · MFU 41 % · images 12 % language 80 % waiting 8 %"


@pytest.mark.speed
def test_the_last_state_is_there_when_the_job_ends(tmp_path):
    with World(0, 1, tmp_path) as world:
        start = time.monotonic()
        for step in range(10_000):
            world.progress("train", step + 1, 10_000, "steps", f"step {step + 1}")
        assert time.monotonic() - start < 2
    assert read_json(tmp_path / "progress.json") == {
        "phase": "train", "done": 10_000, "total": 10_000, "unit": "steps", "note": "step 10000",
    }  # fmt: skip


@pytest.mark.speed
def test_a_disk_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(progress.ProgressFile, "_write", lambda self, state: time.sleep(5))
    monkeypatch.setattr(progress, "END_SECONDS", 0.1)
    start = time.monotonic()
    with World(0, 1, tmp_path) as world:
        world.progress("train", 1, 2, "steps", NOTE)
        world.progress("train", 2, 2, "steps", NOTE)
    assert time.monotonic() - start < 2


def test_only_rank_0_writes(tmp_path):
    World(1, 2, tmp_path).progress("train", 1, 2, "steps")
    assert list(tmp_path.iterdir()) == []


def test_a_phase_has_no_note_of_the_one_before(tmp_path):
    with World(0, 1, tmp_path) as world:
        world.progress("train", 1, 1, "steps", NOTE)
        with world.phase("save", 10) as moved:
            moved(10)
    assert read_json(tmp_path / "progress.json") == {"phase": "save", "done": 10, "total": 10, "unit": "B"}


def _plain_view(monkeypatch, seconds):
    out = io.StringIO()
    monkeypatch.setattr(console, "TOLD_SECONDS", seconds)
    steps = console.Steps(Console(file=out, width=60, highlight=False, markup=False), 1)
    return out, steps


def test_off_a_terminal_a_note_is_a_line_now_and_then(monkeypatch):
    out, steps = _plain_view(monkeypatch, 0.3)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with steps.step("train") as view:
        for done in range(1, 101):
            view.watch({"phase": "train", "done": done, "total": 10_000, "unit": "steps", "note": f"{NOTE} [{done}]"})
            now += 0.01
        view.watch({"phase": "train", "done": 10_000, "total": 10_000, "unit": "steps", "note": f"{NOTE} [last]"})
        view.watch({"phase": "train", "done": 10_000, "total": 10_000, "unit": "steps", "note": f"{NOTE} [last]"})
    lines = [line for line in out.getvalue().splitlines() if "loss" in line]
    assert 4 <= len(lines) <= 6 and lines[0] == f"  train: 1 of 10000 steps · {NOTE} [1]"
    assert "ETA" in lines[1] and lines[-1].endswith("[last]")


def test_on_a_terminal_the_note_is_below_the_bar_and_cut_at_the_edge():
    out = io.StringIO()
    steps = console.Steps(Console(file=out, width=60, force_terminal=True, highlight=False, markup=False), 1)
    with steps.step("train") as view:
        view.watch({"phase": "train", "done": 5, "total": 10, "unit": "steps", "note": f"{NOTE}\n[red]"})
        assert view.live is not None
        view.live.refresh()
    shown = out.getvalue()
    assert "5 of 10 steps" in shown and "loss 1.234 · grad 0.87" in shown and "waiting" not in shown and "…" in shown


@pytest.fixture
def running(tmp_path, monkeypatch):
    """A run of this process whose training step says how it goes."""
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path))
    root = tmp_path / "runs" / "sft-1"
    directory = root / "1-train"
    (directory / "logs").mkdir(parents=True)
    (directory / "logs" / "language.tp0.log").write_text("hello\n")
    step = records.StepRecord("train", "sft", {}, directory, "sft-1-1")
    after = records.StepRecord("export", "export_hf", {}, root / "2-export", "sft-1-2")
    about = {"run_id": "sft-1", "recipe": "sft", "executor": "local", "host": os.uname().nodename, "pid": os.getpid()}
    records.RunRecord(root, [step, after], about).write()
    step.add("started")
    records.write_json(
        directory / "progress.json", {"phase": "train", "done": 120, "total": 1000, "unit": "steps", "note": NOTE}
    )
    return step


def test_status_shows_the_last_note(running, capsys):
    assert cli.main(["status", "sft-1"]) == 0
    assert f"train: 120 of 1000 steps · {NOTE}\n" in capsys.readouterr().out
    assert cli.main(["status"]) == 0
    assert f"train: 120 of 1000 steps · {NOTE}\n" in capsys.readouterr().out
    assert cli.main(["status", "sft-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["progress"]["note"] == NOTE


def test_logs_end_with_the_last_note_on_standard_error(running, capsys):
    assert cli.main(["logs", "sft-1.train"]) == 0
    said = capsys.readouterr()
    assert said.out == "train/language.tp0 | hello\n" and said.err == f"train: 120 of 1000 steps · {NOTE}\n"


def test_a_step_that_has_ended_says_nothing_more(running, capsys):
    running.add("done")
    assert cli.main(["logs", "sft-1.train"]) == 0 and cli.main(["status", "sft-1"]) == 0
    said = capsys.readouterr()
    assert NOTE not in said.out + said.err
