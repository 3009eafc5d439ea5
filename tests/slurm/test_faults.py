"""What goes wrong on a cluster, on a real one: killed ranks, lost nodes, preemption, time limits, silent daemons, lost submitters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_jobs import records
from tests.slurm.runs import (
    NEMO_RUN,
    SMALL,
    ended_well,
    finished,
    kinds,
    nemo_run,
    ranks,
    seen,
    slow_pipeline,
    slowed,
    states,
    submit,
    told,
    wait_for,
    wait_until,
    wait_writing,
)


def test_a_scancelled_step_is_cancelled_and_so_are_its_children(home, model, tmp_path, cluster):
    run = slow_pipeline(home, model, tmp_path, 0.2)
    cluster.run("scancel", str(run.step("import").state().job_id))
    wait_for(run, "cancelled", "cancelled", "cancelled", seconds=12)
    assert seen(run, "export").state.reason == "did not start: import was cancelled"
    assert kinds(run)[-1] == "cancelled"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_started_again_and_the_chain_ends_well(home, model, tmp_path, victim):
    run = slow_pipeline(home, model, tmp_path, 0.05)
    os.kill(ranks(run, "import")[victim], signal.SIGKILL)
    ended_well(run, model, tmp_path)
    retry = next(e for e in run.step("import").events() if e["event"] == "retry")
    assert "was killed (SIGKILL; out of memory?)" in retry["reason"]


def test_without_retries_a_killed_rank_ends_the_job_quickly_with_the_first_error(home, model, tmp_path):
    run = slow_pipeline(home, model, tmp_path, 0.2, "executor.retries=0")
    started = time.monotonic()
    os.kill(ranks(run, "import")[1], signal.SIGKILL)
    wait_for(run, "failed", "cancelled", "cancelled", seconds=20)
    assert time.monotonic() - started < 20
    assert not ranks(run, "import")
    reason = seen(run, "import").state.reason
    assert "was killed" in reason and "NCCL" not in reason and "Traceback" not in reason
    assert "import failed: rank" in nemo_run("status", run.run_id).stdout
    assert not list((tmp_path / "out").glob(".*partial*"))


def test_an_error_that_would_come_again_is_not_retried(home, model, tmp_path):
    """Bad input costs one attempt, whatever ``retries`` says."""
    source = tmp_path / "hf"
    subprocess.run(["cp", "-r", str(model), str(source)], check=True)
    run = submit(
        home, f"model={source}", f"workdir={tmp_path}/out", *SMALL, "executor.setup=sleep 2", "executor.retries=5"
    )
    (source / "config.json").write_text("{")
    wait_for(run, "failed", "cancelled", "cancelled", seconds=30)
    assert kinds(run).count("retry") == 0
    assert "config.json: damaged" in seen(run, "import").state.reason


@pytest.mark.parametrize("host", ["batch host", "another node"])
def test_a_node_that_dies_requeues_the_step_and_the_chain_ends_well(home, model, tmp_path, cluster, host):
    words = ("layout.language.tp=2", "layout.language.dp=8", "layout.images.tp=1", "layout.images.dp=8")
    run = submit(
        home, f"model={model}", f"workdir={tmp_path}/out", *words, *slowed(tmp_path, 0.1), "executor.retries=2"
    )
    wait_writing(run)
    nodes = cluster.run("scontrol", "show", "hostnames", run.step("import").state().nodes).split()
    victim = nodes[0] if host == "batch host" else nodes[-1]
    cluster.kill_node(victim)
    wait_until(lambda: states(run)[0] in ("queued", "failed", "done"), 40, run)
    cluster.start_node(victim)
    ended_well(run, model, tmp_path)
    assert kinds(run).count("started") >= 2 or "retry" in kinds(run)


def test_a_node_set_down_requeues_the_step(home, model, tmp_path, cluster):
    run = slow_pipeline(home, model, tmp_path, 0.1, "executor.retries=2")
    cluster.set_down(run.step("import").state().nodes, "broken")
    ended_well(run, model, tmp_path)
    assert kinds(run).count("started") == 2


@pytest.mark.parametrize("user_signal", [True, False])
def test_a_preempted_step_goes_on_where_it_was(home, model, tmp_path, cluster, user_signal):
    cluster.reconfigure(preempt_send_user_signal=user_signal)
    run = slow_pipeline(home, model, tmp_path, 0.1)
    wait_until(lambda: finished(tmp_path), 30, run)
    cluster.run("sbatch", "--qos=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_until(lambda: "requeued" in kinds(run), 40, run)
    assert states(run)[0] in ("queued", "running")
    ended_well(run, model, tmp_path)
    assert next(e for e in run.step("import").events() if e["event"] == "requeued")["progress"] > 0


def test_a_time_limit_in_the_middle_of_a_step_requeues_it_until_it_is_through(home, model, tmp_path):
    """The limit is one minute, its signal comes 10 to 40 s after the start (up to 30 s early, looked at every 30 s): tasks are finished
    by then, and the step needs longer."""
    run = submit(
        home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, *slowed(tmp_path, 0.25), "executor.time=1", "executor.signal=USR1@20"
    )  # fmt: skip
    wait_until(lambda: "requeued" in kinds(run), 70, run)
    event = next(e for e in run.step("import").events() if e["event"] == "requeued")
    assert event["reason"] == "its time limit was near" and event["progress"] > 0
    ended_well(run, model, tmp_path, seconds=150)


def test_a_step_that_never_gets_further_is_failed_and_says_which_limit(home, model, tmp_path, cluster):
    """Slurm's word that the limit is near is sent by hand: at a limit of a minute its own may come first."""
    run = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, *slowed(tmp_path, 100), "executor.time=10")
    for number in range(1, 4):
        wait_until(lambda n=number: kinds(run).count("started") == n and len(ranks(run, "import")) == 3, 30, run)
        cluster.run("scancel", "--signal=USR1", "--batch", str(run.step("import").state().job_id))
    wait_for(run, "failed", "cancelled", "cancelled", seconds=30)
    expected = "it reached time=10 3 times without coming further; set executor.time to more"
    assert expected in seen(run, "import").state.reason


def test_a_restarted_controller_loses_nothing(home, model, tmp_path, cluster):
    run = slow_pipeline(home, model, tmp_path, 0.1)
    cluster.stop_controller()
    shown = nemo_run("status", run.run_id)
    assert "note: Slurm was not heard" in shown.stdout
    assert states(run)[0] == "running", "what the job wrote itself still says so"
    cluster.start_controller()
    ended_well(run, model, tmp_path)


def test_a_controller_that_is_down_is_said_at_submission_and_nothing_is_half_done(home, model, tmp_path, cluster):
    cluster.stop_controller()
    done = nemo_run(
        "recipes.qwen35vl_pipeline", f"model={model}", f"workdir={tmp_path}/out", *SMALL, "--executor", "slurm", code=1
    )
    assert "sinfo" in done.stderr and ("did not answer" in done.stderr or "contact" in done.stderr)
    assert not records.all_runs(home)


def test_without_accounting_states_are_still_right(home, model, tmp_path, cluster):
    cluster.stop_database()
    run = slow_pipeline(home, model, tmp_path, 0.05, "executor.retries=0")
    assert states(run) == ["running", "queued", "queued"]
    os.kill(ranks(run, "import")[0], signal.SIGKILL)
    wait_for(run, "failed", "cancelled", "cancelled", seconds=20)


def test_jobs_that_slurm_has_forgotten_are_still_known(home, model, tmp_path, cluster):
    """The controller forgets ended jobs after 2 s, accounting is down: only markers are left."""
    cluster.stop_database()
    cluster.reconfigure(min_job_age=2)
    good = submit(home, f"model={model}", f"workdir={tmp_path}/good", *SMALL)
    bad = slow_pipeline(home, model, tmp_path, 0.2)
    os.kill(batch_process(bad, "import"), signal.SIGKILL)  # nobody writes a last word
    wait_until(
        lambda: not [j for j in cluster.jobs() if j["name"].startswith("mimo:")], 90, "the controller forgetting"
    )
    assert states(good) == ["done", "done", "done"]
    wait_for(bad, "failed", "cancelled", "cancelled", seconds=15)
    assert "ended without a word, and Slurm no longer knows it" in seen(bad, "import").state.reason


def batch_process(run, step):
    record = bytes(run.step(step).directory)
    for process in Path("/proc").glob("[0-9]*"):
        words = (process / "cmdline").read_bytes().split(b"\0") if (process / "cmdline").exists() else []
        if b"launchers.slurm_step" in words and record in words:
            return int(process.name)
    raise AssertionError(told(run))


@pytest.mark.parametrize("after", ["--parsable 1", "answer 1", "answer 2"])
def test_a_submitter_killed_in_the_middle_is_continued_without_queueing_anything_twice(
    home, model, tmp_path, cluster, after
):
    """``after``: killed before the first job is queued, after it but before its id is known, after the second."""
    when, count = after.split()
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!{sys.executable}
import os, signal, subprocess, sys
if "--test-only" in sys.argv: os.execv({real!r}, sys.argv)
counter = {str(tmp_path / "count")!r}
number = len(open(counter, "a+").read() or open(counter).read()) + 1
open(counter, "a").write("x")
if {when!r} == "--parsable" and number == {count}:
    os.kill(os.getppid(), signal.SIGKILL); sys.exit(1)
subprocess.run([{real!r}, *sys.argv[1:]])
if {when!r} == "answer" and number == {count}:
    os.kill(os.getppid(), signal.SIGKILL)
"""
    )
    fake.chmod(0o755)
    words = [
        "recipes.qwen35vl_pipeline",
        f"model={model}",
        f"workdir={tmp_path}/out",
        *SMALL,
        "--executor",
        "slurm",
        "executor.setup=sleep 3",
    ]
    died = subprocess.run(
        [NEMO_RUN, *words],
        env=os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    (run,) = [records.load(p) for p in records.all_runs(home)]
    shown = json.loads(nemo_run("status", run.run_id, "--json").stdout)["steps"]
    assert "not queued: its submission was cut short; nemo-run resume queues it" in shown[-1]["reason"]
    nemo_run("resume", run.run_id)
    ended_well(run, model, tmp_path)
    assert len([j for j in cluster.jobs() if j["name"].startswith(f"mimo:{run.run_id}.")]) == 3


@pytest.mark.speed
def test_two_hundred_pipelines_are_listed_in_two_seconds(home, model, tmp_path, cluster):
    """Queued behind a job that holds all nodes; records are those of one real submission, each with its own jobs in the queue."""
    cluster.run("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 600")
    first = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL)
    for number in range(1, 200):
        copy_run(first, number)
    started = time.monotonic()
    shown = json.loads(nemo_run("status", "--json").stdout)
    seconds = time.monotonic() - started
    assert len(shown["runs"]) == 200
    assert {s["state"] for r in shown["runs"] for s in r["steps"]} == {"queued"}
    assert len({s["job_id"] for r in shown["runs"] for s in r["steps"]}) == 600
    assert seconds < 2, seconds


def copy_run(run, number):
    """Another run like it: its scripts queued again under another id."""
    root = run.root.with_name(f"{run.run_id}-copy{number}")
    about = {**run.about, "run_id": root.name}
    steps, after = [], None
    for step in run.steps:
        directory = root / step.directory.name
        directory.mkdir(parents=True)
        again = records.StepRecord(step.name, step.job, step.arguments, directory, step.run_id)
        again.add("submitting", title=f"mimo:{root.name}.{step.name}")
        command = [
            "sbatch",
            "--parsable",
            f"--job-name=mimo:{root.name}.{step.name}",
            "--hold" if after is None else f"--dependency=afterok:{after}",
        ]
        done = subprocess.run([*command, str(step.directory / "sbatch.sh")], capture_output=True, text=True, check=True)
        after = int(done.stdout)
        again.add("submitted", job_id=after)
        steps.append(again)
    records.RunRecord(root, steps, about).write()
