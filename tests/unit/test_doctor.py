"""`nemo-run doctor` without a cluster: what the probe sees, how it is judged, and what is said of what Slurm answers."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launchers import probe, slurm, slurm_probe
from launchers.base import Job
from launchers.profiles import Profile
from launchers.slurm_commands import Partition, QueuedJob, SlurmError, SlurmSilent
from mimo_jobs import doctor, machine_checks
from mimo_jobs.errors import UsageError
from mimo_jobs.machine_checks import Check

ROOT = Path(__file__).resolve().parents[2]
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 81559 << 20}
SIGHT = {
    "schema": probe.SCHEMA, "time": 100.0, "host": "n1", "python": {"version": "3.12.1", "executable": "/v/bin/python"},
    "versions": {"mimo-jobs": None, "torch": "2.11.0", "megatron-core": "0.19.2", "transformers": "5.17.0"},
    "environment": {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"},
    "gpus": {"devices": ["/dev/nvidia0"], "found": [H100], "problem": ""},
    "interfaces": {"lo": {"up": True, "address": "127.0.0.1", "virtual": True}, "ib0": {"up": True, "address": "10.0.0.4", "virtual": False},
                   "eth0": {"up": False, "address": None, "virtual": False}},
    "memory": {"total": 10**12, "available": 9 * 10**11, "limit": None}, "cpus": {"usable": 8, "machine": 64},
    "disks": {"/home": {"free": 10**12}, "/tmp": {"free": 10**12}}, "imports": {"mimo_jobs.worker": ""}, "nonce": "n",
}  # fmt: skip


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """Records and profiles of this test alone."""
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# ----------------------------------------------------------------------------------------------------------- the probe


def test_the_probe_runs_without_this_package_and_without_any_other(tmp_path):
    (tmp_path / "alone" / "launchers").mkdir(parents=True)
    for name in ("__init__.py", "probe.py"):
        (tmp_path / "alone" / "launchers" / name).write_bytes((ROOT / "launchers" / name).read_bytes())
    (tmp_path / "nonce").write_text("word")
    out = tmp_path / "rank.json"
    subprocess.run([sys.executable, "-S", "-m", "launchers.probe", str(out)], cwd=tmp_path / "alone", check=True)
    seen = json.loads(out.read_text())
    assert seen["nonce"] == "word" and seen["cpus"]["usable"] >= 1 and seen["memory"]["total"] > 0
    assert seen["versions"]["torch"] is None
    assert "No module named 'mimo_jobs'" in seen["imports"]["mimo_jobs.worker"]
    assert set(seen["disks"]) == {str(tmp_path), "/tmp"} and seen["interfaces"]["lo"]["virtual"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "nonce", "rank.json"]


def test_the_probe_starts_what_the_plan_says_with_the_environment_as_data(tmp_path):
    command = [sys.executable, "-c", "import os, pathlib; pathlib.Path('seen').write_text(os.environ['X'])"]
    plan = {
        "srun": command,
        "environment": {"X": "$(touch pwned) `touch pwned`"},
        "commands": ["sh", "no-such-program"],
    }
    (tmp_path / probe.PLAN).write_text(json.dumps(plan))
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-m", "launchers.probe", str(tmp_path)], cwd=tmp_path, env=environment, check=True)
    batch = json.loads((tmp_path / probe.BATCH).read_text())
    assert batch["imports"] == {"launchers.slurm_step": ""}
    assert batch["commands"]["no-such-program"] is None and batch["commands"]["sh"]
    assert (tmp_path / "seen").read_text() == plan["environment"]["X"] and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_the_probe_says_how_it_is_used(arguments, capsys):
    assert probe.main(arguments) == 2
    assert "OUT.json" in capsys.readouterr().err


def test_the_probe_has_no_traceback(tmp_path, capsys):
    assert probe.main([str(tmp_path / "absent" / "rank.json")]) == 1
    assert probe.main([str(tmp_path)]) == 1  # a directory without a plan
    assert capsys.readouterr().err.count("probe: FileNotFoundError") == 2


@pytest.mark.parametrize(
    ("script", "found", "problem"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 81559'; echo 'NVIDIA H100 80GB HBM3, 81559'", [H100, H100], ""),
        ("echo 'NVIDIA GB10, [N/A]'", [{"name": "NVIDIA GB10", "memory": None}], ""),
        ("echo No devices were found; exit 6", [], "nvidia-smi: No devices were found"),
        ("exec sleep 30", [], "did not answer within 0.2 s"),
    ],
)
def test_gpus_as_the_driver_tells(script, found, problem, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    seen = probe.gpus(0.2 if "sleep" in script else 10.0)
    assert seen["found"] == found and problem in seen["problem"]


# ---------------------------------------------------------------------------------------------------------- this machine


@pytest.mark.speed
def test_local_is_fast_and_imports_nothing_slow():
    code = (
        "import sys; from mimo_jobs import console, doctor\n"
        "checks = doctor.run('local', {}); console.make().print(doctor.table(checks))\n"
        "assert not {'torch', 'megatron', 'transformers', 'nemo_run', 'fiddle'} & set(sys.modules), sorted(sys.modules)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 3.0  # 0.3 s alone; tests run beside others
    for name in ("python", "packages", "home", "gpus", "memory", "cpus", "disk"):
        assert f" {name} " in done.stdout


def test_local_checks(away):
    found = by_name(doctor.run("local", {}))
    assert found["python"].state == found["packages"].state == found["home"].state == "ok"
    assert str(away / "home") in found["home"].found and str(away) in found["disk"].found


@pytest.mark.parametrize("home", ["with space", "file/below"])
def test_a_home_that_cannot_hold_records(home, away, monkeypatch):
    (away / "file").write_text("")
    monkeypatch.setenv("MIMO_JOBS_HOME", str(away / home))
    check = by_name(doctor.run("local", {}))["home"]
    assert check.state == "failed" and "MIMO_JOBS_HOME" in check.fix


def test_packages_that_are_missing_or_too_old(monkeypatch):
    installed = probe.version
    monkeypatch.setattr(probe, "version", lambda name: "2.0" if name == "torch" else installed(name))
    (check,) = machine_checks.packages()
    assert check.state == "warning" and "torch 2.0 (needs >=2.11)" in check.found
    monkeypatch.setattr(probe, "version", lambda name: None if name == "blake3" else installed(name))
    (check,) = machine_checks.packages()
    assert check.state == "failed" and "not installed: blake3" in check.found and "uv sync" in check.fix


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        ({}, "ok", "1 x NVIDIA H100 80GB HBM3 of 85.5 GB"),
        ({"found": []}, "warning", "training does"),
        ({"found": [], "problem": "nvidia-smi: broken"}, "warning", "nvidia-smi: broken"),
    ],
)
def test_gpus_judged(change, state, said):
    check = machine_checks.gpus("gpus", SIGHT | {"gpus": SIGHT["gpus"] | change})
    assert check.state == state and said in check.found and bool(check.fix) == (state != "ok")


def test_gpus_of_a_job():
    assert machine_checks.gpus("gpus", SIGHT, Profile(gpu="H100-NVL"), 1).state == "ok"
    other = machine_checks.gpus("gpus", SIGHT, Profile(gpu="A100"), 1)
    assert other.state == "warning" and "executor.gpu=A100" in other.found
    hidden = machine_checks.gpus("gpus", SIGHT | {"environment": {}}, Profile(), 1)
    assert hidden.state == "warning" and "gpu_request" in hidden.fix


@pytest.mark.parametrize(
    ("wanted", "state", "said"),
    [
        (None, "ok", "ib0 (10.0.0.4)"),
        ("ib0", "ok", "is up"),
        ("ib1", "failed", "the node has no ib1; did you mean 'ib0'?"),
        ("ib0,eth0", "failed", "eth0 is not up"),
    ],
)
def test_network(wanted, state, said):
    check = machine_checks.network("network", SIGHT["interfaces"], wanted)
    assert check.state == state and said in check.found
    assert ("ib0 (10.0.0.4)" in check.fix) == (state == "failed")


def test_a_full_disk_and_few_cpus():
    check = machine_checks.disks("disk", SIGHT | {"disks": {"/home": {"free": 10**8}}})
    assert check.state == "warning" and "100 MB free at /home" in check.found
    assert machine_checks.cpus("cpus", SIGHT, asked=16).fix == "set executor.cpus_per_task=8"
    limited = machine_checks.memory("memory", SIGHT | {"memory": SIGHT["memory"] | {"limit": 4 * 10**9}})
    assert "this process may use 4 GB" in limited.found


BATCH_HOST = {"host": "n1", "python": "/v/bin/python", "imports": {}, "commands": {"srun": "/bin/srun"}}


def came(**changes) -> slurm_probe.Probed:
    values = {"job": QueuedJob(7, "COMPLETED", nodes="n1"), "waited": 1.0, "rank": SIGHT, "nonce": "n", "submitted": 99.0,
              "seen": 100.3, "log": [], "batch": BATCH_HOST}  # fmt: skip
    return slurm_probe.Probed(**values | changes)


def test_the_filesystem_and_the_clocks(tmp_path):
    (shared,) = machine_checks.filesystem(came(), tmp_path)
    assert shared.state == "ok" and "within 0.3 s" in shared.found
    (other,) = machine_checks.filesystem(came(nonce="other"), tmp_path)
    assert other.state == "failed" and "MIMO_JOBS_HOME" in other.fix
    shared, clock = machine_checks.filesystem(came(submitted=90.0, seen=95.0), tmp_path)
    assert shared.state == "ok" and clock.state == "warning" and "5.0 s ahead" in clock.found


def test_the_batch_host():
    assert [c.state for c in machine_checks.batch_host(came(), Profile())] == ["ok"]
    batch = BATCH_HOST | {"commands": {"srun": None, "scontrol": "/bin/scontrol"}}
    (check,) = machine_checks.batch_host(came(batch=batch), Profile())
    assert check.state == "failed" and check.found.endswith("not on PATH: srun")
    batch = BATCH_HOST | {"imports": {"launchers.slurm_step": "ModuleNotFoundError: No module named 'x'"}}
    (check,) = machine_checks.batch_host(came(batch=batch), Profile(venv="/v"))
    assert check.state == "failed" and "executor.venv=/v" in check.fix


def ranks_place(profile: Profile, **changes) -> dict[str, Check]:
    _, asked = slurm_probe.request("t", profile, None)
    return by_name(machine_checks.ranks_place(SIGHT | changes, profile, asked))


def test_where_a_rank_runs():
    assert {c.state for c in ranks_place(Profile()).values()} == {"ok"}
    old = ranks_place(
        Profile(), python={"version": "3.9.1", "executable": "p"}, imports={"mimo_jobs.worker": "SyntaxError: x"}
    )
    assert old["node python"].state == "warning" and old["worker"].state == "failed" and "Python" in old["worker"].fix
    bare = ranks_place(
        Profile(container_image="/i"),
        imports={"blake3": "ModuleNotFoundError: No module named 'blake3'"},
        versions=dict.fromkeys(probe.PACKAGES),
    )
    assert bare["worker"].state == "failed" and "container_image" in bare["worker"].fix
    assert bare["node packages"].state == "warning" and "conversion needs none" in bare["node packages"].found


def test_versions_there():
    versions = SIGHT["versions"]
    newer = ranks_place(Profile(), versions=versions | {"torch": "99.0"})["node packages"]
    assert newer.state == "ok" and "torch 99.0 (here " in newer.found
    other = ranks_place(Profile(), versions=versions | {"megatron-core": "0.18.0"})["node packages"]
    assert other.state == "warning" and "megatron-core 0.18.0 (needs ==0.19.2)" in other.found
    installed = ranks_place(Profile(code="installed"), versions=versions | {"mimo-jobs": "0.0.1"})["node packages"]
    assert installed.state == "warning" and "mimo-jobs 0.0.1" in installed.found


# ---------------------------------------------------------------------------------------------------------- the profile


def test_an_unknown_executor_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean 'slurm'"):
        doctor.run("slrum", {})


def test_a_profile_that_cannot_be_read_skips_the_rest(away):
    (away / "executors.toml").write_text('[slurm]\npartitoin = "x"\n')
    first, *rest = doctor.run("slurm", {})
    assert first.name == "profile" and first.state == "failed" and "did you mean 'partition'?" in first.fix
    assert rest and {c.state for c in rest} == {"skipped"}


def test_without_slurm_the_rest_is_skipped(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = by_name(doctor.run("slurm", {}))
    assert found["scheduler"].state == "failed" and "sbatch" in found["scheduler"].found
    assert found["home"].state == "ok" and found["probe job"].state == found["node"].state == "skipped"


def test_the_probe_asks_for_little_through_the_same_profile():
    profile = Profile(time="12:00:00", mem="900G", signal="USR1@600", qos="high", cpus_per_task=4)
    reduced, asked = slurm_probe.request("t", profile, None)
    text = slurm.script(asked, reduced, Path("/home/x"), Path("/home/x/code"), module="launchers.probe")
    for line in (
        "--time=00:02:00", "--mem=4G", "--signal=B:USR1@1", "--qos=high", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=4",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    assert text.endswith(" -m launchers.probe /home/x\n")
    short, _ = slurm_probe.request("t", Profile(time="1"), None)
    assert short.time == "1" and slurm_probe.request("t", Profile(time="0"), None)[0].time == "00:02:00"
    assert slurm_probe.request("t", Profile(gpu_request="none"), None)[1].gpus == 0
    assert slurm_probe.request("t", Profile(exclusive=True), None)[1].gpus == 8


def test_the_probe_runs_in_the_container_of_the_ranks(tmp_path):
    profile = Profile(container_image="/images/x.sqsh", container_python="python3.12", srun=("--mpi=none",))
    reduced, asked = slurm_probe.request("t", profile, None)
    job = Job("probe", {}, 1, tmp_path / "doctor" / "id", "id")
    words = slurm.rank_command(job, asked, reduced, ["launchers.probe", "OUT"])
    assert words[-5:] == ["--mpi=none", "python3.12", "-m", "launchers.probe", "OUT"]
    assert {"--container-image=/images/x.sqsh", f"--container-mounts={tmp_path}/doctor:{tmp_path}/doctor"} <= set(words)


BATCH = Partition("batch", True, 3, 32, 64000, 8, "4:00:00", True)


@pytest.mark.parametrize(
    ("profile", "name", "state", "said"),
    [
        (Profile(), "time", "ok", "at most 4:00:00"),
        (Profile(time="4:00:00"), "time", "ok", "within 4:00:00"),
        (Profile(time="1-0"), "time", "failed", "set executor.time=4:00:00"),
        (Profile(time="0"), "time", "failed", "set executor.time"),
        (Profile(time="5", signal="USR1@300"), "time", "failed", "set executor.time to more"),
        (Profile(gpus_per_node=16), "gpus", "failed", "set executor.gpus_per_node=8"),
        (Profile(gpus_per_node=4), "gpus", "warning", "set executor.gpus_per_node=8"),
        (Profile(gpus_per_node=16, gpu_request="none"), "gpus", "ok", "gpu_request=none"),
        (Profile(partition="bacth"), "partition", "failed", "did you mean 'batch'?"),
        (Profile(cpu_partition="cup"), "cpu_partition", "failed", "executor.cpu_partition=cup"),
    ],
)
def test_a_profile_against_its_partition(profile, name, state, said, monkeypatch):
    monkeypatch.setattr(doctor.slurm_commands, "call", lambda command, seconds: "1/2/0/3\n")
    check = by_name(doctor._guarded("partition", lambda: doctor._places(profile, {"batch": BATCH})))[name]
    assert check.state == state and said in f"{check.found}; {check.fix}"


@pytest.mark.parametrize(("counts", "state"), [("0/3/0/3", "ok"), ("0/0/3/3", "failed")])
def test_a_partition_whose_nodes_are_down(counts, state, monkeypatch):
    monkeypatch.setattr(doctor.slurm_commands, "call", lambda command, seconds: counts)
    assert doctor._partition("partition", BATCH, True).state == state


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("slurm_script: line 16: /v/bin/python: No such file or directory", "executor.venv=/v has no Python"),
        ("slurm_script: line 14: module: command not found", "executor.modules=cuda"),
        ("srun: unrecognized option '--container-image=/i'", "executor.container_image=none"),
        ("slurmstepd: error: pyxis: couldn't start container", "executor.container_image and"),
        ("/v/bin/python: No module named launchers.probe", "executor.code=snapshot"),
        ("slurmstepd: error: execve(): python9: No such file or directory", "executor.container_python"),
        ("anything else", "see executor.modules"),
    ],
)
def test_what_a_log_points_to(log, said):
    profile = Profile(venv="/v", modules=("cuda",), container_image="/i")
    assert said in doctor._advice(log, profile)
    assert doctor._evidence(came(log=[log]), profile).endswith(f"its log ends:\n{log}")
    assert "MIMO_JOBS_HOME" in doctor._evidence(came(log=None), profile)


@pytest.mark.parametrize(
    "error", [SlurmError("sacct: accounting storage is disabled"), SlurmSilent("sacct: not found")]
)
def test_accounting_that_is_off_is_a_warning(error, monkeypatch):
    def call(command, seconds):
        raise error

    monkeypatch.setattr(doctor.slurm_commands, "call", call)
    assert doctor._accounting().state == "warning" and "markers" in doctor._accounting().found


def test_the_table_shows_every_check_with_its_fix():
    states = [Check("a", "ok", "fine"), Check("b", "warning", "hm", "do x"), Check("c", "failed", "[bad]", "see\nlog")]
    console = Console(width=80, record=True, markup=False, file=io.StringIO())
    console.print(doctor.table([*states, Check("d", "skipped", "not tried")]))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == [
        "✓  a  fine",
        "!  b  hm",
        "      → do x",
        "✗  c  [bad]",
        "      → see",
        "        log",
        "-  d  not tried",
    ]
