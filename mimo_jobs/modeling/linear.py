"""Linear layers over tensor-parallel ranks: megatron-core's, and PyTorch's own where there is one rank."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear as McoreColumnParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear as McoreRowParallelLinear
from torch import Tensor

# Elements of a weight from which its gradient is added in place: those of 4B and 9B. It saves 6 bytes an element; at 0.8B, where the host
# and not the memory is the bound (docs/training.md), it was not measured.
LARGE = 1 << 24
_ADDMM: Any = torch.ops.aten.addmm


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` where ``total`` is, (m, n); the factors, (m, k) and (k, n), may be narrower, and are summed in fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        _ADDMM.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _alone(layer: Any) -> bool:
    return layer.tp_group.size() == 1


def _own(layer: Any, input_: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same product without what megatron-core does in Python around it, forward and backward: 8 % of the host's time in a step of 0.8B."""
    bias = None if layer.skip_bias_add else layer.bias
    product: Any = _AddingLinear.apply if _adds_in_place(layer.weight) else F.linear
    return product(input_, layer.weight, bias), layer.bias if layer.skip_bias_add else None


def _adds_in_place(weight: Tensor) -> bool:
    """Whether a matrix product can add to where megatron-core's DDP sums the weight's gradient."""
    if weight.numel() < LARGE or not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    return getattr(weight, "main_grad", None) is not None


class _AddingLinear(torch.autograd.Function):
    """`F.linear` whose backward pass adds the weight's gradient to ``weight.main_grad`` itself, in the product's own fp32 sums.

    DDP would do so in a pass over a gradient that was written, and rounded, before. What autograd gets instead is never read: DDP only
    wants to see that there is one (megatron-core 0.19.2, ``DistributedDataParallel._make_backward_post_hook``).
    """

    @staticmethod
    def forward(ctx: Any, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(input_, weight)
        return F.linear(input_, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        input_, weight = ctx.saved_tensors
        rows, inputs = gradient.flatten(0, -2), input_.flatten(0, -2)
        total = weight.main_grad
        add_product(total, rows.t(), inputs)
        weight.grad_added_to_main_grad = True
        seen = total.detach() if total.dtype == weight.dtype else torch.empty_like(weight)
        return (
            gradient @ weight if ctx.needs_input_grad[0] else None,
            seen,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class ColumnParallelLinear(McoreColumnParallelLinear):
    """Each rank has a part of the outputs."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(..., inputs) to (..., outputs / tp), and the bias where another adds it."""
        if _alone(self) and not args and not kwargs:
            return _own(self, input_)
        return super().forward(input_, *args, **kwargs)


class RowParallelLinear(McoreRowParallelLinear):
    """Each rank has a part of the inputs."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(..., inputs / tp) to (..., outputs), and the bias where another adds it."""
        if _alone(self):
            return _own(self, input_)
        return super().forward(input_)
