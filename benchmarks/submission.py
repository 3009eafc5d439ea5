"""How long the submit side takes: ``python -m benchmarks.submission`` starts a real Slurm cluster of its own and measures

* a dry run and a whole submission of ``qwen35vl_pipeline`` (three steps), from the start of the process to its end;
* ``status`` of one run, and of 200 pipelines (600 jobs) that are queued;
* beside them the floor, a Python that imports nothing, and ``import nemo_run``, which these commands do without.

Needs root and Debian's Slurm packages (.ci/run installs them). Writes ``benchmarks/results/submission.json``.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mimo_jobs import provenance
from tests.hf_files import config_of, make_hf
from tests.slurm.cluster import Cluster, missing
from tests.slurm.runs import NEMO_RUN, SMALL, submit
from tests.slurm.test_faults import copy_run

REPEATS = 5
PIPELINES = 200


def seconds(*command: str) -> float:
    """Wall time of a process that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def measured(*command: str, repeats: int = REPEATS) -> dict[str, float]:
    """Median, least and most of several runs; the first, which reads from disk, is not counted."""
    times = [seconds(*command) for _ in range(repeats + 1)][1:]
    return {"median": round(statistics.median(times), 3), "min": round(min(times), 3), "max": round(max(times), 3)}


def main() -> None:
    """Measure, and write the results."""
    if reason := missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        cluster = Cluster(work / "slurm").start()
        try:
            os.environ |= cluster.environment() | {"MIMO_JOBS_HOME": str(work / "home"), "XDG_CONFIG_HOME": str(work)}
            results = measure(work, cluster)
        finally:
            cluster.stop()
    state = provenance.code_state()
    found = {
        "command": "python -m benchmarks.submission", "commit": state.get("commit"), "uncommitted": len(state.get("dirty") or []),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "versions": provenance.versions(), "repeats": REPEATS, "seconds": results,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "submission.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path.read_text())


def measure(work: Path, cluster: Cluster) -> dict[str, dict[str, float]]:
    """Every case, on a cluster whose nodes are taken, so that nothing starts meanwhile."""
    cluster.run("sbatch", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3600")
    model = make_hf(work / "hf", config_of())
    recipe = [
        NEMO_RUN,
        "recipes.qwen35vl_pipeline",
        f"model={model}",
        f"workdir={work}/out",
        *SMALL,
        "--executor",
        "slurm",
    ]
    found = {
        "python -c pass": measured(sys.executable, "-c", "pass"),
        "import nemo_run": measured(sys.executable, "-c", "import nemo_run"),
    }
    found["dry run"] = measured(*recipe, "--dryrun")
    found["submission of the chain"] = measured(*recipe)
    run = submit(work / "home", *recipe[2:-2])
    found["status of one run"] = measured(NEMO_RUN, "status", run.run_id)
    for number in range(1, PIPELINES - REPEATS - 1):
        copy_run(run, number)
    shown = json.loads(subprocess.run([NEMO_RUN, "status", "--json"], check=True, capture_output=True).stdout)
    assert len(shown["runs"]) == PIPELINES, len(shown["runs"])
    found[f"status of {PIPELINES} pipelines"] = measured(NEMO_RUN, "status")
    return found


if __name__ == "__main__":
    main()
