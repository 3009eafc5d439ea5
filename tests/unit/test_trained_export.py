"""Exports of checkpoints whose weights were trained, in the precision that they had before or in another: no rounding goes unsaid."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mimo_jobs import cli, console
from mimo_jobs.checkpoint.manifest import PARITY_NAME, read_manifest, write_manifest
from mimo_jobs.conversion.carried import Carried, exported_digests
from mimo_jobs.conversion.preflight import as_layout, check_export, export_args
from mimo_jobs.errors import UserError
from mimo_jobs.parallel.world import World
from mimo_jobs.weights.safetensors_io import INDEX_NAME, open_hf
from tests.conversion_ranks import convert
from tests.hf_files import config_of, entries_of, make_hf

ONE = {"language": {}, "images": {}, "world_size": 1}
APART = {"language": {"tp": 2}, "images": {"tp": 1}}
STAGES = {"language": {"tp": 1, "pp": 3}, "images": {"tp": 2}}
WIDE = [n for n, dtype, _ in entries_of(config_of()) if dtype == "BF16" and not n.startswith("mtp.")]


def trained(directory: Path, dtype: str, *, digests: bool = True) -> Path:
    """What `training.run` leaves: a checkpoint that was BF16, with other weights, in ``dtype``. They are those in ``after``."""
    entries = [(n, dtype if n in WIDE else d, s) for n, d, s in entries_of(config_of())]
    make_hf(directory / "before")
    make_hf(directory / "after", entries=entries, seed=1)
    for name, source in (("mimo", "before"), ("weights", "after")):
        convert(directory / f"r-{name}", "import", APART, model=str(directory / source), target=str(directory / name))
    sft, weights, layout = directory / "sft", directory / "weights", as_layout(ONE).resolve()
    sft.mkdir()
    for file in (*weights.glob("*.distcp"), weights / ".metadata", weights / "metadata.json"):
        shutil.copyfile(file, sft / file.name)
    files = {p.name: p.stat().st_size for p in sft.glob("*.distcp")}
    Carried(directory / "mimo", read_manifest(directory / "mimo")).attach(sft, files, layout, {"job": "sft"})
    if digests:
        found = exported_digests(sft, layout, World())
        assert found is not None
        write_manifest(dataclasses.replace(read_manifest(sft), digests=found), sft)
    return sft


def export(source: Path, target: Path, layout: dict = STAGES, **options) -> tuple[dict, dict]:
    """The summary and the certificate."""
    summary = convert(
        target.with_name(f"r-{target.name}"), "export", layout, source=str(source), target=str(target), **options
    )
    return summary, json.loads((target / PARITY_NAME).read_text())


def printed(summary: dict, capsys) -> str:
    console.make().print(console.export_table(summary))
    return " ".join(capsys.readouterr().out.split())


def test_weights_trained_in_the_dtype_they_had_are_equal(tmp_path, capsys):
    summary, parity = export(trained(tmp_path, "BF16"), tmp_path / "out")
    tensors = len(open_hf(tmp_path / "out").tensors)
    assert summary["parity"] == {"verified": True, "equal": tensors, "cast": 0, "unknown": 0} and summary["casts"] == {}
    assert parity["trained"] and parity["casts"] == {"import": {}, "export": {}}
    assert f"{tensors} (digests equal to the checkpoint's) cast none" in printed(summary, capsys)
    assert "from_pretrained" in cli.after_export(str(tmp_path / "out"), summary)
    assert (tmp_path / "out" / INDEX_NAME).read_bytes() == (tmp_path / "before" / INDEX_NAME).read_bytes()


def test_weights_trained_in_fp32_are_rounded_on_export_and_it_is_said_how_many(tmp_path, capsys):
    source = trained(tmp_path, "F32")
    assert any(f"{len(WIDE)} tensors were trained in a wider dtype" in n for n in notes(source, tmp_path / "out"))
    summary, parity = export(source, tmp_path / "out")
    assert summary["casts"] == {"F32 to BF16": len(WIDE)} and summary["parity"]["cast"] == parity["cast"] == len(WIDE)
    assert parity["casts"]["export"] == {n: ["F32", "BF16"] for n in WIDE}
    assert {n: t["status"] for n, t in parity["digests"].items() if n in WIDE} == dict.fromkeys(WIDE, "cast")
    assert f"cast {len(WIDE)} F32 to BF16 (rounded)" in printed(summary, capsys)
    for name in WIDE:
        with np.errstate(invalid="ignore"):
            held = np.frombuffer(content(tmp_path / "after", name), np.float32).astype(np.float64)
            written = np.frombuffer(content(tmp_path / "out", name), ml_dtypes.bfloat16).astype(np.float64)
        normal = np.isfinite(written) & (abs(written) > 1e-30)
        assert normal.any() and (abs(written[normal] / held[normal] - 1) <= 2**-8).all(), name
    assert (tmp_path / "out" / INDEX_NAME).read_bytes() == (tmp_path / "before" / INDEX_NAME).read_bytes()


def test_weights_trained_in_fp32_are_exported_as_they_are_with_dtype_fp32(tmp_path, capsys):
    source = trained(tmp_path, "F32")
    assert not any("rounded" in n for n in notes(source, tmp_path / "out", dtype="fp32"))
    summary, parity = export(source, tmp_path / "out", dtype="fp32")
    passed = {n: ["BF16", "F32"] for n in ("mtp.fc.weight", "mtp.norm.weight")}
    assert parity["casts"]["export"] == passed and summary["casts"] == {"BF16 to F32": 2}
    assert parity["unknown"] == 0 and parity["equal"] == parity["tensors"] - 2
    assert "2 BF16 to F32 passed" in printed(summary, capsys)  # exact: not called rounded
    assert {n for n in WIDE if content(tmp_path / "after", n) != content(tmp_path / "out", n)} == set()


def test_a_step_without_digests_is_exported_as_unknown_and_says_its_casts(tmp_path):
    """A checkpoint on the way carries no digests of its own: rounding it is no damage."""
    summary, parity = export(trained(tmp_path, "F32", digests=False), tmp_path / "out", APART)
    assert summary["casts"] == {"F32 to BF16": len(WIDE)} and parity["unknown"] == parity["tensors"]


def test_a_bit_that_rounding_would_hide_is_found(tmp_path):
    source = trained(tmp_path, "F32")
    name = next(n for n in WIDE if n.endswith("patch_embed.proj.bias"))
    first = content(tmp_path / "after", name)[:4]
    flipped = [flip(file, first) for file in source.glob("*.distcp")]
    assert flipped.count(True) == 1
    with pytest.raises(
        UserError, match=r"1 of \d+ tensors differ from what was trained, .*patch_embed.*nothing was published$"
    ):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def notes(source: Path, target: Path, **options) -> list[str]:
    return check_export(export_args(str(source), str(target), STAGES, **options)).notes


def content(directory: Path, name: str) -> bytes:
    tensor = open_hf(directory).tensors[name]
    return (directory / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


def flip(file: Path, value: bytes) -> bool:
    """Flip the lowest bit of an fp32 number, where the file holds it just once."""
    raw = bytearray(file.read_bytes())
    if raw.count(value) != 1:
        return False
    raw[raw.index(value)] ^= 1
    file.write_bytes(raw)
    return True
