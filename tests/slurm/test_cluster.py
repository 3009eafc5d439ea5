"""The test cluster is a real Slurm: what our launchers rely on happens here as it does on a large one."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster


@pytest.fixture
def sbatch(cluster, tmp_path):
    """Submit a shell script; its id. Output in tmp_path/ID.out, appended to if it is requeued."""

    def submit(script: str, *options: str) -> str:
        options = ("--parsable", "--open-mode=append", f"--output={tmp_path}/%j.out", *options)
        return cluster.run("sbatch", *options, f"--wrap={script}").strip()

    return submit


def test_nodes_are_hosts_with_gpus(cluster):
    script = 'echo "$(hostname) $SLURM_NODEID $CUDA_VISIBLE_DEVICES $(getent hosts $(hostname) | cut -d" " -f1)"'
    lines = cluster.run("srun", "-N3", "--gpus-per-node=2", "--ntasks-per-node=1", "sh", "-c", script).splitlines()
    got = sorted(line.split() for line in lines)
    assert [line[:3] for line in got] == [[f"tnode{i}", str(i - 1), "0,1"] for i in (1, 2, 3)]
    assert len({line[3] for line in got}) == 3 and all(line[3].startswith("127.0.") for line in got)
    assert not any(name in Path("/etc/hosts").read_text() for name in cluster.node_names)
    assert "tnode1" not in socket.gethostname()


def test_partitions(cluster):
    assert cluster.run("srun", "-p", "cpu", "hostname").split() == ["tnode3"]
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        cluster.run("sbatch", "--gpus-per-node=9", "--wrap=true")


def test_a_failed_parent_kills_its_dependents(cluster, sbatch):
    parent = sbatch("exit 3")
    child = sbatch("true", f"--dependency=afterok:{parent}", "--kill-on-invalid-dep=yes")
    stuck = sbatch("true", f"--dependency=afterok:{parent}")
    good = sbatch("true", f"--dependency=afternotok:{parent}")
    cluster.wait_state(parent, "FAILED")
    cluster.wait_state(child, "CANCELLED")
    cluster.wait_state(good, "COMPLETED")
    assert cluster.wait_state(stuck, "PENDING")["reason"] == "DependencyNeverSatisfied"


def test_high_qos_preempts_and_the_victim_runs_again(cluster, sbatch, tmp_path):
    script = 'trap "echo warned" USR1; echo start $SLURM_RESTART_COUNT; while :; do sleep 0.1; done'
    victim = sbatch(script, "-N3", "--exclusive", "--signal=B:USR1@1")
    output = tmp_path / f"{victim}.out"
    cluster.wait("the victim", lambda: output.exists() and "start" in output.read_text())
    urgent = sbatch("true", "-N3", "--exclusive", "--qos=high")
    cluster.wait("the signal", lambda: "warned" in output.read_text())
    cluster.wait_state(urgent, "COMPLETED", seconds=cluster.grace + 30)  # the victim stays for all of its grace
    assert cluster.wait_state(victim, "PENDING")["reason"] == "BeginTime"  # for cred_expire seconds, then it runs


def test_a_node_without_power_requeues_its_job(cluster, sbatch, tmp_path):
    job = sbatch("echo start $SLURM_RESTART_COUNT; srun sleep 300", "-N2")
    cluster.wait("slurmd, slurmstepd, sleep", lambda: len(cluster.processes(2)) >= 3)
    cluster.kill_node(2)
    assert cluster.processes(2) == []
    assert cluster.node_states()["tnode2"].startswith("down")
    assert cluster.wait_state(job, "RUNNING")["nodes"] == "tnode[1,3]"
    cluster.wait("the second start", lambda: "start 1" in (tmp_path / f"{job}.out").read_text())


def test_a_controller_restart_keeps_jobs(cluster, sbatch):
    running = sbatch("sleep 300")
    waiting = sbatch("true", f"--dependency=afterok:{running}")
    cluster.wait_state(running, "RUNNING")
    cluster.restart_controller()
    assert cluster.wait_state(running, "RUNNING") and cluster.wait_state(waiting, "PENDING")


def test_without_its_database_it_runs_jobs_and_accounts_later(cluster, sbatch):
    cluster.stop_database()
    job = sbatch("exit 7")
    cluster.wait_state(job, "FAILED")
    with pytest.raises(RuntimeError, match="Connection refused"):
        cluster.run("sacct", "-j", job)
    cluster.start_database()
    # the state comes in seconds; the exit code is 0:0 for ten to twenty more
    cluster.wait("sacct", lambda: cluster.run("sacct", "-nPX", "-j", job, "-o", "state").split() == ["FAILED"], 60)


def test_repair_after_everything_broke(cluster, sbatch):
    sbatch("sleep 300", "-N3")
    cluster.set_down(1, "test")
    cluster.kill_node(3, noticed=False)
    cluster.stop_controller(kill=True)
    with pytest.raises((RuntimeError, subprocess.TimeoutExpired)):
        cluster.run("squeue", seconds=1)
    cluster.stop_database()
    cluster.repair()
    assert set(cluster.node_states().values()) == {"idle"}
    assert not [job for job in cluster.jobs() if job["state"] not in module.ENDED]


def test_squeue_forgets_and_sacct_remembers(cluster, sbatch):
    cluster.reconfigure(min_job_age=2)
    job = sbatch("true")
    cluster.wait_state(job, "COMPLETED")
    cluster.wait("oblivion", lambda: job not in {each["id"] for each in cluster.jobs()}, 60)
    assert cluster.run("sacct", "-nPX", "-j", job, "-o", "state").split() == ["COMPLETED"]


def test_the_guard_ends_a_cluster_whose_owner_was_killed(cluster, short_path):
    code = f"""if True:
        import time
        from pathlib import Path
        from tests.slurm.cluster import Cluster
        cluster = Cluster(Path({str(short_path / "c")!r}), nodes=1).start()
        cluster.run("sbatch", "--output=/dev/null", "--wrap=setsid sleep 301 & sleep 301")
        cluster.wait_state(1, "RUNNING")
        print(cluster._tag, flush=True)
        time.sleep(300)
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        tag = owner.stdout.readline().strip()
        assert tag in {owned for _, owned, _ in module.members()}
        os.kill(owner.pid, signal.SIGKILL)
    cluster.wait("the end", lambda: tag not in {owned for _, owned, _ in module.members()})


def test_leftovers_of_an_owner_and_a_guard_that_died(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    hosts = tmp_path / f"{module.HOSTS}{dead.pid}-1" / "tnode1"
    hosts.parent.mkdir()
    hosts.touch()
    script = 'mount --bind "$1" /etc/hosts && setsid sleep 302'
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", script, "sh", str(hosts)]) as shell:
        while f"{dead.pid}-1" not in {owned for _, owned, _ in module.members()}:
            assert shell.poll() is None
        module.kill_leftovers()
        assert shell.wait(5) == -signal.SIGKILL
    assert f"{dead.pid}-1" not in {owned for _, owned, _ in module.members()}


def test_a_root_too_long_for_sockets(tmp_path):
    with pytest.raises(ValueError, match="too long"):
        Cluster(tmp_path / ("x" * 90))
