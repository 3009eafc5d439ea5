"""Records of runs: what a step's events add up to, how runs are found, and what the logs and diff commands make of them."""

import io
import json
import os
import shutil
import threading
import time

import pytest

from mimo_jobs import commands, monitor, records
from mimo_jobs.commands import LogView
from mimo_jobs.errors import UserError
from mimo_jobs.records import RunRecord, StepRecord, folded

BEGAN = 1000.0


def events(*words: str) -> list[dict]:
    """``"0 submitting"``, ``"1 submitted job_id=7"``: seconds, event, fields."""
    found = []
    for word in words:
        at, kind, *fields = word.split(" ")
        pairs = (f.partition("=")[::2] for f in fields)
        found.append(
            {"time": BEGAN + float(at), "event": kind}
            | {k: int(v) if v.isdigit() else v.replace("_", " ") for k, v in pairs}
        )
    return found


QUEUED = ("0 submitting title=T", "1 submitted job_id=7")
RUNS = (*QUEUED, "10 started job_id=7 nodes=n1 gpus=8")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {"state": "waiting", "job_id": None, "attempts": 0}),
        (("0 note",), {"state": "waiting"}),
        (QUEUED[:1], {"state": "queued", "job_id": None, "title": "T"}),
        (QUEUED, {"state": "queued", "job_id": 7}),
        (("0 skipped reason=there",), {"state": "skipped", "reason": "there"}),
        (RUNS, {"state": "running", "job_id": 7, "nodes": "n1", "gpus": 8, "attempts": 1, "seconds": 0}),
        ((*RUNS, "20 done"), {"state": "done", "seconds": 10, "gpu_seconds": 80, "ended": BEGAN + 20, "exit_code": 0}),
        (
            (*RUNS, "20 failed exit_code=1 reason=bad"),
            {"state": "failed", "exit_code": 1, "reason": "bad", "seconds": 10},
        ),
        ((*RUNS, "20 cancelled exit_code=130"), {"state": "cancelled", "exit_code": 130}),
        # a retry is the same allocation: time goes on
        (
            (*RUNS, "15 retry reason=killed", "20 done"),
            {"state": "done", "attempts": 2, "seconds": 10, "gpu_seconds": 80, "reason": ""},
        ),
        ((*RUNS, "15 retry reason=killed"), {"state": "running", "reason": "killed", "started": BEGAN + 10}),
        # waiting in the queue again costs nothing
        (
            (*RUNS, "20 requeued reason=limit"),
            {"state": "queued", "requeues": 1, "seconds": 10, "started": None, "job_id": 7, "reason": "limit"},
        ),
        (
            (*RUNS, "20 requeued", "120 started gpus=4 nodes=n2", "125 retry", "130 done"),
            {"state": "done", "requeues": 1, "attempts": 3, "seconds": 20, "gpu_seconds": 120, "nodes": "n2"},
        ),
        # submitted again after a failure: the new job counts, the old hours stay
        (
            (*RUNS, "20 failed exit_code=1 reason=bad", "100 submitting title=T"),
            {"state": "queued", "job_id": None, "reason": "", "ended": None, "seconds": 10},
        ),
        (
            (
                *RUNS,
                "20 failed exit_code=1",
                "100 submitting",
                "101 submitted job_id=9",
                "110 started gpus=8",
                "115 done",
            ),
            {"state": "done", "job_id": 9, "seconds": 15, "gpu_seconds": 120, "attempts": 2, "exit_code": 0},
        ),
        ((*RUNS, "20 done", "30 hook problem=x"), {"state": "done", "reason": "", "last": BEGAN + 30, "seconds": 10}),
        ((*RUNS, "20 done", "40 done"), {"state": "done", "seconds": 10, "gpu_seconds": 80}),
        ((*RUNS, "5 done"), {"state": "done", "seconds": 0, "gpu_seconds": 0}),  # clocks of two nodes
        (("0 failed exit_code=1 reason=not_queued",), {"state": "failed", "seconds": 0, "reason": "not queued"}),
    ],
)
def test_what_events_add_up_to(words, expected):
    state = folded(events(*words))
    assert {k: getattr(state, k) for k in expected} == expected


def test_seconds_are_the_sum_over_every_way_of_cutting_the_same_work():
    """A law: however often ten seconds of running are interrupted, they are ten seconds."""
    for cuts in range(6):
        words, at = [*QUEUED], 10.0
        for i in range(cuts + 1):
            words += [f"{at} started gpus=3"]
            at += 10 / (cuts + 1)
            words += [f"{at} {'requeued' if i < cuts else 'done'}"]
            at += 50
        state = folded(events(*words))
        assert state.seconds == pytest.approx(10) and state.gpu_seconds == pytest.approx(30)
        assert (state.requeues, state.attempts, state.state) == (cuts, cuts + 1, "done")


def test_a_step_that_runs_counts_up_to_now():
    now = time.time()
    found = [
        {"time": now - 100, "event": "started"},
        {"time": now - 60, "event": "requeued"},
        {"time": now - 5, "event": "started"},
    ]
    assert folded(found).elapsed == pytest.approx(45, abs=2)
    assert folded(found[:2]).elapsed == pytest.approx(40)


def test_a_step_that_is_submitted_again_has_no_exit_code_yet():
    assert folded(events(*RUNS, "20 failed exit_code=1", "100 submitting", "110 started")).exit_code == 0


def test_a_jobs_own_last_word_is_the_truth_whatever_status_guessed_after_it():
    """Where the record is on NFS, ``done`` may lie in the file while the host that runs ``status`` does not see it yet."""
    guess = "25 failed exit_code=1 seen_by=status reason=left_no_word"
    assert folded(events(*RUNS, "20 done", guess)).state == "done"


# --------------------------------------------------------------------------------------------------------- events.jsonl


def step_at(directory, name="import") -> StepRecord:
    directory.mkdir(parents=True, exist_ok=True)
    return StepRecord(name, "import_hf", {"target": "/x"}, directory, "R")


@pytest.mark.parametrize(
    "torn", [b'{"time": 3, "eve', b'{"time": 3}\n', b"[]\n", b"\xff\xfe\n", b"\n\n", b"null\n", b'"event"\n']
)
def test_lines_that_a_crash_or_a_bad_disk_left_are_passed_over(tmp_path, torn):
    step = step_at(tmp_path)
    step.add("submitted", job_id=7)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(torn)
    assert [e["event"] for e in step.events()] == ["submitted"] and step.state().job_id == 7


def test_an_event_after_a_torn_line_is_not_lost(tmp_path):
    step = step_at(tmp_path)
    step.add("started")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": 3, "eve')
    step.add("done")
    assert step.state().state == "done"


def test_events_of_several_writers_do_not_mix(tmp_path):
    step = step_at(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [step.add("note", n=n, text="x" * 3000) for _ in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if line]
    assert len(step.events()) == 200 == len(lines)


def test_hostile_reasons_stay_one_line(tmp_path):
    step = step_at(tmp_path)
    step.add("failed", reason="a\nb\r\u2028\0\"'", exit_code=1)
    assert (tmp_path / "events.jsonl").read_bytes().count(b"\n") == 1 and step.state().reason == "a\nb\r\u2028\0\"'"


# ----------------------------------------------------------------------------------------------------------------- runs


def make_run(home, run_id: str, steps=("import", "export"), **about) -> RunRecord:
    root = home / "runs" / run_id
    found = [
        StepRecord(
            n,
            "import_hf",
            {"target": f"/x/{n}"},
            records.step_directory(root, i, n, len(steps)),
            records.step_run_id(run_id, i, len(steps)),
        )
        for i, n in enumerate(steps, 1)
    ]
    for step in found:
        step.directory.mkdir(parents=True, exist_ok=True)
    run = RunRecord(root, found, {"run_id": run_id, "recipe": "r", "executor": "slurm", **about})
    run.write()
    return run


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_record_reads_as_it_was_written_and_wherever_it_is_moved(home, tmp_path):
    run = make_run(home, "r-1", profile={"partition": "p"})
    assert records.load(run.root) == run
    run.steps[1].add("done")
    shutil.move(run.root, tmp_path / "elsewhere")
    moved = records.load(tmp_path / "elsewhere")
    assert moved.run_id == "r-1" and moved.step("export").state().state == "done"
    assert moved.step("export").directory == tmp_path / "elsewhere/2-export"
    assert [s.run_id for s in moved.steps] == ["r-1-1", "r-1-2"]


def test_a_run_of_one_step_is_its_own_step_directory(home):
    run = records.load(make_run(home, "r-1", ("import",)).root)
    assert run.steps[0].directory == run.root and run.steps[0].run_id == "r-1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no readable RUN.json"),
        ("{", "holds no readable RUN.json"),
        ("[]", "holds no readable RUN.json"),
        ('{"schema": 2}', "holds no readable RUN.json"),
        ('{"schema": 1, "steps": []}', "schema 1; this version of mimo_jobs reads 2"),
        ('{"schema": 2, "steps": [{}]}', "damaged"),
        ('{"schema": 2, "steps": ["x"]}', "damaged"),
        ('{"schema": 2, "steps": [{"name": "a", "job": "b", "arguments": {}, "directory": 3}]}', "damaged"),
    ],
)
def test_a_damaged_record_says_so(tmp_path, text, said):
    (tmp_path / "RUN.json").write_text(text)
    with pytest.raises(UserError, match=said):
        records.load(tmp_path)


def test_runs_are_found_by_id_prefix_latest_and_path(home, tmp_path, monkeypatch):
    for i, name in enumerate(("aaaa-1", "aaaa-2", "bbbb-1")):
        run = make_run(home, name)
        os.utime(run.root / "RUN.json", (i, i))
    os.utime(home / "runs/aaaa-1/RUN.json", (9, 9))
    (home / "runs/stray").mkdir()
    for name, found in (
        ("aaaa-1", "aaaa-1"),
        ("bbbb", "bbbb-1"),
        ("latest", "aaaa-1"),
        (str(home / "runs/aaaa-2"), "aaaa-2"),
    ):
        assert records.find(name, home).run_id == found
    monkeypatch.chdir(home / "runs")
    assert records.find("./bbbb-1", home).run_id == "bbbb-1"
    for name, said in (
        ("aaaa", "'aaaa' begins 2 runs"),
        ("bbb", "no run 'bbb'"),
        ("", "an empty run id"),
        ("aaaa-3", "no run 'aaaa-3'.*did you mean 'aaaa-"),
        ("zz", "nemo-run list shows them"),
        ("stray", "no run"),
    ):
        with pytest.raises(UserError, match=said):
            records.find(name, home)
    assert [p.name for p in records.all_runs(home)] == ["aaaa-1", "bbbb-1", "aaaa-2"]
    with pytest.raises(UserError, match="there are no runs"):
        records.find("latest", tmp_path / "nothing")


def test_the_directory_one_stands_in_is_a_run_too(home, monkeypatch):
    monkeypatch.chdir(make_run(home, "r-1").root)
    assert records.find(".", home).run_id == "r-1"


def test_a_step_that_a_run_has_not_is_refused_with_the_nearest(home):
    run = make_run(home, "r-1")
    with pytest.raises(UserError, match="no step 'exprot'; did you mean 'export'"):
        run.step("exprot")


# ----------------------------------------------------------------------------------------------------------------- logs


def shown(view_of: list[tuple[str, bytes]]) -> str:
    """What a `LogView` prints of a file that grows: (mode, bytes) after each of which it looks."""
    out, directory = io.StringIO(), view_of
    view = LogView(out)
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.log"
        for mode, text in directory:
            with path.open(mode) as file:
                file.write(text)
            view.show(path, "x", last=False)
    return out.getvalue()


def test_a_log_is_shown_once_line_by_line_as_it_grows():
    assert shown([("ab", b"a\n"), ("ab", b""), ("ab", b"b\nc"), ("ab", b"c\n")]) == "x | a\nx | b\nx | cc\n"
    assert shown([("ab", "é\n".encode()), ("ab", b"\xff\n")]) == "x | é\nx | \ufffd\n"


def test_the_last_line_is_shown_also_when_it_does_not_end(home, capsys):
    """The last words of a process that died are often cut short: they matter most."""
    run = make_run(home, "r-1")
    run.steps[0].add("failed")
    (run.steps[0].directory / "slurm.log").write_text("first\nKilled")
    commands.logs("r-1.import", follow=False)
    assert capsys.readouterr().out == "import/slurm | first\nimport/slurm | Killed\n"


def test_a_first_line_that_is_still_being_written_is_not_cut_in_two():
    assert shown([("ab", b"hel"), ("ab", b"lo\n")]) == "x | hello\n"


@pytest.fixture
def logged(home):
    run = make_run(home, "r-1", ("import", "export", "verify"))
    for name in ("language.tp0", "language.tp1", "language.tp10", "images.tp0", "language.tp2+images.tp1"):
        path = run.steps[0].directory / f"logs/{name}.log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"I am {name}\n")
    (run.steps[0].directory / "slurm.log").write_text("srun\n")
    (run.steps[1].directory / "slurm.log").write_text("srun 2\n")
    for step in run.steps[:2]:
        step.add("done")
    return run


@pytest.mark.parametrize(
    ("target", "lines"),
    [
        ("r-1.import:images", ["images.tp0", "language.tp2+images.tp1"]),
        ("r-1.import:language.tp1", ["language.tp1"]),
        ("r-1:language", ["language.tp0", "language.tp1", "language.tp10", "language.tp2+images.tp1"]),
        ("latest.export", ["slurm"]),
        ("r-1:slurm", ["slurm", "slurm"]),
        (
            "r-1",
            [
                "images.tp0",
                "language.tp0",
                "language.tp1",
                "language.tp10",
                "language.tp2+images.tp1",
                "slurm",
                "slurm",
            ],
        ),
    ],
)
def test_logs_of_a_run_a_step_or_a_component(logged, capsys, target, lines):
    assert commands.logs(target, follow=False) == 0
    out = capsys.readouterr().out
    assert [line.partition(" | ")[0].partition("/")[2] for line in out.splitlines()] == sorted(lines)
    assert commands.logs(str(logged.root), follow=False) == 0


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("r-1:vision", "no logs of vision yet; there are images, language"),
        ("r-1.verify", "no logs yet; nemo-run status r-1"),
        ("r-1.x", "has no step 'x'"),
    ],
)
def test_logs_that_are_not_there_say_which_are(logged, target, said):
    with pytest.raises(UserError, match=said):
        commands.logs(target, follow=False)


def test_following_ends_after_the_last_line_of_a_step_that_ended(logged, capsys, monkeypatch):
    step = logged.steps[0]
    step.add("started")
    looked = []

    def look(runs):
        """The step ends between two looks, with a line that came before its end."""
        looked.append(1)
        if len(looked) == 2:
            step.add("done")
            with (step.directory / "slurm.log").open("a") as file:
                file.write("last\n")
        return [monitor.SeenRun(r, [monitor.Seen(s, s.state()) for s in r.steps]) for r in runs]

    monkeypatch.setattr(commands.monitor, "look", look)
    monkeypatch.setattr(commands, "POLL_SECONDS", 0)
    commands.logs("r-1.import:slurm", follow=True)
    assert capsys.readouterr().out == "import/slurm | srun\nimport/slurm | last\n"


# ----------------------------------------------------------------------------------------------------------------- diff


def test_diff_names_what_differs_and_nothing_else(home, capsys):
    about = {"versions": {"torch": "1"}, "code": {"commit": "c", "dirty": []}, "profile": {"environment": {"A": "1"}}}
    left = make_run(home, "left", **about)
    make_run(home, "same", **about)
    other = {
        "versions": {"torch": "2"},
        "code": {"commit": "c", "dirty": ["x.py"]},
        "profile": {"environment": {"A": "2"}},
    }
    right = make_run(home, "right", **other)
    (right.root / "code.diff").write_text("-a\n+b\n" * 1000)
    assert commands.diff("left", "same", as_json=False) == 0
    assert "no difference" in capsys.readouterr().out
    assert commands.diff("left", "right", as_json=True) == 0
    found = json.loads(capsys.readouterr().out)["different"]
    assert set(found) == {"version.torch", "executor.environment.A", "uncommitted", "code.diff"}
    assert found["version.torch"] == ["1", "2"] and found["code.diff"][1].startswith("2000 lines, blake3 ")
    assert left.run_id == "left"
