"""Which commit was measured."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """What ``GIT_COMMIT`` says, which those set who copy the files; else of the working tree."""
    if given := os.environ.get("GIT_COMMIT"):
        return given
    words = ["git", "rev-parse", "--verify", "HEAD"]
    asked = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else ""
