"""The command line from outside: what it says, with which exit code, how fast, and what it does not import."""

import ast
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mimo_jobs import cli

NEMO_RUN = Path(sys.executable).parent / "nemo-run"
IMPORT = "recipes.qwen35vl_import"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(NEMO_RUN), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "recipes.quickstart"),
        (["--help"], "recipes.qwen35vl_import"),
        (["-h"], "--dryrun"),
        (["recipes"], "MIMO to Hugging Face"),
        (["recipes", "--help"], "recipes.qwen35vl_export"),
        (["verify", "--help"], "Exit code 1 when they differ"),
        ([IMPORT, "--help"], "layout.language and layout.images"),
        (["recipes", "qwen35vl_export", "--help"], "restore them, or drop them"),
        (["recipes.quickstart", "-h"], "workdir"),
        (["recipes.qwen35vl_sft", "-h"], "\noptimizer:\n  .lr "),
        (["recipes.qwen35vl_lora", "-h"], "comma-separated: endings"),
        (["recipes.qwen35vl_pipeline", "-h"], "\nlora:\n  .rank "),
    ],
)
def test_help_lists_what_there_is(arguments, said, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert said in out
    assert max(map(len, out.splitlines())) <= 120


SLURM = [IMPORT, "model=a", "target=b", "--executor", "slurm"]
USAGE_ERRORS = [
    (["--halp"], ["unknown option --halp", "did you mean '--help'"]),
    (["verfy", "a", "b"], ["unknown command 'verfy'", "did you mean 'verify'"]),
    (["qwen35vl_import"], ["did you mean 'recipes.qwen35vl_import'"]),
    (["recipes.qwen35vl_imprt"], ["unknown recipe 'qwen35vl_imprt'", "did you mean 'recipes.qwen35vl_import'"]),
    (["recipes.zzz"], ["unknown recipe 'zzz'", "recipes.quickstart"]),
    ([IMPORT], ["needs model=... and target=...", "for example", "nemo-run recipes.qwen35vl_import model="]),
    ([IMPORT, "model=x"], ["needs target=..."]),
    ([IMPORT, "--dry"], ["unknown option --dry", "did you mean '--dryrun'"]),
    ([IMPORT, "--executor"], ["--executor needs a value"]),
    ([IMPORT, "--executor", "--dryrun"], ["--executor needs a value"]),
    ([IMPORT, "model=a", "target=b", "--executor", "slurm:nope"], ["no [slurm.nope]", "executors.toml"]),
    ([IMPORT, "--executor", "slurm:"], ["unknown executor 'slurm:'", "slurm:NAME"]),
    ([IMPORT, "--executor", "local:x"], ["unknown executor 'local:x'"]),
    ([IMPORT, "model=a", "target=b", "executor.partition=x"], ["--executor local has no such field"]),
    ([*SLURM, "executor.partiton=x"], ["did you mean 'executor.partition'"]),
    ([*SLURM, "executor.gpus_per_node=0"], ["executor.gpus_per_node=0", "at least 1"]),
    ([*SLURM, "executor.gpus_per_node=eight"], ["executor.gpus_per_node='eight'", "expected an integer"]),
    ([*SLURM, "executor.time=1h"], ["executor.time='1h'", "HH:MM:SS"]),
    ([*SLURM, "executor.partition=a;b"], ["executor.partition='a;b'", "letters, digits"]),
    ([*SLURM, "executor.qos=$(id)"], ["executor.qos='$(id)'"]),
    ([*SLURM, "executor.sbatch=--wrap=id"], ["--wrap is set by the launcher"]),
    ([*SLURM, "executor.environment.A-B=x"], ["'A-B' is no name of an environment variable"]),
    ([*SLURM, "executor.environment=x"], ["executor.environment.NAME=value"]),
    ([*SLURM, "on_finish='x"], ["on_finish", "not run by a shell"]),
    (["recipes.qwen35vl_pipeline", "model=x"], ["needs workdir=..."]),
    (["recipes.qwen35vl_pipeline", "model=x", "workdir=y", "exprt.dtype=bf16"], ["did you mean 'export.dtype'"]),
    (
        ["recipes.qwen35vl_pipeline", "model=x", "workdir=y", "export.layout.language.rank_offset=1"],
        ["export: ", "rank_offset=0"],
    ),
    (["status", "a", "b"], ["status takes 0 or 1 arguments", "usage:"]),
    (["cancel"], ["cancel takes 1 argument", "usage:"]),
    (["stats"], ["did you mean 'status'"]),
    ([IMPORT, "--executor=lokal"], ["unknown executor 'lokal'", "did you mean 'local'"]),
    ([IMPORT, "--json=1"], ["--json takes no value"]),
    ([IMPORT, "modl=x"], ["unknown field 'modl'", "did you mean 'model'"]),
    ([IMPORT, "layout.language.tpp=2"], ["did you mean 'layout.language.tp'"]),
    ([IMPORT, "layout.image.tp=2"], ["did you mean 'layout.images.tp'"]),
    ([IMPORT, "layout.language=2"], ["layout.language is a group of fields", "layout.language.tp"]),
    ([IMPORT, "target.x=2"], ["target has no fields of its own"]),
    ([IMPORT, "executor=local"], ["did you mean '--executor NAME'"]),
    ([IMPORT, "layout.language.tp=two"], ["layout.language.tp='two'", "expected integer"]),
    ([IMPORT, "layout.language.tp=2.0"], ["layout.language.tp='2.0'", "expected integer"]),
    ([IMPORT, "layout.language.tp="], ["layout.language.tp=''", "expected integer"]),
    ([IMPORT, "layout.language.tp=+-2"], ["layout.language.tp='+-2'", "expected integer"]),
    ([IMPORT, "layout.language.tp=" + "9" * 5000], ["expected integer"]),
    ([IMPORT, "layout.language.tp=-1"], ["layout.language.tp=-1: expected an integer of at least 1"]),
    ([IMPORT, "layout.images.etp=0"], ["layout.images.etp=0: expected an integer of at least 1"]),
    ([IMPORT, "layout.images.rank_offset=-1"], ["layout.images.rank_offset=-1: expected an integer of at least 0"]),
    ([IMPORT, "layout.world_size=0"], ["layout.world_size=0: expected an integer of at least 1"]),
    ([IMPORT, "overwrite=maybe"], ["overwrite='maybe'", "true or false"]),
    ([IMPORT, "mtp=kep"], ["mtp='kep'", "did you mean 'keep'"]),
    ([IMPORT, "dtype=bfloat"], ["dtype='bfloat'", "did you mean 'bfloat16'"]),
    ([IMPORT, "target="], ["target=''", "expected directory"]),
    ([IMPORT, "target=a", "target=b"], ["target is given twice"]),
    ([IMPORT, "/some/model"], ["unexpected argument '/some/model'", "name=value"]),
    ([IMPORT, "=x"], ["unexpected argument '=x'"]),
    ([IMPORT, "world=3"], ["unknown field 'world'"]),
    (["recipes.quickstart", "target=x"], ["unknown field 'target'", "workdir"]),
    (["verify", "a"], ["verify needs two directories, got 1", "usage:"]),
    (["verify", "a", "b", "--jsn"], ["did you mean '--json'"]),
]


@pytest.mark.parametrize(
    ("arguments", "said"), USAGE_ERRORS, ids=lambda v: " ".join(v)[:80] if isinstance(v, list) else ""
)
def test_a_wrong_command_line_exits_2_and_names_what_is_wrong(arguments, said, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nemo-run: ")
    for words in said:
        assert words in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "/no/a", "/no/b"], "/no/a: no such directory"),
        ([IMPORT, "model=/no/such", "target=/tmp/x"], "model=/no/such: no such directory"),
    ],
)
def test_what_is_not_there_exits_1(arguments, said, capsys):
    assert cli.main(arguments) == 1
    assert said in capsys.readouterr().err


def test_a_hub_id_that_cannot_be_had_says_what_to_do(tmp_path):
    done = run(IMPORT, "model=Qwen/Qwen3.5-0.8B", "target=/tmp/x", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "hf download Qwen/Qwen3.5-0.8B --local-dir DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_layout_that_does_not_tile_exits_2(tmp_path, capsys):
    arguments = [IMPORT, f"model={tmp_path}", "target=/tmp/x", "layout.language.rank_offset=1"]
    assert cli.main(arguments) == 2
    assert "layout.language.rank_offset=0" in capsys.readouterr().err


def test_a_defect_is_one_line_and_its_traceback_is_there_on_request(monkeypatch, capsys):
    def broken() -> int:
        raise LookupError("no such\nthing")

    monkeypatch.delenv("MIMO_JOBS_DEBUG", raising=False)
    assert cli.guarded(broken) == 1
    said = capsys.readouterr().err
    assert said == "nemo-run: LookupError: no such thing (a defect; set MIMO_JOBS_DEBUG=1 for the traceback)\n"
    monkeypatch.setenv("MIMO_JOBS_DEBUG", "1")
    with pytest.raises(LookupError):
        cli.guarded(broken)


# Twice or more what a quiet machine takes (0.07 s, and 0.5 s where Fiddle is needed), for machines that are not quiet.
@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        (["--help"], 1.0),
        ([IMPORT, "layout.language.tpp=2"], 1.0),
        ([IMPORT], 1.0),
        (["recipes.x"], 1.0),
        ([IMPORT, "-h"], 3.0),
    ],
)
def test_help_and_usage_errors_answer_at_once(arguments, seconds):
    def once() -> float:
        started = time.monotonic()
        done = run(*arguments)
        assert "Traceback" not in done.stderr
        return time.monotonic() - started

    assert min(once() for _ in range(3)) < seconds


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["torch", "nemo_run", "fiddle", "numpy", "rich"]),
        ([IMPORT, "layout.language.tpp=2"], ["torch", "nemo_run", "fiddle", "numpy", "rich"]),
        ([IMPORT, "layout.language.tp=-1"], ["torch", "nemo_run", "fiddle", "numpy", "rich"]),
        ([IMPORT], ["torch", "nemo_run", "fiddle", "numpy", "rich"]),
        ([IMPORT, "--help"], ["torch", "nemo_run", "transformers"]),
        (["recipes.quickstart", "--dryrun"], ["torch", "nemo_run", "transformers"]),
        (["verify", "DIR", "DIR"], ["torch", "nemo_run", "transformers", "fiddle"]),
        ([IMPORT, "model=DIR", "target=DIR/new", "--dryrun"], ["torch", "nemo_run", "transformers"]),
    ],
)
def test_the_submit_side_does_not_import_what_it_does_not_need(arguments, absent, checkpoint):
    code = "import sys; from mimo_jobs import cli; cli.main(sys.argv[1:]); print('IMPORTED', *sys.modules)"
    words = [a.replace("DIR", str(checkpoint)) for a in arguments]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=120)
    imported = set(done.stdout.rpartition("IMPORTED ")[2].split())
    assert "Traceback" not in done.stderr
    assert imported.isdisjoint(absent)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("model") / "tiny"
    code = "import sys; from mimo_jobs import jobs; jobs.make_tiny(target=sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, timeout=300, capture_output=True)
    return target


@pytest.mark.speed
def test_a_dry_run_shows_recipe_ranks_plan_and_command(checkpoint, tmp_path):
    layout = ["layout.language.tp=2", "layout.images.tp=1"]
    started = time.monotonic()
    done = run(
        IMPORT,
        f"model={checkpoint}",
        f"target={tmp_path}/out",
        *layout,
        "--dryrun",
        MIMO_JOBS_HOME=str(tmp_path / "home"),
    )
    assert time.monotonic() - started < 6  # 0.8 s on a quiet machine
    assert done.returncode == 0, done.stderr
    for words in (
        "layout.images.rank_offset    2",
        "language   0-1    0       2   1   1",
        "[L0] [L1] [I2] [ - ]",
        "5 of 8 GPUs idle",
        "tensors",
        "passed through",
        "--nproc-per-node 3",
        "mimo_jobs.worker",
    ):
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_a_dry_run_as_json_is_json_alone(checkpoint, tmp_path):
    done = run(
        IMPORT,
        f"model={checkpoint}",
        f"target={tmp_path}/out",
        "--dryrun",
        "--json",
        "layout.language.tp=2",
        "layout.images.tp=2",
    )
    data = json.loads(done.stdout)
    assert data["steps"][0]["layout"]["images"]["rank_offset"] == 2
    assert data["steps"][0]["commands"][0]["ranks"] == [0, 1, 2, 3]
    assert data["plan"]["tensors"] > 90


def test_verify_of_equal_and_unequal_checkpoints(checkpoint, tmp_path):
    equal = run("verify", str(checkpoint), str(checkpoint))
    assert equal.returncode == 0, equal.stderr
    assert "tensors bit-exact" in equal.stdout.splitlines()[-1]
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", checkpoint, other], check=True)
    shard = sorted(other.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    unequal = run("verify", str(checkpoint), str(other), "--json")
    assert unequal.returncode == 1
    json.loads(unequal.stdout)
    assert "Traceback" not in unequal.stderr


AS_IMPORTED = {"trained": False, "casts": {}, "dropped": 0, "parity": {"equal": 3}}


@pytest.mark.parametrize(
    ("made", "compared"),
    [
        ({}, True),
        ({"trained": True}, False),
        ({"casts": {"BF16 to F32": 3}}, False),
        ({"dropped": 1}, False),
        ({"parity": {"equal": 2, "merged": 1}}, False),
    ],
)
def test_an_export_is_compared_with_its_original_only_where_it_has_the_same_bytes(made, compared):
    place = '/data/it\'s "here"'
    words = shlex.split(cli.after_export(place, AS_IMPORTED | made))
    if compared:
        assert words == ["nemo-run", "verify", "ORIGINAL_DIR", place]
    else:
        assert words[:2] == ["python", "-c"]
        assert ast.literal_eval(ast.unparse(ast.parse(words[2]).body[1].value.args[0])) == place


@pytest.mark.parametrize("more", [[], ["--dryrun"]])
def test_a_secret_that_was_typed_is_neither_repeated_nor_written(tmp_path, more, monkeypatch, capsys):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    (tmp_path / "model").mkdir()
    words = [f"source={tmp_path}/model", "data=a/b", f"target={tmp_path}/t", "logging.mlflow=https://me:hunter2@host"]
    assert cli.main(["recipes.qwen35vl_sft", *words, "--executor", "local", *more]) == 2
    said = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in said.err and "hunter2" not in said.out + said.err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
