"""The head and its cross entropy in blocks against PyTorch's own on whole logits."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mimo_jobs.modeling import loss as losses
from mimo_jobs.modeling.loss import linear_cross_entropy
from tests.gloo.processes import run_ranks

pytestmark = pytest.mark.gloo

TOKENS, HIDDEN, COUNT = 321, 24, 37


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(COUNT, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, TOKENS, (COUNT,), generator=generator)


def of_rank(
    tp: int, dtype: torch.dtype, block_bytes: int, count: int, frozen: bool
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """Loss, and the gradients of this rank's hidden states and rows of the head; the loss is used three times over."""
    losses.HEAD_BLOCK_BYTES = block_bytes
    hidden, weight, labels = inputs(dtype)
    padded = F.pad(weight, (0, 0, 0, -TOKENS % tp), value=9.0)  # padding must not count, whatever it holds
    own = padded.chunk(tp)[dist.get_rank()].clone().requires_grad_(not frozen)
    hidden = hidden[:count].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, own, labels[:count], TOKENS, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    (3 * loss).backward()
    assert hidden.grad is not None
    return loss.item(), hidden.grad, own.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("rows", [COUNT, 5])
def test_loss_and_gradients_are_those_of_whole_logits(tp: int, rows: int) -> None:
    found = run_ranks(tp, of_rank, tp, torch.float32, 4 * rows * -(-TOKENS // tp), COUNT, False)
    hidden, weight, labels = inputs(torch.float64)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    (3 * expected).backward()
    assert [loss for loss, _, _ in found] == pytest.approx([expected.item()] * tp, rel=1e-6)
    assert hidden.grad is not None and weight.grad is not None
    d_hidden = sum(d for _, d, _ in found)
    torch.testing.assert_close(d_hidden, hidden.grad.float(), rtol=1e-5, atol=1e-5)
    d_weight = torch.cat([d for _, _, d in found])
    torch.testing.assert_close(d_weight[:TOKENS], weight.grad.float(), rtol=1e-5, atol=1e-5)
    assert not d_weight[TOKENS:].any()


def test_16_bits_are_as_transformers_has_them() -> None:
    """Logits in bf16, softmax in fp32; the head's gradient is summed over blocks in fp32."""
    ((loss, d_hidden, d_weight),) = run_ranks(1, of_rank, 1, torch.bfloat16, 4 * 5 * TOKENS, COUNT, False)
    hidden, weight, labels = inputs(torch.bfloat16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")
    (3 * expected).backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for one, other in ((d_hidden, hidden.grad), (d_weight, weight.grad)):
        assert one is not None and other is not None and one.dtype == torch.bfloat16
        assert ((one - other).float().norm() / other.float().norm()).item() < 5e-3


def of_rank_on_kernels(tokens: int) -> tuple[float, torch.Tensor]:
    """As `of_rank` with the kernels' place taken by the same in PyTorch: loss, and the gradient of this rank's rows."""

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mine = (labels >= 0) & (labels < logits.shape[1])
        predicted = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        return logits.logsumexp(-1), torch.where(mine, predicted, 0.0)

    def gradient(logits: torch.Tensor, labels: torch.Tensor, log_sums: torch.Tensor) -> None:
        mine = (labels >= 0) & (labels < logits.shape[1])
        logits.sub_(log_sums[:, None]).exp_()
        logits.scatter_add_(1, labels.clamp(0, logits.shape[1] - 1)[:, None], -mine.to(logits.dtype)[:, None])

    kernels = losses.kernels
    kernels.take, kernels.cross_entropy, kernels.cross_entropy_gradient = lambda _: True, cross_entropy, gradient
    hidden, weight, labels = inputs(torch.float32)
    own = -(-tokens // dist.get_world_size())
    padded = F.pad(weight[:tokens], (0, 0, 0, own * dist.get_world_size() - tokens), value=9.0)
    part = padded.split(own)[dist.get_rank()].clone().requires_grad_()
    loss = linear_cross_entropy(hidden, part, labels % tokens, tokens, dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    loss.backward()
    assert part.grad is not None
    return loss.item(), part.grad


@pytest.mark.parametrize("tokens", [TOKENS, 9])  # of 9 tokens the last of four ranks has none
def test_on_kernels_every_rank_has_the_whole_loss(tokens: int) -> None:
    found = run_ranks(4, of_rank_on_kernels, tokens)
    hidden, weight, labels = inputs(torch.float64)
    weight = weight[:tokens].clone().requires_grad_()
    expected = F.cross_entropy(hidden @ weight.t(), labels % tokens, reduction="sum")
    expected.backward()
    assert [loss for loss, _ in found] == pytest.approx([expected.item()] * 4, rel=1e-6)
    d_weight = torch.cat([d for _, d in found])
    assert weight.grad is not None
    torch.testing.assert_close(d_weight[:tokens], weight.grad.float(), rtol=1e-5, atol=1e-5)
    assert not d_weight[tokens:].any()


def test_a_frozen_head_and_a_microbatch_without_a_loss() -> None:
    for loss, d_hidden, d_weight in run_ranks(2, of_rank, 2, torch.float32, 1 << 20, 0, True):
        assert loss == 0.0 and d_hidden.shape == (0, HIDDEN) and d_weight is None


def of_validation() -> float:
    hidden, weight, labels = inputs(torch.float32)
    losses._add_product = None  # pyright: ignore[reportAttributeAccessIssue]  # a call would be an error
    with torch.no_grad():
        return linear_cross_entropy(hidden, weight.requires_grad_(), labels, TOKENS, dist.group.WORLD).item()  # pyright: ignore


def test_a_validation_makes_no_gradient_of_the_head() -> None:
    hidden, weight, labels = inputs(torch.float32)
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum").item()
    assert run_ranks(1, of_validation) == pytest.approx([expected], rel=1e-6)
