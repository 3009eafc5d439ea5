"""Ranks that do not see the same data set are told apart before training begins."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mimo_jobs.parallel.world import World
from mimo_jobs.training.config import Dataset
from mimo_jobs.training.data import open_source
from mimo_jobs.training.inputs import same_data
from tests.gloo.images import write_data

pytestmark = pytest.mark.gloo


def on_ranks(record: Path, sources: list[Any]) -> list[Any]:
    """What `same_data` says on each rank: a sketch, or the error."""
    said: list[Any] = [None] * len(sources)
    args: Any = SimpleNamespace(data="train.jsonl")

    def rank(r: int) -> None:
        try:
            with World(r, len(sources), record, "test") as world:
                said[r] = same_data(args, sources[r], world)
                world.barrier("compared")
        except Exception as error:
            said[r] = error

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(len(sources))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_copies_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    sources = [open_source(str(write_data(tmp_path / name, 30)), Dataset()) for name in "ab"]
    one, two = on_ranks(tmp_path, sources)
    assert one == two and one["rows"] == 30


@pytest.mark.parametrize(
    ("change", "words"), [("a row less", "30 rows, 29 here"), ("another row", "rows of other contents")]
)
def test_another_data_set_on_a_rank_is_named(change: str, words: str, tmp_path: Path) -> None:
    first, second = (write_data(tmp_path / name, 30) for name in "ab")
    lines = second.read_text().splitlines(keepends=True)
    second.write_text("".join(lines[:-1] + ([] if change == "a row less" else [lines[0]])))
    said = on_ranks(tmp_path, [open_source(str(file), Dataset()) for file in (first, second)])
    assert "rank 1 on" in str(said[0]) and "every node needs the same files" in str(said[0]) and words in str(said[0])
    assert str(said[1]) == str(said[0]), "the other rank hears of it"
