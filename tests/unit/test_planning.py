"""The layout planner: what it offers is what a dry run accepts, it fits, the order makes sense, and measurements teach it."""

import dataclasses
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mimo_jobs import cli, overrides
from mimo_jobs.conversion import publish
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.layout import ComponentLayout as C
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.planning import advice, candidates, command, fit, rates, shapes, show
from mimo_jobs.planning.cost import PARTS, CostModel
from mimo_jobs.planning.rates import NUMBERS, Rates
from mimo_jobs.planning.search import search
from mimo_jobs.planning.sizes import Sizes
from mimo_jobs.planning.workload import Settings, Tuning, Workload
from mimo_jobs.submission import GPU_MEMORY
from mimo_jobs.training.preflight import check_training
from mimo_jobs.weights.safetensors_io import SINGLE_NAME, make_header
from tests.hf_files import config_of, entries_of
from tests.unit.test_recipes import built
from tests.unit.test_rules import PUBLISHED
from tests.unit.test_rules import config_of as published

SFT, LORA = "qwen35vl_sft", "qwen35vl_lora"
# What the tests of the order rest on, whatever rates.json learns.
RATES = Rates(
    card="H100", matrix=800e12, matrix_fp32=67e12, hbm=3.3e12, nvlink=450e9, network=50e9, links=0.7, latency=2e-5, language_ceiling=0.6,
    images_ceiling=0.5, mixing=0.25, half_tokens=1000, half_width=250, launch=3e-4, step_overhead=0.02, memory_factor=1.0,
    memory_reserve=2e9, source=dict.fromkeys(NUMBERS, "made up"),
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory of checkpoints that are all header: tiny, and the published sizes with holes in place of weights."""
    base = tmp_path_factory.mktemp("models")
    for name, config in {"tiny": config_of(layers=4), **{n: published(*PUBLISHED[n]) for n in PUBLISHED}}.items():
        (base / name).mkdir()
        (base / name / "config.json").write_text(json.dumps(config))
        header = make_header(entries_of(config, mtp=False), {})
        end = max(e["data_offsets"][1] for e in json.loads(header).values())
        with (base / name / SINGLE_NAME).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
    return base


def asked(model: Path, *words: str, recipe: str = SFT, rates: Rates | None = RATES):
    values = overrides.parse(overrides.split([f"model={model}", *words]), command.fields(recipe))
    question = command.ask(recipe, values, None)
    return dataclasses.replace(question, rates=rates) if rates else question


def planned(model: Path, *words: str, recipe: str = SFT):
    question = asked(model, *words, recipe=recipe)
    return question, search(question)


def words_of(plan) -> tuple:
    language, images = plan.layout.components.values()
    return plan.layout.colocated, (language.tp, language.pp, language.dp), (images.tp, images.dp)


# ------------------------------------------------------------------------------------------------------------ candidates


def test_the_layouts_of_two_gpus_are_those_found_by_hand(models):
    _, found = planned(models / "tiny", "gpus=2", "global_batch_size=2")
    assert sorted(map(words_of, found.best)) == [
        (False, (1, 1, 1), (1, 1)),
        (True, (1, 1, 1), (1, 1)),
        (True, (1, 1, 2), (1, 2)),
        (True, (1, 1, 2), (2, 1)),
        (True, (2, 1, 1), (1, 2)),
        (True, (2, 1, 1), (2, 1)),
    ]
    assert (found.considered, found.too_large, found.refused.total()) == (6, 0, 0)
    assert {p.layout.world_size for p in found.best} == {1, 2}


def test_of_a_batch_of_one_the_replicas_are_refused(models):
    _, found = planned(models / "tiny", "gpus=2", "global_batch_size=1")
    assert sorted(map(words_of, found.best)) == [
        (False, (1, 1, 1), (1, 1)), (True, (1, 1, 1), (1, 1)), (True, (2, 1, 1), (2, 1))
    ]  # fmt: skip
    assert sum(found.refused.values()) == 3
    assert any("global_batch_size=1" in why for why in found.refused)


@pytest.mark.parametrize(("model", "tp", "images"), [("0.8B", {1, 2, 4, 8}, {1, 2, 4}), ("tiny", {1, 2}, {1, 2, 4})])
def test_sizes_are_those_that_the_model_divides_by(models, model, tp, images):
    _, found = planned(models / model, "gpus=16", "global_batch_size=64", "gpu_memory=1000")
    assert {w[1][0] for w in map(words_of, found.best)} == tp
    assert {w[2][0] for w in map(words_of, found.best)} == images
    assert found.considered == len(found.best) + sum(found.refused.values()) and found.refused
    worlds = [p.layout.world_size for p in found.best]
    assert max(worlds) == 16 and min(worlds) >= 1
    assert len(set(map(words_of, found.best))) == len(found.best), "each once"


@pytest.mark.parametrize("number", [1, 2, 12, 49, 720720])
def test_divisors(number):
    assert candidates.divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


# ------------------------------------------------------------------------------------------------ what a dry run says of it

CASES = [
    ("tiny", SFT, ("gpus=8",)),
    ("tiny", SFT, ("gpus=6", "global_batch_size=48", "precision=fp32", "recompute=none")),
    ("tiny", SFT, ("gpus=4", "freeze=images", "layout.language.pp=2")),
    ("tiny", SFT, ("gpus=4", "freeze=language")),
    ("tiny", LORA, ("gpus=4", "lora.rank=3", "lora.targets=q_proj,down_proj,images", "layout.language.pp=2")),
    ("0.8B", SFT, ("gpus=8",)),
    ("0.8B", SFT, ("gpus=4", "layout.language.pp=3")),  # a tied head on a stage of its own
    ("9B", SFT, ("gpus=8", "max_length=2048")),
    ("9B", LORA, ("gpus=6", "layout.images.dp=1")),
    ("27B", SFT, ("gpus=64", "layout.language.pp=4", "layout.language.tp=4")),
    ("27B", SFT, ("gpus=16",)),
]


@pytest.mark.parametrize(("model", "recipe", "words"), CASES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_what_is_offered_is_accepted_and_needs_the_memory_that_a_dry_run_says(
    models, tmp_path, monkeypatch, model, recipe, words
):
    monkeypatch.setattr(publish, "check_space", lambda *_: 1 << 60)
    question, found = planned(models / model, *words, recipe=recipe)
    given = command._given(
        overrides.parse(overrides.split([f"model={models / model}", *words]), command.fields(recipe))
    )
    shown = found.best[: show.SHOWN] if model != "27B" else found.best[: show.SHOWN : 4]
    assert shown
    for plan in shown:
        given["target"] = str(tmp_path / "t")
        typed = show.command(recipe, given, "local", {}, question, plan)
        (step,) = built(recipe, *typed[1:-2])
        made = check_training(step.arguments, data_to_come=True)
        assert made.layout == plan.layout
        assert made.memory == plan.memory
        assert plan.needed * RATES.memory_factor + RATES.memory_reserve <= question.gpu_memory


def test_shapes_are_the_published_ones():
    assert {n: shapes.config_of(n.lower()) for n in PUBLISHED} == {n: published(*PUBLISHED[n]) for n in PUBLISHED}
    with pytest.raises(UsageError, match="no published size; did you mean '27B'"):
        shapes.config_of("72B")


# ------------------------------------------------------------------------------------------------------- does it fit


def test_nothing_that_does_not_fit_is_offered(models):
    for gb in (40, 80, 141):
        question, found = planned(models / "9B", "gpus=16", f"gpu_memory={gb}")
        assert found.too_large and found.best
        assert all(p.needed + RATES.memory_reserve <= gb * 1e9 for p in found.best)
        assert found.considered == len(found.best) + found.too_large + found.refused.total()
    small = {words_of(p) for p in planned(models / "9B", "gpus=16", "gpu_memory=40")[1].best}
    assert small < {words_of(p) for p in found.best}, "more memory, more layouts"


def test_where_nothing_fits_the_smallest_need_is_told_and_what_would_help_helps(models):
    question, found = planned(models / "27B", "gpus=4", "layout.images.tp=1")
    assert not found.best and found.least == min(found.least or 0, found.smallest.needed)
    said = advice.nothing_fits(question, found)
    assert said.startswith("nothing fits: of ") and "gpus=4 H100" in said and "the smallest needs 13" in said
    assert "which has 80 GB" in said and "micro_batch_size=1 recompute=full sequence_parallel=true" in said
    helps = said.partition("what would help: ")[2].split("; ")
    assert helps == ["the recipe qwen35vl_lora", "gpus=8", "gpu=H200"]
    assert planned(models / "27B", "gpus=8", "layout.images.tp=1")[1].best
    assert planned(models / "27B", "gpus=4", "layout.images.tp=1", recipe=LORA)[1].best
    assert planned(models / "27B", "gpus=4", "layout.images.tp=1", "gpu=H200")[1].best


def test_a_choice_that_stands_in_the_way_is_named(models):
    question, found = planned(models / "9B", "gpus=8", "recompute=none", "micro_batch_size=8", "max_length=16384")
    said = advice.nothing_fits(question, found)
    assert "leaving out micro_batch_size, recompute" in said and "max_length=4096" in said
    assert planned(models / "9B", "gpus=8", "recompute=none", "micro_batch_size=8", "max_length=4096")[1].best


# -------------------------------------------------------------------------------------------------------- the order


def seconds(question, layout: ParallelLayout, settings: Settings, **changed: float) -> float:
    costs = CostModel(
        Sizes(question.config, question.tuning), question.workload, dataclasses.replace(RATES, **changed), 8
    )
    return costs.estimate(layout.resolve(), settings).seconds


TWO = ParallelLayout(C(tp=2, dp=2), C(dp=2))
BESIDE = ParallelLayout(C(tp=4, dp=2, rank_offset=0), C(tp=1, dp=8, rank_offset=0))


@pytest.mark.parametrize("layout", [TWO, BESIDE], ids=["disjoint", "colocated"])
def test_more_of_anything_is_not_slower(models, layout):
    question, how = asked(models / "9B", "gpus=8"), Settings(4, True, True)
    now = seconds(question, layout, how)
    for name, better in (
        ("matrix", 2e15), ("hbm", 8e12), ("nvlink", 9e11), ("links", 0.9), ("language_ceiling", 0.8), ("latency", 1e-6), ("half_tokens", 100.0),
        ("half_width", 10.0), ("step_overhead", 0.0),
    ):  # fmt: skip
        assert seconds(question, layout, how, **{name: better}) < now, name
    assert seconds(question, layout, how, launch=1e-5) <= now <= seconds(question, layout, how, launch=1e-2)
    assert seconds(question, layout, how, images_ceiling=0.9) <= now


def test_recomputation_is_slower_and_smaller(models):
    question = asked(models / "9B", "gpus=8")
    sizes = Sizes(question.config, question.tuning)
    for layout in (TWO, BESIDE):
        times, needs = [], []
        for recompute in (False, True):
            how = Settings(2, recompute, False) if layout is TWO else Settings(4, recompute, False)
            times.append(seconds(question, layout, how))
            needs.append({n: m.activations for n, m in sizes.memory(layout.resolve(), how, 4096).items()})
        assert times[0] < times[1]
        assert all(needs[1][n] < needs[0][n] for n in needs[0])


def test_a_frozen_component_and_adapters_are_faster(models):
    how = Settings(4, True, False)
    whole, images, language = (asked(models / "9B", "gpus=8", f"freeze={f}") for f in ("none", "images", "language"))
    times = [seconds(q, BESIDE, how) for q in (whole, images, language)]
    assert times[0] > times[1] > times[2]
    assert seconds(asked(models / "9B", "gpus=8", recipe=LORA), BESIDE, how) < times[1]


def test_disjoint_components_overlap_from_two_microbatches_on(models):
    question, free = asked(models / "9B", "gpus=4"), {"step_overhead": 0.0, "latency": 0.0, "nvlink": 1e18, "hbm": 1e18}
    apart, how = ParallelLayout(C(), C()), Settings(1, False, False)

    def of(batch: int, layout: ParallelLayout = apart) -> float:
        changed = dataclasses.replace(
            question, workload=dataclasses.replace(question.workload, global_batch_size=batch)
        )
        return seconds(changed, layout, how, **free)

    one, more = of(1), of(9) - of(8)
    together = of(1, ParallelLayout(C(rank_offset=0), C(rank_offset=0)))
    assert one == pytest.approx(together, rel=1e-3), "with one microbatch they add up"
    assert more < 0.95 * one and of(8) == pytest.approx(one + 7 * more)


def test_a_pipeline_has_its_bubble(models):
    """Of m microbatches on p equal stages (p - 1) / m is waiting (GPipe, arXiv 1811.06965); the head makes the last stage longer."""
    question = asked(models / "27B", "gpus=8", "image_tokens=0", "loss_tokens=1")
    costs = CostModel(Sizes(question.config, question.tuning), question.workload, RATES, 8)
    for stages in (2, 4):
        found = costs.estimate(ParallelLayout(C(tp=1, pp=stages), C()).resolve(), Settings(1, False, False))
        busy = found.parts["language"] * (stages + 1) / stages
        waiting = found.seconds - busy - found.parts["optimizer"]
        assert found.microbatches == 32
        assert waiting / busy == pytest.approx((stages - 1) / 32, rel=0.35)


@pytest.mark.parametrize("model", ["0.8B", "9B"])
def test_parts_add_up_to_the_step(models, model):
    _, found = planned(models / model, "gpus=8")
    for plan in found.best:
        parts = plan.estimate.parts
        assert tuple(parts) == PARTS and sum(parts.values()) == pytest.approx(plan.estimate.seconds)
        assert min(parts.values()) >= -1e-9 and (parts["waiting"] == 0) is plan.layout.colocated
    assert [p.estimate.seconds for p in found.best] == pytest.approx(
        sorted(p.estimate.seconds for p in found.best), rel=0.01
    )


def test_text_alone_gives_the_images_no_gpus_of_their_own_and_many_images_do(models):
    for model, gpus in (("0.8B", 8), ("9B", 8), ("27B", 64)):
        _, found = planned(models / model, f"gpus={gpus}", "image_tokens=0", "global_batch_size=64")
        assert found.best[0].layout.colocated and found.best[0].estimate.parts["images"] == 0
    heavy = ("gpus=64", "global_batch_size=64", "tokens=16384", "max_length=16384")
    assert planned(models / "27B", *heavy, "image_tokens=0")[1].best[0].layout.colocated
    assert not planned(models / "27B", *heavy, "image_tokens=16000")[1].best[0].layout.colocated


def test_the_more_images_the_more_gpus_they_get_in_a_pipeline(models):
    words = ("gpus=16", "layout.language.pp=2", "tokens=4096")
    shares = []
    for count in (64, 2000, 4000):
        _, found = planned(models / "0.8B", *words, f"image_tokens={count}")
        best = found.best[0]
        shares.append(best.estimate.parts["images"])
    assert shares == sorted(shares)


# ------------------------------------------------------------------------------------------------------------- pins


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("layout.language.tp=4", lambda p, l, i: l.tp == 4),
        ("layout.images.dp=4", lambda p, l, i: i.dp == 4),
        ("layout.language.pp=2", lambda p, l, i: l.pp == 2 and not p.layout.colocated),
        ("layout.language.dp=2 layout.images.tp=2", lambda p, l, i: (l.dp, i.tp) == (2, 2)),
        ("layout.world_size=6", lambda p, l, i: p.layout.world_size == 6),
        ("layout.images.rank_offset=0 layout.language.rank_offset=0", lambda p, l, i: p.layout.colocated),
        (
            "layout.images.rank_offset=0 layout.language.rank_offset=2",
            lambda p, l, i: l.rank_offset == 2 and i.size == 2,
        ),
        ("layout.images.dp=none", lambda p, l, i: True),
        ("micro_batch_size=2", lambda p, l, i: p.settings.micro_batch_size == 2),
        ("recompute=full", lambda p, l, i: p.settings.recompute),
        ("recompute=none", lambda p, l, i: not p.settings.recompute),
        ("sequence_parallel=true", lambda p, l, i: p.settings.sequence_parallel),
        ("sequence_parallel=false", lambda p, l, i: not p.settings.sequence_parallel),
        ("global_batch_size=7", lambda p, l, i: l.dp in (1, 7)),
    ],
)
def test_what_the_user_chose_is_kept(models, words, holds):
    question, found = planned(models / "0.8B", "gpus=8", *words.split())
    assert found.best
    for plan in found.best:
        assert holds(plan, *plan.layout.components.values())
    given = command._given(
        overrides.parse(overrides.split([f"model={models}", "gpus=8", *words.split()]), command.fields(SFT))
    )
    typed = show.command(SFT, given, "local", {}, question, found.best[0])
    assert set(words.split()) - {"layout.images.dp=none"} <= set(typed)
    assert len({w.partition("=")[0] for w in typed}) == len(typed), "each once"


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
    assert shlex.split(printed.partition("next ")[2].partition("\n")[2]) == found["command"]
    assert "data=/data/x.jsonl" in found["command"] and "with your TARGET:" in printed
    assert f"{found['considered']} layouts considered: {found['fit']} fit" in printed
    assert "constants behind these numbers are assumed, not yet measured" in printed or not found["assumed"]


@pytest.mark.parametrize(
    "words",
    [
        ("27B", "gpus=512", "global_batch_size=512", "layout.language.pp=4"),
        ("0.8B", "gpus=16384", "global_batch_size=16384"),
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
    line = shlex.split(printed.partition("next ")[2].partition("\n")[2])
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    assert cli.main([*line[1:], "--dryrun", "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["steps"][0]
    assert step["arguments"]["dataset"]["max_length"] == 512 and step["world_size"] == 4
    assert step["arguments"]["source"] == str(model)


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


# ------------------------------------------------------------------------------------------------------------ learning


def test_every_constant_has_a_source_and_every_card_a_memory():
    for card in rates.cards():
        found = rates.load(card.lower())
        assert set(found.source) == set(NUMBERS) and card in GPU_MEMORY
        assert all(getattr(found, name) > 0 for name in NUMBERS)
        assert set(found.assumed) <= set(NUMBERS)
    with pytest.raises(UsageError, match="how fast it is is not known; did you mean 'H100'"):
        rates.load("H101")


def points(rates: Rates, noise: float = 0.0) -> list[fit.Point]:
    """Measured steps as they would be, were ``rates`` true; ``noise`` is a relative standard deviation."""
    random.seed(3)
    found = []
    for shape, layout, rows, tokens, image, recompute in (
        ("0.8B", "layout.language.rank_offset=0 layout.images.rank_offset=0", 4, 2048, 576, True),
        ("0.8B", "layout.language.rank_offset=0 layout.images.rank_offset=0", 1, 256, 64, False),
        ("0.8B", "layout.language.tp=2 layout.images.tp=1", 4, 1024, 1000, False),
        ("0.8B", "layout.language.tp=1 layout.images.tp=1", 8, 2048, 2000, True),
        ("9B", "layout.language.tp=4 layout.images.tp=4", 2, 2048, 576, True),
        ("9B", "layout.language.tp=2 layout.language.pp=2 layout.images.tp=2 layout.images.dp=1", 1, 4096, 576, True),
        ("9B", "layout.language.tp=8 layout.language.rank_offset=0 layout.images.rank_offset=0", 8, 1024, 64, False),
    ):
        point = fit.Point(
            shape, layout, Workload(tokens, image, tokens - image, 32, tokens), Settings(rows, recompute, False), 1.0
        )
        ready = fit.Prepared(point)
        peaks = {n: b * rates.memory_factor * random.gauss(1, noise) for n, b in ready.bytes.items()}
        found.append(
            dataclasses.replace(point, step_seconds=ready.seconds(rates) * random.gauss(1, noise), peak_bytes=peaks)
        )
    return found


TRUE = dataclasses.replace(
    RATES, language_ceiling=0.43, images_ceiling=0.31, half_tokens=2100, launch=6e-4, memory_factor=1.17
)


def test_a_fit_finds_the_constants_that_made_the_points():
    made = points(TRUE)
    before = np.log([c.seconds[0] / c.seconds[1] for c in fit.compare(made, RATES)])
    learnt = fit.fit(made, RATES)
    assert np.abs(before).max() > 0.2
    for one in fit.compare(made, learnt):
        assert one.seconds[0] == pytest.approx(one.seconds[1], rel=0.02)
        assert all(predicted == pytest.approx(measured, rel=0.02) for predicted, measured in one.peaks.values())
    for name in (*fit.FITTED, "memory_factor"):
        assert getattr(learnt, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
        assert learnt.source[name] == "fitted to 7 measured points"
    others = [n for n in NUMBERS if n not in (*fit.FITTED, "memory_factor")]
    assert all(getattr(learnt, n) == getattr(RATES, n) and learnt.source[n] == RATES.source[n] for n in others)


def test_a_fit_bears_noise():
    made = points(TRUE, noise=0.05)
    learnt = fit.fit(made, RATES)
    for one, true in zip(fit.compare(made, learnt), fit.compare(made, TRUE), strict=True):
        assert one.seconds[0] == pytest.approx(true.seconds[0], rel=0.06)
    assert learnt.memory_factor == pytest.approx(TRUE.memory_factor, rel=0.05)


def test_what_no_point_depends_on_stays_as_it_was():
    text = [
        dataclasses.replace(p, workload=dataclasses.replace(p.workload, image_tokens=0), peak_bytes={})
        for p in points(TRUE)
    ]
    learnt = fit.fit(text, RATES)
    assert learnt.images_ceiling == RATES.images_ceiling and learnt.source["images_ceiling"] == "made up"
    assert learnt.memory_factor == 1.0 and learnt.source["memory_factor"] == "made up"
    assert learnt.source["language_ceiling"].startswith("fitted")
    assert learnt.language_ceiling <= 1


def test_the_table_shows_predicted_beside_measured():
    lines = fit.table(
        points(RATES)[:3], dataclasses.replace(RATES, matrix=RATES.matrix / 2, memory_factor=2.0)
    ).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| 0.8B | language tp1, images tp1, colocated | 4 x 2048, recompute full |" in lines[2]
    assert lines[2].count("+100 %") == 2 and "language tp2, images tp1 |" in lines[4]


def test_what_was_learnt_is_kept_for_its_card(tmp_path, monkeypatch):
    file = tmp_path / "rates.json"
    file.write_text(rates.FILE.read_text())
    monkeypatch.setattr(rates, "FILE", file)
    before, other = rates.load("H100"), rates.load("H200")
    learnt = dataclasses.replace(before, launch=1e-3, source={**before.source, "launch": "fitted to 3 measured points"})
    rates.save(learnt, file)
    try:
        assert rates.load("H100") == learnt and rates.load("H200") == other
        assert "launch" not in learnt.assumed
    finally:
        monkeypatch.undo()
        rates._table.cache_clear()


def test_a_point_with_a_layout_that_is_none_is_refused():
    point = fit.Point("0.8B", "layout.language.tp=3", Workload(8, 0, 8, 1, 8), Settings(1, False, False), 1.0)
    with pytest.raises(UserError, match="does not divide"):
        fit.Prepared(point)
    assert fit.layout_of("layout.language.tp=2 layout.world_size=4").world_size == 4
    assert Tuning() == point.tuning
