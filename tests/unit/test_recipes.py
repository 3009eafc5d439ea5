"""Recipes are whole configurations: the table, the overrides, and what is built from them."""

import ast
import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fiddle as fdl
import psutil
import pytest

from mimo_jobs import jobs, overrides, pipeline, records, running
from mimo_jobs.errors import UsageError
from mimo_jobs.layout import ComponentLayout, ParallelLayout
from recipes import RECIPES, layouts


def built(name: str, *given: str) -> list[pipeline.Step]:
    values = overrides.parse(overrides.split(given), overrides.recipe_fields(name))
    stand_ins = {
        p: f"/stand-in/{p}" for p, f in overrides.recipe_fields(name).items() if f.default is overrides.REQUIRED
    }
    return pipeline.steps_of(overrides.build(name, {p: v for p, v in stand_ins.items() if "." not in p} | values), name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_in_the_table_with_a_line_an_example_and_its_job(name):
    assert overrides.summaries()[name].endswith(".")
    example = overrides.split(overrides.example(name).split())
    assert overrides.parse(example, overrides.recipe_fields(name))
    overrides.require(name, example)
    steps = built(name)
    assert RECIPES[name].job in (None, steps[0].job)
    for step in steps:
        assert step.world_size >= 1


def test_every_recipe_function_is_in_the_table():
    for module in {e.module for e in RECIPES.values()}:
        source = inspect.getsource(__import__(module, fromlist=["_"]))
        functions = {
            n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
        }
        assert functions == {n for n, e in RECIPES.items() if e.module == module}


@pytest.mark.parametrize("name", jobs.JOBS)
def test_every_job_field_is_documented_and_has_a_type_that_can_be_read(name):
    for path, field in overrides.leaves(jobs.JOBS[name]).items():
        assert field.doc or path == "layout.world_size", path
        assert "typing" not in overrides.type_name(field.type)


@pytest.mark.parametrize(
    ("given", "path", "value"),
    [
        ("layout.language.tp=2", "layout.language.tp", 2),
        ("layout.images.rank_offset=4", "layout.images.rank_offset", 4),
        ("layout.images.dp=none", "layout.images.dp", None),
        ("layout.images.dp=None", "layout.images.dp", None),
        ("layout.world_size=16", "layout.world_size", 16),
        ("overwrite=true", "overwrite", True),
        ("overwrite=False", "overwrite", False),
        ("fsync=0", "fsync", False),
        ("mtp=drop", "mtp", "drop"),
        ("dtype=bf16", "dtype", "bf16"),
        ("dtype=none", "dtype", None),
        ("target=/a b/$(x)=y", "target", "/a b/$(x)=y"),
        ("target=~/x", "target", str(Path.home() / "x")),
        ("target=x/../y", "target", str(Path.cwd() / "y")),
        ("target=none", "target", str(Path.cwd() / "none")),
        ("model=Qwen/Qwen3.5-0.8B", "model", "Qwen/Qwen3.5-0.8B"),
    ],
)
def test_an_override_reaches_the_built_arguments(given, path, value):
    (step,) = built("qwen35vl_import", given)
    assert overrides.flat(step.arguments)[path] == value


@pytest.mark.parametrize(
    "given",
    [
        "layout.language.tp=1e2",
        "layout.language.tp=²",
        "layout.language.tp=None",
        "layout.language.tp=true",
        "fsync=2",
        "target=\0",
    ],
)
def test_a_value_of_another_type_is_refused(given):
    with pytest.raises(UsageError, match="expected"):
        built("qwen35vl_import", given)


def test_overrides_do_not_conflict_with_what_is_filled_in():
    (step,) = built(
        "qwen35vl_import", "layout.language.tp=2", "layout.language.pp=3", "layout.images.tp=1", "layout.images.dp=2"
    )
    assert step.layout is not None
    assert {n: c.ranks for n, c in step.layout.components.items()} == {"language": range(6), "images": range(6, 8)}


def test_an_override_inside_a_default_that_the_recipe_left_alone():
    config = fdl.Partial(jobs.import_hf, layout=fdl.Config(ParallelLayout, language=fdl.Config(ComponentLayout, tp=2)))
    overrides._set(config, "layout.images.tp", 3)
    assert overrides.arguments(config)["layout"] == ParallelLayout(ComponentLayout(tp=2), ComponentLayout(tp=3))


def test_recipes_do_not_share_configurations():
    first, second = layouts.split_8gpu(), layouts.split_8gpu()
    first.language.tp = 1
    assert second.language.tp == 4
    assert first.images.tp == 4


def test_the_quickstart_exports_from_another_layout_than_it_imported_to():
    steps = {s.name: s for s in built("quickstart", "workdir=/w")}
    assert steps["import"].layout != steps["export"].layout
    assert steps["import"].layout is not None
    assert not steps["import"].layout.colocated
    assert steps["export"].arguments["source"] == steps["import"].arguments["target"] == "/w/mimo"


def test_arguments_survive_json_and_the_worker(tmp_path):
    import json

    from launchers.base import Job
    from mimo_jobs.worker import read_job

    (step,) = built("qwen35vl_import", "layout.language.tp=2", "dtype=fp32", "target=/a '\"\n$(x)")
    job = Job(step.job, step.plain(), step.world_size, tmp_path / "record", "id")
    job.write()
    assert json.loads(job.file.read_text())["world_size"] == step.world_size
    read = read_job(job.file)
    assert read["arguments"] == dict(step.arguments)
    assert read["function"] is jobs.import_hf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema 1"),
        ({"job": "import_fh"}, "did you mean 'import_hf'"),
        ({"extra": 1}, "expected the keys"),
        (
            {"arguments": {"model": "m", "target": "t", "layout": {}, "dtyp": 1}},
            "unknown field 'dtyp'; did you mean 'dtype'",
        ),
        (
            {"arguments": {"model": "m", "target": "t", "layout": {"language": {"tpp": 1}}}},
            "arguments.layout.language: unknown field",
        ),
        ({"arguments": {"model": "m", "layout": {}}}, "target is missing"),
        ({"arguments": {"model": "m", "target": 3, "layout": {}}}, "arguments.target=3: expected str"),
        ({"arguments": {"model": "m", "target": "t", "layout": {}, "fsync": 1}}, "arguments.fsync=1: expected bool"),
        ({"arguments": {"model": "m", "target": "t", "layout": {}, "mtp": []}}, "arguments.mtp=[]: expected Literal"),
        ({"record": 3}, "record=3: expected str"),
        ({"world_size": True}, "world_size=True: expected int"),
        ({"arguments": {"model": "m", "target": "t", "layout": 3}}, "expected an object"),
        ({"arguments": {"model": "m", "target": "t", "layout": {}, "world": 3}}, "unknown field 'world'"),
    ],
)
def test_the_worker_is_strict_about_its_job(change, said, tmp_path, capsys, signals):
    import json

    from mimo_jobs import worker

    job = {
        "schema": 1,
        "job": "import_hf",
        "run_id": "r",
        "world_size": 1,
        "record": str(tmp_path),
        "arguments": {},
    } | change
    (tmp_path / "JOB.json").write_text(json.dumps(job))
    assert worker.main([str(tmp_path / "JOB.json")]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def signals():
    """The worker ends with its signals ignored, which the tests after it must not."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def work(tmp_path, monkeypatch, signals):
    """Run a job of one rank whose function is the one given, in this process; the exit code and result.json."""
    import json

    from mimo_jobs import worker

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def run(function) -> tuple[int, dict]:
        monkeypatch.setitem(jobs.JOBS, "test", function)
        job = {"schema": 1, "job": "test", "run_id": "r", "world_size": 1, "record": str(tmp_path), "arguments": {}}
        (tmp_path / "JOB.json").write_text(json.dumps(job))
        code = worker.main([str(tmp_path / "JOB.json")])
        result = tmp_path / "result.json"
        return code, json.loads(result.read_text()) if result.exists() else {}

    return run


@pytest.mark.parametrize(
    ("code", "cuda", "waits"), [(0, True, True), (0, False, True), (1, False, True), (1, True, False), (2, True, False)]
)
def test_a_failed_rank_with_a_gpu_waits_for_nothing_at_its_end(code, cuda, waits, tmp_path):
    """At the end of a process CUDA and NCCL may wait for ranks that are gone; here something waits for its own file."""
    script = f"""
import atexit, sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(is_initialized=lambda: {cuda}))
from mimo_jobs import worker
atexit.register(lambda: open({str(tmp_path / "waited")!r}, "w"))
print("said")
worker._leave({code})
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (code, "said\n"), ended.stderr
    assert (tmp_path / "waited").exists() == waits


@pytest.mark.parametrize(
    ("error", "message", "traceback"),
    [
        (OSError(28, "No space left on device", "/t/x"), "/t/x: No space left on device", False),
        (OSError(28, "No space left on device"), "No space left on device", False),
        (RuntimeError("odd"), "RuntimeError: odd (a defect, at test_recipes.py:", True),
    ],
)
def test_an_error_of_the_system_is_no_defect(error, message, traceback, work, capsys):
    def fail(*, world):
        raise error

    code, result = work(fail)
    assert code == 1
    assert result["error"]["message"].startswith(message)
    assert ("Traceback" in capsys.readouterr().err) == traceback


def test_a_repeated_job_replaces_the_result_of_the_attempt_before(work, tmp_path):
    (tmp_path / "progress.json").write_text("{}")
    assert work(lambda *, world: 1 / 0)[0] == 1
    assert work(lambda *, world: {"fine": True}) == (0, {"status": "ok", "summary": {"fine": True}, "attempt": ""})
    assert not (tmp_path / "progress.json").exists()


@pytest.mark.parametrize(
    ("named", "says", "older", "stale"),
    [
        ("", "", False, False),  # another rank of this attempt may have failed before rank 0 came
        ("", "", True, True),
        ("7-0-1", "7-0-1", True, False),  # under Slurm ranks start minutes apart
        ("7-0-1", "7-0-0", True, True),
        ("7-0-1", "7-0-0", False, False),  # a rank of an earlier attempt that woke up, or this one is such a rank
        ("7-0-1", None, True, True),
    ],
)
def test_among_several_ranks_only_the_result_of_an_earlier_attempt_is_stale(
    tmp_path, named, says, older, stale, monkeypatch
):
    import json

    from mimo_jobs import worker
    from mimo_jobs.parallel import attempt

    result = tmp_path / "result.json"
    result.write_text(json.dumps({"status": "failed", "error": {}} | ({} if says is None else {"attempt": says})))
    born = attempt.began()
    os.utime(result, (born + (-0.1 if older else 0.1),) * 2)
    monkeypatch.setenv("MIMO_JOBS_ATTEMPT", named)
    worker._remove_stale(tmp_path)
    assert result.exists(), "too close to tell, but for rank 0, which is started first"
    worker._remove_stale(tmp_path, spread=0.0)
    assert result.exists() != stale
    assert worker.write_result(tmp_path, {"status": "failed", "error": {"rank": 3}}) == stale


@pytest.mark.parametrize(("restarts", "pid"), [(None, os.getpid), ("0", os.getppid), ("1", os.getpid)])
def test_an_attempt_begins_with_its_torchrun_or_with_the_rank(restarts, pid, monkeypatch):
    from mimo_jobs.parallel import attempt

    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert attempt.began() == pytest.approx(psutil.Process(pid()).create_time(), abs=2)


def test_a_second_signal_does_not_cut_off_the_last_word(work, capsys):
    def interrupted(*, world):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    code, result = work(interrupted)
    assert code == 1
    assert result["error"]["message"] == "interrupted"
    assert capsys.readouterr().err == "rank 0: interrupted\n"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "x"}, "RANK='x': expected integers"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "rank 1 is not among the 1 ranks"),
        ({"WORLD_SIZE": "2"}, "is for 1 ranks, started with 2"),
    ],
)
def test_a_wrong_rank_is_a_usage_error(environment, said, work, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, result = work(lambda *, world: {})
    assert code == 2
    assert said in result["error"]["message"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_rank_is_interrupted_when_its_torchrun_is_killed():
    rank = (
        "import signal, time; from mimo_jobs import worker\n"
        "signal.signal(signal.SIGTERM, worker._interrupt)\n"
        "try:\n"
        "    worker._end_with_torchrun(); print('ready', flush=True); time.sleep(30)\n"
        "except KeyboardInterrupt: print('interrupted')"
    )
    agent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    process = subprocess.Popen(
        [sys.executable, "-c", agent, rank],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    assert process.communicate(timeout=10)[0] == "interrupted\n"


def test_the_first_rank_to_write_a_result_wins(tmp_path):
    import json

    from mimo_jobs.worker import write_result

    assert write_result(tmp_path, {"status": "failed", "error": {"rank": 3}})
    assert not write_result(tmp_path, {"status": "failed", "error": {"rank": 1}})
    assert json.loads((tmp_path / "result.json").read_text())["error"]["rank"] == 3
    assert write_result(tmp_path, {"status": "ok", "summary": {}}), "what was published is there, whoever failed late"
    assert not write_result(tmp_path, {"status": "failed", "error": {"rank": 1}})
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "ok"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def chain(tmp_path, names):
    """A chain of make_tiny steps, decided, and its record."""
    steps = [pipeline.Step(n, "make_tiny", {"target": f"{tmp_path}/{n}", "seed": 0, "overwrite": False}) for n in names]
    plan = pipeline.Plan("chain", [pipeline.Planned(s) for s in steps])
    return plan, pipeline.record_at(tmp_path / "runs" / "chain-1", "chain-1", plan, "local", {})


def test_a_chain_stops_at_the_first_failure_with_its_exit_code(tmp_path, monkeypatch):
    from mimo_jobs.console import Steps, make
    from mimo_jobs.errors import UserError
    from mimo_jobs.worker import write_result

    started = []

    def launch(job, watch):
        started.append(job.record.name)
        ok = len(started) < 2
        write_result(
            job.record, {"status": "ok", "summary": {}} if ok else {"status": "failed", "error": {"message": "no luck"}}
        )

    monkeypatch.setattr("launchers.local.launch", launch)
    plan, run = chain(tmp_path, "abc")
    with pytest.raises(UserError, match="b: no luck") as caught:
        running.run_chain(plan, run, Steps(make(stderr=True), 3))
    assert caught.value.exit_code == 1
    assert started == ["1-a", "2-b"]
    kept = records.load(run.root)
    assert [s.state().state for s in kept.steps] == ["done", "failed", "waiting"]
    assert "no luck" in kept.step("b").state().reason


def test_a_failed_step_leaves_no_staging_directory_of_its_own(tmp_path, monkeypatch):
    from mimo_jobs.console import Steps, make
    from mimo_jobs.errors import UserError

    def killed(job, watch):
        for run_id in (job.run_id, "another"):
            (tmp_path / f".t.partial-{run_id}").mkdir()

    monkeypatch.setattr("launchers.local.launch", killed)
    plan, run = chain(tmp_path, "t")
    with pytest.raises(UserError, match="ended without a result"):
        running.run_chain(plan, run, Steps(make(stderr=True), 1))
    assert [p.name for p in tmp_path.glob(".t.*")] == [".t.partial-another"]


def test_checkpoints_that_differ_fail_their_step(tmp_path, monkeypatch):
    import mimo_jobs.conversion.verify as module
    from mimo_jobs.errors import JobFailed

    found = {"equal": False, "different": {"a.weight": {}}, "only_left": [], "only_right": ["b"]}
    monkeypatch.setattr(module, "verify_hf", lambda *_, **__: found)
    monkeypatch.setattr(module.identity, "of_hf", lambda directory: "")
    with pytest.raises(JobFailed, match=r"2 tensors differ, the first is a\.weight\n  nemo-run verify '/l 1' /r"):
        module.certify("/l 1", "/r", tmp_path / "certificate.json")
    assert not (tmp_path / "certificate.json").exists()


def test_a_job_without_a_result_failed_and_says_how_its_rank_died(tmp_path):
    import json

    from launchers.base import Job, outcome

    job = Job("import_hf", {}, 2, tmp_path / "record", "id")
    job.write()
    assert "ended without a result" in (outcome(job).error or "")
    log = job.record / "nemo_run" / "0" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "Root Cause (first observed failure):\n[0]:\n  rank      : 5 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
    )
    assert (outcome(job).error or "").startswith("rank 5 was killed by SIGKILL; out of memory?")
    for rank, said in ((2, "rank 5 was killed by SIGKILL"), (5, "interrupted")):
        error = {"rank": rank, "message": "interrupted", "exit_code": 1}
        (job.record / "result.json").write_text(json.dumps({"status": "failed", "error": error}))
        assert (outcome(job).error or "").startswith(said)
    (job.record / "result.json").write_text('{"status": ')
    assert outcome(job).exit_code == 1, "half a result is no result"


def test_a_result_of_another_attempt_is_no_result(tmp_path):
    import json

    from launchers.base import Job, clear, outcome

    job = Job("import_hf", {}, 2, tmp_path / "record", "id")
    job.write()
    result = {"status": "ok", "summary": {"n": 3}, "attempt": "7-0-0"}
    (job.record / "result.json").write_text(json.dumps(result))
    assert outcome(job).summary == outcome(job, "7-0-0").summary == {"n": 3}
    late = outcome(job, "7-0-1")
    assert late.transient and "ended without a result" in (late.error or "")
    clear(job.record)
    assert [p.name for p in job.record.iterdir()] == ["JOB.json"]


def test_the_fields_of_the_layout_are_those_of_its_dataclasses():
    found = {p for p in overrides.recipe_fields("qwen35vl_import") if p.startswith("layout.language.")}
    assert found == {f"layout.language.{f.name}" for f in dataclasses.fields(ComponentLayout)}


@pytest.mark.parametrize("name", [n for n, entry in RECIPES.items() if entry.layout])
def test_the_layout_in_the_table_is_the_recipes_own(name):
    """So that a layout that does not resolve is answered without Fiddle, by the very same error."""
    required = {p: "/x" for p, f in overrides.recipe_fields(name).items() if f.default is overrides.REQUIRED}
    steps = [s for s, job in (RECIPES[name].steps or {}).items() if job != "verify"]

    def layout_of(values):
        built = overrides.build(name, required | values)
        return fdl.build((built[steps[0]] if steps else built).layout)

    own = ParallelLayout(**{c: ComponentLayout(**f) for c, f in RECIPES[name].layout.items()})
    assert layout_of({}) == own
    for values in ({"layout.images.rank_offset": 3}, {"layout.images.pp": 2}, {"layout.world_size": 7}):
        with pytest.raises(UsageError) as early:
            overrides.check_layout(name, values)
        with pytest.raises(UsageError) as late:
            layout_of(values).resolve()
        assert str(early.value).removeprefix(f"{steps[0]}: " if steps else "") == str(late.value)
