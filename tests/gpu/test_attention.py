"""Attention of packed sequences in one kernel, against each sequence alone in fp32.

One command: ``python -m pytest tests/gpu``.
"""

import pytest
import torch
import torch.nn.functional as F

from mimo_jobs.modeling import kernels
from mimo_jobs.modeling.attention import Packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 12, 64), (16, 16, 72), (8, 2, 256), (6, 6, 256)])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_is_that_of_each_sequence(heads: int, kv_heads: int, width: int, causal: bool) -> None:
    packed = Packed.of((5, 700, 1, 64, 333))
    torch.manual_seed(heads)
    q, k, v = (
        torch.randn(sum(packed.lengths), n, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    bounds = packed.cu_seqlens_q.cuda()  # pyright: ignore[reportOptionalMemberAccess]
    out = kernels.packed_attention(q, k, v, bounds, 700, causal, width**-0.5)
    if out is None:
        assert heads != kv_heads or torch.__version__.startswith("2.10"), "this PyTorch should have a kernel"
        pytest.skip("this PyTorch has no packed attention for these")
    exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
    parts = zip(*(t.transpose(0, 1)[None].split(list(packed.lengths), 2) for t in exact), strict=True)
    wanted = torch.cat(
        [F.scaled_dot_product_attention(*p, is_causal=causal, enable_gqa=heads != kv_heads) for p in parts], 2
    )[0].transpose(0, 1)
    weight = torch.randn_like(out)
    out.backward(weight)
    wanted.backward(weight.float())
    for found, right in [(out, wanted), *((a.grad, b.grad) for a, b in zip((q, k, v), exact, strict=True))]:
        assert found is not None and right is not None
        assert (found.float() - right).abs().max() <= 0.02 * right.abs().max()
