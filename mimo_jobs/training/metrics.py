"""What rank 0 writes down of a training step: metrics.jsonl, TensorBoard and, when asked for, Weights & Biases and MLflow.

Nothing here stops or delays training once it runs: files are appended to, services have a thread each, and what fails (a full disk,
no network) is said once.
"""

import contextlib
import importlib
import importlib.util
import json
import queue
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mimo_jobs.errors import UsageError
from mimo_jobs.training import history
from mimo_jobs.training.checks import check_logging
from mimo_jobs.training.config import Logging
from mimo_jobs.training.history import Kind, Values

TRACKERS = "trackers.json"  # the runs of services that a resumed step goes on with
TENSORBOARD = "tensorboard"
WAITING = 1000  # lines that a slow service may be behind
CLOSE_SECONDS = 30.0
LONGEST = 250  # characters of a parameter at MLflow


def check(logging: Logging) -> None:
    """See `checks.check_logging`; also raises a `UsageError` when a package that is asked for is not installed. Imports none of them."""
    check_logging(logging)
    asked = {
        "tensorboard": ("tensorboard", logging.tensorboard),
        "wandb": ("wandb", logging.wandb),
        "mlflow": ("mlflow", logging.mlflow),
    }
    for field, (package, wanted) in asked.items():
        spec = importlib.util.find_spec(package) if wanted else None
        if wanted and (
            spec is None or spec.origin is None
        ):  # no origin: a directory of that name, which W&B itself makes
            value, off = ("true", "false") if wanted is True else (wanted, "none")
            raise UsageError(
                f"logging.{field}={value}: {package} is not installed; pip install {package}, or set logging.{field}={off}"
            )


class Sink(Protocol):
    """Somewhere that numbers go. Whatever a method raises ends the sink, not the training."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def event(self, step: int, text: str, kind: Kind) -> None: ...
    def close(self, failed: bool) -> None: ...


class Metrics:
    """The log of a training step; a context manager, on rank 0 only.

    Args:
        directory: the step's record.
        config: what is worth knowing beside the numbers, as plain JSON.
        resumed_at: the step of the checkpoint that training goes on from; 0 when it begins.

    Raises:
        UsageError: a package is missing (see `check`).
    """

    def __init__(self, directory: Path, logging: Logging, config: Mapping[str, Any], resumed_at: int = 0) -> None:
        check(logging)
        self.directory, self.logging, self.config, self.resumed_at = directory, logging, dict(config), resumed_at
        self._sinks: dict[str, Sink] = {}
        self._told: set[str] = set()
        self._held: tuple[int, dict[str, float]] | None = None

    def __enter__(self) -> "Metrics":
        self._open(history.FILE, lambda: _Lines(self.directory, self.config, self.resumed_at))
        if self.logging.tensorboard:
            self._open("TensorBoard", lambda: _TensorBoard(self.directory / TENSORBOARD, self.config, self.resumed_at))
        if self.logging.wandb:
            self._open(
                "Weights & Biases",
                lambda: _Apart(
                    "Weights & Biases", lambda: _Wandb(self.directory, self.logging, self.config), self._failed
                ),
            )
        if self.logging.mlflow:
            self._open(
                "MLflow",
                lambda: _Apart("MLflow", lambda: _Mlflow(self.directory, self.logging, self.config), self._failed),
            )
        return self

    def log(self, step: int, values: Values) -> None:
        """Numbers of a step. ``logging.every`` thins them out; the last step is written whatever its number."""
        numbers = {n: v if isinstance(v, int) else float(v) for n, v in history.flat(values).items()}
        self._held = (step, numbers) if step % self.logging.every else None
        if self._held is None:
            self._each("log", step, numbers)

    def validation(self, step: int, loss: float, tokens: int) -> None:
        """Mean loss over ``tokens`` tokens of the validation data, after ``step``."""
        self._each("log", step, {"validation_loss": float(loss), "validation_tokens": int(tokens)})

    def event(self, step: int, text: str, kind: Kind = "note") -> None:
        """Something to remember. The report lists bad samples by themselves."""
        self._each("event", step, text, kind)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._held is not None:
            self._each("log", *self._held)
        self._each("close", error is not None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for name, sink in self._sinks.items():
            if isinstance(sink, _Apart) and not sink.ended(deadline):
                self._failed(name, TimeoutError(f"not done {CLOSE_SECONDS:g} s after the end"))

    def _open(self, name: str, made: Any) -> None:
        try:
            self._sinks[name] = made()
        except Exception as error:
            self._failed(name, error)

    def _each(self, method: str, *arguments: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                self._failed(name, error)
                if name != history.FILE:  # a disk that was full may have room again
                    self._sinks.pop(name, None)

    def _failed(self, name: str, error: BaseException) -> None:
        if name not in self._told:
            self._told.add(name)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            print(f"warning: {name}: {text}; training goes on without it", file=sys.stderr, flush=True)
            if (lines := self._sinks.get(history.FILE)) is not None and name != history.FILE:
                with contextlib.suppress(Exception):
                    lines.event(self._held[0] if self._held else self.resumed_at, f"{name}: {text}", "warning")


class _Lines:
    """metrics.jsonl, a write for each line, so that what was logged before a kill is there."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resumed_at: int) -> None:
        self.file = (directory / history.FILE).open("ab", buffering=0)
        with (directory / history.FILE).open("rb") as written:
            written.seek(0, 2)
            if written.tell():
                written.seek(-1, 2)
                if written.read() != b"\n":  # cut by a kill
                    self.file.write(b"\n")
        self._write({"start": resumed_at, "config": dict(config)})

    def _write(self, values: Mapping[str, Any]) -> None:
        self.file.write(history.line(time.time(), values).encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._write({"step": step, **values})

    def event(self, step: int, text: str, kind: Kind) -> None:
        self._write({"step": step, "event": text, "kind": kind})

    def close(self, failed: bool) -> None:
        self.file.close()


class _TensorBoard:
    """Event files, from which TensorBoard leaves out what was made again after a resumption (``purge_step``)."""

    def __init__(self, directory: Path, config: Mapping[str, Any], resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=resumed_at + 1 if resumed_at else None)
        self.writer.add_text(
            "config", "    " + json.dumps(config, indent=2, default=str).replace("\n", "\n    "), resumed_at
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def event(self, step: int, text: str, kind: Kind) -> None:
        self.writer.add_text(kind, text, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Apart:
    """A sink in a thread of its own: a service that is slow, or hangs, is waited for at the end, and only so long."""

    def __init__(self, name: str, made: Any, failed: Any) -> None:
        self.name, self.made, self.failed = name, made, failed
        self.waiting: queue.Queue[tuple[str, tuple]] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name=f"log to {name}", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            sink = self.made()
            method = ""
            while method != "close":
                method, arguments = self.waiting.get()
                getattr(sink, method)(*arguments)
        except BaseException as error:  # some packages exit
            self.failed(self.name, error)

    def _put(self, method: str, *arguments: Any) -> None:
        try:
            self.waiting.put_nowait((method, arguments))
        except queue.Full:
            if self.thread.is_alive():
                self.failed(self.name, TimeoutError(f"{WAITING} lines behind; lines are left out"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._put("log", step, values)

    def event(self, step: int, text: str, kind: Kind) -> None:
        self._put("event", step, text, kind)

    def close(self, failed: bool) -> None:
        self._put("close", failed)

    def ended(self, deadline: float) -> bool:
        """Whether the service has everything, waiting for it until then (time.monotonic)."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        return not self.thread.is_alive()


class _Wandb:
    """A run at Weights & Biases, the same one after a resumption. Account and host are taken from its own settings."""

    def __init__(self, directory: Path, logging: Logging, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")  # not a dependency: linters do not find it
        known = _trackers(directory)
        self.run: Any = wandb.init(
            project=logging.wandb,
            name=logging.name,
            id=known.get("wandb"),
            resume="allow",
            config=dict(config),
            dir=str(directory),
        )
        # Steps as a value: W&B's own count cannot go back to the step of a checkpoint.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        _keep(directory, "wandb", str(self.run.id))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **{n.replace(".", "/"): v for n, v in values.items()}})

    def event(self, step: int, text: str, kind: Kind) -> None:
        self.run.summary[f"last {kind}"] = f"step {step}: {text}"

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Mlflow:
    """A run of the experiment ``mimo_jobs`` at an MLflow server, the same one after a resumption."""

    def __init__(self, directory: Path, logging: Logging, config: Mapping[str, Any]) -> None:
        self.mlflow: Any = importlib.import_module("mlflow")
        self.client: Any = self.mlflow.MlflowClient(logging.mlflow)
        self.run_id = _trackers(directory).get("mlflow")
        if self.run_id is None:
            known = self.client.get_experiment_by_name("mimo_jobs")
            experiment = known.experiment_id if known else self.client.create_experiment("mimo_jobs")
            self.run_id = self.client.create_run(experiment, run_name=logging.name).info.run_id
            _keep(directory, "mlflow", self.run_id)
            for name, value in history.flat(config).items():
                self.client.log_param(self.run_id, name, str(value)[:LONGEST])
        else:
            self.client.update_run(self.run_id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id, metrics=[self.mlflow.entities.Metric(n, float(v), now, step) for n, v in values.items()]
        )

    def event(self, step: int, text: str, kind: Kind) -> None:
        self.client.set_tag(self.run_id, f"last {kind}", f"step {step}: {text}")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def _trackers(directory: Path) -> dict[str, str]:
    try:
        found = json.loads((directory / TRACKERS).read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _keep(directory: Path, name: str, run: str) -> None:
    with _keeping:
        (directory / TRACKERS).write_text(json.dumps({**_trackers(directory), name: run}) + "\n")


_keeping = threading.Lock()
