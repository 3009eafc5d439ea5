"""What is logged of a training step, and that logging never stops or delays it."""

import builtins
import contextlib
import json
import math
import sys
import threading
import time
import types

import pytest

from mimo_jobs.errors import UsageError
from mimo_jobs.training import history, metrics
from mimo_jobs.training.config import Logging
from mimo_jobs.training.metrics import Metrics

FILES = Logging(tensorboard=False)


def _lines(directory):
    return (directory / history.FILE).read_text().splitlines()


def test_every_value_survives_the_file(tmp_path):
    values = {"loss": 2.5, "grad_norm": math.inf, "lr": 1e-5, "tokens": 4096, "mfu": math.nan, "low": -math.inf,
              "seconds": 1.5, "skipped": 0}  # fmt: skip
    with Metrics(tmp_path, FILES, {"gpus": 8, "bad": math.nan}, 0) as log:
        log.log(1, {**values, "seconds_by_part": {"images": 0.5, "language": 1.0}})
        log.validation(1, 1.25, 4096)
        log.event(1, "saved <b>", "checkpoint")
    for line in _lines(tmp_path):
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = history.read(tmp_path)
    assert found is not None
    expected = {**values, "seconds_by_part.images": 0.5, "seconds_by_part.language": 1.0}
    assert found.steps.keys() == {1} and found.steps[1] == pytest.approx(expected, nan_ok=True)
    assert found.validation == {1: 1.25} and found.config["gpus"] == 8
    assert [(e.step, e.text, e.kind) for e in found.events] == [(1, "saved <b>", "checkpoint")]


def test_a_line_is_there_as_soon_as_it_was_logged(tmp_path):
    with Metrics(tmp_path, FILES, {}, 0) as log:
        log.log(1, {"loss": 1.0})
        assert len(_lines(tmp_path)) == 2


def test_a_resumed_step_takes_back_what_it_makes_again(tmp_path):
    with Metrics(tmp_path, FILES, {"attempt": 1}, 0) as log:
        for step in range(1, 8):
            log.log(step, {"loss": 10.0 + step})
        log.validation(4, 1.0, 1)
        log.validation(6, 2.0, 1)
    with Metrics(tmp_path, FILES, {"attempt": 2}, 5) as log:
        log.log(6, {"loss": 6.0})
    found = history.read(tmp_path)
    assert found is not None
    assert found.series("loss") == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 6.0)]
    assert found.validation == {4: 1.0} and found.resumed == [5] and found.config == {"attempt": 2}


def test_a_step_that_starts_anew_forgets_everything(tmp_path):
    for loss in (1.0, 2.0):
        with Metrics(tmp_path, FILES, {}, 0) as log:
            log.log(1, {"loss": loss})
    found = history.read(tmp_path)
    assert found is not None and found.series("loss") == [(1, 2.0)] and found.resumed == []


def test_a_line_cut_by_a_kill_costs_that_line_only(tmp_path):
    with Metrics(tmp_path, FILES, {}, 0) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
    path = tmp_path / history.FILE
    path.write_bytes(path.read_bytes()[:-20])
    found = history.read(tmp_path)
    assert found is not None and found.series("loss") == [(1, 1.0)]
    with Metrics(tmp_path, FILES, {}, 1) as log:
        log.log(2, {"loss": 3.0})
    found = history.read(tmp_path)
    assert found is not None and found.series("loss") == [(1, 1.0), (2, 3.0)]


@pytest.mark.parametrize(
    "damage", ["[]", "{", "null", '{"step": "1", "loss": 1}', '{"step": true}', '{"start": "x"}', "\x00\xff", "[" * 100_000, '{"step": 2, "loss": "much"}']
)  # fmt: skip
def test_a_damaged_line_is_left_out(tmp_path, damage):
    good = '{"step": 1, "loss": 1.0}\n'
    (tmp_path / history.FILE).write_text(f"{damage}\n{good}", errors="surrogateescape")
    found = history.read(tmp_path)
    assert found is not None and found.series("loss") == [(1, 1.0)]


def test_nothing_logged_is_none(tmp_path):
    assert history.read(tmp_path) is None
    (tmp_path / history.FILE).write_text("")
    assert history.read(tmp_path) is None


def test_lines_are_thinned_out_but_the_last_is_kept(tmp_path):
    with Metrics(tmp_path, Logging(every=10, tensorboard=False), {}, 0) as log:
        for step in range(1, 36):
            log.log(step, {"loss": float(step)})
    found = history.read(tmp_path)
    assert found is not None and list(found.steps) == [10, 20, 30, 35]


def test_tensorboard_has_it_and_leaves_out_what_was_made_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, steps in ((0, range(1, 6)), (3, range(4, 8))):
        with Metrics(tmp_path, Logging(), {"lr": 1}, resumed_at) as log:
            for step in steps:
                log.log(step, {"loss": step + resumed_at / 10, "seconds": {"images": 1.0}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "seconds/images"} <= set(events.Tags()["scalars"])
    assert [(e.step, round(e.value, 1)) for e in events.Scalars("loss")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.3), (5, 5.3), (6, 6.3), (7, 7.3),
    ]  # fmt: skip


@pytest.mark.parametrize("field", ["wandb", "mlflow"])
def test_a_missing_package_is_said_before_anything_runs(tmp_path, field, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / field).mkdir()  # W&B makes such a directory where it runs: no package
    with pytest.raises(UsageError, match=rf"logging.{field}=place: {field} is not installed; pip install {field}"):
        Metrics(tmp_path, Logging(tensorboard=False, **{field: "place"}), {}, 0)
    assert not (tmp_path / history.FILE).exists()


@pytest.mark.parametrize(
    ("uri", "refused"),
    [
        ("https://me:hunter2@host:5000", True),
        ("HTTPS://hunter2@host", True),
        ("https://me:hun/ter2#?@host", True),
        ("https://:hunter2@host", True),
        ("mysql+pymysql://me:hunter2@host/db", True),
        ("https://host:5000/a", False),
        ("postgresql://me@host/db", False),
        ("sqlite:////home/me@work/a:b@c.db", False),
        ("file:///home/me@work/runs", False),
        ("databricks://profile", False),
        ("runs@home", False),
    ],
)
def test_a_password_in_an_address_is_refused_unrepeated_and_nothing_is_written(tmp_path, uri, refused, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin="somewhere"))
    logging = Logging(tensorboard=False, mlflow=uri)
    expected = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    with pytest.raises(UsageError, match=expected) if refused else contextlib.nullcontext() as caught:
        Metrics(tmp_path, logging, {}, 0)
    assert not (caught and "hun" in str(caught.value)) and not list(tmp_path.iterdir())


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A ``wandb`` whose behaviour a test sets: ``init`` is called as the real one is."""
    (tmp_path / "packages" / "wandb").mkdir(parents=True)
    (tmp_path / "packages" / "wandb" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    made = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", made)
    made.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py")  # type: ignore[assignment]
    return made


class _Run:
    id = "abc"

    def __init__(self):
        self.logged, self.summary, self.finished = [], {}, []

    def define_metric(self, *names, **options): ...

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished.append(exit_code)


WANDB = Logging(tensorboard=False, wandb="project", name="mine")


def test_a_service_has_everything_when_training_ends_and_the_same_run_goes_on(tmp_path, service):
    runs, asked = [], []

    def init(**options):
        asked.append(options)
        runs.append(_Run())
        return runs[-1]

    service.init = init
    with Metrics(tmp_path, WANDB, {"lr": 1}, 0) as log:
        log.log(1, {"loss": 1.0, "seconds": {"images": 2.0}})
        log.validation(1, 0.5, 10)
    assert runs[0].logged == [
        {"step": 1, "loss": 1.0, "seconds/images": 2.0},
        {"step": 1, "validation_loss": 0.5, "validation_tokens": 10},
    ]
    assert runs[0].finished == [0] and asked[0]["project"] == "project" and asked[0]["name"] == "mine"
    with pytest.raises(ZeroDivisionError), Metrics(tmp_path, WANDB, {}, 1):
        raise ZeroDivisionError
    assert asked[0]["id"] is None and asked[1]["id"] == "abc" and runs[1].finished == [1]


def test_a_service_that_fails_is_said_once_and_training_goes_on(tmp_path, service, capfd):
    def init(**options):
        raise ConnectionError("no route to host")

    service.init = init
    with Metrics(tmp_path, WANDB, {}, 0) as log:
        for step in range(1, 3000):  # more than may wait
            log.log(step, {"loss": 1.0})
    said = capfd.readouterr().err
    assert said.count("Weights & Biases") == 1 and "no route to host; training goes on without it" in said
    found = history.read(tmp_path)
    assert found is not None and len(found.steps) == 2999
    assert any("no route to host" in e.text for e in found.events)


@pytest.mark.speed
def test_a_service_that_hangs_delays_nothing(tmp_path, service, monkeypatch, capfd):
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.2)
    end = threading.Event()
    service.init = lambda **options: end.wait(60)
    start = time.monotonic()
    with Metrics(tmp_path, WANDB, {}, 0) as log:
        for step in range(1, 100):
            log.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 5
    assert "not done 0.2 s after the end" in capfd.readouterr().err
    end.set()


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, capfd):
    with Metrics(tmp_path, FILES, {}, 0) as log:
        sink = log._sinks[history.FILE]
        written, sink.file = sink.file, open("/dev/full", "wb", buffering=0)  # type: ignore[attr-defined]  # noqa: SIM115
        for step in (1, 2, 3):
            log.log(step, {"loss": 1.0})
        sink.file.close()  # type: ignore[attr-defined]
        sink.file = written  # type: ignore[attr-defined]
        log.log(4, {"loss": 1.0})
    assert capfd.readouterr().err.count("No space left on device") == 1
    found = history.read(tmp_path)
    assert found is not None and list(found.steps) == [4]


def test_the_reader_needs_nothing_but_python(monkeypatch):
    """The submit side reads it too."""
    for name in [n for n in sys.modules if n.startswith("mimo_jobs.training.history")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def only_standard(name, *rest):
        assert name.partition(".")[0] in sys.stdlib_module_names or name.startswith("mimo_jobs"), name
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", only_standard)
    import mimo_jobs.training.history  # noqa: F401


@pytest.mark.speed
def test_a_long_run_is_read_in_seconds(tmp_path):
    values = {"loss": 1.234567, "grad_norm": 0.9, "lr": 1e-5, "tokens": 65536, "seconds": 1.9, "mfu": 0.4}
    with (tmp_path / history.FILE).open("w") as file:
        file.writelines(history.line(1.0, {"step": s, **values}) for s in range(100_000))
    start = time.monotonic()
    found = history.read(tmp_path)
    assert found is not None and len(found.steps) == 100_000 and time.monotonic() - start < 10
