"""megatron-core's ``MimoOptimizer`` over the components that train, and the learning rate of each."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from mimo_jobs.layout import IMAGES
from mimo_jobs.modeling.build import BuiltModel
from mimo_jobs.training.adamw import NarrowAdamW
from mimo_jobs.training.checks import check_optimizer
from mimo_jobs.training.config import Optimizer
from mimo_jobs.training.step import trained_components

_TORCH: Any = torch  # its operations on lists have no types
_DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "wsd": "WSD"}


@dataclass(frozen=True)
class Updates:
    """The optimizer of a rank and what sets its learning rates.

    Attributes:
        optimizer: steps every component, clipping over all of them.
        schedulers: component -> its learning rate, only those of this rank.
    """

    optimizer: "DeviceOptimizer"
    schedulers: Mapping[str, OptimizerParamScheduler]

    def set_step(self, done: int) -> None:
        """Set the learning rates for the step that follows ``done`` steps."""
        for scheduler in self.schedulers.values():
            scheduler.num_steps = 0
            scheduler.step(done)

    def apply(self) -> Tensor:
        """Clip and step. Returns the norm of all gradients before clipping, an fp32 scalar on the device: infinite if one is not finite."""
        _, norm, _ = self.optimizer.step()
        return norm


class DeviceOptimizer(MimoOptimizer):
    """`MimoOptimizer` in whose step nothing waits for the device.

    Without apex and transformer-engine megatron-core (0.19.2) takes the norm of each gradient to the host, and reads three more numbers
    that say nothing in bf16 and fp32, where there is no loss scale: whether one is infinite, the norm, and success.
    """

    @torch.no_grad()
    def get_grad_norm(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """fp32 scalar on the device, the same on every rank."""
        squares = torch.stack([_squared_norm(info.optimizer) for _, info in sorted(self.module_infos.items())])
        # A component's own ranks know its norm. A MAX may drop a NaN.
        squares = squares.nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(squares, dist.ReduceOp.MAX)
        return squares.sum().sqrt()

    @torch.no_grad()
    def step(self) -> tuple[bool, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Clip by the norm over all components, and step."""
        self.prepare_grads()
        norm = self.get_grad_norm()
        for one in self._active_optimizers:
            if one.config.clip_grad > 0:
                _clip(one, norm)
        return self.step_with_ready_grads(), norm, None


def _clip(optimizer: MegatronOptimizer, norm: Tensor) -> None:
    """Scale gradients to ``config.clip_grad`` if their norm is above it (as torch.nn.utils.clip_grad_norm_ does)."""
    for one in _parts(optimizer):
        if isinstance(one.optimizer, NarrowAdamW):
            one.optimizer.scale = (one.config.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        else:  # those of tensor-parallel duplicates too, which the norm leaves out
            torch.nn.utils.clip_grads_with_norm_(one.get_parameters(), one.config.clip_grad, norm)


def make_optimizer(built: BuiltModel, settings: Optimizer, steps: int) -> Updates:
    """Optimizer state in ``settings.state``, sharded over data parallel ranks. Collective over the world.

    Args:
        built: wrapped by `step.wrap_for_training`, with gradients in ``settings.state``.
        steps: of the whole run, where the learning rate reaches its end.

    Raises:
        UsageError: see `checks.check_optimizer`.
    """
    check_optimizer(settings, steps)
    trained, infos, schedulers = trained_components(built), {}, {}
    for name, grid in built.grids.items():
        module, groups = trained.get(name), built.groups.get(name)
        optimizer = None
        if module is not None:
            highest = settings.images_lr if name == IMAGES and settings.images_lr is not None else settings.lr
            config = _config(built, settings, highest)
            optimizer = get_megatron_optimizer(config, [module], pg_collection=groups, use_gloo_process_groups=False)
            _number_parameters(optimizer)
            _bind(optimizer)
            fuse(optimizer)
            schedulers[name] = _scheduler(optimizer, settings, highest, steps)
        infos[name] = ModuleOptimizerInfo(optimizer, grid, groups, is_active=name in built.groups)
    if not trained:  # get_megatron_optimizer gathers the kinds of dense, then of expert parameters over the whole world
        for _ in range(2):
            nothing: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(nothing, [])
    updates = Updates(DeviceOptimizer(infos, _config(built, settings, settings.lr)), schedulers)
    updates.set_step(0)
    return updates


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _number_parameters(optimizer: MegatronOptimizer) -> None:
    """Have megatron-core find each parameter's state where it is.

    Its distributed optimizer (0.19.2) numbers the parameters of a group in the model's order, but orders their states by dtype, fp32
    first: with both in a group (A_log beside bf16) it would save and load the one for the other.
    """
    for one in _parts(optimizer):
        for group, parts in enumerate(zip(one.model_fp32_groups, one.model_float16_groups, strict=True)):
            for place, parameter in enumerate(p for part in parts for p in part):
                one.model_param_group_index_map[parameter] = (group, place)


def fuse(optimizer: Any) -> None:
    """One kernel for a step of AdamW on a GPU, where PyTorch's default passes over the state a dozen times; also after a checkpoint's groups are loaded."""
    for group in optimizer.param_groups:
        group["fused"] = torch.cuda.is_available() or None


def _bind(optimizer: MegatronOptimizer) -> None:
    """Tell the optimizer once where gradients and weights are, in DDP's buffers; megatron-core looks for each of them in every step.

    Its gradients are used where they are, also where they are narrower than the weights, which megatron-core would copy to fp32.
    """
    for one in _parts(optimizer):
        found = [(model, main) for models, mains in (
            (one.model_float16_groups, one.shard_fp32_from_float16_groups), (one.model_fp32_groups, one.shard_fp32_groups)
        ) for model, main in zip(itertools.chain(*models), itertools.chain(*mains), strict=True)]  # fmt: skip
        one.gradients, copies, narrow = [], [], False
        for model, main in found:
            own = one._get_model_param_range_map(model)["param"]
            gradient = model.main_grad.view(-1)[own.start : own.end]
            if gradient.dtype == main.dtype:
                main.grad = gradient
            else:
                narrow = True
            main.decoupled_grad = gradient
            if param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main, tp_group=one.tp_group):
                one.gradients.append(gradient)
            if model.dtype == main.dtype:
                continue
            rounded = model.detach().view(-1)[own.start : own.end]
            if gradient.dtype == main.dtype:
                copies.append((rounded, main))
            else:
                main.rounded = rounded
        one._copy_model_grads_to_main_grads = lambda: None
        one._copy_main_params_to_model_params = partial(_copy, copies)
        if narrow:
            one.optimizer = NarrowAdamW.instead_of(one.optimizer)


@torch.no_grad()
def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    """Each second to its first, rounded."""
    if copies:
        _TORCH._foreach_copy_([to for to, _ in copies], [source for _, source in copies])


def _squared_norm(optimizer: MegatronOptimizer | None) -> Tensor:
    """Of a component's gradients, over its ranks; 0 where the component is not."""
    if optimizer is None:
        return torch.zeros((), device="cuda")
    gradients = [g for one in _parts(optimizer) for g in one.gradients]
    square = _norm(gradients).square() if gradients else torch.zeros((), device="cuda")
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of them all, an fp32 scalar; PyTorch's own rounds a norm of 16 bits to 16 bits."""
    by_dtype = [[g for g in gradients if g.dtype == dtype] for dtype in {g.dtype: None for g in gradients}]
    norms = [n for some in by_dtype for n in _TORCH._foreach_norm(some, 2, dtype=torch.float32)]
    return torch.linalg.vector_norm(torch.stack(norms))


def _config(built: BuiltModel, settings: Optimizer, highest: float) -> OptimizerConfig:
    dtype = built.model.config.params_dtype
    return OptimizerConfig(
        optimizer="adam",
        lr=highest,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )


def _scheduler(optimizer: object, settings: Optimizer, highest: float, steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,  # pyright: ignore[reportArgumentType]
        init_lr=0.0,
        max_lr=highest,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=_DECAY_STYLES[settings.schedule],
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=settings.decay_steps if settings.schedule == "wsd" else None,
        lr_wsd_decay_style="linear" if settings.schedule == "wsd" else None,
    )
