"""What a run was made of: versions, commit and uncommitted changes of this code, the code itself, the resolved configuration."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mimo_jobs.pipeline import Plan, process_stat
from mimo_jobs.records import RunRecord, write_json

PACKAGES = ("mimo_jobs", "recipes", "launchers")
GIT_SECONDS = 10.0


def package_root() -> Path:
    """The directory that holds this package: the project, or site-packages."""
    return Path(__file__).resolve().parent.parent


def code_state() -> dict[str, Any]:
    """``{"commit", "dirty": [files]}`` of the project that this code runs from; empty outside a git work tree."""
    root = package_root()
    if not (root / ".git").exists():
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *PACKAGES)
    if commit is None or changed is None:
        return {}
    return {"commit": commit.strip(), "dirty": [line[3:] for line in changed.splitlines()]}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, errors="replace", timeout=GIT_SECONDS,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Python and the packages that matter."""
    from mimo_jobs.checkpoint.manifest import versions as packages

    return {"python": sys.version.split()[0], **packages()}


def write_code_diff(root: Path) -> None:
    """``code.diff``: how the shipped code differs from its commit; nothing when it does not."""
    diff = _git(package_root(), "diff", "HEAD", "--", *PACKAGES)
    if diff:
        (root / "code.diff").write_text(diff)


def ship_code(root: Path) -> Path:
    """Copy this code into a record, so that what was submitted is what will run; the directory for PYTHONPATH."""
    target = root / "code"
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec and spec.submodule_search_locations, package
        source = Path(next(iter(spec.submodule_search_locations)))
        shutil.copytree(
            source, target / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.so"), dirs_exist_ok=True
        )
    return target


def describe(run: RunRecord, plan: Plan, recipe: Any, ship: bool) -> None:
    """Write what a record holds besides its steps' own files: RUN.json, the configuration, the code.

    Args:
        recipe: the Fiddle configuration; None for a run that goes on, whose configuration is there already.
        ship: copy the code, to run it from the record.
    """
    from mimo_jobs import overrides

    if ship:
        ship_code(run.root)
    write_code_diff(run.root)
    if recipe is not None:
        from fiddle.experimental import serialization

        write_json(run.root / "config.json", {p.step.name: overrides.flat(p.step.arguments) for p in plan.steps})
        write_json(run.root / "config.fiddle.json", json.loads(serialization.dump_json(recipe)))
    run.write()


def who() -> dict[str, Any]:
    """The process that writes a record."""
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "user": os.environ.get("USER") or "",
        "uid": os.getuid(),
        "started": process_stat(os.getpid())[1],
    }
