"""This machine: NeMo-Run's LocalExecutor, starting several ranks with torchrun and a single one directly.

A single rank does without torchrun because that imports torch first: 4 s, more than most of these jobs take.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.base import LOGS, Job, RankGroup, Watch, clear
from mimo_jobs.records import read_json

POLL_SECONDS = 0.1
BIN = Path(sys.executable).parent
RENDEZVOUS_ID = "1"  # NeMo-Run would draw lots; torchrun takes a free port, so runs beside each other do not meet


def commands(job: Job) -> list[RankGroup]:
    """One command for all ranks: word for word what NeMo-Run makes of the experiment below."""
    worker = ["-m", "mimo_jobs.worker", str(job.file)]
    if job.world_size == 1:
        return [RankGroup(range(1), "this machine", [str(BIN / "python"), *worker])]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", RENDEZVOUS_ID]
    ranks = ["--nnodes", "1", "--nproc-per-node", str(job.world_size), "--node-rank", "0", "--tee", "3"]
    return [RankGroup(range(job.world_size), "this machine", [str(BIN / "torchrun"), *rendezvous, *ranks, *worker])]


def launch(job: Job, watch: Watch) -> None:
    """Run the job in a NeMo-Run experiment until it ends; an exception (Ctrl-C) ends every rank first.

    Everything that NeMo-Run writes and prints goes under the job's record.
    """
    clear(job.record)
    watch({"phase": "starting NeMo-Run"})
    with _quietly(job.record / "launcher.log") as log:
        # Read when nemo_run is imported; the first job of a process decides.
        os.environ.setdefault("NEMORUN_HOME", str(job.record / "nemo_run"))
        import nemo_run as run
        from nemo_run.core.frontend.console.api import CONSOLE

        CONSOLE.file = log
        # torchrun and python are looked up on PATH; the user's directory must not shadow our modules.
        (job.record / LOGS).mkdir(exist_ok=True)
        environment = {"PATH": str(BIN), "PYTHONSAFEPATH": "1", "MIMO_JOBS_LOGS": str(job.record / LOGS)}
        environment["MIMO_JOBS_OWNER"] = str(os.getpid())  # killed, this process could not end the ranks any more
        if job.world_size == 1:
            environment |= {"RANK": "0", "WORLD_SIZE": "1"}  # else inside an salloc the rank would be Slurm's
        executor = run.LocalExecutor(
            ntasks_per_node=job.world_size,
            launcher=run.Torchrun(rdzv_id=int(RENDEZVOUS_ID)) if job.world_size > 1 else None,
            env_vars=environment,
        )
        script = run.Script(path="mimo_jobs.worker", m=True, entrypoint="python", args=[str(job.file)])
        with run.Experiment(
            job.name,
            executor=executor,
            id=_experiment_id(job),
            base_dir=str(job.record / "nemo_run"),
            log_level="WARNING",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        ) as experiment:
            experiment.add(script, name=job.name)
            watch({"phase": "starting ranks"})
            try:
                experiment.run(tail_logs=False)
                _follow(experiment, job, watch)
            except BaseException:
                with _deaf():
                    experiment.cancel(job.name)
                raise


def _experiment_id(job: Job) -> str:
    """A name that no earlier attempt of this record has."""
    taken = job.record / "nemo_run" / "experiments" / job.name
    names = itertools.chain([job.run_id], (f"{job.run_id}-again{n}" for n in itertools.count(1)))
    return next(n for n in names if not (taken / n).exists())


def _follow(experiment: Any, job: Job, watch: Watch) -> None:
    """Pass progress on until the job has ended."""
    from torchx.specs import is_terminal

    while not is_terminal(experiment.status(return_dict=True)[job.name]["status"]):
        progress = read_json(job.record / "progress.json")
        if progress:
            watch(progress)
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Ignore Ctrl-C: an impatient second one would leave ranks behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quietly(path: Path) -> Iterator[Any]:
    """Send what Python code prints to a file; the console that shows our own progress holds the real terminal."""
    with path.open("a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield log
