"""Checkpoints that training goes on from: weights (or adapters) and optimizer state in megatron-core's ``torch_dist`` format.

`saved` finds and reads them.

```
TARGET.steps/
  step-00000500/      any layout can go on from it, and an export can read it
    *.distcp .metadata metadata.json     weights and optimizer state
    mimo.json hf/ headers/ ...           what makes it a MIMO checkpoint (not where only adapters train)
    training.json                        step, identity, file sizes (last)
  .step-00001000.partial/                being written, or cut off: never read
```
"""

import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from mimo_jobs.checkpoint.manifest import write_json
from mimo_jobs.checkpoint.model_io import adapter_state, load_adapters, load_model, sharded_state
from mimo_jobs.conversion.publish import sync, sync_tree
from mimo_jobs.errors import UserError
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.training.adamw import empty_state
from mimo_jobs.training.moments import SHARDING, load_own_state, share_out
from mimo_jobs.training.optimizer import Updates, fuse
from mimo_jobs.training.saved import RECORD, Saved, checkpoint_directory, completed


class Checkpoints:
    """Writes checkpoints of one run, if wanted while training goes on, and keeps the newest. Methods are collective.

    Args:
        adapters: only adapters train: their weights are all that is written.
        finish: called on rank 0 with the staging directory and its file sizes before it is published.
    """

    def __init__(
        self, built: BuiltModel, updates: Updates, root: Path, keep: int, background: bool, *, adapters: bool,
        finish: Callable[[Path, dict[str, int]], None] | None = None,
    ) -> None:  # fmt: skip
        self._built, self._updates, self.root, self._keep = built, updates, root, keep
        self._background, self._adapters, self._finish = background, adapters, finish
        self._pending: _Writing | None = None
        self._optimizers = _distributed_optimizers(updates)
        for optimizer in self._optimizers.values():
            share_out(optimizer)
        # The writer hands its results over in a queue, which megatron-core takes from a process of its own (3 s to start, an
        # orphan after a kill); here the writer is a thread.
        filesystem_async._results_queue = queue.Queue()  # pyright: ignore[reportAttributeAccessIssue]
        filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(_write_file)

    def save(self, saved: Saved) -> None:
        """Begin a checkpoint; in the background unless the run has it otherwise. Waits for the one before."""
        self.wait()
        staging = self.root / f".step-{saved.step:08d}.partial"
        with errors_named(staging, _advice(saved.step)):
            if dist.get_rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            dist.barrier()
            request: Any = dist_checkpointing.save(
                self._state(), str(staging), async_sharded_save=True, async_strategy="mcore"
            )
        self._pending = _Writing(request, staging, saved)
        if not self._background:
            self.wait()

    @property
    def writing(self) -> bool:
        """Whether this rank still writes; when no rank does, `wait` publishes without waiting."""
        return self._pending is not None and self._pending.thread.is_alive()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is begun and not published; the same on every rank."""
        return self._pending is not None

    def wait(self) -> Path | None:
        """Publish the checkpoint that was begun, once every rank has written; its directory.

        Raises:
            UserError: a file could not be written.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        with errors_named(pending.staging, _advice(pending.saved.step)):
            return self._published(pending)

    def _published(self, pending: "_Writing") -> Path:
        pending.join()
        for finalize in pending.request.finalize_fns:
            finalize()
        final = checkpoint_directory(self.root, pending.saved.step)
        if dist.get_rank() == 0:
            files = {p.name: p.stat().st_size for p in sorted(pending.staging.glob("*.distcp"))}
            files[".metadata"] = (pending.staging / ".metadata").stat().st_size
            if self._finish is not None:
                self._finish(pending.staging, files)
            write_json(pending.staging / RECORD, asdict(pending.saved) | {"files": files})
            sync_tree(pending.staging)
            shutil.rmtree(final, ignore_errors=True)  # one that was not whole
            os.rename(pending.staging, final)
            sync(self.root)
            # A later one is no part of this run's history: it was not whole, and is written again.
            kept = [found for found in completed(self.root) if found[0] <= pending.saved.step]
            for _, old in kept[self._keep :]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        return final

    def load(self, directory: Path) -> None:
        """Set weights and optimizer to those of a checkpoint, written under any layout."""
        if self._adapters:
            load_adapters(self._built, directory)
        else:
            load_model(self._built, directory)
        for optimizer in self._optimizers.values():
            _fill_empty_state(optimizer.optimizer)
        wanted = {"optimizer": self._optimizer_state(self._model_state(), is_loading=True)}
        loaded: Any = dist_checkpointing.load(wanted, str(directory))
        state = loaded["optimizer"]
        own = {name: state[name].pop("param_state") for name in self._optimizers}
        self._updates.optimizer.load_state_dict(state)
        for name, optimizer in self._optimizers.items():
            fuse(optimizer.optimizer)
            load_own_state(optimizer, self._model_state(), own[name])
        dist.barrier()

    def _state(self) -> dict[str, Any]:
        model = self._model_state()
        return {"model": model, "optimizer": self._optimizer_state(model, is_loading=False)}

    def _model_state(self) -> dict[str, Any]:
        return adapter_state(self._built) if self._adapters else sharded_state(self._built)

    def _optimizer_state(self, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        return self._updates.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(SHARDING))


_write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
_failed: list[tuple[Path, Exception]] = []  # of this rank


def _write_file(*args: Any, **kwargs: Any) -> Any:
    """megatron-core's writer of one file, of whose error it keeps the type alone."""
    result: Any = _write(*args, **kwargs)
    if isinstance(result[1], Exception):
        _failed.append((Path(kwargs["write_bucket"][0]), result[1]))
    return result


def _advice(step: int) -> str:
    return (
        f"the checkpoint of step {step} was not saved; make room and start again: the run goes on from the one before"
    )


@contextmanager
def errors_named(directory: Path, advice: str) -> Iterator[None]:
    """What goes wrong while ``directory`` is written, as a `UserError` with the file and the reason. megatron-core's own is no `Exception`.

    Raises:
        UserError: a file could not be written.
        RuntimeError: another rank could not write; it says more.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        path, cause = _failed[0] if _failed else (directory, error)
        reason = _os_error(cause)
        if reason is not None:
            raise UserError(f"{reason.filename or path}: {reason.strerror or reason}; {advice}") from None
        if _failed:
            raise UserError(f"{path}: {' '.join(str(cause).split())[:300]}; {advice}") from None
        if isinstance(error, CheckpointException):
            raise RuntimeError(f"{directory}: a rank could not write its part; its log says why") from None
        raise
    finally:
        _failed.clear()


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the system behind an error: torch wraps it in one of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _Writing:
    """A checkpoint on its way to the disk: the state is copied when this returns, and a thread writes it."""

    def __init__(self, request: Any, staging: Path, saved: Saved) -> None:
        self.request, self.staging, self.saved = request, staging, saved
        self._error: BaseException | None = None
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = [
                (path, key, (objects, [(item, _own(tensor)) for item, tensor in tensors]))
                for path, key, (objects, tensors) in request.preload_fn()
            ]
        self.thread = threading.Thread(target=self._write, args=(arguments,), daemon=True)
        self.thread.start()

    def _write(self, arguments: list[Any]) -> None:
        try:
            if self.request.async_fn is not None:
                self.request.async_fn(*arguments, **self.request.async_fn_kwargs)
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        """Wait for this rank's part. Raises what went wrong, e.g. `OSError` of a full disk."""
        self.thread.join()
        if self._error is not None:
            raise self._error


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Memory that training does not write to; what came from a GPU is a copy already."""
    return tensor if torch.cuda.is_available() else tensor.clone()


def _distributed_optimizers(updates: Updates) -> dict[str, DistributedOptimizer]:
    """Component -> its optimizer on this rank, without wrappers."""
    found = {}
    for name, info in updates.optimizer.module_infos.items():
        if info.is_active and info.optimizer is not None:
            (found[name],) = getattr(info.optimizer, "chained_optimizers", [info.optimizer])
    return found


def _fill_empty_state(optimizer: torch.optim.Optimizer) -> None:
    """What AdamW makes in its first step: megatron-core reads the step out of it before it loads."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = empty_state(parameter)
