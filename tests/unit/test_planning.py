"""The layout planner: what it offers is what a dry run accepts, it fits, the order makes sense, and measurements teach it."""

import dataclasses
import json
from pathlib import Path

import pytest

from mimo_jobs import overrides
from mimo_jobs.conversion import publish
from mimo_jobs.layout import ComponentLayout as C
from mimo_jobs.layout import ParallelLayout
from mimo_jobs.planning import advice, candidates, command, show
from mimo_jobs.planning.cost import PARTS, CostModel
from mimo_jobs.planning.rates import NUMBERS, Rates
from mimo_jobs.planning.search import search
from mimo_jobs.planning.sizes import Sizes
from mimo_jobs.planning.workload import Settings
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


@pytest.mark.parametrize(
    "words", [("global_batch_size=96",), ("global_batch_size=720", "image_tokens=0"), ("layout.language.pp=2",)]
)
def test_what_is_left_out_on_many_gpus_is_not_the_best(models, monkeypatch, words):
    words = ("gpus=96", *words)
    _, some = planned(models / "9B", *words)
    monkeypatch.setattr(candidates, "FEW_GPUS", 1000)
    _, more = planned(models / "9B", *words)
    assert more.considered > 1.3 * some.considered
    assert some.best[0].estimate.seconds == pytest.approx(more.best[0].estimate.seconds, rel=0.03)


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
        words_typed = show.command(recipe, given, "local", {}, question, plan)
        (step,) = built(recipe, *words_typed[1:-2])
        made = check_training(step.arguments, data_to_come=True)
        assert made.layout == plan.layout
        assert made.memory == plan.memory
        assert plan.needed * RATES.memory_factor + RATES.memory_reserve <= question.gpu_memory


# ------------------------------------------------------------------------------------------------------- does it fit


def test_nothing_that_does_not_fit_is_offered(models):
    for gb in (40, 80, 141):
        _, found = planned(models / "9B", "gpus=16", f"gpu_memory={gb}")
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
    assert "which has 80 GB" in said and "micro_batch_size=4 recompute=full sequence_parallel=true" in said
    helps = said.partition("what would help: ")[2].split("; ")
    assert helps == ["the recipe qwen35vl_lora", "gpus=8", "gpu=H200"]
    assert planned(models / "27B", "gpus=8", "layout.images.tp=1")[1].best
    assert planned(models / "27B", "gpus=4", "layout.images.tp=1", recipe=LORA)[1].best
    assert planned(models / "27B", "gpus=4", "layout.images.tp=1", "gpu=H200")[1].best


def test_narrow_state_is_told_where_it_makes_room(models):
    question, found = planned(models / "9B", "gpus=2")
    assert not found.best and "what would help: optimizer.state=bf16; " in advice.nothing_fits(question, found)
    assert planned(models / "9B", "gpus=2", "optimizer.state=bf16")[1].best


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


FREE = {
    "step_overhead": 0.0,
    "latency": 0.0,
    "nvlink": 1e18,
    "hbm": 1e18,
}  # nothing but products and launching takes time
TWO = ParallelLayout(C(tp=2, dp=2), C(dp=2))
BESIDE = ParallelLayout(C(tp=4, dp=2, rank_offset=0), C(tp=1, dp=8, rank_offset=0))


@pytest.mark.parametrize("layout", [TWO, BESIDE], ids=["disjoint", "colocated"])
def test_more_of_anything_is_not_slower(models, layout):
    question, how = asked(models / "9B", "gpus=8"), Settings(4, "full", True)
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
        for recompute in ("none", "selective", "full"):
            how = Settings(2, recompute, False) if layout is TWO else Settings(4, recompute, False)
            times.append(seconds(question, layout, how))
            needs.append({n: m.activations for n, m in sizes.memory(layout.resolve(), how, 4096).items()})
        assert times == sorted(set(times))
        assert all(needs[2][n] < needs[1][n] < needs[0][n] for n in needs[0])


def test_a_frozen_component_and_adapters_are_faster(models):
    how = Settings(4, "full", False)
    whole, images, language = (asked(models / "9B", "gpus=8", f"freeze={f}") for f in ("none", "images", "language"))
    times = [seconds(q, BESIDE, how) for q in (whole, images, language)]
    assert times[0] > times[1] > times[2]
    assert seconds(asked(models / "9B", "gpus=8", recipe=LORA), BESIDE, how) < times[1]


def test_disjoint_components_overlap_from_two_microbatches_on(models):
    question = asked(models / "9B", "gpus=4")
    apart, how = ParallelLayout(C(), C()), Settings(1, "none", False)

    def of(batch: int, layout: ParallelLayout = apart) -> float:
        changed = dataclasses.replace(
            question, workload=dataclasses.replace(question.workload, global_batch_size=batch)
        )
        return seconds(changed, layout, how, **FREE)

    one, more = of(1), of(9) - of(8)
    together = of(1, ParallelLayout(C(rank_offset=0), C(rank_offset=0)))
    assert one == pytest.approx(together, rel=1e-3), "with one microbatch they add up"
    assert more < 0.95 * one and of(8) == pytest.approx(one + 7 * more)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_a_pipeline_has_its_bubble(models, stages):
    """Beside m microbatches, p equal stages take the time of p - 1 more (GPipe, arXiv 1811.06965)."""
    question = asked(models / "27B", "gpus=16", "image_tokens=0", "loss_tokens=1")
    layout, how = ParallelLayout(C(pp=stages), C()), Settings(1, "none", False)

    def of(batch: int) -> float:
        workload = dataclasses.replace(question.workload, global_batch_size=batch)
        return seconds(dataclasses.replace(question, workload=workload), layout, how, **FREE, half_tokens=0.0)

    slowest = of(33) - of(32)
    assert of(32) == pytest.approx((32 + stages - 1) * slowest, rel=1e-3)
    assert of(1) == pytest.approx(stages * slowest, rel=0.01)


def test_many_small_images_are_faster_than_one_large_one(models):
    one, many = (asked(models / "0.8B", "gpus=2", "image_tokens=2000", f"images={n}") for n in (1, 10))
    how = Settings(1, "none", False)
    assert seconds(many, ParallelLayout(C(), C()), how) < seconds(one, ParallelLayout(C(), C()), how)


def test_gradients_of_the_language_are_reduced_behind_its_last_backward_pass(models):
    """With links that are slow enough it shows; those of the images are not hidden (`training.step.wrap_for_training`)."""
    question, how = asked(models / "0.8B", "gpus=2"), Settings(8, "none", False)

    def communicating(layout: ParallelLayout, **changed: float) -> float:
        costs = CostModel(
            Sizes(question.config, question.tuning), question.workload, dataclasses.replace(RATES, **changed), 8
        )
        return costs.estimate(layout.resolve(), how).parts["communication"]

    both = ParallelLayout(C(dp=2, rank_offset=0), C(dp=2, rank_offset=0))
    sizes = Sizes(question.config, question.tuning)
    language, images = (sizes.held(n, 1, 1)[0].elements for n in ("language", "images"))
    link = RATES.nvlink * RATES.links
    expected = (2 * language + 6 * images) / 2 / link + 4 * RATES.latency
    assert communicating(both) == pytest.approx(expected, abs=2 * RATES.latency)
    assert communicating(both, nvlink=4.5e9) > 1.5 * 100 * expected


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
        ("layout.language.tp=4", lambda p, lang, images: lang.tp == 4),
        ("layout.images.dp=4", lambda p, lang, images: images.dp == 4),
        ("layout.language.pp=2", lambda p, lang, images: lang.pp == 2 and not p.layout.colocated),
        ("layout.language.dp=2 layout.images.tp=2", lambda p, lang, images: (lang.dp, images.tp) == (2, 2)),
        ("layout.world_size=6", lambda p, lang, images: p.layout.world_size == 6),
        ("layout.images.rank_offset=0 layout.language.rank_offset=0", lambda p, lang, images: p.layout.colocated),
        (
            "layout.images.rank_offset=0 layout.language.rank_offset=2",
            lambda p, lang, images: lang.rank_offset == 2 and images.size == 2,
        ),
        ("layout.images.dp=none", lambda p, lang, images: True),
        ("micro_batch_size=2", lambda p, lang, images: p.settings.micro_batch_size == 2),
        ("recompute=full", lambda p, lang, images: p.settings.recompute == "full"),
        ("recompute=none", lambda p, lang, images: p.settings.recompute == "none"),
        ("sequence_parallel=true", lambda p, lang, images: p.settings.sequence_parallel),
        ("sequence_parallel=false", lambda p, lang, images: not p.settings.sequence_parallel),
        ("global_batch_size=7", lambda p, lang, images: lang.dp in (1, 7)),
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
    told = show.command(SFT, given, "local", {}, question, found.best[0])
    assert set(words.split()) - {"layout.images.dp=none"} <= set(told)
    assert len({w.partition("=")[0] for w in told}) == len(told), "each once"
