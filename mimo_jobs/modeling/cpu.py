"""Run megatron-core 0.19.2 on CPU and gloo. The only file that touches megatron-core's or PyTorch's internals for it.

megatron-core names CUDA outright: ``device="cuda"``, ``torch.cuda.current_device()``, ``backend="nccl"``, an assert on
``torch.cuda.FloatTensor``. `install` turns each into its CPU meaning. Nothing happens when CUDA is there.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


def install() -> None:
    """Make this process run megatron-core without CUDA; idempotent, and a no-op where CUDA is available.

    Call it before a model is built. It lasts for the life of the process.
    """
    if torch.cuda.is_available():
        return
    _install_once()


@functools.cache
def _install_once() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    torch.cuda.current_stream = lambda *_args, **_kwargs: _NoStream()
    torch.cuda.empty_cache = lambda: None
    dist.new_group = _on_gloo(dist.new_group)
    dist.new_subgroups_by_enumeration = _on_gloo(dist.new_subgroups_by_enumeration)
    _CudaMeansCpu().__enter__()
    # megatron-core's jit_fuser is torch.compile: 25 s a process with a cold cache, and it needs a C++ compiler.
    torch.compiler.set_stance("force_eager")
    _replace_in_megatron()


def _replace_in_megatron() -> None:
    """Places with no device argument to redirect."""
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # There is no CUDA generator to fork; dropout is 0 and weights come from checkpoints.
    setattr(CudaRNGStatesTracker, "fork", lambda *_args, **_kwargs: contextlib.nullcontext())  # noqa: B010
    # Recomputation puts the generators back to where the first pass found them: here the CPU's, and those of adapters.
    setattr(random, "_get_all_rng_states", _get_all_rng_states)  # noqa: B010
    setattr(random, "_set_all_rng_states", _set_all_rng_states)  # noqa: B010


def _get_all_rng_states() -> tuple[torch.Tensor, None, dict[str, Any]]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    return torch.get_rng_state(), None, tracker.get_states()


def _set_all_rng_states(cpu: torch.Tensor, _cuda: None, tracked: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    torch.set_rng_state(cpu)
    tracker.set_states(tracked)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` (schedules, optimizers), ``.cuda()`` and the type name that optimizers assert."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _NoStream:
    """The only stream of a CPU: everything on it has happened already."""

    def wait_stream(self, *_args: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_event(self, *_args: object) -> None: ...

    def record_event(self, *_args: object) -> None: ...


def _on_gloo(create: Callable) -> Callable:
    """The bridge communicators ask for NCCL groups by name (models/mimo/comm, pipeline_parallel)."""

    @functools.wraps(create)
    def created(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return create(*args, **kwargs)

    return created
