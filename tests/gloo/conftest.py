"""Ranks are forked: the parent imports megatron-core once, and keeps its warnings to itself."""

import logging
import warnings

import torch

torch.set_num_threads(1)  # a forked child must not inherit a thread pool
logging.getLogger("megatron.core").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.models.mimo  # noqa: F401
    import transformers.models.qwen3_5.modeling_qwen3_5  # noqa: F401

    import mimo_jobs.modeling.build  # noqa: F401
