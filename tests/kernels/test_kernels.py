"""Fused kernels against references in fp32, and a whole model on them against transformers in fp64."""

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("fla", reason="flash-linear-attention is not installed")

from mimo_jobs.layout import ComponentLayout, ParallelLayout
from mimo_jobs.modeling import kernels
from mimo_jobs.modeling.attention import Packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # Triton's interpreter does not round to bf16, it cuts
pytestmark = pytest.mark.kernels


@pytest.fixture
def fused(monkeypatch):
    """Kernels on this device; the delta rule's own is written out where Triton's interpreter cannot run it (a loop variable has no `.to`)."""
    monkeypatch.setattr(kernels, "DEVICES", frozenset({DEVICE}))
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "chunk_gated_delta_rule", delta_rule)


def delta_rule(q, k, v, *, g, beta, A_log, dt_bias, cu_seqlens, cu_seqlens_cpu, chunk_indices, **flags):
    """flash-linear-attention's rule, token by token (arXiv 2412.06464, equation 10), in fp32."""
    assert flags == dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
    assert (cu_seqlens is None) == (cu_seqlens_cpu is None) == (chunk_indices is None)
    dtype, repeat = q.dtype, v.shape[2] // q.shape[2]
    q, k = (F.normalize(t.float(), dim=-1, eps=1e-6).repeat_interleave(repeat, 2) for t in (q, k))
    decay, beta = (-A_log.float().exp() * F.softplus(g.float() + dt_bias.float())).exp(), beta.float().sigmoid()
    starts = {0} if cu_seqlens_cpu is None else set(cu_seqlens_cpu.tolist())
    outs, state = [], torch.zeros(1)
    for t in range(q.shape[1]):
        if t in starts:
            state = q.new_zeros(*v.shape[:1], v.shape[2], k.shape[-1], v.shape[-1])
        state = state * decay[:, t, :, None, None]
        missing = v[:, t].float() - (state * k[:, t, :, :, None]).sum(-2)
        state = state + k[:, t, :, :, None] * (missing * beta[:, t, :, None])[:, :, None]
        outs.append((state * q[:, t, :, :, None]).sum(-2) * k.shape[-1] ** -0.5)
    return torch.stack(outs, 1).to(dtype), None


@pytest.mark.parametrize("lengths", [(1,), (64,), (65, 1, 128, 300)])
def test_chunks_are_those_that_flash_linear_attention_makes(lengths):
    from fla.ops.utils.index import prepare_chunk_indices

    bounds = Packed.of(lengths).cu_seqlens_q
    found, wanted = kernels.chunks_of(lengths), prepare_chunk_indices(bounds, kernels.CHUNK)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def random(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, DTYPE).requires_grad_()


def compared(function, reference, *inputs, bound=0.02):
    """Output and every gradient, relative to the largest value of each; the reference works on the same numbers in fp32."""
    exact = [t.detach().float().requires_grad_() for t in inputs]
    out, wanted = function(*inputs), reference(*exact)
    assert out.shape == wanted.shape and out.dtype == inputs[0].dtype
    weight = torch.randn(wanted.shape, device=DEVICE)
    out.backward(weight.to(out.dtype))
    wanted.backward(weight.to(out.dtype).float())
    for found, right in [(out, wanted), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]:
        assert ((found.float() - right).abs().max() <= bound * right.abs().max()).item()


def normalised(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("width", [64, 96, 1024])
def test_rms_norm(fused, width):
    weight = (1 + torch.randn(width, device=DEVICE) / 4).requires_grad_()
    x = random(7, 5, width)
    made_by = kernels.rms_norm(x, weight, 1e-6).grad_fn
    assert type(made_by).__name__.startswith("LayerNormFunction")
    compared(lambda x, w: kernels.rms_norm(x, w, 1e-6), lambda x, w: normalised(x) * w, x, weight)


@pytest.mark.parametrize("dtype", [DTYPE, torch.float32])  # checkpoints of 16 bits may keep this weight in fp32
def test_gated_rms_norm(fused, dtype):
    def reference(x, gate, weight):
        return normalised(x) * weight * F.silu(gate)

    compared(
        lambda x, gate, weight: kernels.gated_rms_norm(x, gate, weight, 1e-6),
        reference,
        random(2, 33, 4, 64),
        random(2, 33, 4, 64),
        random(64).detach().to(dtype).requires_grad_(),
    )


def test_swiglu_of_the_halves_of_a_projection(fused):
    def halves(function):
        return lambda both: function(*both.chunk(2, -1))

    compared(halves(kernels.swiglu), halves(lambda gate, up: F.silu(gate) * up), random(9, 3, 2 * 176))


@pytest.mark.parametrize("vocabulary", [300, 70_000])  # the kernels take up to 65536 at a time
def test_cross_entropy(fused, vocabulary):
    torch.manual_seed(0)
    logits = random(5, vocabulary + 3, scale=3.0).detach()
    logits[:, vocabulary:] = float("inf")  # padding, which must not count
    labels = torch.tensor([0, vocabulary - 1, -100, vocabulary + 7, 17], device=DEVICE)  # two are of other ranks
    there, mine = logits[:, :vocabulary], torch.tensor([True, True, False, False, True], device=DEVICE)
    exact = there.float().requires_grad_()
    wanted_sums = exact.logsumexp(-1)
    wanted = torch.where(mine, exact.gather(1, labels.clamp(0, vocabulary - 1)[:, None])[:, 0], 0.0)
    (wanted_sums - wanted).sum().backward()
    log_sums, predicted = kernels.cross_entropy(there, labels)
    torch.testing.assert_close(log_sums, wanted_sums)
    torch.testing.assert_close(predicted, wanted, rtol=1e-5, atol=1e-5)
    kernels.cross_entropy_gradient(there, labels, log_sums)
    torch.testing.assert_close(there.float(), exact.grad, rtol=8e-3, atol=1e-6)
    assert logits[:, vocabulary:].isinf().all()


@pytest.mark.parametrize("lengths", [None, (70,), (5, 64, 1, 30)])
@pytest.mark.parametrize("value_heads", [2, 4])
def test_gated_delta_rule(fused, lengths, value_heads):
    torch.manual_seed(value_heads)
    batch, seq = (2, 70) if lengths is None else (1, sum(lengths))
    packed = None if lengths is None else Packed.of(lengths)
    keys, width = 2 * 32, 2 * 2 * 32 + value_heads * 32

    def run(qkv, alpha, beta, decay, bias, weight):
        where = (None, None, None)
        if packed is not None:
            where = packed.cu_seqlens_q.to(DEVICE), packed.host_bounds, packed.chunks.to(DEVICE)
        return kernels.gated_delta_rule(qkv, alpha, beta, decay, bias, weight, (32, 32, keys), *where)

    def reference(qkv, alpha, beta, decay, bias, weight):
        parts = qkv.split(list(lengths or (seq,)), 1)
        mixed = [
            F.conv1d(F.pad(p.transpose(1, 2), (3, 0)), weight[:, None], groups=width).transpose(1, 2) for p in parts
        ]
        q, k, v = F.silu(torch.cat(mixed, 1)).split([keys, keys, width - 2 * keys], -1)
        flags = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
        bounds = None if packed is None else packed.host_bounds
        q, k, v = (t.unflatten(-1, (-1, 32)) for t in (q, k, v))
        return delta_rule(
            q,
            k,
            v,
            g=alpha,
            beta=beta,
            A_log=decay,
            dt_bias=bias,
            cu_seqlens=bounds,
            cu_seqlens_cpu=bounds,
            chunk_indices=bounds,
            **flags,
        )[0]

    heads = (batch, seq, value_heads)
    compared(
        run, reference, random(batch, seq, width), random(*heads), random(*heads), random(value_heads), random(value_heads),
        random(width, 4, scale=0.5), bound=0.04,
    )  # fmt: skip


@pytest.fixture
def one_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_on_kernels_is_as_near_to_transformers_as_one_without(fused, one_rank, monkeypatch):
    from tests.gloo.batches import tiny
    from tests.gloo.training import exact, samples_of_a_run

    config, model = tiny()
    samples = samples_of_a_run(config, 4)
    loss, gradients, _ = exact(model, samples)
    with_kernels = trained_once(config, model, gradients, samples)
    monkeypatch.setattr(kernels, "DEVICES", frozenset())
    without = trained_once(config, model, gradients, samples)
    assert abs(with_kernels[0] - loss) <= abs(without[0] - loss) + 1e-3 * loss
    for name, error in with_kernels[1].items():
        factor = 3 if name.endswith(("A_log", "dt_bias")) else 2  # sums with heavy cancellation
        assert error <= factor * without[1][name] + 1e-3, (name, error, without[1][name])


def trained_once(config, model, gradients, samples) -> tuple[float, dict[str, float]]:
    """Loss of the samples in 16 bits, and the relative error of every parameter's gradient."""
    from mimo_jobs.modeling.build import build
    from mimo_jobs.training.batches import Shares
    from mimo_jobs.training.step import run_step, wrap_for_training
    from mimo_jobs.training.stopwatch import Stopwatch
    from tests.gloo.reference_weights import live_parameters, load_reference, reference_parameters
    from tests.gloo.training import microbatches_of, table_of

    one = ComponentLayout()
    built = build(config, ParallelLayout(one, one, 1).resolve(), dtype=DTYPE)
    load_reference(built, {n: t.to(DEVICE) for n, t in model.state_dict().items()})
    wrap_for_training(built, sharded=False)
    table = table_of(samples, [[i] for i in range(len(samples))])
    made = microbatches_of(built, samples, table, Shares(1, 1, len(samples), 1))
    total = table.total(table.loss_tokens)
    loss = run_step(built, [m.to(torch.device(DEVICE)) for m in made], total, Stopwatch()).item() / total
    wanted, errors = reference_parameters(built, gradients), {}
    for name, parameter in live_parameters(built).items():
        found: Any = parameter.main_grad  # pyright: ignore[reportAttributeAccessIssue]
        errors[name] = ((found.cpu().double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)).item()
    return loss, errors
