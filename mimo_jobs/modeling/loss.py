"""The head and its cross entropy together, a block of tokens at a time: the logits of a step never exist as a whole.

Logits of 248 320 tokens are the largest tensor of a step: 1 MB a token in fp32, several times. Here each block's logits become its
loss and its gradients at once (the gradient of a sum of losses needs nothing from the backward pass but a factor), and go.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mimo_jobs.layout import HEAD_BLOCK_BYTES
from mimo_jobs.modeling import kernels
from mimo_jobs.modeling.linear import add_product


@dataclass(frozen=True)
class Targets:
    """The tokens of a microbatch that have a loss; the head works on these alone.

    Attributes:
        places: int64 (n,), in the flattened (seq, batch) output of the decoder: ``seq_index * batch + batch_index``.
        labels: int64 (n,), what is to be predicted there.
    """

    places: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, ignored: int = -100) -> "Targets":
        """From labels (batch, seq), ``ignored`` where there is no loss."""
        flat = labels.t().reshape(-1)
        places = (flat != ignored).nonzero()[:, 0]
        return cls(places, flat[places])


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, tokens: int, group: dist.ProcessGroup
) -> Tensor:
    """Sum over tokens of the cross entropy of ``hidden @ weight.T``, the vocabulary spread over tensor parallel ranks.

    As transformers computes it: logits in the parameters' dtype, softmax in fp32.

    Args:
        hidden: (n, hidden), the same on every rank; its gradient is this rank's part of a sum over ranks.
        weight: (own rows of the padded vocabulary, hidden).
        labels: int64 (n,), in the whole vocabulary.
        tokens: the vocabulary without what pads it; padded rows are no tokens.

    Returns:
        fp32 scalar, the same on every rank.
    """
    if not torch.is_grad_enabled():  # a parameter wants a gradient all the same
        weight = weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, tokens, group)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tokens: int, group: dist.ProcessGroup
    ) -> Tensor:
        own = weight.shape[0]
        first = own * group.rank()
        there = max(0, min(own, tokens - first))  # rows that are tokens
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        rows = max(1, HEAD_BLOCK_BYTES // (own * _bytes_per_logit(hidden)))
        once = 0 < len(hidden) <= rows  # the one product is the sum
        d_weight = None
        if wants_weight and not once:
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            logits = hidden[block] @ weight.t()
            losses, gradient = _losses(logits, labels[block] - first, there, group)
            loss += losses.sum()
            if d_hidden is not None:
                torch.matmul(gradient, weight, out=d_hidden[block])
            if d_weight is not None:
                add_product(d_weight, gradient.t(), hidden[block])
            elif wants_weight:
                d_weight = gradient.t() @ hidden
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        d_hidden, d_weight = (None if t is None else t.mul_(factor) for t in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None


def _bytes_per_logit(hidden: Tensor) -> int:
    """What a block of logits holds at a time: of 16 bits without kernels also its values and their gradient in fp32, and that in 16."""
    return hidden.itemsize if kernels.take(hidden) or hidden.itemsize == 4 else 4 + 2 * hidden.itemsize


def _losses(logits: Tensor, labels: Tensor, there: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Loss of each token, in fp32, and the gradient of their sum in the logits' dtype; overwrites the logits.

    Args:
        logits: (n, own rows of the padded vocabulary), of which ``there`` are tokens.
        labels: relative to this rank's first row; outside of ``[0, there)`` another rank has it.
    """
    if kernels.take(logits):
        return _fused_losses(logits, labels, there, group), logits
    logits[:, there:] = float("-inf")
    losses, gradient = _plain_losses(logits.float(), labels, there, group)
    return losses, gradient.to(logits.dtype)


def _fused_losses(logits: Tensor, labels: Tensor, there: int, group: dist.ProcessGroup) -> Tensor:
    tokens = logits[:, :there]
    if there:
        log_sums, predicted = kernels.cross_entropy(tokens, labels)
    else:  # nothing but padding
        predicted = torch.zeros(len(logits), device=logits.device)
        log_sums = torch.full_like(predicted, float("-inf"))
    if group.size() > 1:
        highest = log_sums.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        both = torch.stack([predicted, (log_sums - highest).exp()])
        dist.all_reduce(both, group=group)
        predicted, log_sums = both[0], both[1].log() + highest
    if there:
        kernels.cross_entropy_gradient(tokens, labels, log_sums)
    logits[:, there:] = 0
    return log_sums - predicted


def _plain_losses(logits: Tensor, labels: Tensor, there: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    highest = logits.amax(-1)
    if group.size() > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    logits -= highest[:, None]
    mine = (labels >= 0) & (labels < there)
    place = labels.clamp(0, max(0, there - 1))[:, None]
    predicted = torch.where(mine, logits.gather(1, place)[:, 0], 0.0)
    total = logits.exp_().sum(-1)
    if group.size() > 1:
        both = torch.stack([predicted, total])
        dist.all_reduce(both, group=group)
        predicted, total = both
    logits /= total[:, None]
    logits.scatter_add_(1, place, -mine.to(logits.dtype)[:, None])
    return total.log() - predicted, logits
