"""Imported by the fork server alone: what every data worker needs, and the signals that neither it nor they may end at."""

import signal

from mimo_jobs.training.data.workers import IGNORED_SIGNALS

for _number in IGNORED_SIGNALS:
    signal.signal(_number, signal.SIG_IGN)

import transformers  # noqa: E402
from transformers import AutoProcessor  # noqa: E402, F401  (a lazy import otherwise, paid in every worker)

from mimo_jobs.training.data import encode, sources  # noqa: E402, F401

transformers.Qwen3VLProcessor  # noqa: B018  (likewise)
