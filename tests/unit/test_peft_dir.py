"""What is read of a PEFT directory, and one screen for each thing that is not plain LoRA."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimo_jobs.checkpoint.peft_dir import CONFIG_NAME, WEIGHTS_NAME, read_peft
from mimo_jobs.errors import UserError
from mimo_jobs.families import family_of
from mimo_jobs.training.config import Lora
from mimo_jobs.weights.adapters import target_modules, targeted
from tests.adapter_files import make_adapter, write
from tests.hf_files import config_of

CONFIG = config_of()
LAYER = "base_model.model.model.language_model.layers.3.self_attn.q_proj"


def test_settings_and_modules_are_read(tmp_path: Path) -> None:
    make_adapter(tmp_path, CONFIG, "q_proj", rank=8, use_rslora=True, lora_alpha=12.5, base_model_name_or_path="Qwen/x")
    adapter = read_peft(tmp_path)
    module = "model.language_model.layers.3.self_attn.q_proj"
    assert (adapter.rank, adapter.alpha, adapter.rslora, adapter.base_model) == (8, 12.5, True, "Qwen/x")
    assert adapter.modules == (module,) and adapter.tensors[f"{module}.lora_B"].shape == (128, 8)
    started = Lora(rank=1, alpha=1, dropout=0.1, targets="images")
    assert adapter.applied_to(started) == replace(started, rank=8, alpha=12.5, rslora=True, targets=module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; supported: 'LORA'"),
        ({"bias": "all"}, 'bias="all" is not supported; merge the adapter into its base with PEFT'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\] is not supported'),
        ({"rank_pattern": {"q_proj": 2}}, 'rank_pattern={"q_proj": 2} is not supported'),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base's own weights"),
        ({"r": 0}, "r=0: expected an integer of at least 1"),
        ({"r": 3}, r"lora_A.weight has shape \[4, 64\], but adapter_config.json says r=3"),
        ({"lora_alpha": "x"}, "lora_alpha='x': expected a number"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    make_adapter(tmp_path, CONFIG, "q_proj", **settings)
    with pytest.raises(UserError, match=message):
        read_peft(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "holds no adapter"),
        ([(f"{LAYER}.lora_A.weight", "F32", (4, 64))], "lora_B.weight is missing; the adapter is incomplete"),
        ([(f"{LAYER}.base_layer.weight", "F32", (4, 64))], "is not part of a LoRA adapter of linear layers"),
        ([("transformer.lora_A.weight", "F32", (4, 64))], "is not part of a LoRA adapter"),
        ([(f"{LAYER}.lora_A.weight", "I8", (4, 64))], "has dtype I8; supported: F64, F32, BF16, F16"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, entries: list, message: str) -> None:
    size = sum(4 * 64 * (1 if dtype == "I8" else 4) for _, dtype, _ in entries)
    write(tmp_path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, entries, bytes(size))
    with pytest.raises(UserError, match=message):
        read_peft(tmp_path)


def test_directories_without_an_adapter_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"is no directory with an {CONFIG_NAME}"):
        read_peft(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"has no {CONFIG_NAME}"):
        read_peft(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    with pytest.raises(UserError, match=f"has no {WEIGHTS_NAME}$"):
        read_peft(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="save it again with safe_serialization=True"):
        read_peft(tmp_path)


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("language", ["down_proj", "gate_proj", "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "k_proj", "o_proj", "out_proj", "q_proj", "up_proj", "v_proj"]),
        ("images", ["attn.proj", "linear_fc1", "linear_fc2", "qkv"]),  # patch_embed.proj is not one of them
        ("merger.linear_fc1", ["merger.linear_fc1"]),
        ("model.language_model.layers.0.mlp.up_proj", ["model.language_model.layers.0.mlp.up_proj"]),
        ("blocks.1.attn.qkv, in_proj_z", ["in_proj_z", "model.visual.blocks.1.attn.qkv"]),
    ],
)  # fmt: skip
def test_target_modules_name_exactly_the_targets(targets: str, written: list[str]) -> None:
    weight_map = family_of(CONFIG).weight_map(CONFIG)
    modules = targeted(weight_map, targets)
    assert target_modules(weight_map, modules) == written
    again = targeted(weight_map, ",".join(written))
    assert again == modules


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "lora.targets='q_prj' is no projection of the model; did you mean 'q_proj'"),
        ("q_proj,lm_head", "'lm_head' is no projection of the model\n  known: language, images, gate_proj, up_proj"),
        ("embed_tokens", "attn.qkv, attn.proj, mlp.linear_fc1"),
        (" , ", "lora.targets is empty"),
    ],
)
def test_unknown_targets_are_named(targets: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        targeted(family_of(CONFIG).weight_map(CONFIG), targets)
    assert message in str(caught.value)
