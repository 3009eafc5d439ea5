"""Data of a fine-tuning run: from files to the tokens and patches that a rank needs of each step."""

from mimo_jobs.training.data.encode import Encoded, Encoder
from mimo_jobs.training.data.lengths import Lengths, measure, share
from mimo_jobs.training.data.loader import Loaded, Loader, Want
from mimo_jobs.training.data.order import Order
from mimo_jobs.training.data.packing import pack
from mimo_jobs.training.data.samples import BadSample, Conversation
from mimo_jobs.training.data.sources import Source, open_source

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
