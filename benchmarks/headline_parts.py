"""What `benchmarks.headline` is made of: the command line as a user types it, a data set, the 27B's headers, the machine."""

import contextlib
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from benchmarks.conversion import ROOT

if TYPE_CHECKING:
    from mimo_jobs.training.history import History

LAST_LINES = 15
RUNS = "runs"
POLL_SECONDS = 0.02
GOLDEN = ROOT / "tests" / "golden" / "qwen35_27b.json"  # config and tensors of the published 27B
KINDS = {"vision": "model.visual.", "head": "lm_head.", "mtp": "mtp."}
RANK_LINE = re.compile(r"^# .* rank (\d+) of \d+ .* pid (\d+)$", re.MULTILINE)
COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (31, 80, 200), "white": (240, 240, 240)}
TEMPLATE_TOKENS = 64  # more than the chat template and the question take


class Failed(Exception):
    """A command failed, or what it made is not what it should be."""


@dataclass
class Ran:
    """A command that ended: what it printed as JSON, its seconds from start to end."""

    command: str
    rc: int
    seconds: float
    data: dict[str, Any]
    said: str

    def summary(self, step: str) -> dict[str, Any]:
        return self.data["steps"][step]


@dataclass
class CommandLine:
    """``nemo-run`` with records of its own. ``ran``: every command so far, for the result."""

    work: Path
    gpus: bool
    ran: list[dict[str, Any]] = field(default_factory=list)

    def run(self, *words: str, codes: Iterable[int] = (0,)) -> Ran:
        """Run a command to its end.

        Raises:
            Failed: another exit code than ``codes``.
        """
        with self.start(*words) as started:
            return started.end(codes)

    def start(self, *words: str) -> "Started":
        return Started(self, words)

    def shown(self, text: str) -> str:
        return text.replace(str(self.work), "WORK")


class Started(contextlib.AbstractContextManager["Started"]):
    """A command under way; left, nothing of it runs."""

    def __init__(self, line: CommandLine, words: tuple[str, ...]) -> None:
        self.line, self.command = line, shlex.join(["nemo-run", *words])
        number = len(line.ran) + 1
        self.home = line.work / RUNS / f"{number:02d}"
        self.home.mkdir(parents=True)
        environment = {**os.environ, "MIMO_JOBS_HOME": str(self.home)}
        if not line.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._out, self._err = self.home / "out", self.home / "err"
        print(f"$ {line.shown(self.command)}", flush=True)
        self._started = time.perf_counter()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = self._begin([*words, "--json"], environment, out, err)

    def _begin(
        self, words: list[str], environment: dict[str, str], out: IO[bytes], err: IO[bytes]
    ) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "mimo_jobs.cli", *words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def record(self) -> Path | None:
        """The directory of the run's record, once it is there."""
        return next(iter(self.home.glob("runs/*")), None)

    def end(self, codes: Iterable[int] = (0,)) -> Ran:
        """Wait for the end. Raises `Failed` for another exit code than ``codes``."""
        rc = self._process.wait()
        seconds = time.perf_counter() - self._started
        said = self._err.read_text(errors="replace")
        command = self.line.shown(self.command)
        self.line.ran.append({"command": command, "rc": rc, "seconds": round(seconds, 2)})
        print(f"  {seconds:.1f} s" + (f", exit code {rc}" if rc else ""), flush=True)
        if rc not in codes:
            last = "\n".join((self._out.read_text(errors="replace") + said).splitlines()[-LAST_LINES:])
            raise Failed(f"exit code {rc}: {self.command}\n{last}")
        data = {}
        with contextlib.suppress(ValueError):
            data = json.loads(self._out.read_text())
        return Ran(command, rc, seconds, data, said)

    def history(self) -> "History":
        """What the ranks have written of their steps so far."""
        from mimo_jobs.training import history

        return (history.read(self.record) if self.record else None) or history.History()

    def kill_last_rank(self) -> int:
        """As the kernel does when memory is short; its number."""
        assert self.record is not None
        logs = [p.read_text(errors="replace") for p in self.record.glob("logs/*.log")]
        found = [(int(r), int(p)) for text in logs for r, p in RANK_LINE.findall(text)]
        require(bool(found), f"no log in {self.record} names a rank")
        rank, pid = max(found)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return rank


def require(holds: bool, said: str) -> None:
    """Raise `Failed` with what is wrong."""
    if not holds:
        raise Failed(said)


def kinds(names: Iterable[str]) -> dict[str, int]:
    """How many tensors are of the language, of the vision tower, of the head and of multi-token prediction."""
    found = dict.fromkeys(("language", *KINDS), 0)
    for name in names:
        found[next((k for k, start in KINDS.items() if name.startswith(start)), "language")] += 1
    return found


def make_data(target: Path, config: Mapping[str, Any], samples: int, tokens: int, image: int) -> int:
    """Chats of about ``tokens`` tokens with a square image each, a byte a token (as the tokenizer of a made checkpoint has it).

    Returns: image tokens of a sample.
    """
    from PIL import Image

    vision = config["vision_config"]
    image_tokens = (image // (vision["patch_size"] * vision["spatial_merge_size"])) ** 2
    room = tokens - image_tokens - TEMPLATE_TOKENS
    require(
        room > 0,
        f"--tokens {tokens}: an image takes {image_tokens}, give at least {image_tokens + TEMPLATE_TOKENS + 1}",
    )
    target.mkdir()
    draw = random.Random(0)
    with open(target / "train.jsonl", "w") as file:
        for number in range(samples):
            name, colour = draw.choice(list(COLOURS.items()))
            Image.new("RGB", (image, image), colour).save(target / f"{number:04d}.png")
            said = f"Number {number}: a {name} square of {image} by {image} pixels. "
            answer = (said * (room // len(said) + 1))[:room]
            asked = [{"type": "image", "image": f"{number:04d}.png"}, {"type": "text", "text": "What is it?"}]
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return image_tokens


def make_headers(target: Path) -> int:
    """The published 27B as a checkpoint of headers alone: one file with a hole for the data. Returns bytes of its tensors."""
    from mimo_jobs.weights.dtypes import itemsize
    from mimo_jobs.weights.safetensors_io import SINGLE_NAME, make_header

    golden = json.loads(GOLDEN.read_text())
    entries = [
        (name, "F32" if name.endswith((".A_log", ".linear_attn.norm.weight")) else "BF16", tuple(shape))
        for name, shape in golden["tensors"].items()
    ]
    header, nbytes = make_header(entries, {"format": "pt"}), sum(math.prod(s) * itemsize(d) for _, d, s in entries)
    target.mkdir()
    (target / "config.json").write_text(json.dumps(golden["config"]))
    with open(target / SINGLE_NAME, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    return nbytes


def covered_once(made: Any) -> list[str]:
    """Names of the tensors every element of which is written by one rank, and by no other.

    Args:
        made: an ``ImportPlan``.
    """
    from mimo_jobs.weights.rules import stored_rows

    pieces: dict[str, list[tuple[int, int, int, int]]] = {}  # column, columns, row, rows
    rules = made.matched.weight_map.rules
    for box, _, _ in made.writes:
        for run in stored_rows(made.matched.segments[box.rule], box.stored, box.row, box.row + box.rows):
            name = rules[box.rule].hf[run.hf].name
            pieces.setdefault(name, []).append((box.column, box.columns, run.hf_row, run.count))
    whole = {t.name: (t.rows, t.row_elements) for rule in rules for t in rule.hf}
    found = [name for name, held in pieces.items() if _tiles(held, *whole[name])]
    passed = [name for name, _ in made.passed_ranks]
    return found + [name for name in passed if passed.count(name) == 1]


def _tiles(held: list[tuple[int, int, int, int]], rows: int, columns: int) -> bool:
    at = 0
    for column, width in sorted({(c, w) for c, w, _, _ in held}):
        if column != at:
            return False
        at, row = column + width, 0
        for start, count in sorted((r, n) for c, w, r, n in held if (c, w) == (column, width)):
            if start != row:
                return False
            row += count
        if row != rows:
            return False
    return at == columns


def cards() -> list[str]:
    """Names of the GPUs, asked in a process of its own: asking takes some of their memory."""
    code = (
        "import json, torch as t; print(json.dumps([t.cuda.get_device_name(i) for i in range(t.cuda.device_count())]))"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(asked.stdout.splitlines()[-1]) if asked.returncode == 0 else []


def planned_card(card: str | None) -> str:
    """The card as the planner knows it; H200 where there is none, or one that it does not know."""
    from mimo_jobs.planning import rates

    known = [name for name in sorted(rates.cards(), key=len) if card and name in card.upper()]
    return known[-1] if known else "H200"
