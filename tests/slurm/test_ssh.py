"""A profile with ``ssh``: the command runs on the login node. Here ``ssh`` is a script that does what ssh does with its command:
hand it, as one string, to the remote user's shell, in another home and an almost empty environment."""

import json
import os
import sys
from pathlib import Path

import pytest

from mimo_jobs import records
from tests.hf_files import config_of, make_hf
from tests.slurm.runs import SMALL, nemo_run, same_files, wait_for

SSH = """#!/bin/sh
printf '%s\\n' "$*" >> "{log}"
while [ "$1" != -- ]; do shift; done
[ "$2" = me@login.far ] || { echo "ssh: Could not resolve hostname $2" >&2; exit 255; }
cd / && exec /usr/bin/env -i HOME="{home}" PATH="{path}" SLURM_CONF="$SLURM_CONF" /bin/sh -c "$3"
"""


@pytest.fixture
def far(tmp_path, monkeypatch, cluster):
    """The home over there; ``ssh`` is on PATH here, Slurm's commands are not."""
    home, binaries = tmp_path / "far home", tmp_path / "bin"
    home.mkdir()
    binaries.mkdir()
    (home / "venv").symlink_to(Path(sys.executable).parent.parent)
    text = (
        SSH.replace("{log}", str(tmp_path / "ssh.log"))
        .replace("{home}", str(home))
        .replace("{path}", os.environ["PATH"])
    )
    (binaries / "ssh").write_text(text)
    (binaries / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:/nowhere")
    monkeypatch.chdir(tmp_path)
    profile = '[slurm.far]\nssh = "me@login.far"\nvenv = "~/venv"\naccount = "research"\nenvironment = { X = "$(touch pwned) \'q\'" }\n'
    (tmp_path / "executors.toml").write_text(profile)
    return home


def test_a_chain_is_submitted_watched_and_read_over_ssh(far, tmp_path, monkeypatch, cluster):
    model = make_hf(tmp_path / "hf $(touch pwned) 'q'", config_of())
    words = (
        "recipes.qwen35vl_pipeline",
        f"model={model}",
        f"workdir={tmp_path}/out",
        *SMALL,
        "--executor",
        "slurm:far",
    )
    said = nemo_run(*words, "executor.time=00:10:00").stdout
    run_id = next(line.split()[1] for line in said.splitlines() if line.startswith("run "))
    assert f"nemo-run status {run_id} --executor slurm:far" in said
    run = records.load(far / ".local" / "state" / "mimo_jobs" / "runs" / run_id)
    assert (
        run.about["profile"]["time"] == "00:10:00" and run.about["profile"]["environment"]["X"] == "$(touch pwned) 'q'"
    )
    shown = nemo_run("status", run_id, "--wait", "--json", "--executor", "slurm:far").stdout
    assert json.loads(shown)["state"] == "done"
    assert same_files(model, tmp_path / "out" / "hf")
    assert "language.tp1 | " in nemo_run("logs", f"{run_id}.import", "--executor", "slurm:far").stdout
    assert not list(tmp_path.rglob("pwned")) and not Path("/pwned").exists()
    monkeypatch.undo()
    os.environ |= cluster.environment()
    wait_for(run, "done", "done", "done")


def test_errors_and_exit_codes_come_back(far, tmp_path):
    there = ("--executor", "slurm:far")
    done = nemo_run("recipes.qwen35vl_pipeline", "model=/no/such", f"workdir={tmp_path}/out", *SMALL, *there, code=1)
    assert "model=/no/such: no such directory" in done.stderr
    done = nemo_run("recipes.qwen35vl_pipeline", "model=/a", "workdir=/b", *there, "executor.ssh=me@nowhere", code=1)
    assert "no connection; `ssh me@nowhere` must work without a password" in done.stderr
    done = nemo_run("recipes.qwen35vl_pipeline", "model=/a", "workdir=/b", *there, "executor.venv=none", code=2)
    assert "ssh=me@login.far needs venv" in done.stderr
