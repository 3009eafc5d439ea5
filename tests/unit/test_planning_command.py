"""``nemo-run plan`` from outside: what it refuses, what it prints, and that the command it ends with runs."""

import dataclasses
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mimo_jobs import cli, jobs
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.planning import command, show
from mimo_jobs.planning.rates import NUMBERS
from mimo_jobs.planning.search import search
from tests.hf_files import config_of, make_hf
from tests.unit.test_planning import LORA, SFT, asked, models, planned

__all__ = ["models"]  # a fixture


def typed(printed: str) -> list[str]:
    """The command at the end of what is printed, as a shell reads it."""
    return shlex.split(printed.partition("\nnext ")[2].partition("\n")[2].replace("\\\n", ""))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "plan needs a recipe first"),
        (["recipes.qwen35vl_sfft", "model=x"], "did you mean 'recipes.qwen35vl_sft'"),
        (["qwen35vl_sft", "model=x"], "did you mean 'recipes.qwen35vl_sft'"),
        (["recipes.qwen35vl_import", "model=x"], "trains nothing by itself"),
        ([f"recipes.{SFT}", "gpus=8"], "plan needs model=..."),
        ([f"recipes.{SFT}", "model=M"], "plan needs gpus=..."),
        (["model=M", "gpus=8"], "plan needs a recipe first"),
        ([f"recipes.{SFT}", "M", "gpus=8"], "unexpected argument"),
        ([f"recipes.{SFT}", "model=M", "gpus=0"], "gpus=0: expected an integer from 1 to 16384"),
        ([f"recipes.{SFT}", "model=M", "gpus=eight"], "gpus='eight': expected integer"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "tokns=3"], "unknown field 'tokns'; did you mean 'tokens'"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "layout.language.tpp=3"], "did you mean 'layout.language.tp'"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "optimizer.lr=3"], "unknown field 'optimizer.lr'"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "dataset.max_length=3"], "did you mean 'max_length'"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "lora.rank=3"], "unknown field 'lora.rank'"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "tokens=5000"], "tokens=5000: the mean is above max_length=4096"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "tokens=0"], "tokens=0: expected an integer from 1 to 4096"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "image_tokens=3000"], "image_tokens=3000: expected an integer from 0 to 2048"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "loss_tokens=-1"], "loss_tokens=-1: expected an integer from 1 to 2048"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "global_batch_size=0"], "global_batch_size=0: expected an integer from 1"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "gpu=V100"], "gpu=V100: how fast it is is not known"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "gpu_memory=0"], "gpu_memory=0: expected at least 1"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "layout.world_size=9"], "layout.world_size=9: there are gpus=8"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "layout.language.tp=3"], "layout.language.tp=3 does not divide"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "layout.language.tp=16"], "no layout of at most gpus=8 GPUs has layout.language.tp=16"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "layout.language.cp=2"], "layout.language.cp=2: training does not have it"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "micro_batch_size=3"], "global_batch_size=32 is no multiple of micro_batch_size=3"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "micro_batch_size=0"], "micro_batch_size=0: expected an integer of at least 1"),
        ([f"recipes.{LORA}", "model=M", "gpus=8", "lora.rank=0"], "lora.rank=0: expected an integer of at least 1"),
        ([f"recipes.{LORA}", "model=M", "gpus=8", "lora.targets=q_prj"], "did you mean 'q_proj'"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "executor.gpu=H200"], "--executor local has no such field"),
        ([f"recipes.{SFT}", "model=M", "gpus=8", "--jsn"], "did you mean '--json'"),
    ],
)  # fmt: skip
def test_a_bad_field_exits_2_on_one_screen(models, words, said, capsys):
    assert cli.main(["plan", *(w.replace("=M", f"={models}/tiny") for w in words)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and said in told.err
    assert told.err.startswith("nemo-run: ") and told.err.count("\n") <= 5 and len(told.err) < 1200


@pytest.mark.parametrize(
    ("model", "said"),
    [("none", "no such directory"), (".", "config.json: missing"), ("broken", "model_type='x' is not supported")],
)
def test_a_model_that_is_none_exits_1(tmp_path, model, said, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": "x"}')
    assert cli.main(["plan", f"recipes.{SFT}", f"model={tmp_path}/{model}", "gpus=8"]) == 1
    assert said in capsys.readouterr().err


def test_where_nothing_fits_the_exit_code_is_1(models, capsys):
    assert cli.main(["plan", f"recipes.{SFT}", f"model={models}/27B", "gpus=1"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "nothing fits" in told.err and "what would help" in told.err and told.err.count("\n") == 3


# ----------------------------------------------------------------------------------------------------- what is printed


def test_the_profile_gives_the_card_and_its_node(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "executors.toml").write_text('[slurm]\ngpu = "h200"\ngpus_per_node = 4\n')

    def seen(*words: str) -> dict:
        assert (
            cli.main(
                ["plan", f"recipes.{SFT}", f"model={models}/9B", "gpus=8", "--executor", "slurm", "--json", *words]
            )
            == 0
        )
        return json.loads(capsys.readouterr().out)

    found = seen()
    assert (found["gpu"], found["gpu_memory_bytes"], found["gpus_per_node"]) == ("H200", 141e9, 4)
    assert found["command"][-2:] == ["--executor", "slurm"]
    assert max(one["layout"]["language"]["tp"] for one in found["layouts"]) <= 4
    assert (seen("gpu=H100")["gpu_memory_bytes"], seen("executor.gpu_memory=100")["gpu_memory_bytes"]) == (80e9, 100e9)
    assert "executor.gpu=A100" in seen("executor.gpu=A100")["command"]


def test_json_says_what_the_table_says(models, capsys):
    words = ["plan", f"recipes.{SFT}", f"model={models}/0.8B", "gpus=8", "tokens=1024", "data=/data/x.jsonl"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    question = asked(models / "0.8B", "gpus=8", "tokens=1024", rates=None)
    best = search(question).best
    assert [one["step_seconds"] for one in found["layouts"]] == [p.estimate.seconds for p in best[:10]]
    assert found["layouts"][0]["layout"] == best[0].layout.as_layout()
    assert found["layouts"][0]["peak_bytes"] == {
        n: m.total * question.rates.memory_factor for n, m in best[0].memory.items()
    }
    assert found["considered"] == found["fit"] + found["too_large"] + sum(found["refused"].values())
    assert found["workload"]["loss_tokens"] == 1024 - 576 and set(found["rates"]["source"]) == set(NUMBERS)
    one = found["layouts"][0]
    assert one["tokens_per_second_per_gpu"] == pytest.approx(32 * 1024 / one["step_seconds"] / 8)
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert typed(printed) == found["command"]
    assert "data=/data/x.jsonl" in found["command"] and "with your TARGET:" in printed
    assert f"{found['considered']} layouts considered: {found['fit']} fit" in printed
    assert "constants behind these numbers are assumed, not yet measured" in printed or not found["assumed"]


@pytest.mark.parametrize(
    "words",
    [
        ("27B", "gpus=512", "global_batch_size=512", "layout.language.pp=4"),
        ("0.8B", "gpus=16384", "global_batch_size=16384", "layout.language.dp=4096", "layout.language.tp=1"),
    ],
)
def test_tables_are_whole_on_eighty_columns(models, words):
    question, found = planned(models / words[0], *words[1:])
    for table in (show.layouts_table(question, found.best[:10]), show.parts_table(question, found.best[:10])):
        console = Console(width=80, markup=False)
        with console.capture() as capture:
            console.print(table)
        text = capture.get()
        assert "…" not in text and len(text.splitlines()) == len(found.best[:10]) + 2


def test_the_command_is_one_that_runs(tmp_path, capsys, monkeypatch):
    from mimo_jobs.conversion.tiny import make_tiny

    model = tmp_path / "my model"
    make_tiny(str(model))
    code = "import sys; from mimo_jobs import cli; cli.main(sys.argv[1:]); print('IMPORTED', *sys.modules)"
    words = [
        "plan",
        f"recipes.{SFT}",
        f"model={model}",
        "gpus=4",
        "global_batch_size=8",
        "max_length=512",
        f"target={tmp_path}/out",
    ]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, timeout=120)
    printed, _, imported = done.stdout.rpartition("IMPORTED ")
    assert {"torch", "transformers", "nemo_run", "fiddle"}.isdisjoint(imported.split()) and not done.stderr
    line = typed(printed)
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    assert cli.main([*line[1:], "--dryrun", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["steps"][0]
    assert step["arguments"]["dataset"]["max_length"] == 512 and 1 <= step["world_size"] <= 4
    assert step["arguments"]["source"] == str(model)


def test_the_optimizers_state_is_planned_with_and_checked(models, capsys):
    words = ["plan", f"recipes.{SFT}", f"model={models}/27B", "gpus=8", "gpu=H200", "--json"]
    needs = []
    for state in ("fp32", "bf16"):
        assert cli.main([*words, "layout.language.tp=8", f"optimizer.state={state}"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert f"optimizer.state={state}" in found["command"]
        memory = found["layouts"][0]["memory"]["language"]
        needs.append((memory["gradients"] + memory["optimizer"]) / memory["weights"])
    assert needs == pytest.approx([8, 5])


def test_a_mimo_checkpoint_is_planned_like_its_original(tmp_path, capsys):
    original, made = make_hf(tmp_path / "hf", config_of(layers=4)), tmp_path / "mimo"
    jobs.import_hf(model=str(original), target=str(made), layout=ParallelLayout(world_size=1))
    told = []
    for model in (original, made):
        assert cli.main(["plan", f"recipes.{SFT}", f"model={model}", "gpus=4", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out)["layouts"])
    assert told[0] == told[1]


def test_help_lists_its_fields(capsys):
    assert cli.main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in (f.name for f in dataclasses.fields(command.Asked)))
    text = (Path(command.__file__).parents[2] / "docs/planning.md").read_text()
    assert [f.name for f in dataclasses.fields(command.Asked) if f"`{f.name}`" not in text] == []


@pytest.mark.speed
def test_512_gpus_are_answered_in_two_seconds(models):
    words = ["plan", f"recipes.{SFT}", f"model={models}/27B", "gpus=512", "global_batch_size=512"]

    def once() -> float:
        started = time.monotonic()
        subprocess.run([Path(sys.executable).parent / "nemo-run", *words], check=True, capture_output=True, timeout=60)
        return time.monotonic() - started

    assert min(once() for _ in range(3)) < 2  # 1.1 s on a quiet machine
