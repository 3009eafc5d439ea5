"""Real launches on this machine: NeMo-Run, torchrun, ranks that succeed, fail, are killed, are interrupted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launchers import base, local
from launchers.base import Job, outcome
from mimo_jobs import paths, records

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(300)]

BIN = Path(sys.executable).parent
NASTY = "a b'c\"d $(touch pwned) `touch pwned` ;\n{e} %s [bold]"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    code = "import sys; from mimo_jobs import jobs; jobs.make_tiny(target=sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, timeout=300, capture_output=True)
    return target


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def job(name: str, home: Path, world_size: int, **arguments: Any) -> Job:
    run_id = paths.new_id("test")
    made = Job(name, arguments, world_size, home / "runs" / run_id, run_id)
    made.write()
    return made


def ranks_of(record: Path) -> dict[int, int]:
    """rank -> pid of the live processes whose command line names a file of the record."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"mimo_jobs.worker" in words
            and any(w.startswith(bytes(record)) for w in words)
            and b"torchrun" not in words[1]
        ):
            rank = next((e.removeprefix(b"RANK=") for e in environment if e.startswith(b"RANK=")), b"0")
            found[int(rank)] = int(process.name)
    return found


def wait_for(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def stuck(checkpoint, tmp_path) -> Path:
    """A checkpoint that a rank can never finish reading: its config.json is a pipe that nobody writes."""
    target = tmp_path / "stuck"
    shutil.copytree(checkpoint, target)
    (target / "config.json").unlink()
    os.mkfifo(target / "config.json")
    return target


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_command_of_a_dry_run_is_the_one_nemo_run_executes(home, world_size, monkeypatch):
    import nemo_run  # noqa: F401  before Popen is replaced

    described, seen, original = job("verify", home, world_size, left="/a", right="/b"), [], subprocess.Popen

    class Recorder(original):
        def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
            seen.append((args, options.get("env")))
            super().__init__(["true"], *rest, **options)

    monkeypatch.setattr("torchx.schedulers.local_scheduler.subprocess.Popen", Recorder)
    local.launch(described, lambda progress: None)
    (group,) = local.commands(described)
    command, environment = next((c, e) for c, e in seen if "mimo_jobs.worker" in c)
    assert [Path(group.command[0]).name, *group.command[1:]] == command
    assert environment["PATH"].split(":")[0] == str(Path(group.command[0]).parent)
    assert group.ranks == range(world_size)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_job_that_succeeds_leaves_its_summary_and_shows_progress(checkpoint, home, world_size):
    made, shown = job("verify", home, world_size, left=str(checkpoint), right=str(checkpoint)), []
    local.launch(made, shown.append)
    ended = outcome(made)
    assert ended.error is None
    assert ended.summary["equal"] is True
    assert [p["phase"] for p in shown[:2]] == ["starting NeMo-Run", "starting ranks"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_error_of_a_rank_is_what_the_user_sees(checkpoint, home, world_size):
    made = job("verify", home, world_size, left=str(checkpoint), right="/no/such/directory")
    local.launch(made, lambda progress: None)
    ended = outcome(made)
    assert ended.exit_code == 1
    assert "/no/such/directory" in (ended.error or "")
    assert "Traceback" not in (ended.error or "")


def test_a_defect_is_named_in_one_line_and_its_traceback_is_in_the_log(home, tmp_path, monkeypatch):
    defect = "from mimo_jobs import jobs\njobs.JOBS['verify'] = lambda *, world: len(world)\n"
    (tmp_path / "sitecustomize.py").write_text(defect)  # Python imports it in the rank
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = job("verify", home, 1)
    local.launch(made, lambda progress: None)
    ended = outcome(made)
    assert "TypeError" in (ended.error or "")
    assert "\n" not in (ended.error or "")
    assert "Traceback" in base.log_tail(made.record, lines=100)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_rank_ends_the_job_within_seconds(stuck, home, world_size):
    made = job("verify", home, world_size, left=str(stuck), right=str(stuck))

    def kill() -> None:
        wait_for(lambda: len(ranks_of(made.record)) == world_size)
        time.sleep(1)
        os.kill(ranks_of(made.record)[world_size - 1], signal.SIGKILL)
        killed.append(time.monotonic())

    killed: list[float] = []
    thread = threading.Thread(target=kill)
    thread.start()
    local.launch(made, lambda progress: None)
    thread.join()
    assert time.monotonic() - killed[0] < 20
    ended = outcome(made)
    assert ended.exit_code == 1
    assert f"rank {world_size - 1}" in (ended.error or "") or world_size == 1
    assert "killed" in (ended.error or "")
    assert wait_for(lambda: not ranks_of(made.record), 10)


def test_ranks_whose_torchrun_was_killed_end_too(stuck, home):
    made, parents = job("verify", home, 2, left=str(stuck), right=str(stuck)), set()

    def kill() -> None:
        wait_for(lambda: len(ranks_of(made.record)) == 2)
        time.sleep(1)
        for pid in ranks_of(made.record).values():
            parents.add(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]))
        os.kill(*parents, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    local.launch(made, lambda progress: None)
    thread.join()
    assert outcome(made).exit_code == 1
    assert wait_for(lambda: not ranks_of(made.record), 10)
    assert "Traceback" not in base.log_tail(made.record, lines=100)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_command_ends_every_rank(stuck, home, how):
    code = (
        "import sys, json; from pathlib import Path; from launchers import local; from launchers.base import Job\n"
        "from mimo_jobs import cli\n"
        "import signal; signal.signal(signal.SIGTERM, cli._stop)\n"
        "made = Job(**json.loads(sys.argv[1]) | {'record': Path(sys.argv[2])})\n"
        "sys.exit(cli.guarded(lambda: local.launch(made, lambda progress: None)))"
    )
    made = job("verify", home, 2, left=str(stuck), right=str(stuck))
    text = json.dumps({"name": made.name, "arguments": made.arguments, "world_size": 2, "run_id": made.run_id})
    process = subprocess.Popen([sys.executable, "-c", code, text, str(made.record)], stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: len(ranks_of(made.record)) == 2)
    time.sleep(1)
    process.send_signal(how)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("nemo-run: interrupted")
    assert wait_for(lambda: not ranks_of(made.record), 10)


def test_a_round_trip_through_paths_that_a_shell_would_read(checkpoint, home, tmp_path):
    mimo, exported = tmp_path / f"mimo {NASTY}", tmp_path / f"exported {NASTY}"
    layout = ["layout.language.tp=2", "layout.images.tp=1"]
    for recipe, *fields in (
        ("qwen35vl_import", f"model={checkpoint}", f"target={mimo}"),
        ("qwen35vl_export", f"source={mimo}", f"target={exported}"),
    ):
        command = [str(BIN / "nemo-run"), f"recipes.{recipe}", *fields, *layout, "--executor", "local"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    verified = subprocess.run(
        [str(BIN / "nemo-run"), "verify", checkpoint, exported], capture_output=True, text=True, check=False
    )
    assert verified.returncode == 0, verified.stderr
    assert verified.stdout.splitlines()[-1] == "parity: 103/103 tensors bit-exact"
    assert not list(tmp_path.rglob("pwned"))


def test_a_run_directory_that_nemo_run_cannot_carry_is_refused(checkpoint, tmp_path):
    home = tmp_path / "my home"
    command = [str(BIN / "nemo-run"), "recipes.quickstart", "--executor", "local", f"workdir={tmp_path}/w"]
    environment = os.environ | {"MIMO_JOBS_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == 1
    assert "MIMO_JOBS_HOME" in done.stderr
    assert not home.exists()


@pytest.mark.timeout(700)  # 60 s on two idle cores, of which the imports of three training ranks are a third
def test_quickstart_ends_with_the_parity_line(home, tmp_path):
    command = [str(BIN / "nemo-run"), "recipes.quickstart", "--executor", "local", f"workdir={tmp_path}/work dir"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "parity: 103/103 tensors bit-exact"
    assert "✓ 6/8 logits" in done.stderr and "✓ 8/8 merge" in done.stderr
    first, last = re.findall(r"✓ 7/8 lora +.* 16 steps, loss ([\d.]+) → ([\d.]+) → ", done.stderr)[0]
    assert float(last) < 0.3 * float(first)
    (run,) = (home / "runs").iterdir()
    assert [s.state().state for s in records.load(run).steps] == ["done"] * 8
    merged = json.loads((tmp_path / "work dir/merged/parity.json").read_text())
    assert merged["merged"] > 0 and not merged["different"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert "Traceback" not in again.stderr


def test_nemoruns_own_command_line_runs_a_recipe(checkpoint, home, tmp_path):
    recipe = [str(BIN / "nemorun"), "recipes", "qwen35vl_import", f"model={checkpoint}", f"target={tmp_path}/mimo"]
    layout = ["layout.language.tp=1", "layout.images.tp=1"]
    shown = subprocess.run([*recipe, *layout, "--dryrun"], capture_output=True, text=True, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "ComponentLayout(tp=1)" in shown.stdout
    assert not (tmp_path / "mimo").exists()
    trained = [str(BIN / "nemorun"), "recipes", "qwen35vl_sft", f"source={checkpoint}", "data=d.jsonl", "target=t"]
    groups = ["optimizer.lr=0.001", "saving.keep=3", "epochs=0.5", "--dryrun"]
    shown = subprocess.run([*trained, *layout, *groups], capture_output=True, text=True, timeout=120, check=False)
    assert "lr=0.001" in shown.stdout and "keep=3" in shown.stdout, shown.stdout + shown.stderr
    done = subprocess.run([*recipe, *layout, "--yes"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mimo").is_dir()
    wrong = subprocess.run([*recipe, *layout, "--yes"], capture_output=True, text=True, timeout=200, check=False)
    assert wrong.returncode == 1
    assert "exists" in wrong.stdout + wrong.stderr
