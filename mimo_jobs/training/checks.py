"""Whether the settings of a run make sense, before anything is built. No torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import LANGUAGE, ResolvedLayout, check_batch
from mimo_jobs.training.config import Dataset, Logging, Optimizer, Saving, Stop, Validation
from mimo_jobs.weights import adapters

MOST_BETA = 0.99  # of a moment in bf16


def check_settings(arguments: Mapping[str, Any], layout: ResolvedLayout) -> None:
    """Check every setting of a fine-tuning job that can be checked without its model and its data.

    Args:
        arguments: of `jobs.sft` or `jobs.lora`, their groups as dataclasses.

    Raises:
        UsageError: names the field, its bound and its value.
    """
    check_batch(layout, arguments["global_batch_size"], arguments["micro_batch_size"])
    for size in ("cp", "ep"):
        if (value := getattr(layout.components[LANGUAGE], size)) > 1:
            raise UsageError(
                f"layout.language.{size}={value}: training does not have it; set layout.language.{size}=1, and cut long sequences "
                "with layout.language.tp and sequence_parallel=true"
            )
    if (steps := arguments["steps"]) is not None:
        _least("steps", steps, 1)
        check_optimizer(arguments["optimizer"], steps)
    else:
        check_values(arguments["optimizer"])
    _check_state(arguments)
    _above("epochs", arguments["epochs"], 0)
    _least("seed", arguments["seed"], 0)
    _check_places(arguments)
    _check_data(arguments["dataset"])
    _check_often(arguments["validation"], arguments["saving"])
    check_logging(arguments["logging"])
    _check_stop(arguments["stop"])
    if (lora := arguments.get("lora")) is not None:
        adapters.check_settings(lora)


def check_optimizer(settings: Optimizer, steps: int) -> None:
    """Raises `UsageError` for numbers that make no schedule of ``steps`` steps."""
    check_values(settings)
    if settings.warmup_steps >= steps:
        raise UsageError(
            f"optimizer.warmup_steps={settings.warmup_steps}: the run has {steps} steps; set it below that"
        )
    if settings.schedule == "wsd" and not 0 < settings.decay_steps <= steps - settings.warmup_steps:
        raise UsageError(
            f"optimizer.decay_steps={settings.decay_steps}: schedule=wsd needs between 1 and "
            f"{steps - settings.warmup_steps}, the steps after the warm-up"
        )


def _check_places(arguments: Mapping[str, Any]) -> None:
    """Checkpoints to go on from lie apart from what is read and what is published."""
    given = arguments["saving"].directory
    if not given:
        return
    steps = Path(given).expanduser().resolve()
    for name in ("target", "source"):
        other = Path(arguments[name]).expanduser().resolve()
        if steps.is_relative_to(other) or other.is_relative_to(steps):
            raise UsageError(
                f"saving.directory={given} and {name}={arguments[name]} lie in one another; give another directory"
            )


def _check_state(arguments: Mapping[str, Any]) -> None:
    """A moment in bf16 does not see changes of less than 0.4 %. Raises `UsageError`."""
    settings = arguments["optimizer"]
    if settings.state != "bf16" or arguments["precision"] != "bf16" or arguments.get("lora") is not None:
        return
    for name in ("beta1", "beta2"):
        if (value := getattr(settings, name)) > MOST_BETA:
            raise UsageError(
                f"optimizer.{name}={value:g}: with optimizer.state=bf16 at most {MOST_BETA:g}, since changes of less than 0.4 % are "
                "lost in bf16; lower it or set optimizer.state=fp32"
            )


def check_values(settings: Optimizer) -> None:
    """Raises `UsageError` for a number that no optimizer takes."""
    for name in ("lr", "min_lr", "warmup_steps", "decay_steps", "weight_decay", "clip_grad", "images_lr"):
        if (value := getattr(settings, name)) is not None:
            _least(f"optimizer.{name}", value, 0)
    _above("optimizer.eps", settings.eps, 0)
    for name in ("beta1", "beta2"):
        _least(f"optimizer.{name}", getattr(settings, name), 0)
        _below(f"optimizer.{name}", getattr(settings, name), 1)
    for name in ("lr", "images_lr"):
        value = getattr(settings, name)
        if value is not None and value < settings.min_lr:
            raise UsageError(f"optimizer.{name}={value:g} is below optimizer.min_lr={settings.min_lr:g}; lower min_lr")


def check_logging(logging: Logging) -> None:
    """Raises `UsageError` for a number that makes no sense, and for a secret: settings are written to logs, records and reports."""
    _least("logging.every", logging.every, 1)
    if logging.peak_tflops is not None:
        _above("logging.peak_tflops", logging.peak_tflops, 0)
    if _has_credentials(logging.mlflow or ""):
        raise UsageError(
            "logging.mlflow has a user or password in it (before the @), which would be written to logs and records; give the "
            "address alone, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
        )


def _has_credentials(uri: str) -> bool:
    """Whether a password stands before a host's @, or a user alone, who for a server is a token. A password may hold a / too."""
    scheme, separator, rest = uri.partition("://")
    user, at, _ = rest.rpartition("@")
    return bool(separator and at) and not rest.startswith("/") and (":" in user or scheme.lower() in ("http", "https"))


def notes(arguments: Mapping[str, Any], layout: ResolvedLayout) -> list[str]:
    """What is allowed but does nothing, or not what was meant."""
    found = []
    if arguments["sequence_parallel"] and layout.components[LANGUAGE].tp == 1:
        found.append("sequence_parallel=true does nothing at layout.language.tp=1")
    settings: Optimizer = arguments["optimizer"]
    if settings.schedule != "wsd" and settings.decay_steps:
        found.append(
            f"optimizer.decay_steps={settings.decay_steps} is for schedule=wsd; {settings.schedule} ignores it"
        )
    if arguments["steps"] is not None and arguments["saving"].every > arguments["steps"]:
        found.append(
            f"saving.every={arguments['saving'].every} is more than steps={arguments['steps']}: the only checkpoint is the last"
        )
    return found


def _check_data(data: Dataset) -> None:
    _least("dataset.max_length", data.max_length, 2)  # a token, and the one to predict
    for name, least in (("max_pixels", 1), ("min_pixels", 1), ("workers", 0), ("prefetch", 1)):
        if (value := getattr(data, name)) is not None:
            _least(f"dataset.{name}", value, least)
    if data.max_pixels is not None and data.min_pixels is not None and data.min_pixels > data.max_pixels:
        raise UsageError(f"dataset.min_pixels={data.min_pixels} is above dataset.max_pixels={data.max_pixels}")


def _check_often(validation: Validation, saving: Saving) -> None:
    _least("saving.every", saving.every, 0)
    _least("saving.keep", saving.keep, 1)
    _least("validation.every", validation.every, 0)
    _least("validation.samples", validation.samples, 0)


def _check_stop(stop: Stop) -> None:
    if stop.max_loss is not None:
        _above("stop.max_loss", stop.max_loss, 0)
    if stop.spike is not None:
        _above("stop.spike", stop.spike, 1)


def _least(field: str, value: float, bound: float) -> None:
    if not (value >= bound and math.isfinite(value)):
        raise UsageError(f"{field}={value:g}: expected at least {bound:g}")


def _above(field: str, value: float, bound: float) -> None:
    if not (value > bound and math.isfinite(value)):
        raise UsageError(f"{field}={value:g}: expected more than {bound:g}")


def _below(field: str, value: float, bound: float) -> None:
    if not value < bound:
        raise UsageError(f"{field}={value:g}: expected less than {bound:g}")
