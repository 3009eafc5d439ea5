"""The pipeline on a real Slurm cluster: submitted at once, states, logs, skipping, hostile values, profiles, speed."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mimo_jobs import records
from tests.slurm.runs import (
    SMALL,
    nemo_run,
    same_files,
    slowed,
    states,
    submit,
    wait_for,
    wait_until,
    wait_writing,
)

NASTY = "a b'c\"d $(touch pwned) `touch pwned` ;\n{e} %s"


def pipeline(model, tmp_path, *more):
    return (f"model={model}", f"workdir={tmp_path}/out", *SMALL, *more)


@pytest.mark.speed
def test_a_whole_chain_is_submitted_at_once_and_ends_bit_exact(home, model, tmp_path, cluster):
    started = time.monotonic()
    done = nemo_run("recipes.qwen35vl_pipeline", *pipeline(model, tmp_path), "--executor", "slurm")
    assert time.monotonic() - started < 15
    assert "next      nemo-run status qwen35vl_pipeline-" in done.stdout
    (run,) = [records.load(p) for p in records.all_runs(home)]
    jobs = {j["id"]: j for j in cluster.jobs()}
    ids = [str(s.state().job_id) for s in run.steps]
    assert set(ids) <= set(jobs), "all three are with Slurm when the command returns"
    wait_for(run, "done", "done", "done")
    assert same_files(model, tmp_path / "out" / "hf")
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["equal"] is True
    for child, parent in ((1, 0), (2, 1)):
        script = (run.steps[child].directory / "sbatch.sh").read_text()
        assert f"#SBATCH --dependency=afterok:{ids[parent]}\n#SBATCH --kill-on-invalid-dep=yes\n" in script
    logs = {p.name for p in (run.root / "1-import" / "logs").iterdir()}
    assert logs == {"language.tp0.log", "language.tp1.log", "images.tp0.log"}
    about = json.loads((run.root / "RUN.json").read_text())
    assert {"command", "versions", "code", "profile", "host", "recipe"} <= set(about)
    assert json.loads((run.root / "config.json").read_text())["import"]["layout.language.tp"] == 2
    assert (run.root / "code" / "mimo_jobs" / "worker.py").is_file()
    states_of = json.loads(nemo_run("status", run.run_id, "--json").stdout)
    assert states_of["state"] == "done"
    assert all(s["gpu_hours"] > 0 for s in states_of["steps"][:2]) and states_of["steps"][2]["gpu_hours"] == 0


def test_seventeen_ranks_are_placed_as_eight_eight_and_one(home, model, tmp_path):
    words = (
        f"model={model}",
        f"target={tmp_path}/mimo",
        "layout.language.tp=2",
        "layout.language.dp=8",
        "layout.images.tp=1",
    )
    shown = json.loads(nemo_run("recipes.qwen35vl_import", *words, "--executor", "slurm", "--dryrun", "--json").stdout)
    assert [len(n) for n in shown["steps"][0]["nodes"]] == [8, 8, 1]
    assert "7 of 24 GPUs stay idle on 3 nodes of 8; layout.images.dp=8 (24 ranks) would use them all" in shown["notes"]
    assert not home.exists(), "a dry run writes nothing"
    run = submit(home, *words, recipe="qwen35vl_import")
    wait_for(run, "done")
    heads = [p.read_text().splitlines()[0] for p in (run.root / "logs").iterdir()]
    hosts = {int(h.split(" rank ")[1].split()[0]): h.split(" on ")[1].split(",")[0] for h in heads}
    assert [hosts[r] for r in range(17)] == [
        n for n, k in zip(sorted(set(hosts.values())), (8, 8, 1), strict=True) for _ in range(k)
    ]


def test_what_is_done_is_skipped_whatever_the_layout_and_what_changed_is_repeated(home, model, tmp_path):
    first = submit(home, *pipeline(model, tmp_path))
    wait_for(first, "done", "done", "done")
    again = json.loads(
        nemo_run("recipes.qwen35vl_pipeline", f"model={model}", f"workdir={tmp_path}/out", "layout.language.tp=1",
                 "layout.images.tp=1", "--executor", "slurm", "--json").stdout
    )  # fmt: skip
    assert again["jobs"] == {} and set(again["skipped"]) == {"import", "export", "verify"}
    assert all("made from the same inputs and settings" in why for why in again["skipped"].values())
    changed = submit(home, *pipeline(model, tmp_path, "mtp=drop"))
    assert "mtp was keep, now drop" in changed.step("import").state().reason or wait_for(
        changed, "done", "done", "done"
    )
    events = changed.step("import").events()
    assert "mtp was keep, now drop" in events[0]["reason"]
    wait_for(changed, "done", "done", "done")
    difference = json.loads(nemo_run("diff", first.run_id, changed.run_id, "--json").stdout)["different"]
    assert difference["import.mtp"] == ["keep", "drop"] and "version.torch" not in difference


def test_hostile_names_and_values_are_data(home, model, tmp_path):
    nasty = tmp_path / NASTY
    shutil.copytree(model, nasty / "model")
    hook = tmp_path / "hook.py"
    hook.write_text("import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')")
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "sitecustomize.py").write_text(
        "import os, sys\nif 'mimo_jobs.worker' in ' '.join(sys.orig_argv): print('VALUE', ascii(os.environ.get('NASTY')), file=sys.stderr)"
    )
    profile = f'[slurm]\naccount = "research"\n[slurm.environment]\nNASTY = {json.dumps(NASTY)}\nPYTHONPATH = {json.dumps(str(probe))}\n'
    (tmp_path / "executors.toml").write_text(profile)
    run = submit(
        home, f"model={nasty}/model", f"workdir={nasty}/out", *SMALL, "executor.code=installed",
        f"on_finish=python3 {hook} '{tmp_path}/said $(touch pwned) `touch pwned`.jsonl'",
    )  # fmt: skip
    wait_for(run, "done", "done", "done")
    assert same_files(nasty / "model", nasty / "out" / "hf")
    # The interpreter starts before the worker takes its log over.
    assert f"VALUE {NASTY!a}" in (run.steps[0].directory / "slurm.log").read_text()
    told = tmp_path / "said $(touch pwned) `touch pwned`.jsonl"
    wait_until(
        lambda: told.exists() and len(told.read_text().splitlines()) == 3, 30, run
    )  # it is told once a step is over
    said = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(s["step"], s["state"]) for s in said] == [("import", "done"), ("export", "done"), ("verify", "done")]
    assert not [p for p in tmp_path.rglob("pwned*")], "something typed was executed"


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("executor.partition=bach", ["the cluster has no such partition", "did you mean 'batch'"]),
        ("executor.account=nobody", ["Slurm would refuse executor.account=nobody"]),
        ("executor.qos=gold", ["Slurm would refuse executor.qos=gold"]),
        ("executor.cpus_per_task=30", ["executor.cpus_per_task=30 times 3 ranks", "executor.cpus_per_task=10"]),
        ("layout.language.dp=64", ["needs", "nodes of 8 GPUs, partition batch has 3"]),
        ("executor.gpus_per_node=16 layout.language.dp=7", ["asks 15 GPUs of a node, nodes of batch have 8"]),
        ("executor.constraint=nvlink", ["Slurm would refuse executor.constraint=nvlink"]),
        ("executor.mem=100K", ["ranks of a node need", "executor.mem=100K"]),
        ("executor.gpu=H1000", ["executor.gpu=H1000", "executor.gpu_memory"]),
    ],
)
def test_what_the_cluster_would_refuse_is_said_before_anything_is_queued(home, model, tmp_path, cluster, field, said):
    before = len(cluster.jobs())
    words = pipeline(model, tmp_path, *field.split())
    done = nemo_run("recipes.qwen35vl_pipeline", *words, "--executor", "slurm", code=None)
    assert done.returncode in (1, 2)
    for text in said:
        assert text in done.stderr
    assert len(cluster.jobs()) == before


def test_named_clusters_are_profiles(home, model, tmp_path, cluster):
    (tmp_path / "config" / "mimo_jobs").mkdir(parents=True)
    text = '[slurm]\naccount = "research"\npartition = "nowhere"\n[slurm.sim]\npartition = "batch"\ncpu_partition = "cpu"\nqos = "normal"\n'
    (tmp_path / "config" / "mimo_jobs" / "executors.toml").write_text(text)
    run = submit(home, *pipeline(model, tmp_path, "executor.time=00:10:00"), executor="slurm:sim")
    wait_for(run, "done", "done", "done")
    script = (run.steps[2].directory / "sbatch.sh").read_text()
    assert "#SBATCH --partition=cpu\n" in script and "gpus" not in script
    assert "#SBATCH --time=00:10:00\n" in script
    assert seen_node(run, "verify") == cluster.node_names[-1]


def seen_node(run, step):
    return run.step(step).state().nodes


def test_a_failed_step_ends_its_children_and_resume_goes_on_with_the_edges_intact(home, model, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(model, source)
    run = submit(home, f"model={source}", f"workdir={tmp_path}/out", *SMALL, "executor.setup=sleep 2")
    shard = next(source.glob("*.safetensors"))
    whole = shard.read_bytes()
    stamp = shard.stat()
    shard.write_bytes(whole[:-64])
    wait_for(run, "failed", "cancelled", "cancelled", seconds=40)
    shown = nemo_run("status", run.run_id).stdout
    assert "import failed: " in shown and shard.name in shown and f"nemo-run resume {run.run_id}" in shown
    assert "did not start: import failed" in shown
    assert not (tmp_path / "out" / "mimo").exists()
    assert not list((tmp_path / "out").glob(".*partial*"))
    shard.write_bytes(whole)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    moved = tmp_path / "elsewhere" / "record"
    moved.parent.mkdir()
    shutil.move(run.root, moved)
    nemo_run("resume", str(moved))
    again = records.load(moved)
    assert [s.state().state for s in again.steps][1:] == ["queued", "queued"]
    ids = [s.state().job_id for s in again.steps]
    assert f"afterok:{ids[0]}\n" in (again.steps[1].directory / "sbatch.sh").read_text()
    wait_for(again, "done", "done", "done")
    assert same_files(model, tmp_path / "out" / "hf")
    assert "nothing to do" in nemo_run("resume", str(moved)).stdout


def test_resume_starts_at_the_failed_step_and_keeps_what_is_done(home, model, tmp_path):
    run = submit(home, *pipeline(model, tmp_path, "executor.environment.X=1"))
    wait_for(run, "done", "done", "done")
    shutil.rmtree(tmp_path / "out" / "hf")
    said = nemo_run("resume", run.run_id).stdout
    assert "export queued as job" in said and "verify queued as job" in said and "import stays" in said
    wait_for(run, "skipped", "done", "done") if run.step("import").state().state == "skipped" else wait_for(
        run, "done", "done", "done"
    )
    assert same_files(model, tmp_path / "out" / "hf")


def test_logs_name_component_role_and_rank_and_follow_to_the_end(home, model, tmp_path):
    run = submit(home, *pipeline(model, tmp_path, *slowed(tmp_path, 0.02)))
    wait_writing(run)
    follow = subprocess.run(
        [shutil.which("nemo-run") or "nemo-run", "logs", "-f", f"{run.run_id}.import:language"],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert follow.returncode == 0
    labels = {line.split(" | ")[0] for line in follow.stdout.splitlines()}
    assert labels == {"import/language.tp0", "import/language.tp1"}
    assert '"tensors"' in follow.stdout, "the last line of the step was printed too"
    wait_for(run, "done", "done", "done")
    assert "import/images.tp0 | " in nemo_run("logs", run.run_id).stdout
    assert "no step 'imprt'; did you mean 'import'?" in nemo_run("logs", f"{run.run_id}.imprt", code=1).stderr
    assert "there are images, language" in nemo_run("logs", f"{run.run_id}.import:audio", code=1).stderr


def test_cancel_ends_everything_within_seconds(home, model, tmp_path):
    run = submit(home, *pipeline(model, tmp_path, *slowed(tmp_path, 0.2)))
    wait_writing(run)
    nemo_run("cancel", run.run_id)
    wait_for(run, "cancelled", "cancelled", "cancelled", seconds=12)
    assert not list((tmp_path / "out").iterdir()), "staging is removed"


def test_the_same_recipe_runs_on_this_machine_and_stops_at_the_first_failure(home, model, tmp_path):
    nemo_run("recipes.qwen35vl_pipeline", f"model={model}", f"workdir={tmp_path}/local", *SMALL, "--executor", "local")
    assert same_files(model, tmp_path / "local" / "hf")
    (run,) = [records.load(p) for p in records.all_runs(home)]
    assert states(run) == ["done", "done", "done"]
    shutil.rmtree(tmp_path / "local" / "hf")
    (tmp_path / "local" / "hf").write_text("in the way")
    done = nemo_run(
        "recipes.qwen35vl_pipeline",
        f"model={model}",
        f"workdir={tmp_path}/local",
        *SMALL,
        "--executor",
        "local",
        code=1,
    )
    assert "export" in done.stderr


def test_two_directories_run_the_same_pipeline_at_once(home, model, tmp_path):
    runs = [submit(home, f"model={model}", f"workdir={tmp_path}/{user}", *SMALL) for user in ("ann", "bob")]
    for run in runs:
        wait_for(run, "done", "done", "done")
    assert same_files(tmp_path / "ann" / "hf", tmp_path / "bob" / "hf")


@pytest.mark.speed
def test_dry_run_and_status_answer_quickly(home, model, tmp_path):
    def seconds(*words):
        started = time.monotonic()
        nemo_run(*words)
        return time.monotonic() - started

    assert (
        min(
            seconds("recipes.qwen35vl_pipeline", *pipeline(model, tmp_path), "--executor", "slurm", "--dryrun")
            for _ in range(2)
        )
        < 3
    )
    run = submit(home, *pipeline(model, tmp_path))
    assert min(seconds("status", run.run_id) for _ in range(3)) < 1
    wait_until(lambda: states(run) == ["done"] * 3, 60, run)


def test_a_job_does_not_take_the_shells_slurm_defaults(home, model, tmp_path):
    done = nemo_run(
        "recipes.qwen35vl_pipeline", *pipeline(model, tmp_path), "--executor", "slurm", "--json", SBATCH_PARTITION="nowhere",
        SBATCH_QOS="gold", SQUEUE_FORMAT="%i", SLURM_NTASKS="99", RANK="7", WORLD_SIZE="9", SLURM_TIME_FORMAT="%s",
    )  # fmt: skip
    wait_for(records.load(Path(json.loads(done.stdout)["record"])), "done", "done", "done")
