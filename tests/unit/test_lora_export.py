"""Merged exports: exactly the targeted tensors change, by the same bits in every layout; the rest is what was imported."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mimo_jobs.checkpoint.manifest import PARITY_NAME, read_manifest
from mimo_jobs.checkpoint.peft_dir import WEIGHTS_NAME, base_digest
from mimo_jobs.conversion import identity
from mimo_jobs.errors import UserError
from mimo_jobs.weights.safetensors_io import open_hf
from tests.adapter_files import make_adapter
from tests.conversion_ranks import convert
from tests.hf_files import config_of, entries_of, make_hf

ONE = {"world_size": 1}
TP2 = {"language": {"tp": 2}, "images": {"tp": 2}, "world_size": 4}
PP2 = {"language": {"pp": 2, "dp": 2}, "images": {}, "world_size": 5}
CONFIG = config_of()
TARGETS = "q_proj,v_proj,in_proj_qkv,in_proj_b,up_proj,down_proj,images"
NUMPY = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source of finite values, and its checkpoint."""
    root = tmp_path_factory.mktemp("imported")
    entries = [e for e in entries_of(CONFIG) if e[1] != "I64"]
    source = make_hf(root / "hf", CONFIG, entries=entries)
    rng = np.random.default_rng(1)
    for tensor in open_hf(source).tensors.values():
        values = (rng.standard_normal(tensor.shape) * 0.05).astype(NUMPY[tensor.dtype])
        with open(source / tensor.file, "r+b") as file:
            file.seek(tensor.offset)
            file.write(values.tobytes())
    convert(root / "r", "import", TP2, model=str(source), target=str(root / "mimo"))
    return source, root / "mimo"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, info in open_hf(directory).tensors.items():
        raw = (directory / info.file).read_bytes()[info.offset : info.offset + info.nbytes]
        found[name] = np.frombuffer(raw, NUMPY[info.dtype]).reshape(info.shape)
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_every_layout_writes_the_same_bits_and_only_the_targets_change(imported, tmp_path: Path, rslora: bool) -> None:
    source, mimo = imported
    values = make_adapter(tmp_path / "adapter", CONFIG, TARGETS, use_rslora=rslora)
    for name, layout in (("one", ONE), ("tp2", TP2), ("pp2", PP2)):
        made = convert(
            tmp_path / f"r{name}", "export", layout, source=str(mimo), target=str(tmp_path / name), adapter=str(tmp_path / "adapter")
        )  # fmt: skip
    before, (one, tp2, pp2) = tensors(source), (tensors(tmp_path / n) for n in ("one", "tp2", "pp2"))
    targeted = {n.removesuffix(".lora_A") + ".weight" for n in values if n.endswith(".lora_A")}
    assert {n for n in before if not np.array_equal(before[n], one[n])} == targeted
    scale = 6 / (2.0 if rslora else 4)
    for name, wrote in one.items():
        assert wrote.tobytes() == tp2[name].tobytes() == pp2[name].tobytes(), name
        if name in targeted:
            module = name.removesuffix(".weight")
            update = values[f"{module}.lora_B"].astype(np.float64) @ values[f"{module}.lora_A"] * scale
            exact = before[name].astype(np.float64) + update
            # one rounding to bf16, of a sum whose fp32 error is far below it
            assert np.all(np.abs(wrote.astype(np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-6), name
    certificate = json.loads((tmp_path / "one" / PARITY_NAME).read_text())
    assert made["parity"]["merged"] == certificate["merged"] == len(targeted)
    assert certificate["equal"] == len(before) - len(targeted) and not certificate["different"]
    assert {n for n, d in certificate["digests"].items() if d["status"] == "merged"} == targeted
    assert certificate["adapter"]["scale"] == scale and certificate["adapter"]["modules"] == len(targeted)


def test_a_merge_and_a_cast_round_once(imported, tmp_path: Path) -> None:
    source, mimo = imported
    values = make_adapter(tmp_path / "adapter", CONFIG, "language", rank=3)
    convert(
        tmp_path / "r", "export", ONE, source=str(mimo), target=str(tmp_path / "out"), adapter=str(tmp_path / "adapter"), dtype="fp32"
    )  # fmt: skip
    before, after = tensors(source), tensors(tmp_path / "out")
    name = "model.language_model.layers.3.self_attn.q_proj"
    exact = before[f"{name}.weight"].astype(np.float64) + values[f"{name}.lora_B"] @ values[f"{name}.lora_A"] * 2.0
    assert after[f"{name}.weight"].dtype == np.float32 and np.abs(after[f"{name}.weight"] - exact).max() < 1e-6


def test_a_damaged_base_is_not_published(imported, tmp_path: Path) -> None:
    import shutil

    source, mimo = imported
    shutil.copytree(mimo, tmp_path / "mimo")
    make_adapter(tmp_path / "adapter", CONFIG, "language,images")
    file = max(tmp_path.glob("mimo/__*.distcp"), key=lambda p: p.stat().st_size)
    raw = bytearray(file.read_bytes())
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    first = tensors(source)[name][:, :48].copy().tobytes()[:64]  # tp rank 0 holds the left half of each row
    at = next((i for i in [raw.find(first)] if i >= 0), None)
    if at is None:
        file = next(p for p in tmp_path.glob("mimo/__*.distcp") if first in p.read_bytes())
        raw = bytearray(file.read_bytes())
        at = raw.find(first)
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="1 of .* tensors differ from what was imported, e.g. " + name):
        convert(
            tmp_path / "r", "export", ONE, source=str(tmp_path / "mimo"), target=str(tmp_path / "out"),
            adapter=str(tmp_path / "adapter"),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_bases_are_refused(imported, tmp_path: Path) -> None:
    _, mimo = imported
    own = base_digest(read_manifest(mimo))
    make_adapter(tmp_path / "right", CONFIG, "q_proj", base=own)
    make_adapter(tmp_path / "trained elsewhere", CONFIG, "q_proj", base="0" * 64)
    make_adapter(tmp_path / "wider", config_of(hidden=80), "q_proj")
    make_adapter(tmp_path / "deeper", config_of(layers=9), "q_proj")
    messages = {
        "trained elsewhere": "was trained on weights other than those of",
        "wider": r"shape \[128, 80\], but that of .* is \[128, 64\]",
        "deeper": r"layers\.7\.self_attn\.q_proj, which is no projection",
        "nowhere": "is no directory with an adapter_config.json",
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            convert(
                tmp_path / "r", "export", ONE, source=str(mimo), target=str(tmp_path / "out"), adapter=str(tmp_path / name)
            )  # fmt: skip
    convert(
        tmp_path / "r", "export", ONE, source=str(mimo), target=str(tmp_path / "out"), adapter=str(tmp_path / "right")
    )


def test_the_adapter_is_part_of_the_identity(imported, tmp_path: Path) -> None:
    _, mimo = imported
    make_adapter(tmp_path / "a", CONFIG, "q_proj")
    make_adapter(tmp_path / "b", CONFIG, "q_proj", seed=1)
    convert(tmp_path / "r", "export", ONE, source=str(mimo), target=str(tmp_path / "out"), adapter=str(tmp_path / "a"))
    arguments = dict(source=str(mimo), target=str(tmp_path / "out"), dtype=None, mtp="keep", verify=True)
    assert identity.is_complete("export_hf", arguments | {"adapter": str(tmp_path / "a")})
    for other in (str(tmp_path / "b"), None):
        assert not identity.is_complete("export_hf", arguments | {"adapter": other})
        now = identity.expected("export_hf", arguments | {"adapter": other}, {})
        before = identity.recorded("export_hf", tmp_path / "out")
        assert now is not None and before is not None
        assert "the adapter" in identity.difference(before, now)
    chained = identity.expected("export_hf", arguments | {"adapter": "to/come"}, {"to/come": {"job": "lora"}})
    assert chained is not None and chained["adapter"] == identity.digest({"job": "lora"})


def test_the_weights_of_an_adapter_are_not_needed_to_know_its_revision(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", CONFIG, "q_proj")
    before = identity.of_adapter(tmp_path / "a")
    assert before == identity.of_adapter(tmp_path / "a")
    raw = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    (tmp_path / "a" / WEIGHTS_NAME).write_bytes(raw[:-1] + b"x")
    assert before != identity.of_adapter(tmp_path / "a")
