"""What a rank asks for comes in order, whatever the workers, and no bad sample ends a run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from mimo_jobs.errors import UserError
from mimo_jobs.training.config import Dataset as Settings
from mimo_jobs.training.data import Encoder, Loader, Order, Want, measure, open_source, share
from mimo_jobs.training.data.lengths import BLOCK, Lengths
from mimo_jobs.training.data.workers import in_order
from tests.unit.training.data.conftest import encoded, llava_row, noise, write_lines

BAD = {3: "messages", 7: "missing", 11: "truncated"}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(noise(48, 32)))
    (tmp_path / "truncated.png").write_bytes(encoded(noise(64, 64))[:-500])
    rows = [llava_row("good.png" if i % 2 else None, f"answer {i}") for i in range(20)]
    rows[3] = {"conversations": None}
    rows[7]["image"], rows[11]["image"] = "missing.png", "truncated.png"
    return open_source(str(write_lines(tmp_path / "d.jsonl", rows)), Settings())


@pytest.fixture
def encoder(processor_directory):
    return Encoder(processor_directory, Settings())


def rows_of(order: Order, step: int) -> list[Want]:
    """Rows of six samples; the second row is packed; text and pixels differ; of every third step nothing is wanted."""
    take = [int(order.epoch(p // order.count)[p % order.count]) for p in range(6 * step, 6 * step + 6)]
    if step % 3 == 2:
        return []
    return [Want(0, take[:1]), Want(1, take[1:4], pixels=False), Want(2, take[4:5], text=False), Want(5, take[5:])]


def flat(steps) -> list:
    done = []
    for step in steps:
        for row in step:
            texts = row.encoded and [one.input_ids.tolist() + one.labels.tolist() for one in row.encoded]
            pixels = row.pixels and [(p.sum().item(), tuple(p.shape), grid.tolist()) for p, grid in row.pixels]
            done.append((row.row, row.samples, texts, pixels, row.problem))
        done.append("end of step")
    return done


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_in_order_and_resumed(source, encoder, workers):
    order = Order(len(source), 3, True)
    loader = Loader(source, encoder, lambda step: rows_of(order, step), stop_step=8, workers=workers, prefetch=3)
    whole = flat(loader)
    assert whole.count("end of step") == 8
    here = flat(Loader(source, encoder, lambda step: rows_of(order, step), stop_step=8))
    assert whole == here
    resumed = flat(Loader(source, encoder, lambda step: rows_of(order, step), start_step=5, stop_step=8))
    assert whole[-len(resumed) :] == resumed and resumed.count("end of step") == 3
    for row in (row for row in whole if row != "end of step"):
        bad = [i for i in row[1] if i in BAD and not (i == 11 and row[0] == 1)]  # damage shows with the pixels only
        assert (row[4] is None) == (not bad)
        if bad:
            assert row[4].startswith(f"d.jsonl:{bad[0] + 1}: ") and row[2] is None and row[3] is None
        else:
            assert (row[2] is None, row[3] is None) == (row[0] == 2, row[0] == 1)


def test_problems_name_the_sample_and_the_reason(source, encoder):
    loaded = next(iter(Loader(source, encoder, lambda _: [Want(i, [i]) for i in BAD])))
    assert [row.problem.split(": ")[0] for row in loaded if row.problem] == ["d.jsonl:4", "d.jsonl:8", "d.jsonl:12"]
    for row, reason in zip(loaded, ("conversations is missing", "no image", "cannot be read as an image"), strict=True):
        assert row.problem and reason in row.problem


class _Broken:
    def __init__(self, encoder):
        self.encoder = encoder

    def encode(self, conversation):
        raise ZeroDivisionError("a defect")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_has_the_traceback_of_the_worker(source, encoder, workers):
    loader = Loader(source, _Broken(encoder), lambda _: [Want(0, [2])], workers=workers)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in encode.*ZeroDivisionError: a defect.*sample d.jsonl:3"):
        next(iter(loader))


def test_the_random_state_of_the_run_is_left_alone(source, encoder):
    before = torch.get_rng_state()
    next(iter(Loader(source, encoder, lambda _: [Want(0, [0])], stop_step=1)))
    assert torch.equal(before, torch.get_rng_state())


def _about(_):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    ignored = all(handler == signal.SIG_IGN for handler in handlers)
    return {"pid": os.getpid(), "ignored": ignored, "megatron": "megatron" in sys.modules, "cuda": torch.cuda.is_initialized(), "nemo": "nemo_run" in sys.modules}  # fmt: skip


def _gone(pids, seconds=15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.1)
    return False


def test_workers_ignore_signals_are_light_and_end_with_the_iterator():
    results = in_order(_about, range(1000), 2, 4)
    seen = [next(results) for _ in range(4)]
    pids = {one["pid"] for one in seen}
    assert len(pids) == 2 and os.getpid() not in pids
    assert all(one["ignored"] and not one["megatron"] and not one["cuda"] and not one["nemo"] for one in seen)
    servers = {psutil.Process(pid).ppid() for pid in pids}
    assert len(servers) == 1 and os.getpid() not in servers
    for pid in pids | servers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    assert {next(results)["pid"] for _ in range(8)} == pids
    results.close()
    assert _gone(pids) and psutil.pid_exists(servers.pop())


def _die(task):
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_killed_worker_is_one_clear_error():
    with pytest.raises(UserError, match=r"reads data ended .*killed.*lower dataset.workers"):
        list(in_order(_die, range(10), 1, 2))


@pytest.mark.parametrize("end", ["killed", "by itself"])
def test_workers_and_fork_server_end_with_the_rank(end, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        from mimo_jobs.training.data.workers import in_order

        def work(task):
            return os.getpid()

        if __name__ == "__main__":
            results = in_order(work, range(10**6), 2, 4)
            print(*{next(results) for _ in range(4)}, flush=True)
            sys.stdin.readline()
            raise SystemExit(3)  # with the iterator open
        """)
    )
    root = str(Path(__file__).parents[4])
    rank = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}, text=True,
    )  # fmt: skip
    assert rank.stdout is not None
    pids = [int(pid) for pid in rank.stdout.readline().split()]
    assert len(pids) == 2
    pids += [process.pid for process in psutil.Process(rank.pid).children(recursive=True)]
    if end == "killed":
        rank.kill()
    rank.communicate("\n", timeout=30)
    assert rank.returncode == (-signal.SIGKILL if end == "killed" else 3)
    assert _gone(set(pids))


@pytest.mark.parametrize("workers", [0, 2])
def test_lengths_are_those_of_encode_and_bad_samples_have_a_reason(source, encoder, workers, tmp_path):
    found = measure(source, encoder, workers=workers, cache=tmp_path / "cache")
    for index, length in enumerate(found.values.tolist()):
        if index in (3, 7):
            assert length == -1 and found.reasons[index].startswith(f"d.jsonl:{index + 1}: ")
        else:
            assert length == len(encoder.encode(source.conversation(index)).input_ids)
    assert set(found.reasons) == {3, 7}


class _Counting:
    """A source of no conversations: its encoder knows lengths."""

    def __init__(self, count):
        self.count, self.asked, self.fingerprint = count, [], f"counting {count}"

    def __len__(self):
        return self.count

    def id(self, index):
        return f"c:{index}"

    def conversation(self, index):
        self.asked.append(index)
        return index

    def encode(self, index):
        return type("E", (), {"input_ids": range(index % 97)})


def test_lengths_are_shared_and_remembered(tmp_path):
    count, ranks = 5 * BLOCK + 17, 3
    slices = [share(count, rank, ranks) for rank in range(ranks)]
    assert slices[0][0] == 0 and slices[-1][1] == count and all(a[1] == b[0] for a, b in zip(slices, slices[1:]))  # noqa: RUF007
    parts = []
    for start, stop in slices:
        data = _Counting(count)
        parts.append(measure(data, data, start, stop, cache=tmp_path))  # type: ignore[arg-type]
        assert data.asked == list(range(start, stop))
    whole = Lengths.join(parts[::-1])
    assert whole.values.tolist() == [i % 97 for i in range(count)]
    again = _Counting(count)
    known = measure(again, again, cache=tmp_path)  # type: ignore[arg-type]
    assert not again.asked and known.values.tolist() == whole.values.tolist()
    block = next(tmp_path.rglob("*.json"))
    block.write_text("damaged")
    measure(again, again, cache=tmp_path)  # type: ignore[arg-type]
    assert len(again.asked) in (BLOCK, 17)
    with pytest.raises(ValueError, match="lengths end at sample"):
        Lengths.join([parts[0], parts[2]])


@pytest.mark.parametrize(("count", "ranks"), [(0, 4), (1, 4), (5, 8), (BLOCK * 8, 8), (BLOCK * 9 + 5, 4)])
def test_shares_cover_everything_once(count, ranks):
    slices = [share(count, rank, ranks) for rank in range(ranks)]
    assert [i for a, b in slices for i in range(a, b)] == list(range(count))
