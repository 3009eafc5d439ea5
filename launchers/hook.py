"""``on_finish``: a command that is given a step's JSON on standard input when the step has ended. Words, never a shell."""

import json
import subprocess
from collections.abc import Sequence

from mimo_jobs.records import StepRecord

SECONDS = 60


def call(command: Sequence[str], run_id: str, step: StepRecord) -> None:
    """Run the command for a step that has ended. Its failure is noted in the record and changes nothing."""
    if not command:
        return
    state = step.state()
    said = {
        "run": run_id, "step": step.name, "state": state.state, "reason": state.reason, "job_id": state.job_id,
        "exit_code": state.exit_code, "seconds": round(state.seconds, 1), "gpu_hours": round(state.gpu_seconds / 3600, 4),
        "attempts": state.attempts, "nodes": state.nodes, "record": str(step.directory), "summary": step.summary(),
    }  # fmt: skip
    try:
        done = subprocess.run(command, input=json.dumps(said, default=str), text=True, timeout=SECONDS, check=False)
        problem = f"exit code {done.returncode}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    step.add("hook", command=list(command), **({"problem": problem} if problem else {}))
