"""Fine-tuning as a step of a pipeline on a real cluster: asked to stop, it saves, is requeued, and goes on at the step it was at."""

import json
import subprocess
import sys

import pytest

from mimo_jobs.training import history, saved
from mimo_jobs.training.tiny_data import make_data
from tests.slurm.runs import SMALL, states, submit, told, wait_until

pytestmark = pytest.mark.timeout(900)  # three ranks that import torch twice; minutes on a busy machine

STEPS = 16
WORDS = (
    *SMALL, f"steps={STEPS}", "global_batch_size=8", "micro_batch_size=4", "precision=fp32", "recompute=none",
    "saving.every=1000", "logging.tensorboard=false",
)  # fmt: skip


SLOW = """
import sys, time
if "mimo_jobs.worker" in " ".join(sys.orig_argv):
    from mimo_jobs.training.rows import Rows
    real = Rows.of_step
    Rows.of_step = lambda self, step: (time.sleep(0.5), real(self, step))[1]
"""  # a step takes at least that long, on a fast machine too


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model whose processor is a real one, and what to train it on."""
    base = tmp_path_factory.mktemp("inputs")
    code = "import sys; from mimo_jobs import jobs; jobs.make_tiny(target=sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(base / "hf")], check=True, timeout=300, capture_output=True)
    make_data(str(base / "data"))
    return base


def training(home, inputs, tmp_path, train, *more):
    """A pipeline whose training has done a few steps when this returns."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW)
    slow = ("executor.code=installed", f"executor.environment.PYTHONPATH={tmp_path}/slow")
    words = (
        *slow,
        f"model={inputs}/hf",
        f"workdir={tmp_path}/out",
        f"data={inputs}/data",
        f"train={train}",
        *WORDS,
        *more,
    )
    run = submit(home, *words)
    wait_until(lambda: len(steps_of(run, train)) >= 3, 240, run)
    return run


def steps_of(run, train):
    found = history.read(run.step(train).directory)
    return list(found.steps) if found else []


def events(run, train):
    return [e["event"] for e in run.step(train).events()]


def went_on(run, train, tmp_path):
    """Requeued with its progress saved, and through: every step counts once, and the second start began where the first ended."""
    wait_until(lambda: "requeued" in events(run, train), 90, run)
    event = next(e for e in run.step(train).events() if e["event"] == "requeued")
    assert event["progress"] > 0, told(run)
    wait_until(lambda: set(states(run)) <= {"done", "skipped"}, 300, run)
    found = history.read(run.step(train).directory)
    assert found is not None
    assert list(found.steps) == list(range(1, STEPS + 1))
    assert found.resumed == [event["progress"]]
    assert events(run, train)[-1] == "done" and events(run, train).count("started") == 2
    assert saved.progress(tmp_path / "out" / f"{train}.steps") == STEPS
    assert (tmp_path / "out" / "hf" / "parity.json").is_file()
    assert not list((tmp_path / "out").glob(".*partial*"))


def test_adapters_asked_to_stop_go_on_where_they_were(home, inputs, tmp_path, cluster):
    run = training(home, inputs, tmp_path, "lora", "optimizer.lr=1e-2", "dataset.workers=1")
    cluster.run("scancel", "--signal=USR1", "--batch", str(run.step("lora").state().job_id))
    went_on(run, "lora", tmp_path)
    losses = history.read(run.step("lora").directory).series("loss")
    assert losses[-1][1] < 0.5 * losses[0][1]
    parity = json.loads((tmp_path / "out/hf/parity.json").read_text())
    assert parity["merged"] > 0 and parity["equal"] + parity["merged"] == parity["tensors"]


def test_a_preempted_training_goes_on_where_it_was(home, inputs, tmp_path, cluster):
    run = training(home, inputs, tmp_path, "sft", "dataset.workers=0")
    cluster.run("sbatch", "--qos=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    went_on(run, "sft", tmp_path)
