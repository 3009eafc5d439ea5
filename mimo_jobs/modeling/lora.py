"""Low-rank adapters in megatron-core's linear layers: one to one with PEFT's, at any tensor parallelism.

A fused layer made of S adapted projections holds ``lora_A`` (S * rank, in), their A's one below the other, and ``lora_B``
(rows, rank), one row for each row of its weight; rows of projections without an adapter stay zero. What is cut in the weight
is cut here: B's rows in a column-parallel layer, A's columns in a row-parallel one. The other of the two is replicated, and
only the product with A, ``rank`` wide, travels:

| layer | sequence parallel | product with A | gradient of the replicated one |
|---|---|---|---|
| column | no | copied; its gradient is summed over tp | whole on every rank |
| column | yes | gathered; its gradient is reduce-scattered | A's, of a part of the sequence: summed by finalize_model_grads |
| row | no | summed over tp | whole on every rank |
| row | yes | reduce-scattered; its gradient is gathered | B's, of a part of the sequence: summed by finalize_model_grads |

DoRA (arXiv 2402.09353) adds ``lora_magnitude_vector`` (rows): what the norm of each row of W + scale * B @ A is made to be. That norm
counts as a constant in the backward pass, as in PEFT; a row-parallel layer sums its square over tp.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mimo_jobs.families import family_of
from mimo_jobs.layout import IMAGES, LANGUAGE
from mimo_jobs.modeling.build import ENCODER, BuiltModel
from mimo_jobs.modeling.linear import ColumnParallelLinear, RowParallelLinear
from mimo_jobs.weights.adapters import (
    AdaptedLinear,
    adapted_linears,
    check_settings,
    check_stages,
    scale_of,
    targeted,
)

if TYPE_CHECKING:
    from mimo_jobs.training.config import Lora

MAGNITUDE = "lora_magnitude_vector"
ADAPTER_PARAMETERS = ("lora_A", "lora_B", MAGNITUDE)


def add_adapters(built: BuiltModel, lora: "Lora", seed: int = 0) -> None:
    """Put adapters into this rank's layers and freeze everything else.

    Call it once, after the base weights were filled (DoRA starts from their norms) and before the components are wrapped
    (DDP). No communication but for DoRA, which is collective over each component's tp groups. Adapters are fp32
    whatever the model's dtype, and compute in the dtype of the activations. A starts as in PEFT (``kaiming_uniform`` with
    a=sqrt(5)), the same values in every layout; B starts at zero, so the model is what it was.

    Args:
        lora: ``targets`` are Hugging Face module names; see `weights.adapters.targeted`.
        seed: of A and of dropout.

    Raises:
        UsageError: a setting is out of its bounds, a target matches nothing, or a pipeline stage would have no adapter.
    """
    check_settings(lora)
    config = built.hf.to_dict()
    weight_map = family_of(config).weight_map(config)
    modules = targeted(weight_map, lora.targets)
    check_stages(weight_map, modules, lora.targets, built.layout)
    built.model.requires_grad_(False)
    live = _linears(built)
    for key, layer in adapted_linears(weight_map, modules, built.layout, torch.distributed.get_rank()).items():
        live[key].__class__ = _ADAPTED[type(live[key])]  # it keeps its parameters, groups and place
        live[key].attach(layer, lora, seed)
    for component, stack in ((LANGUAGE, built.language), (IMAGES, built.vision)):
        if stack is not None and built.configs[component].recompute_granularity is not None:
            stack.decoder.register_forward_pre_hook(_require_grad, with_kwargs=True)
    if lora.dropout:
        seed_dropout(built, seed)


def adapted_layers(built: BuiltModel) -> dict[str, "AdaptedLayer"]:
    """Checkpoint key (without ``.weight``) -> layer, of this rank's layers that have an adapter."""
    return {key: module for key, module in _linears(built).items() if isinstance(module, AdaptedLayer)}


def _linears(built: BuiltModel) -> dict[str, Any]:
    """Checkpoint key (without ``.weight``) -> parallel linear layer of this rank."""
    found = {}
    if built.language is not None:
        layers: Any = built.language.decoder.layers
        for layer in layers:
            at = f"{LANGUAGE}_model.decoder.layers.{layer.layer_number - 1}"
            found |= {f"{at}.{name}": module for name, module in layer.named_modules()}
    if built.vision is not None:
        at = f"modality_submodules.{IMAGES}.encoders.{ENCODER}"
        found |= {f"{at}.{name}": module for name, module in built.vision.named_modules()}
    return {n: m for n, m in found.items() if isinstance(m, ColumnParallelLinear | RowParallelLinear)}


def _require_grad(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Recomputation gives no gradient at all when no input of a recomputed part needs one; embeddings are frozen here."""

    def leaf(x: Any) -> Any:
        plain = isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad and torch.is_grad_enabled()
        return x.detach().requires_grad_() if plain else x

    if "hidden_states" in kwargs:
        return args, kwargs | {"hidden_states": leaf(kwargs["hidden_states"])}
    return (leaf(args[0]), *args[1:]), kwargs


# ------------------------------------------------------------------------------------------------------------- dropout


def seed_dropout(built: BuiltModel, seed: int) -> None:
    """Start this rank's streams of dropout anew; calling it with another seed each step makes a resumed run draw the same.

    Ranks that hold copies of an activation draw the same; ranks that hold parts of it, or other samples, draw differently.
    """
    states = _streams()
    for component, groups in built.groups.items():
        for cut in (False, True):
            place = [groups.dp.rank(), groups.cp.rank(), groups.pp.rank(), groups.tp.rank() if cut else -1]
            generator = torch.Generator(_device(built)).manual_seed(_number(seed, "dropout", component, *place))
            states[_stream(component, cut)] = generator.get_state()


def _streams() -> dict[str, Tensor]:
    """Name -> state of a generator, kept where megatron-core's recomputation winds states back (tensor_parallel/random.py)."""
    tracker: Any = get_cuda_rng_tracker()
    return tracker.states_


def _stream(component: str, cut: bool) -> str:
    return f"adapter-dropout-{component}-{'cut' if cut else 'whole'}"


def _device(built: BuiltModel) -> torch.device:
    return next(built.model.parameters()).device


def _number(*words: object) -> int:
    """A seed from words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest()) >> 1


def _keep(x: Tensor, p: float, stream: str) -> Tensor:
    """Which elements of ``x`` stay: bool."""
    states = _streams()
    generator = torch.Generator(x.device)
    generator.set_state(states[stream])
    keep = torch.rand(x.shape, device=x.device, generator=generator) >= p
    states[stream] = generator.get_state()
    return keep


# -------------------------------------------------------------------------------------------------------------- layers


class AdaptedLayer(nn.Module):
    """What both parallel layers share; mixed into them by `add_adapters`.

    Attributes:
        adapted: what the adapter is of.
        lora_A: fp32 (S * rank, local columns).
        lora_B: fp32 (local rows, rank).
        lora_owner: bool (local rows, S): whose row it is; None when all rows are one projection's.
        lora_magnitude_vector: fp32 (local rows,) under DoRA; rows without an adapter are not scaled.
    """

    adapted: AdaptedLinear
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_owner: Tensor | None
    lora_magnitude_vector: nn.Parameter | None
    lora_scale: float
    lora_dropout: float
    # of the parallel layers
    weight: nn.Parameter
    bias: nn.Parameter | None
    skip_bias_add: bool
    sequence_parallel: bool
    tp_group: torch.distributed.ProcessGroup

    def attach(self, layer: AdaptedLinear, lora: "Lora", seed: int) -> None:
        """Make the parameters of an adapter."""
        assert self.weight.shape == (layer.rows, layer.columns), (layer, self.weight.shape)
        device, own = self.weight.device, slice(layer.column, layer.column + layer.columns)
        starts = [_initial_a(lora.rank, layer.in_features, seed, module)[:, own] for module in layer.modules]
        self.adapted, self.lora_scale, self.lora_dropout = layer, scale_of(lora), lora.dropout
        self.lora_A = nn.Parameter(torch.cat(starts).contiguous().to(device))
        self.lora_B = nn.Parameter(torch.zeros(layer.rows, lora.rank, device=device))
        # For the norm of gradients: megatron-core counts what is not marked as cut on tp rank 0 alone.
        cut, whole, axis = (self.lora_A, self.lora_B, 1) if layer.by_columns else (self.lora_B, self.lora_A, 0)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=axis, stride=1)
        whole.sequence_parallel = self.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
        owner = torch.zeros(layer.rows, len(layer.modules), dtype=torch.bool)
        for run in layer.runs:
            owner[run.row : run.row + run.count, run.module] = True
        trivial = len(layer.modules) == 1 and bool(owner.all())
        self.register_buffer("lora_owner", None if trivial else owner.to(device), persistent=False)
        self.register_parameter(MAGNITUDE, None)
        if lora.dora:
            self.lora_magnitude_vector = magnitude = nn.Parameter(self._row_norms())
            if layer.by_columns:
                magnitude.sequence_parallel = self.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
            else:
                set_tensor_model_parallel_attributes(magnitude, is_parallel=True, dim=0, stride=1)

    def _down(self, x: Tensor, cut: bool) -> Tensor:
        """(..., local columns) to (..., S * rank), scaled."""
        if self.training and self.lora_dropout:
            keep = _keep(x, self.lora_dropout, _stream(self.adapted.component, cut))
            x = x * keep * (1 / (1 - self.lora_dropout))
        return F.linear(x, self.lora_A.to(x.dtype)) * self.lora_scale

    def _block_b(self, dtype: torch.dtype) -> Tensor:
        """B as (local rows, S * rank), so that each row sees its own projection's product alone."""
        b = self.lora_B.to(dtype)
        return b if self.lora_owner is None else (b[:, None, :] * self.lora_owner[:, :, None]).flatten(1)

    def _adapted(self, output: Tensor, bias: Tensor | None, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """The base layer's result with the product of A, (..., S * rank), brought up to (..., local rows) and added."""
        update = F.linear(a, self._block_b(a.dtype))
        if self.lora_magnitude_vector is None:
            return output + update, bias
        factor = self.lora_magnitude_vector / self._row_norms()
        if self.lora_owner is not None:
            factor = torch.where(self.lora_owner.any(1), factor, 1.0)
        added = None if self.skip_bias_add else self.bias  # the magnitude is not the bias's
        plain = output if added is None else output - added
        scaled = (plain + update) * factor.to(output.dtype)
        return scaled if added is None else scaled + added, bias

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """fp32 (local rows,): norms of whole rows of W + scale * B @ A."""
        squares = torch.addmm(
            self.weight.float(), self._block_b(torch.float32), self.lora_A.float(), alpha=self.lora_scale
        ).square().sum(1)  # fmt: skip
        if self.adapted.by_columns and self.tp_group.size() > 1:
            torch.distributed.all_reduce(squares, group=self.tp_group)
        return squares.sqrt()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As the base layer's, with the adapter cut as the weight is; what has its rows has its sections."""
        by_columns = self.adapted.by_columns
        axes = {"weight": 1, "lora_A": 1} if by_columns else {"weight": 0, "bias": 0, "lora_B": 0, MAGNITUDE: 0}
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"],
        )  # fmt: skip
        if len(self.adapted.sections) > 1:
            for name in (f"{prefix}lora_B", f"{prefix}{MAGNITUDE}"):
                if name in state:
                    state[name] = _in_sections(state[name], self.adapted, sharded_offsets)
        return state


class AdaptedColumnParallelLinear(AdaptedLayer, ColumnParallelLinear):
    """``ColumnParallelLinear`` with an adapter."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the base layer's."""
        output, bias = ColumnParallelLinear.forward(self, input_, *args, **kwargs)
        a = self._down(input_, cut=self.sequence_parallel)
        if self.sequence_parallel:
            a = gather_from_sequence_parallel_region(a, group=self.tp_group)
        elif self.tp_group.size() > 1:
            a = copy_to_tensor_model_parallel_region(a, group=self.tp_group)
        return self._adapted(output, bias, a)


class AdaptedRowParallelLinear(AdaptedLayer, RowParallelLinear):
    """``RowParallelLinear`` with an adapter."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As the base layer's."""
        assert self.input_is_parallel
        output, bias = RowParallelLinear.forward(self, input_)
        a = self._down(input_, cut=True)
        if self.sequence_parallel:
            a = reduce_scatter_to_sequence_parallel_region(a, group=self.tp_group)
        elif self.tp_group.size() > 1:
            a = reduce_from_tensor_model_parallel_region(a, group=self.tp_group)
        return self._adapted(output, bias, a)


_ADAPTED = {ColumnParallelLinear: AdaptedColumnParallelLinear, RowParallelLinear: AdaptedRowParallelLinear}


def _initial_a(rank: int, in_features: int, seed: int, module: str) -> Tensor:
    """PEFT's start of A, (rank, in_features) fp32 on the host; ``kaiming_uniform_(a=sqrt(5))`` is uniform up to 1/sqrt(in)."""
    generator = torch.Generator().manual_seed(_number(seed, module))
    bound = in_features**-0.5
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


def _in_sections(whole: Any, layer: AdaptedLinear, sharded_offsets: tuple) -> ShardedTensorFactory:
    """A parameter of one row a row of the weight, stored in the weight's sections: gate and up, or in_proj's six parts."""
    axis = len(sharded_offsets)

    def build(key: str, tensor: Tensor, replica_id: Any, _flattened_range: slice | None) -> Any:
        return [
            ShardedTensor.from_rank_offsets(
                key + s.suffix, tensor[s.row : s.row + s.rows], *sharded_offsets, (axis, s.offset // s.rows, s.of // s.rows),
                replica_id=replica_id, prepend_axis_num=axis,
            )
            for s in layer.sections
        ]  # fmt: skip

    joined: Any = torch.cat
    return ShardedTensorFactory(whole.key, whole.data, build, joined, whole.replica_id)
