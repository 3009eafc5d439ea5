"""Going on: resume while something still ends, twice at once, after an answer that was lost; and ends that nobody announced."""

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
    nemo_run,
    ranks,
    seen,
    slow_pipeline,
    slowed,
    states,
    submit,
    wait_for,
    wait_until,
    wait_writing,
)


def queued_jobs(run, cluster):
    return [j["name"].rpartition(".")[2] for j in cluster.jobs() if j["name"].startswith(f"mimo:{run.run_id}.")]


def processes(*words: bytes) -> list[int]:
    """pids whose command line has all of these words in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if all(w in line for w in words):
            found.append(int(process.name))
    return found


def test_cancel_and_resume_at_once(home, model, tmp_path, cluster):
    run = slow_pipeline(home, model, tmp_path, 0.2)
    nemo_run("cancel", run.run_id)
    said = nemo_run("resume", run.run_id, "--force").stdout
    assert "import queued as job" in said and "verify queued as job" in said
    ended_well(run, model, tmp_path)


def test_resumes_at_once_queue_every_step_once(home, model, tmp_path, cluster):
    run = slow_pipeline(home, model, tmp_path, 0.2)
    nemo_run("cancel", run.run_id)
    wait_for(run, "cancelled", "cancelled", "cancelled", seconds=20)
    before = len(queued_jobs(run, cluster))
    several = [
        subprocess.Popen(
            [NEMO_RUN, "resume", run.run_id, "--force"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(3)
    ]
    said = [p.communicate(timeout=90)[0] for p in several]
    assert sum("queued as job" in s for s in said) == 1, said
    assert all("queued as job" in s or "another nemo-run is changing it" in s or "nothing to do" in s for s in said), (
        said
    )
    assert len(queued_jobs(run, cluster)) == before + 3
    ended_well(run, model, tmp_path)


def test_an_sbatch_whose_answer_is_lost_queues_nothing_twice(home, model, tmp_path, cluster):
    real = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!{sys.executable}
import os, subprocess, sys
if "--test-only" in sys.argv: os.execv({real!r}, sys.argv)
subprocess.run([{real!r}, *sys.argv[1:]], stdout=subprocess.DEVNULL)
print("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", file=sys.stderr); sys.exit(1)
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
    done = nemo_run(*words, code=1, PATH=f"{fake.parent}:{os.environ['PATH']}")
    (run,) = [records.load(p) for p in records.all_runs(home)]
    assert (
        "import: whether it was queued is not known" in done.stderr and f"nemo-run resume {run.run_id}" in done.stderr
    )
    nemo_run("resume", run.run_id, "--force")
    ended_well(run, model, tmp_path)
    assert sorted(queued_jobs(run, cluster)) == ["export", "import", "verify"]


def test_a_resume_right_after_all_ranks_were_killed(home, model, tmp_path):
    run = slow_pipeline(home, model, tmp_path, 0.2, "executor.retries=0")
    for pid in ranks(run, "import"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: run.step("import").state().state == "failed", 30, run)
    nemo_run("resume", run.run_id, "--force")
    ended_well(run, model, tmp_path)


def test_a_resume_while_the_hook_of_the_failed_step_still_runs(home, model, tmp_path):
    run = slow_pipeline(home, model, tmp_path, 0.2, "executor.retries=0", "on_finish=sleep 5")
    os.kill(ranks(run, "import")[0], signal.SIGKILL)
    wait_until(lambda: run.step("import").state().state == "failed", 30, run)
    nemo_run("resume", run.run_id, "--force")
    ended_well(run, model, tmp_path)


def test_a_rank_killed_after_publication_does_not_fail_the_step(home, model, tmp_path):
    """Rank 0 dies between the rename and its last word."""
    place = tmp_path / "slow"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'mimo_jobs.worker' in ' '.join(sys.orig_argv):\n"
        "    from mimo_jobs.conversion import publish\n"
        "    real = publish.publish\n"
        "    def dying(*a):\n"
        "        real(*a); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    publish.publish = dying\n"
    )
    run = submit(
        home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, "executor.code=installed", f"executor.environment.PYTHONPATH={place}"
    )  # fmt: skip
    ended_well(run, model, tmp_path)
    assert "complete, although rank 0" in run.step("import").state().reason


def test_a_killed_srun_leaves_no_rank_behind(home, model, tmp_path):
    run = slow_pipeline(home, model, tmp_path, 0.1)
    job = bytes(run.step("import").directory / "JOB.json")
    for pid in processes(b"srun\0", job):
        os.kill(pid, signal.SIGKILL)
    ended_well(run, model, tmp_path)


def test_a_killed_slurmstepd_does_not_hang_the_step(home, model, tmp_path, monkeypatch):
    run = slow_pipeline(home, model, tmp_path, 0.1)
    job_id = run.step("import").state().job_id
    for pid in processes(f"slurmstepd: [{job_id}.0]".encode()):
        os.kill(pid, signal.SIGKILL)
    ended_well(run, model, tmp_path, seconds=150)


def test_losing_other_nodes_again_and_again_is_counted(home, model, tmp_path, cluster):
    words = ("layout.language.tp=2", "layout.language.dp=8", "layout.images.tp=1", "layout.images.dp=8")
    run = submit(
        home, f"model={model}", f"workdir={tmp_path}/out", *words, *slowed(tmp_path, 0.3), "executor.retries=0"
    )
    wait_writing(run)
    victim = cluster.run("scontrol", "show", "hostnames", run.step("import").state().nodes).split()[-1]
    cluster.kill_node(victim)
    wait_until(lambda: states(run)[0] in ("queued", "failed"), 40, run)
    cluster.start_node(victim)
    wait_for(run, "failed", "cancelled", "cancelled", seconds=60)
    assert "its nodes failed 1 times (retries=0)" in seen(run, "import").state.reason


def test_another_cluster_does_not_judge_a_run(home, model, tmp_path, cluster, monkeypatch):
    run = slow_pipeline(home, model, tmp_path, 0.2)
    record = records.load(run.root)
    foreign = records.RunRecord(record.root, record.steps, {**record.about, "cluster": "elsewhere"})
    foreign.write()
    time.sleep(11)
    assert "is on cluster elsewhere" in nemo_run("status", run.run_id).stdout
    assert states(records.load(run.root)) == ["running", "queued", "queued"]
    assert "nothing was cancelled" in nemo_run("cancel", run.run_id, code=1).stderr
    record.write()
    ended_well(run, model, tmp_path)


@pytest.mark.parametrize("what", ["", "qwe", "zzzz"])
def test_a_slip_of_the_finger_cancels_nothing(home, model, tmp_path, what):
    run = submit(home, f"model={model}", f"workdir={tmp_path}/out", *SMALL, "executor.setup=sleep 3")
    nemo_run("cancel", what, code=1)
    wait_for(run, "done", "done", "done")
