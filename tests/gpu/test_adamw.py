"""`NarrowAdamW`'s compiled update against PyTorch's AdamW, on pieces of memory as megatron-core hands them out.

One command: ``python -m pytest tests/gpu``.
"""

import pytest
import torch

from mimo_jobs.training.adamw import NarrowAdamW

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device"), pytest.mark.timeout(540),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_updates_are_those_of_pytorchs_adamw(dtype: torch.dtype) -> None:
    if torch._dynamo.config.disable:
        pytest.skip("TORCHDYNAMO_DISABLE is set")
    torch.manual_seed(0)
    cuts = [(0, 1), (1, 4098), (4099, 70_001), (70_001, 70_002)]  # odd places, and of one element
    weights, gradients = torch.randn(70_002, device="cuda"), torch.randn(70_002, device="cuda").to(dtype)
    mine = [weights.clone()[a:b].requires_grad_() for a, b in cuts]
    wanted = [weights[a:b].clone().requires_grad_() for a, b in cuts]
    for parameter, (a, b) in zip(mine, cuts, strict=True):
        parameter.decoupled_grad = gradients[a:b]  # pyright: ignore[reportAttributeAccessIssue]
    rounded = torch.zeros(70_002, device="cuda", dtype=torch.bfloat16)
    for parameter, (a, b) in zip(mine[:3], cuts, strict=False):
        parameter.rounded = rounded[a:b]  # pyright: ignore[reportAttributeAccessIssue]
    options = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    reference = torch.optim.AdamW(wanted, **options)
    optimizer = NarrowAdamW.instead_of(torch.optim.AdamW(mine, **options))
    optimizer.scale = torch.tensor(0.5, device="cuda")
    for step in range(10):
        gradients.copy_(torch.randn(70_002, device="cuda") + 0.5)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-3 * (step + 1)
        for parameter, (a, b) in zip(wanted, cuts, strict=True):
            parameter.grad = gradients[a:b].float() / 2
        optimizer.step()
        reference.step()
    moved = sum((w - weights[a:b]).norm() for w, (a, b) in zip(wanted, cuts, strict=True))
    apart = sum((m - w).norm() for m, w in zip(mine, wanted, strict=True))
    assert apart <= (0.01 if dtype == torch.bfloat16 else 1e-5) * moved
    assert all(torch.equal(p.rounded, p.bfloat16()) for p in mine[:3]) and not rounded[70_001:].any()  # pyright: ignore[reportAttributeAccessIssue]
