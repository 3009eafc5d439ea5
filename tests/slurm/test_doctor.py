"""`nemo-run doctor` on a real cluster: a healthy one, profiles with one mistake each, and a cluster that is out of order."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import slurm_probe
from mimo_jobs import doctor
from mimo_jobs.machine_checks import Check

ENDED = ("CANCELLED", "COMPLETED", "FAILED")
ON_NODES = {"filesystem", "batch host", "worker", "node python", "node packages", "node gpus", "node network", "node memory",
            "node cpus", "node disk"}  # fmt: skip


@pytest.fixture
def examine(cluster, tmp_path, monkeypatch):
    """Run the doctor in-process; afterwards neither a job nor a file of it may be left."""
    home = tmp_path / "home"
    monkeypatch.setenv("MIMO_JOBS_HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def run(wait_seconds: float = 30.0, controller: bool = True, **fields) -> dict[str, Check]:
        checks = doctor.run("slurm", fields, wait_seconds)
        assert len({check.name for check in checks}) == len(checks)
        assert all(check.fix for check in checks if check.state in ("warning", "failed"))
        assert list(home.rglob("*")) == []
        jobs = cluster.jobs() if controller else []
        assert all(job["state"] in ENDED for job in jobs if job["name"].startswith("mimo:doctor"))
        return {check.name: check for check in checks}

    return run


def failed(found: dict[str, Check]) -> set[str]:
    return {check.name for check in found.values() if check.state == "failed"}


@pytest.mark.speed
def test_a_healthy_cluster(cluster, examine):
    cluster.run("srun", "true")
    start = time.monotonic()
    found = examine(time="00:10:00", account="research", qos="normal")
    assert time.monotonic() - start < 10
    assert not failed(found) and set(found) >= ON_NODES
    assert "3 nodes of 32 CPUs" in found["partition"].found and "8 GPUs" in found["partition"].found
    assert "8 ranks, 8 GPUs" in found["request"].found and found["accounting"].state == "ok"
    assert "ran on tnode" in found["probe job"].found
    assert "CUDA_VISIBLE_DEVICES=" in found["node gpus"].found
    assert sys.executable in found["node python"].found
    states = {job["state"] for job in cluster.jobs() if job["name"].startswith("mimo:doctor")}
    assert states == {"COMPLETED"}  # it ended by itself


def test_the_command_line(cluster, examine, tmp_path):
    nemo_run = Path(sys.executable).parent / "nemo-run"
    (tmp_path / "executors.toml").write_text('[slurm.here]\npartition = "bacth"\n')
    for more, code in (((), 1), (("executor.partition=cpu",), 0)):
        done = subprocess.run([nemo_run, "doctor", "--executor", "slurm:here", *more], capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert ("did you mean 'batch'?" in done.stdout) == (code == 1)
        assert f"{tmp_path}/executors.toml" in done.stdout.replace("\n", "")


def test_values_are_data(examine, tmp_path):
    nasty = "$(touch pwned); `touch pwned` \"'\\\n%j"
    found = examine(environment={"X": nasty}, constraint=None, sbatch=["--comment=$(touch pwned) #"])
    assert not failed(found) and not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("fields", "name", "said"),
    [
        ({"partition": "bacth"}, "partition", "did you mean 'batch'?"),
        ({"account": "nobody"}, "request", "Invalid account"),
        ({"qos": "turbo"}, "request", "executor.qos=turbo"),
        ({"constraint": "a100"}, "request", "executor.constraint=a100"),
        ({"cpus_per_task": 64}, "request", "cpus_per_task"),
        ({"gpus_per_node": 16}, "gpus", "executor.gpus_per_node=8"),
        ({"venv": "/no/venv"}, "probe job", "executor.venv=/no/venv has no Python on the node"),
        ({"modules": ["cuda/12"]}, "probe job", "executor.modules=cuda/12"),
        ({"setup": ["echo this setup fails", "exit 3"]}, "probe job", "this setup fails"),
        ({"setup": ["false"]}, "probe job", "executor.setup"),
        ({"container_image": "/no/image"}, "probe job", "executor.container_image=none"),
        ({"network_interface": "ib7"}, "node network", "the node has no ib7"),
        ({"on_finish": "/no/hook --now"}, "batch host", "not on PATH: /no/hook"),
    ],
)
def test_one_mistake(examine, fields, name, said):
    found = examine(**fields)
    assert failed(found) == {name}
    assert said in f"{found[name].found} → {found[name].fix}"
    if name in ("partition", "request", "gpus"):
        assert found["probe job"].state == found["node"].state == "skipped"


def test_a_python_without_the_packages(examine, tmp_path):
    bare = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    found = examine(venv=str(bare))
    assert failed(found) >= {"worker"} and "'blake3'" in found["worker"].found
    assert f"executor.venv={bare}" in found["worker"].fix
    assert found["node packages"].state == "warning" and "torch" in found["node packages"].found
    assert "No module named" in examine(venv=str(bare), code="installed")["probe job"].fix


def test_a_queue_that_is_full(cluster, examine):
    blocker = cluster.run(
        "sbatch", "--parsable", "-N3", "--exclusive", "--output=/dev/null", "--wrap=sleep 300"
    ).strip()
    cluster.wait_state(blocker, "RUNNING")
    found = examine(wait_seconds=2.0)
    assert not failed(found) and found["probe job"].state == "warning" and found["node"].state == "skipped"
    assert "waited more than 2 s" in found["probe job"].found
    assert "(Resources)" in found["probe job"].found or "(Priority)" in found["probe job"].found


def test_a_job_that_hangs_is_cancelled(examine, monkeypatch):
    monkeypatch.setattr(slurm_probe, "RUN_SECONDS", 3.0)
    found = examine(setup=["sleep 300"])
    assert found["probe job"].state == "failed" and "still running" in found["probe job"].found


def test_an_interruption_leaves_nothing(cluster, examine, monkeypatch, tmp_path):
    def interrupted(job_id, directory, wait_seconds):
        cluster.wait_state(job_id, {"PENDING", "RUNNING"})
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm_probe, "_watched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine(setup=["sleep 300"])
    assert list((tmp_path / "home").rglob("*")) == []
    assert all(job["state"] in ENDED for job in cluster.jobs())


def test_a_home_that_the_nodes_do_not_share(cluster, examine, tmp_path):
    (tmp_path / "home").mkdir()
    inside = ["nsenter", f"--target={cluster.processes(1)[0]}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(tmp_path / "home")], check=True)
    try:
        found = examine(nodelist="tnode1")
    finally:
        subprocess.run([*inside, "umount", "--lazy", str(tmp_path / "home")], check=True)
    assert failed(found) == {"probe job"} and found["node"].state == "skipped"
    assert "nothing that it wrote came here" in found["probe job"].found and "MIMO_JOBS_HOME" in found["probe job"].fix


def test_nodes_that_are_down(cluster, examine):
    cluster.set_down(3, "test")
    found = examine(partition="cpu")
    assert "partition" in failed(found) and "sinfo -R" in found["partition"].fix


def test_without_accounting(cluster, examine):
    cluster.stop_database()
    found = examine()
    assert not failed(found) and found["accounting"].state == "warning"
    assert "own markers" in found["accounting"].found and found["probe job"].state == "ok"


@pytest.mark.speed
def test_without_a_controller(cluster, examine):
    cluster.stop_controller()
    start = time.monotonic()
    found = examine(controller=False)
    assert time.monotonic() - start < 5
    assert failed(found) == {"scheduler"} and "no controller" in found["scheduler"].found
    assert {found[n].state for n in ("partition", "request", "accounting", "probe job", "node")} == {"skipped"}


def test_a_code_directory_that_cannot_be_shipped(examine, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    found = examine()
    assert failed(found) == {"probe job"} and "No space left" in found["probe job"].found
    assert "MIMO_JOBS_HOME" in found["probe job"].fix
