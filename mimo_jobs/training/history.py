"""metrics.jsonl of a training step: what a line is, and what all of them add up to. Standard library only.

```
{"start": 0, "time": 1795380757.1, "config": {...}}              training starts, or goes on from the checkpoint of that step
{"step": 1, "time": ..., "loss": 2.31, "seconds": 1.9, "seconds.images": 0.2}     a step
{"step": 100, "time": ..., "validation_loss": 1.9, "validation_tokens": 40960}
{"step": 100, "time": ..., "event": "saved", "kind": "checkpoint"}
```

Appended to and never rewritten. A start at step n takes back the steps after n, which will be made again; of two lines of one step
the last one counts. What JSON has no number for is a string: "nan", "inf", "-inf".
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mimo_jobs.layout import IMAGES, LANGUAGE

FILE = "metrics.jsonl"
PARTS = (IMAGES, LANGUAGE, "waiting", "data", "optimizer")  # of a step's time, as ``seconds.images``
LARGEST = 1 << 53  # beyond it a step is damage
NO_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
Kind = Literal["note", "checkpoint", "warning", "bad sample"]
Values = Mapping[str, "float | Mapping[str, float]"]


@dataclass(frozen=True)
class Event:
    """Something that happened at a step. ``time`` in epoch seconds."""

    time: float
    step: int
    text: str
    kind: str = "note"


@dataclass
class History:
    """What metrics.jsonl says.

    Attributes:
        steps: step -> its values by name, in order of steps; parts of a value are named as ``seconds.images``.
        validation: step -> validation loss.
        resumed: steps that training went on from, in the order it did.
        config: of the last start.
    """

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every step that has the value."""
        return [(step, values[name]) for step, values in self.steps.items() if name in values]

    @property
    def last(self) -> dict[str, float]:
        """Values of the last step; empty before there is one."""
        return next(reversed(self.steps.values()), {})


def flat(values: Values) -> dict[str, float]:
    """``{"seconds": {"images": 1}}`` -> ``{"seconds.images": 1}``."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{part}": number for part, number in value.items()}
        else:
            found[name] = value
    return found


def line(time: float, values: Mapping[str, Any]) -> str:
    """A line of the file, with its end."""
    plain = {name: _plain(value) for name, value in values.items()}
    return json.dumps({**plain, "time": round(time, 3)}, default=str) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return {str(name): _plain(v) for name, v in value.items()} if isinstance(value, Mapping) else value


def read(directory: Path) -> History | None:
    """The history in a step's record; None when nothing was logged there. Lines that a crash cut or a disk damaged are left out."""
    history, found = History(), False
    try:
        with (directory / FILE).open(errors="replace") as lines:
            for text in lines:
                try:
                    one = json.loads(text)
                except (ValueError, RecursionError):
                    continue
                if isinstance(one, dict):
                    found = True
                    _take(history, one)
    except OSError:
        return None
    history.steps, history.validation = dict(sorted(history.steps.items())), dict(sorted(history.validation.items()))
    return history if found else None


def _take(history: History, one: dict[str, Any]) -> None:
    start, step, time = one.pop("start", None), one.pop("step", None), number(one.pop("time", None)) or 0.0
    if type(start) is int and start < LARGEST:
        if start > 0:
            history.resumed.append(start)
            for known in (history.steps, history.validation):
                for later in [s for s in known if s > start]:
                    del known[later]
        else:
            history.steps, history.validation = {}, {}
        history.config = one["config"] if isinstance(one.get("config"), dict) else {}
    elif type(step) is not int or not 0 <= step < LARGEST:
        return
    elif "event" in one:
        history.events.append(Event(time, step, str(one["event"]), str(one.get("kind") or "note")))
    elif "validation_loss" in one:
        if (loss := number(one["validation_loss"])) is not None:
            history.validation[step] = loss
    else:
        history.steps[step] = {n: v for n, value in one.items() if (v := number(value)) is not None}


def number(value: Any) -> float | None:
    """A number as it is written here; None for anything else."""
    if type(value) in (int, float):
        return value
    return NO_NUMBERS.get(value) if isinstance(value, str) else None
