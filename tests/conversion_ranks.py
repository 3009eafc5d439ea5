"""Run a conversion job's ranks: as threads of this process (fast), or as the worker processes that users run."""

import json
import os
import resource
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from mimo_jobs.conversion.exporter import run_export
from mimo_jobs.conversion.importer import run_import
from mimo_jobs.conversion.preflight import as_layout, export_args, import_args
from mimo_jobs.parallel.world import World


def convert(record: Path, job: str, layout: dict, **arguments: Any) -> dict[str, Any]:
    """Import or export with one thread a rank; rank 0's summary. Raises what the first failing rank raised."""
    size = as_layout(layout).resolve().world_size
    record.mkdir(parents=True, exist_ok=True)
    summaries: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def rank(r: int) -> None:
        try:
            with World(r, size, record, "test") as world:
                if job == "import":
                    summaries[r] = run_import(import_args(layout=layout, fsync=False, **arguments), world)
                else:
                    summaries[r] = run_export(export_args(layout=layout, fsync=False, **arguments), world)
        except BaseException as error:
            errors.append((r, error))

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0][1]
    return summaries[0]


def start_worker(
    record: Path, job: str, layout: dict, file_limit: dict[int, int] | None = None,
    environment: dict[str, str] | None = None, **arguments: Any,
) -> list[subprocess.Popen]:  # fmt: skip
    """Start the ranks of a job as worker processes, as torchrun would, but with nobody that ends them together.

    ``file_limit``: rank -> bytes after which its writes fail, as on a full disk; ``environment``: variables beside this process's.
    """

    def limited(rank: int) -> None:
        if file_limit and rank in file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit[rank], file_limit[rank]))

    size, file = as_layout(layout).resolve().world_size, job_file(record, job, layout, arguments)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mimo_jobs.worker", str(file)],
            env={**os.environ, **(environment or {}), "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(size)}, preexec_fn=partial(limited, r),
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for r in range(size)
    ]  # fmt: skip


def job_file(record: Path, job: str, layout: dict, arguments: dict[str, Any]) -> Path:
    """Write JOB.json as the submit side does."""
    record.mkdir(parents=True, exist_ok=True)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
    size = as_layout(layout).resolve().world_size
    spec = {"schema": 1, "job": job, "run_id": record.name, "world_size": size, "record": str(record),
            "arguments": {**plain, "layout": layout}}  # fmt: skip
    (record / "JOB.json").write_text(json.dumps(spec))
    return record / "JOB.json"


def result(record: Path) -> dict[str, Any]:
    """result.json of a worker job."""
    return json.loads((record / "result.json").read_text())
