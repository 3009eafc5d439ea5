"""Data of a fine-tuning run: from files to the tokens and patches that a rank needs of each step.

The names are imported when they are used: what looks at data files before a run starts needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimo_jobs.training.data.encode import Encoded, Encoder
    from mimo_jobs.training.data.lengths import Lengths, measure, share
    from mimo_jobs.training.data.loader import Loaded, Loader, Want
    from mimo_jobs.training.data.order import Order
    from mimo_jobs.training.data.packing import pack
    from mimo_jobs.training.data.samples import BadSample, Conversation
    from mimo_jobs.training.data.sources import Source, open_source

_NAMES = {
    "encode": ("Encoded", "Encoder"),
    "lengths": ("Lengths", "measure", "share"),
    "loader": ("Loaded", "Loader", "Want"),
    "order": ("Order",),
    "packing": ("pack",),
    "samples": ("BadSample", "Conversation"),
    "sources": ("Source", "open_source"),
}

__all__ = [
    "BadSample",
    "Conversation",
    "Encoded",
    "Encoder",
    "Lengths",
    "Loaded",
    "Loader",
    "Order",
    "Source",
    "Want",
    "measure",
    "open_source",
    "pack",
    "share",
]


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
