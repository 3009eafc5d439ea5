"""FLOPs by formula, held against the real modules: their weights, and what torch counts while they run."""

from dataclasses import replace

import pytest

from mimo_jobs.conversion import tiny
from mimo_jobs.training import flops

TINY = tiny.Shape(mtp=False)
SHAPES = {"tiny": TINY, "0.8B": tiny.published("0.8b", mtp=False), "9B": tiny.published("9b", mtp=False)}
UNTIED = replace(TINY, tied=False)


def _model(shape, device="meta"):
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    with torch.device(device):
        return Qwen3_5ForConditionalGeneration(tiny._config(shape)).eval().float()


def _matrices(module):
    """Weights that are multiplied with activations: not the tables, which are only looked up."""
    import torch

    return sum(
        m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.modules.conv._ConvNd)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_weights_cost_twice_their_number(name):
    model = _model(SHAPES[name])
    cost = flops.of_config(tiny._config(SHAPES[name]).to_dict())
    assert cost.token == 2 * _matrices(model.model.language_model)
    assert cost.head == 2 * model.lm_head.weight.numel()
    visual = model.model.visual
    merged = _matrices(visual.merger)
    assert cost.patch == 2 * (_matrices(visual) - merged) + 2 * merged / visual.spatial_merge_size**2
    # What is left out, norms and biases, is little. Tables are looked up, not multiplied.
    every = (
        sum(p.numel() for p in model.model.language_model.parameters())
        - model.model.language_model.embed_tokens.weight.numel()
    )
    assert cost.token / 2 == pytest.approx(every, rel=0.01)


def _counted(call):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [64, 192])
def test_the_decoder_costs_what_torch_counts(length):
    import torch

    model = _model(UNTIED, "cpu")
    cost = flops.of_config(tiny._config(UNTIED).to_dict())
    with torch.no_grad():
        counted = _counted(lambda: model(input_ids=torch.full((2, length), 5)))
    # torch counts every pair of a masked attention, and the matrix products of the rule in chunks of 64 (but not its triangular solve).
    work, linear = cost.language([length, length]), 3
    every_pair = cost.attention * (2 * length**2 - length * (length + 1))
    key, value, heads = UNTIED.gdn_key_dim, UNTIED.gdn_value_dim, UNTIED.gdn_value_heads
    chunks = linear * heads * 2 * length * (6 * key * value + 64 * (4 * key + 2 * value))
    # Nor a convolution that is done without aten.convolution.
    assert counted == pytest.approx(work.forward + every_pair + chunks - cost.state * 2 * length, rel=0.01)


def test_the_vision_tower_costs_what_torch_counts():
    import torch

    visual = _model(TINY, "cpu").model.visual
    cost = flops.of_config(tiny._config(TINY).to_dict())
    grid = torch.tensor([[1, 8, 12], [2, 4, 6]])  # one image, and a film of two frames
    with torch.no_grad():
        counted = _counted(lambda: visual(torch.randn(96 + 48, visual.patch_embed.proj.weight[0].numel()), grid))
    assert counted == pytest.approx(cost.images([96, 24, 24]).forward, rel=0.01)


@pytest.mark.parametrize(("training", "trained"), [("trained", True), ("passed", False)])
def test_a_step_costs_what_torch_counts(training, trained):
    """On the vision tower: in the decoder torch counts the backward pass of the depthwise convolution as a full one."""
    import torch

    visual = _model(TINY, "cpu").model.visual.requires_grad_(trained)
    grid, per_patch = torch.tensor([[1, 8, 12]]), visual.patch_embed.proj.weight[0].numel()
    embedded = torch.randn(96, visual.config.hidden_size, requires_grad=True)
    visual.patch_embed.forward = lambda pixels: embedded * 1  # its own gradient goes no further: left out on both sides
    counted = _counted(lambda: visual(torch.randn(96, per_patch), grid).pooler_output.sum().backward())
    work = flops.of_config(tiny._config(TINY).to_dict()).images([96])
    embedding = 2 * 96 * per_patch * visual.config.hidden_size
    expected = flops.Work(work.weights - embedding, work.mixing).passes(training)
    again = work.mixing / 2  # fused attention makes the scores once more on its way back, and torch counts that
    assert counted == pytest.approx(expected + again, rel=0.01)


def test_how_often_a_part_is_passed():
    work = flops.of_config(tiny._config(TINY).to_dict()).language([128])
    assert work.passes("trained") == 3 * work.forward
    assert work.passes("lora") == work.passes("passed") == 2 * work.weights + 3 * work.mixing
    assert work.passes("frozen") == work.forward


def test_attention_grows_with_the_square_and_packed_sequences_do_not_see_each_other():
    cost = flops.of_config(tiny._config(TINY).to_dict())
    one, two = cost.language([4096]), cost.language([2048, 2048])
    assert one.weights == two.weights
    assert one.weights - cost.language([4096], losses=96).weights == cost.head * 4000
    assert one.mixing - two.mixing == cost.attention * 2048 * 2048
    assert (cost.images([100]) + cost.images([50])).mixing == cost.images([100, 50]).mixing


@pytest.mark.parametrize(
    ("card", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100-PCIE-40GB", 312.0), ("NVIDIA H20", 148.0),
        ("NVIDIA A10", 125.0), ("NVIDIA L40S", 362.05), ("NVIDIA L4", 121.0), ("NVIDIA B200", 2250.0), ("NVIDIA GB200", 2500.0),
        ("Tesla V100-SXM2-32GB", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_rates_by_the_name_of_the_card(card, rate):
    assert flops.peak_tflops(card) == rate


def test_utilisation():
    assert flops.utilisation(989.4e12 * 8, 2.0, 8, 989.4) == pytest.approx(0.5)
    assert flops.utilisation(1e12, 2.0, 8, None) is None
    assert flops.utilisation(1e12, 0.0, 8, 989.4) is None
