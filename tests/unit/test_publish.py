"""What is published survives a power cut: every file and directory is flushed before the name appears."""

import os
from pathlib import Path

import pytest

from mimo_jobs.conversion import publish


@pytest.fixture
def flushed(monkeypatch) -> list[Path]:
    """Paths in the order of their fsync."""
    seen: list[Path] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def tree(root: Path) -> list[Path]:
    """Made, with everything that must be flushed."""
    for name in ("a.distcp", "mimo.json", "hf/config.json", "hf/nested/deep.bin", "headers/model.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty").mkdir()
    return [root, *root.rglob("*")]


def test_every_file_is_flushed_once_and_every_directory_after_what_it_holds(tmp_path, flushed):
    expected = tree(tmp_path / "t")
    publish.sync_tree(tmp_path / "t")
    assert sorted(flushed) == sorted(expected)
    at = {path: i for i, path in enumerate(flushed)}
    assert [p for p in expected if p != tmp_path / "t" and at[p] > at[p.parent]] == []


@pytest.mark.parametrize("fsync", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_name_appears_when_all_behind_it_is_flushed(tmp_path, flushed, fsync, overwrite, monkeypatch):
    staging, target = publish.staging_of(tmp_path / "t", "r"), tmp_path / "t"
    expected = tree(staging)
    if overwrite:
        target.mkdir()
        (target / "mimo.json").write_text("old")
    before_rename = []
    rename = publish._rename
    monkeypatch.setattr(publish, "_rename", lambda *a: before_rename.append(list(flushed)) or rename(*a))
    publish.publish(staging, target, overwrite, fsync)
    assert sorted(before_rename[0]) == (sorted(expected) if fsync else [])
    assert flushed[-1] == tmp_path and (target / "mimo.json").read_text() == "mimo.json"
