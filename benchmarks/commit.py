"""Which commit was measured."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """Of the working tree; where the files were copied without their history, what ``GIT_COMMIT`` says."""
    asked = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() if asked.returncode == 0 else os.environ.get("GIT_COMMIT", "")
