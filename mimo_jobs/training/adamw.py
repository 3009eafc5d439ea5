"""AdamW whose gradients and moments are narrower than its weights: 12 bytes a parameter of 16 bits, where fp32 takes 18.

PyTorch's own (2.15) wants one dtype for all; megatron-core's precision-aware optimizer wants transformer-engine.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101, algorithm 2) on fp32 weights, computed in fp32, with everything else in the gradients' dtype.

    A parameter's gradient is its attribute ``decoupled_grad``, as megatron-core calls it: PyTorch wants ``grad`` to be of the
    parameter's dtype. An attribute ``rounded``, a tensor of its shape, takes over each new value in its own dtype, in the same pass.

    Attributes:
        scale: fp32 scalar that gradients are multiplied with as they are read, on their device; None leaves them.
    """

    scale: Tensor | None = None

    @classmethod
    def instead_of(cls, other: torch.optim.Optimizer) -> "NarrowAdamW":
        """With the parameter groups of an AdamW that made no step yet; a parameter may be a view, as megatron-core's of fp32 are."""
        made = cls([torch.zeros(0)], {})
        made.param_groups = other.param_groups
        return made

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the numbers of the groups. Moments stay the tensors they are: PyTorch would make them fp32."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has elements."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.numel()]
            states = [self._state(p) for p in parameters]
            for state in states:
                state["step"] += 1
            if not parameters:
                continue
            numbers = _numbers(group, states[0]["step"].item(), parameters[0].device)
            scale = numbers.new_ones(()) if self.scale is None else self.scale
            update = _fused() if numbers.is_cuda else _update
            for parameter, state in zip(parameters, states, strict=True):
                gradient, rounded = parameter.decoupled_grad, getattr(parameter, "rounded", None)
                update(parameter, state["exp_avg"], state["exp_avg_sq"], gradient, rounded, numbers, scale)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        if not self.state[parameter]:
            self.state[parameter] = empty_state(parameter)
        return self.state[parameter]


def empty_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW knows of a parameter before its first step; ``step`` is on the host."""
    dtype = getattr(parameter, "decoupled_grad", parameter).dtype
    zeros = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return {"step": torch.zeros((), dtype=torch.float32), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _numbers(group: dict[str, float], step: float, device: torch.device) -> Tensor:
    """As a tensor, so that a learning rate of its own for each step is no program of its own."""
    beta1, beta2 = group["betas"]  # pyright: ignore[reportGeneralTypeIssues]
    corrections = (1 - beta1**step, (1 - beta2**step) ** 0.5)
    numbers = torch.tensor([group["lr"], group["lr"] * group["weight_decay"], beta1, beta2, group["eps"], *corrections])
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


@functools.cache
def _fused() -> Callable[..., None]:
    """In one kernel: a pass over 20 bytes a parameter, with the rounded one."""
    return torch.compile(_update, dynamic=True)


def _update(
    weights: Tensor, mean: Tensor, square: Tensor, gradient: Tensor, rounded: Tensor | None, numbers: Tensor, scale: Tensor
) -> None:  # fmt: skip
    lr, decay, beta1, beta2, eps, correction1, correction2 = numbers.unbind()
    g = gradient.float() * scale
    m = torch.lerp(g, mean.float(), beta1)
    v = torch.lerp(g * g, square.float(), beta2)
    updated = weights - decay * weights - lr / correction1 * m / (v.sqrt() / correction2 + eps)
    weights.copy_(updated)
    if rounded is not None:
        rounded.copy_(updated)
    mean.copy_(m)
    square.copy_(v)
