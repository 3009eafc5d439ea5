"""A weight's gradient added where it is summed, by the matrix product itself.

One command: ``python -m pytest tests/gpu``.
"""

from types import SimpleNamespace

import pytest
import torch

from mimo_jobs.modeling import linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_two_microbatches_are_added_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGE", 0)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(384, 256, device="cuda", dtype=torch.bfloat16))
    bias = torch.nn.Parameter(torch.randn(384, device="cuda", dtype=torch.bfloat16))
    total = torch.randn(384, 256, device="cuda").to(dtype)
    wanted = total.double()
    weight.main_grad = total  # pyright: ignore[reportAttributeAccessIssue]
    layer = SimpleNamespace(weight=weight, bias=bias, skip_bias_add=False)
    for _ in range(2):
        x = torch.randn(96, 2, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        upstream = torch.randn(96, 2, 384, device="cuda", dtype=torch.bfloat16)
        out, _ = linear._own(layer, x)
        out.backward(upstream)
        wanted += upstream.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
        assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))
        assert x.grad is not None and torch.equal(x.grad, upstream @ weight)
        assert weight.grad is not None and weight.grad_added_to_main_grad  # pyright: ignore[reportAttributeAccessIssue]
        weight.grad = None
    assert bias.grad is not None and total.dtype == dtype
    error = ((total.double() - wanted).norm() / wanted.norm()).item()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
