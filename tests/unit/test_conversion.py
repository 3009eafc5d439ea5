"""Hugging Face -> MIMO -> Hugging Face, bit for bit, saved in one layout and exported in another."""

import filecmp
import json
import random
import shutil

import pytest

from mimo_jobs.checkpoint.manifest import PARITY_NAME
from mimo_jobs.conversion.preflight import preflight
from mimo_jobs.conversion.verify import verify_hf
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.weights.safetensors_io import open_hf
from tests.conversion_ranks import convert
from tests.hf_files import config_of, entries_of, make_hf

ONE = {"language": {}, "images": {}, "world_size": 1}
APART = {"language": {"tp": 2}, "images": {"tp": 1}}
STAGES = {"language": {"tp": 1, "pp": 3}, "images": {"tp": 2}}
TOGETHER = {"language": {"tp": 2, "rank_offset": 0}, "images": {"dp": 2, "rank_offset": 0}}
WIDE = {"language": {"tp": 2, "pp": 2, "dp": 2}, "images": {"tp": 4}}


def assert_same_directory(left, right, extra=(PARITY_NAME,)):
    compared = filecmp.dircmp(left, right)
    assert compared.left_only == [] and set(compared.right_only) == set(extra)
    for name in compared.common_files:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


@pytest.mark.parametrize("saved", [ONE, APART, STAGES, TOGETHER, WIDE])
@pytest.mark.parametrize("exported", [ONE, APART, STAGES, WIDE])
def test_the_export_is_the_source_byte_for_byte(tmp_path, saved, exported):
    source = make_hf(tmp_path / "hf")
    convert(tmp_path / "r1", "import", saved, model=str(source), target=str(tmp_path / "mimo"))
    shutil.move(source, tmp_path / "kept")  # the export needs nothing but the checkpoint
    summary = convert(tmp_path / "r2", "export", exported, source=str(tmp_path / "mimo"), target=str(source))
    assert_same_directory(tmp_path / "kept", source)
    tensors = len(open_hf(source).tensors)
    assert summary["parity"] == {"verified": True, "equal": tensors, "cast": 0, "unknown": 0}
    assert sum(summary["bytes_per_rank"]) == summary["bytes"]


def random_config(rng: random.Random) -> dict:
    kv, key_heads = rng.choice([2, 4]), rng.choice([2, 4])
    return config_of(
        layers=rng.randint(1, 9), hidden=rng.choice([32, 40, 72]), ffn=rng.choice([16, 48, 100]) * 2, kv_heads=kv,
        heads=kv * rng.randint(1, 4), head_dim=rng.choice([8, 16]), key_heads=key_heads, value_heads=key_heads * rng.randint(1, 4),
        vocab=rng.randint(50, 400), tied=rng.random() < 0.5, depth=rng.randint(1, 4), v_heads=rng.choice([2, 4, 8]),
        v_hidden=rng.choice([32, 64]), v_ffn=rng.choice([40, 80]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_other_sizes_shard_counts_and_layouts(tmp_path, seed):
    rng = random.Random(seed)
    config = random_config(rng)
    source = make_hf(
        tmp_path / "hf", config, shards=rng.randint(1, 6), seed=seed, mtp=rng.random() < 0.7, single=rng.random() < 0.2
    )

    def layout():
        language = {"tp": rng.choice([1, 2]), "pp": rng.randint(1, min(3, config["text_config"]["num_hidden_layers"]))}
        return {"language": language, "images": {"tp": rng.choice([1, 2])}}

    convert(tmp_path / "r1", "import", layout(), model=str(source), target=str(tmp_path / "mimo"))
    convert(tmp_path / "r2", "export", layout(), source=str(tmp_path / "mimo"), target=str(tmp_path / "out"))
    assert_same_directory(source, tmp_path / "out")
    certificate = verify_hf(source, tmp_path / "out")
    assert certificate["equal"] and certificate["same_metadata"] and certificate["same_files"]


def test_a_tied_head_that_is_in_the_files_comes_back_and_must_be_the_embedding(tmp_path):
    config = config_of(tied=True)
    embed = next(e for e in entries_of(config) if e[0].endswith("embed_tokens.weight"))
    entries = [*entries_of(config), ("lm_head.weight", embed[1], embed[2])]
    source = make_hf(tmp_path / "hf", config, entries=entries, single=True)
    with pytest.raises(UserError, match=r"lm_head\.weight is tied to .*embed_tokens.*other values"):
        convert(tmp_path / "r0", "import", APART, model=str(source), target=str(tmp_path / "mimo"))
    assert sorted(p.name for p in tmp_path.iterdir() if "mimo" in p.name) == []
    tensors = open_hf(source).tensors
    raw = bytearray((source / "model.safetensors").read_bytes())
    a, b = tensors["lm_head.weight"], tensors[embed[0]]
    raw[a.offset : a.offset + a.nbytes] = raw[b.offset : b.offset + b.nbytes]
    (source / "model.safetensors").write_bytes(raw)
    convert(tmp_path / "r1", "import", APART, model=str(source), target=str(tmp_path / "mimo"))
    convert(tmp_path / "r2", "export", STAGES, source=str(tmp_path / "mimo"), target=str(tmp_path / "out"))
    assert_same_directory(source, tmp_path / "out")
    cast = {"target": str(tmp_path / "wide"), "dtype": "fp32"}
    convert(tmp_path / "r3", "export", STAGES, source=str(tmp_path / "mimo"), **cast)
    tensors = open_hf(tmp_path / "wide").tensors
    assert tensors["lm_head.weight"].dtype == tensors[embed[0]].dtype == "F32"


@pytest.mark.parametrize("seed", range(4))
def test_every_tensor_keeps_its_own_dtype_also_where_several_are_stored_as_one(tmp_path, seed):
    """Hostile bits in BF16, F16 and F32, mixed at random over every tensor: gate F16 beside up F32, q BF16 beside k F16 ..."""
    rng, config = random.Random(seed), config_of()
    entries = [(n, rng.choice(["BF16", "F16", "F32"]) if d != "I64" else d, s) for n, d, s in entries_of(config)]
    source = make_hf(tmp_path / "hf", config, entries=entries, seed=seed)
    convert(tmp_path / "r1", "import", APART, model=str(source), target=str(tmp_path / "mimo"))
    summary = convert(tmp_path / "r2", "export", STAGES, source=str(tmp_path / "mimo"), target=str(tmp_path / "out"))
    assert_same_directory(source, tmp_path / "out")
    assert summary["parity"]["cast"] == summary["parity"]["unknown"] == 0


@pytest.mark.parametrize("when", ["import", "export"])
def test_mtp_can_be_dropped_and_is_reported(tmp_path, when):
    source = make_hf(tmp_path / "hf")
    drop = {"mtp": "drop"}
    first = convert(
        tmp_path / "r1",
        "import",
        APART,
        model=str(source),
        target=str(tmp_path / "m"),
        **(drop if when == "import" else {}),
    )
    second = convert(
        tmp_path / "r2",
        "export",
        APART,
        source=str(tmp_path / "m"),
        target=str(tmp_path / "o"),
        **(drop if when == "export" else {}),
    )
    assert first["dropped"] == (3 if when == "import" else 0) and second["dropped"] == 3
    certificate = verify_hf(source, tmp_path / "o")
    assert certificate["only_left"] == ["mtp.fc.weight", "mtp.norm.weight", "mtp.step"] and not certificate["different"]
    assert json.loads((tmp_path / "o/config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 0
    parity = json.loads((tmp_path / "o" / PARITY_NAME).read_text())
    assert parity["dropped"] == certificate["only_left"] and parity["index"]["names_equal_files"]


@pytest.mark.parametrize("when", ["import", "export"])
def test_an_explicit_dtype_casts_as_torch_does_and_says_so(tmp_path, when):
    import torch
    from safetensors.torch import load_file

    source = make_hf(tmp_path / "hf", single=True)
    cast = {"dtype": "float32"}
    convert(
        tmp_path / "r1",
        "import",
        APART,
        model=str(source),
        target=str(tmp_path / "m"),
        **(cast if when == "import" else {}),
    )
    convert(
        tmp_path / "r2",
        "export",
        STAGES,
        source=str(tmp_path / "m"),
        target=str(tmp_path / "o"),
        **(cast if when == "export" else {}),
    )
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "o/model.safetensors")
    assert list(open_hf(source).tensors) == list(open_hf(tmp_path / "o").tensors)
    for name, tensor in before.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert after[name].dtype == expected.dtype
        assert torch.equal(torch.nan_to_num(after[name], nan=7.0), torch.nan_to_num(expected, nan=7.0)), name
    parity = json.loads((tmp_path / "o" / PARITY_NAME).read_text())
    assert parity["casts"][when]["mtp.fc.weight"] == ["BF16", "F32"]
    assert not any(n.endswith(("A_log", "mtp.step")) for n in parity["casts"][when])
    assert json.loads((tmp_path / "o/config.json").read_text())["dtype"] == "float32"


def test_casting_down_rounds_to_nearest_even(tmp_path):
    import torch
    from safetensors.torch import load_file

    config = config_of(layers=1)
    entries = [(n, "F32" if d == "BF16" else d, s) for n, d, s in entries_of(config)]
    source = make_hf(tmp_path / "hf", config, entries=entries, single=True)
    convert(tmp_path / "r1", "import", APART, model=str(source), target=str(tmp_path / "m"), dtype="bf16")
    convert(tmp_path / "r2", "export", ONE, source=str(tmp_path / "m"), target=str(tmp_path / "o"))
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "o/model.safetensors")
    for name, tensor in before.items():
        if tensor.is_floating_point():
            assert torch.equal(torch.nan_to_num(after[name], nan=7.0), torch.nan_to_num(tensor.bfloat16(), nan=7.0)), (
                name
            )


def test_overwrite_replaces_only_when_asked(tmp_path):
    source = make_hf(tmp_path / "hf")
    target = tmp_path / "mimo"
    convert(tmp_path / "r1", "import", ONE, model=str(source), target=str(target))
    with pytest.raises(UserError, match=r"exists; .*overwrite=true"):
        convert(tmp_path / "r2", "import", ONE, model=str(source), target=str(target))
    before = (target / "mimo.json").stat().st_ino
    convert(tmp_path / "r3", "import", APART, model=str(source), target=str(target), overwrite=True)
    assert (target / "mimo.json").stat().st_ino != before
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("hf", "lie in one another"),
        ("hf/inside", "lie in one another"),
        (".", "lie in one another"),
        ("link", "is a symbolic link"),
        ("file", "is a file"),
        ("file/inside", "is a file"),
        ("home", "so it is no checkpoint"),
        ("project", "so it is no checkpoint"),
        ("n" * 240, "too long"),
    ],
)
def test_overwrite_never_touches_what_is_no_checkpoint(tmp_path, target, said):
    source = make_hf(tmp_path / "hf")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    before = sorted(p for p in tmp_path.rglob("*"))
    arguments = {"model": source, "target": tmp_path / target, "layout": ONE, "overwrite": True}
    with pytest.raises(UserError, match=said):
        preflight("import_hf", arguments)
    with pytest.raises(UserError, match=said):
        convert(
            tmp_path.parent / f"{tmp_path.name}-r",
            "import",
            ONE,
            model=source,
            target=tmp_path / target,
            overwrite=True,
        )
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_a_flipped_bit_in_the_checkpoint_is_found_and_nothing_is_published(tmp_path, dtype):
    source = make_hf(tmp_path / "hf")
    convert(tmp_path / "r1", "import", APART, model=str(source), target=str(tmp_path / "m"))
    file = tmp_path / "m/__1_0.distcp"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"1 of \d+ tensors differ from what was imported"):
        convert(tmp_path / "r2", "export", APART, source=str(tmp_path / "m"), target=str(tmp_path / "o"), dtype=dtype)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith((".o", "o"))] == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "mimo.json").unlink(), "has no mimo.json: not a finished MIMO checkpoint"),
        (lambda m: (m / "__0_0.distcp").unlink(), "__0_0.distcp: is missing"),
        (
            lambda m: (m / "__0_0.distcp").write_bytes((m / "__0_0.distcp").read_bytes()[:-9]),
            "the checkpoint is damaged",
        ),
        (
            lambda m: (m / ".metadata").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
            "refers to os.system",
        ),
        (lambda m: (m / ".metadata").write_bytes(b"junk"), ".metadata: damaged"),
        (lambda m: (m / ".metadata").unlink(), "not a torch_dist checkpoint"),
        (
            lambda m: [p.unlink() for p in (m / "headers").iterdir()],
            "headers/model-00001-of-00003.safetensors.json: missing",
        ),
        (lambda m: (m / "mimo.json").write_text("{"), "mimo.json: damaged"),
        (lambda m: (m / "mimo.json").write_text("[" * 100_000), "mimo.json: damaged"),
        (lambda m: (m / "mimo.json").write_text('{"format": 1, "files": []}'), "mimo.json: damaged: files is list"),
        (lambda m: (m / "hf/config.json").write_text("{"), "hf/config.json: is not what the import left"),
        (lambda m: (m / "hf/tokenizer.json").write_text(""), "hf/tokenizer.json: is not what the import left"),
        (lambda m: (m / "hf/chat_template.jinja").unlink(), "hf/chat_template.jinja: missing"),
        (lambda m: (m / "hf/model.safetensors.index.json").unlink(), "index.json: missing"),
        (
            lambda m: (m / "headers/model-00002-of-00003.safetensors.json").unlink(),
            "00002-of-00003.safetensors.json: missing",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage, said):
    source = make_hf(tmp_path / "hf")
    convert(tmp_path / "r1", "import", APART, model=str(source), target=str(tmp_path / "m"))
    damage(tmp_path / "m")
    with pytest.raises(UserError) as error:
        convert(tmp_path / "r2", "export", ONE, source=str(tmp_path / "m"), target=str(tmp_path / "o"))
    assert said in str(error.value)
    assert not (tmp_path / "o").exists()


def test_wrong_choices_are_usage_errors(tmp_path):
    source = make_hf(tmp_path / "hf")
    for arguments, said in (({"mtp": "maybe"}, "mtp='maybe'"), ({"dtype": "int8"}, "dtype='int8'")):
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "r", "import", ONE, model=str(source), target=str(tmp_path / "m"), **arguments)
    with pytest.raises(UsageError, match="tp=8 does not divide num_attention_heads"):
        preflight("import_hf", {"model": source, "target": tmp_path / "m", "layout": {"language": {"tp": 8}}})


def test_preflight_says_what_the_job_then_does(tmp_path):
    source = make_hf(tmp_path / "hf")
    planned = preflight("import_hf", {"model": source, "target": tmp_path / "m", "layout": APART})
    done = convert(tmp_path / "r1", "import", APART, model=str(source), target=str(tmp_path / "m"))
    assert planned.bytes_per_rank == done["bytes_per_rank"] and planned.tensors == done["tensors"]
    written = [p.stat().st_size for p in (tmp_path / "m").iterdir() if p.suffix in (".distcp", ".safetensors")]
    assert planned.disk_needed == sum(written)
    planned = preflight(
        "export_hf", {"source": tmp_path / "m", "target": tmp_path / "o", "layout": WIDE, "mtp": "drop"}
    )
    done = convert(tmp_path / "r2", "export", WIDE, source=str(tmp_path / "m"), target=str(tmp_path / "o"), mtp="drop")
    assert planned.bytes_per_rank == done["bytes_per_rank"]
    assert planned.dropped == ["mtp.fc.weight", "mtp.norm.weight", "mtp.step"]
    assert planned.disk_needed == sum(p.stat().st_size for p in (tmp_path / "o").glob("*.safetensors"))


def test_a_disk_that_is_too_small_is_known_before_the_job(tmp_path, monkeypatch):
    source = make_hf(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"m: needs 0\.735 MB, but .* has 0\.001 MB free"):
        preflight("import_hf", {"model": source, "target": tmp_path / "m", "layout": APART})
