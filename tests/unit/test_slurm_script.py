"""What Slurm is given: scripts and srun commands byte for byte, values that stay data, and queueing that stops half way.

The expected texts are ``tests/golden/sbatch_*.sh`` and ``srun_*.toml``; ``UPDATE_GOLDEN=1 pytest tests/unit/test_slurm_script.py``
writes them anew: read the diff before committing it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers import profiles, slurm, slurm_commands
from launchers.base import Job
from launchers.profiles import from_plain
from launchers.slurm_commands import Partition, SlurmError, SlurmSilent
from mimo_jobs import commands, monitor, pipeline, placement, records, submission
from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.errors import UserError
from tests.hf_files import config_of, make_hf
from tests.unit.test_pipeline import Chain

GOLDEN = Path(__file__).parent.parent / "golden"
RECORD, CODE = Path("/shared/runs/RUN/1-import"), Path("/shared/runs/RUN/code")
EIGHT = {"language": {"tp": 4}, "images": {"tp": 4}}
SIXTEEN = {"language": {"tp": 8}, "images": {"tp": 8}}
SEVENTEEN = {"language": {"tp": 8, "dp": 2}, "images": {"tp": 1}}
H100 = Partition("h100", True, 4, 64, 512_000, 8, "infinite", True)
CPU = Partition("cpu", False, 4, 32, 128_000, 0, "infinite", True)
HOSTILE = "a 'b' \"c\" $(touch pwned) `touch pwned`; touch pwned #\n&& touch pwned \\"
CONTAINER = {
    "container_image": "/images/a b.sqsh", "container_mounts": ["/data:/data:ro", "/home/$(touch pwned):/h"], "container_python": "/opt/py thon",
    "environment": {"NCCL_DEBUG": "WARN", "MOTTO": HOSTILE},
}  # fmt: skip

CASES: dict[str, dict] = {  # layout None: a verify
    "one_node": {"layout": EIGHT},
    "two_nodes": {"layout": SIXTEEN, "partition": H100},
    "irregular": {"layout": SEVENTEEN, "profile": {"cpus_per_task": 7}},
    "container": {"layout": EIGHT, "profile": CONTAINER},
    "modules": {
        "layout": EIGHT, "code": None,
        "profile": {"modules": ["gcc/13", "cuda/12.4"], "setup": ["source /etc/x.sh", 'export A="$HOME"'], "venv": "/shared/my venv's"},
    },
    "gres": {"layout": {"language": {"tp": 2}, "images": {"tp": 1}}, "profile": {"gpu_request": "gres", "mem": "64G", "exclusive": True}},
    "verify": {"layout": None, "profile": {"cpu_partition": "cpu", "partition": "h100"}, "partition": CPU},
    "dependency": {
        "layout": EIGHT, "after": 41,
        "profile": {
            "account": "research", "partition": "h100,h200", "qos": "high", "reservation": "r1", "constraint": "(a|b)&c", "nodelist": "n[1-3,7]",
            "exclude": "n9", "time": "2-12:30:00", "signal": "B:USR2@120", "sbatch": ["--comment=a # $(touch pwned) \"b\"", "--oversubscribe"],
            "gpu_request": "none",
        },
    },
}  # fmt: skip


def requested(case: dict):
    """(request, profile) of a case."""
    profile = from_plain({"venv": "/shared/venv"} | case.get("profile", {}), {})
    layout = case["layout"]
    placed = placement.place(as_layout(layout).resolve(), 8) if layout else placement.place_ranks(1, 8)
    uses_gpus = layout is not None
    title = "mimo:RUN.import"
    return slurm.request(
        title, placed, profile, uses_gpus=uses_gpus, partition=case.get("partition"), after=case.get("after")
    ), profile


def rendered(case: dict) -> str:
    asked, profile = requested(case)
    return slurm.script(asked, profile, RECORD, case.get("code", CODE))


def job_of(record: Path, case: dict) -> Job:
    if case["layout"] is None:
        return Job("verify", {"left": "/m/a", "right": "/m/b", "certificate": "/out/v.json"}, 1, record, "RUN-3")
    size = as_layout(case["layout"]).resolve().world_size
    model = "/hub/models--Qwen--Q/snapshots/abc"
    return Job("import_hf", {"model": model, "target": "/work/w/mimo", "layout": case["layout"]}, size, record, "RUN-1")


def compare(path: Path, text: str) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, f"{path.name}; UPDATE_GOLDEN=1 rewrites it"


# ---------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_golden_one_and_bash_can_read_it(name):
    path = GOLDEN / f"sbatch_{name}.sh"
    compare(path, rendered(CASES[name]))
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_golden_script_belongs_to_a_case():
    assert {p.stem for p in GOLDEN.glob("*.sh")} == {f"sbatch_{n}" for n in CASES}


@pytest.mark.parametrize("name", ["irregular", "container", "verify"])
def test_the_ranks_command_is_the_golden_one(name, tmp_path):
    record = tmp_path / "runs/RUN/1-import"
    asked, profile = requested(CASES[name])
    slurm.write(job_of(record, CASES[name]), "import", "RUN", asked, profile, tmp_path / "runs/RUN/code")
    step = json.loads((record / "STEP.json").read_text())
    lines = [
        f"{k} = {json.dumps(step[k])}"
        for k in ("node_of_rank", "ranks_on_a_node", "allocated_gpus")
        if step[k] is not None
    ]
    lines += ["srun = [", *(f"  {json.dumps(w)}," for w in step["srun"]), "]", "[environment]"]
    lines += [f"{k} = {json.dumps(v)}" for k, v in step["environment"].items()]
    text = "\n".join(lines).replace(str(tmp_path), "/shared") + "\n"
    compare(GOLDEN / f"srun_{name}.toml", text)
    assert tomllib.loads(text)["srun"][0] == "srun"
    assert os.access(record / "sbatch.sh", os.X_OK) and (record / "JOB.json").is_file() and (record / "logs").is_dir()


def test_seventeen_ranks_are_placed_one_by_one_on_three_nodes():
    asked, profile = requested(CASES["irregular"])
    assert [len(n) for n in asked.placement.nodes] == [8, 8, 1] and asked.allocated_gpus == 24
    command = slurm.rank_command(job_of(RECORD, CASES["irregular"]), asked, profile)
    assert "--distribution=arbitrary" in command and "--ntasks=17" in command
    assert not any(w.startswith("--ntasks-per-node") for w in command)


# ------------------------------------------------------------------------------------------------- values that stay data


def run_script(tmp_path: Path, profile_values: dict, record: Path) -> tuple[list[str], dict[str, str]]:
    """Render a script, run it with bash; what its python was given and found in its environment."""
    venv = Path(profile_values["venv"])
    (venv / "bin").mkdir(parents=True)
    stub = venv / "bin/python"
    stub.write_text(
        f'#!{sys.executable} -I\nimport json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open({str(tmp_path / "seen")!r}, "w"))\n'
    )
    stub.chmod(0o755)
    profile = from_plain(profile_values, {})
    asked = slurm.request("mimo:RUN.import", placement.place_ranks(2, 2), profile, uses_gpus=True, after=7)
    script = tmp_path / "script.sh"
    script.write_text(slurm.script(asked, profile, record, tmp_path / "code"))
    subprocess.run(["bash", script], cwd=tmp_path, check=True)
    arguments, environment = json.loads((tmp_path / "seen").read_text())
    return arguments, environment


def test_hostile_values_reach_the_job_unread_by_any_shell(tmp_path):
    record = tmp_path / "runs/RUN"
    venv = tmp_path / "v $(touch pwned) `touch pwned` 'x' \"y\" ; touch pwned"
    values = {
        "venv": str(venv), "container_image": HOSTILE, "container_mounts": [HOSTILE.replace(",", "")], "on_finish": "x '$(touch pwned)'",
        "environment": {"A": HOSTILE}, "container_python": HOSTILE, "sbatch": ['--comment=$(touch pwned) `touch pwned` "; touch pwned'],
        "srun": ["--comment=$(touch pwned)"],
    }  # fmt: skip
    arguments, environment = run_script(tmp_path, values, record)
    assert arguments == ["-m", "launchers.slurm_step", str(record)]
    assert environment["PATH"].startswith(f"{venv}/bin:") and environment["PYTHONPATH"] == str(tmp_path / "code")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("asked", ["USR1@60", "B:TERM@60"])
def test_a_signal_that_nobody_hears_yet_does_not_end_the_script(tmp_path, asked):
    """During a slow setup, and during a slow start of python: by default each of these signals ends either."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho python; sleep 1; echo over\n")
    python.chmod(0o755)
    profile = from_plain({"venv": str(tmp_path), "setup": ["echo setup; sleep 1"], "signal": asked}, {})
    step = slurm.request("t", placement.place_ranks(1, 8), profile, uses_gpus=False)
    signals = {signal.SIGUSR1, signal.SIGUSR2, signal.Signals[f"SIG{profiles.signal_name(asked)}"]}
    text = slurm.script(step, profile, tmp_path, None)
    with subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True) as batch:
        assert batch.stdout
        for expected in ("setup\n", "python\n"):
            assert batch.stdout.readline() == expected
            for signum in signals:
                batch.send_signal(signum)
        assert batch.stdout.read() == "over\n"
    assert batch.returncode == 0


def test_setup_is_what_a_shell_runs(tmp_path):
    values = {"venv": str(tmp_path / "venv"), "setup": ["touch ran", "export SET=$(echo 1)"]}
    _, environment = run_script(tmp_path, values, tmp_path / "runs/RUN")
    assert (tmp_path / "ran").exists() and environment["SET"] == "1"


def test_the_batch_host_hands_hostile_values_to_srun_and_the_hook_as_they_are(tmp_path, monkeypatch):
    """launchers.slurm_step with a stand-in for srun: what the profile says arrives as one word or one variable each."""
    record, tools = tmp_path / "runs/RUN", tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(
        f"#!{sys.executable} -I\nimport json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open({str(tmp_path / 'seen')!r}, 'w'))\n"
        f"json.dump({{'status': 'ok', 'summary': {{'n': 3}}}}, open({str(record / 'result.json')!r}, 'w'))\n"
    )
    (tools / "hook").write_text(f'#!/bin/sh\ncat > {tmp_path}/said; printf "%s" "$1" > {tmp_path}/word\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    values = {"container_image": HOSTILE, "environment": {"A": HOSTILE}, "on_finish": f"hook {shlex.quote(HOSTILE)}"}
    profile = from_plain(values, {})
    asked = slurm.request("t", placement.place_ranks(1, 8), profile, uses_gpus=False)
    job = Job("verify", {"left": "/nowhere", "right": "/nowhere2"}, 1, record, "RUN")
    slurm.write(job, "verify", "RUN", asked, profile, None)
    command = [sys.executable, "-m", "launchers.slurm_step", str(record)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent.parent, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    words, environment = json.loads((tmp_path / "seen").read_text())
    assert f"--container-image={HOSTILE}" in words and environment["A"] == HOSTILE
    assert (tmp_path / "word").read_text() == HOSTILE
    said = json.loads((tmp_path / "said").read_text())
    assert (said["state"], said["job_id"], said["summary"]) == ("done", 7, {"n": 3})
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def slurms_reading(text: str) -> str:
    """A word of an ``#SBATCH`` line as slurm's src/sbatch/opt.c (_get_argument) reads it."""
    word, quote, i = "", "", 0
    while i < len(text):
        c = text[i]
        if c == "\\":
            i += 1
            word += text[i : i + 1]
        elif quote:
            quote, word = ("", word) if c == quote else (quote, word + c)
        elif c in "'\"":
            quote = c
        elif c.isspace() or c == "#":
            break
        else:
            word += c
        i += 1
    return word


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="'\\\0\n\r", exclude_categories=("Cs",)), max_size=30))
def test_a_quoted_value_is_read_back_by_slurm_as_it_was(value):
    assert slurms_reading(f"--comment={slurm.quoted(value)} --next") == f"--comment={value}"


def test_a_percent_sign_in_the_record_is_no_pattern_of_slurms():
    asked, profile = requested(CASES["one_node"])
    text = slurm.script(asked, profile, Path("/shared/50%j/RUN"), None)
    assert "#SBATCH --output=/shared/50%%j/RUN/slurm.log\n" in text and "#SBATCH --chdir=/shared/50%j/RUN\n" in text


# ---------------------------------------------------------------------------------------------------------- a container


@pytest.mark.parametrize("place", ["/data/a,b", "/data/a:b"])
def test_a_path_that_pyxis_cannot_mount_is_refused(place):
    asked, profile = requested(CASES["container"])
    job = Job("import_hf", {"model": place, "target": "/w/mimo"}, 8, RECORD, "RUN-1")
    with pytest.raises(UserError, match="pyxis cannot mount"):
        slurm.rank_command(job, asked, profile)


def mounts_of(command: list[str]) -> list[str]:
    (word,) = (w for w in command if w.startswith("--container-mounts="))
    return word.removeprefix("--container-mounts=").split(",")


def test_everything_that_is_mounted_exists_when_the_step_is_written(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    asked, profile = requested(CASES["container"] | {"profile": {"container_image": "/i"}})
    job = Job(
        "import_hf",
        {"model": str(model), "target": str(tmp_path / "new/workdir/mimo")},
        8,
        tmp_path / "runs/RUN/1-import",
        "RUN-1",
    )
    slurm.write(job, "import", "RUN", asked, profile, None)
    step = json.loads((tmp_path / "runs/RUN/1-import/STEP.json").read_text())
    assert [m for m in mounts_of(step["srun"]) if not Path(m.partition(":")[0]).exists()] == []


def test_a_model_below_a_directory_named_snapshots_does_not_mount_the_root():
    asked, profile = requested(CASES["container"])
    job = Job("import_hf", {"model": "/snapshots/qwen", "target": "/w/mimo"}, 8, RECORD, "RUN-1")
    assert "/:/" not in mounts_of(slurm.rank_command(job, asked, profile))


def test_a_mount_with_a_comma_is_refused():
    with pytest.raises(UserError):
        from_plain({"container_mounts": ["/a,b:/c"]}, {})


# ------------------------------------------------------------------------------------------------- what Slurm is asked


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ("Batch job submission failed: Invalid partition name specified", "partition"),
        ("Batch job submission failed: Invalid qos specification", "qos"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "time"),
        ("Batch job submission failed: Requested node configuration is not available", "gpus_per_node"),
        ("Batch job submission failed: Requested reservation is invalid", "reservation"),
        ("Batch job submission failed: Invalid feature specification", "constraint"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "account"),
        pytest.param(
            "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "qos",
        ),
    ],
)  # fmt: skip
def test_what_slurm_refuses_names_the_field_to_change(said, field):
    error = slurm.explained(SlurmError(said), profiles.Profile(partition="h10"), {"h100": H100})
    assert f"executor.{field}=" in str(error)
    if field == "partition":
        assert "did you mean 'h100'" in str(error)


# ------------------------------------------------------------------------------------------------------------- queueing


class Sbatch:
    """A stand-in for sbatch that hands out ids and fails when told."""

    def __init__(self) -> None:
        self.fail: dict[int, BaseException] = {}
        self.scripts: list[str] = []

    def __call__(self, script: str, seconds: float = 60.0) -> int:
        if error := self.fail.pop(len(self.scripts), None):
            raise error
        self.scripts.append(Path(script).read_text())
        return 100 + len(self.scripts)


GPU = Partition("gpu", True, 2, 64, 512_000, 8, "infinite", True)


@pytest.fixture
def chain(tmp_path):
    make_hf(tmp_path / "base/hf", config_of(layers=2))
    return Chain(tmp_path / "base")


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    stand_in = Sbatch()
    monkeypatch.setattr(slurm_commands, "submit", stand_in)
    monkeypatch.setattr(slurm_commands, "would_run", lambda script, seconds=20.0: None)
    monkeypatch.setattr(slurm_commands, "partitions", lambda seconds=5.0: {"gpu": GPU})
    monkeypatch.setattr(submission.provenance, "ship_code", lambda root: root / "code")
    return stand_in


def queued(chain: Chain, profile: dict | None = None):
    """Submit the chain; its record, also when that failed."""
    made = from_plain(profile or {"venv": sys.prefix}, {})
    plan = chain.plan()
    asked = submission.prepare(plan, made, need_slurm=True)
    run = pipeline.new_record(plan, "slurm", submission.about(made, []))
    try:
        submission.start(asked, run, None)
    except BaseException as error:
        return records.load(run.root), error
    return records.load(run.root), None


def dependencies(sbatch: Sbatch) -> list[str | None]:
    found = [[x for x in s.splitlines() if "--dependency" in x] for s in sbatch.scripts]
    return [f[0].partition("afterok:")[2] if f else None for f in found]


def test_every_step_is_queued_after_the_one_before(chain, sbatch):
    run, error = queued(chain)
    assert error is None and dependencies(sbatch) == [None, "101", "102"]
    assert [(s.state().state, s.state().job_id) for s in run.steps] == [
        ("queued", 101),
        ("queued", 102),
        ("queued", 103),
    ]
    assert all("--gpus-per-node" in s for s in sbatch.scripts[:2]) and "--gpus-per-node" not in sbatch.scripts[2]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_submission_that_is_refused_half_way_is_continued_by_resume(chain, sbatch, at, monkeypatch, capsys):
    sbatch.fail[at] = SlurmError("sbatch: Job submit limit reached")
    run, error = queued(chain)
    assert isinstance(error, UserError) and f"nemo-run resume {run.run_id}" in str(error)
    assert [s.state().state for s in run.steps] == ["queued"] * at + ["failed"] + ["waiting"] * (2 - at)
    pending = {100 + n: slurm_commands.QueuedJob(100 + n, "PENDING") for n in range(1, at + 1)}
    monkeypatch.setattr(slurm_commands, "queue", lambda users=(), seconds=5.0: pending)
    commands.resume(run.run_id, {}, force=False)
    assert [s.state().job_id for s in run.steps] == [101, 102, 103] and dependencies(sbatch) == [None, "101", "102"]
    assert monitor.look([run])[0].state == "queued"


def test_a_submission_that_is_interrupted_leaves_a_title_to_find_the_job_by(chain, sbatch, monkeypatch):
    sbatch.fail[1] = KeyboardInterrupt()
    run, error = queued(chain)
    assert isinstance(error, KeyboardInterrupt)
    state = run.steps[1].state()
    assert (state.state, state.job_id, state.title) == ("queued", None, f"mimo:{run.run_id}.export")
    found = {101: slurm_commands.QueuedJob(101, "RUNNING"), 7: slurm_commands.QueuedJob(7, "PENDING", state.title)}
    monkeypatch.setattr(slurm_commands, "queue", lambda users=(), seconds=5.0: found)
    commands.resume(run.run_id, {}, force=False)
    assert (
        dependencies(sbatch) == [None, "7"] and run.steps[2].state().job_id == 102
    )  # the export itself is not queued twice


def test_an_sbatch_that_is_not_heard_may_have_queued_the_job(chain, sbatch):
    sbatch.fail[0] = SlurmSilent("sbatch did not answer within 60 s")
    run, error = queued(chain)
    assert isinstance(error, UserError) and run.steps[0].state().state == "queued"


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"partition": "gpo"}, "executor.partition=gpo.*did you mean 'gpu'"),
        ({"gpus_per_node": 1}, "needs 3 nodes of 1 GPUs, partition gpu has 2"),
        ({"gpus_per_node": 16, "exclusive": True}, "set executor.gpus_per_node=8"),
        ({"cpus_per_task": 30}, "set executor.cpus_per_task=21"),
        ({"mem": "100M"}, "executor.mem=100M"),
        ({"gpu": "H101"}, "executor.gpu=H101: its memory is not known; set executor.gpu_memory"),
    ],
)
def test_what_the_cluster_cannot_run_is_refused_with_the_field(chain, sbatch, profile, said):
    with pytest.raises(UserError, match=said):
        submission.prepare(chain.plan(), from_plain(profile, {}), need_slurm=True)


def test_memory_of_the_gpu_and_idle_gpus_become_notes(chain, sbatch):
    plan = chain.plan()
    asked = submission.prepare(
        plan, from_plain({"gpu": "h100", "gpus_per_node": 8, "exclusive": True}, {}), need_slurm=True
    )
    text = "\n".join(plan.notes)
    assert "import: converts without GPU memory" in text and "on one h100 of 80 GB: fits" in text
    assert (
        "idle" in text and asked.requests["verify"].allocated_gpus == 0 and asked.requests["import"].allocated_gpus == 8
    )
    assert slurm.partition_of(from_plain({"cpu_partition": "c", "partition": "p"}, {}), False) == "c"


@pytest.mark.parametrize(
    ("text", "size"), [("64G", 64 << 30), ("1", 1 << 20), ("0", 0), ("2T", 2 << 40), ("512K", 512 << 10)]
)
def test_memory_as_slurm_counts_it(text, size):
    assert submission.memory_bytes(text) == size


def test_a_dry_run_without_slurm_says_so_and_goes_on(chain, sbatch, monkeypatch):
    def silent(seconds: float = 5.0):
        raise SlurmSilent("sinfo: not found")

    monkeypatch.setattr(slurm_commands, "partitions", silent)
    plan = chain.plan()
    assert set(submission.prepare(plan, from_plain({}, {}), need_slurm=False).requests) == {
        "import",
        "export",
        "verify",
    }
    assert any("Slurm was not asked: sinfo" in n for n in plan.notes)
    with pytest.raises(SlurmSilent):
        submission.prepare(plan, from_plain({}, {}), need_slurm=True)


def test_uncommitted_code_that_would_not_be_shipped_is_a_warning(chain, sbatch, monkeypatch):
    monkeypatch.setattr(submission.provenance, "code_state", lambda: {"dirty": ["a.py", "b.py"]})
    for code, warned in (("installed", 1), ("snapshot", 0)):
        plan = chain.plan()
        submission.prepare(plan, from_plain({"code": code}, {}), need_slurm=True)
        assert len(plan.warnings) == warned
