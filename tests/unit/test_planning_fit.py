"""The planner's constants: where they come from, and that measured steps teach them."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.planning import fit, rates
from mimo_jobs.planning.rates import NUMBERS, Rates
from mimo_jobs.planning.workload import Settings, Tuning, Workload
from mimo_jobs.submission import GPU_MEMORY
from tests.unit.test_planning import RATES
from tests.unit.test_rules import PUBLISHED
from tests.unit.test_rules import config_of as published


def test_every_constant_has_a_source_and_every_card_a_memory():
    for card in rates.cards():
        found = rates.load(card.lower())
        assert set(found.source) == set(NUMBERS) and card in GPU_MEMORY
        assert all(getattr(found, name) > 0 for name in NUMBERS)
        assert set(found.assumed) <= set(NUMBERS)
    with pytest.raises(UsageError, match="how fast it is is not known; did you mean 'H100'"):
        rates.load("H101")
    text = (Path(rates.__file__).parents[2] / "docs/planning.md").read_text()
    assert [name for name in NUMBERS if f"`{name}`" not in text] == []


def points(rates: Rates, noise: float = 0.0) -> list[fit.Point]:
    """Measured steps as they would be, were ``rates`` true; ``noise`` is a relative standard deviation."""
    random.seed(3)
    found = []
    for shape, layout, rows, tokens, image, recompute in (
        ("0.8B", "layout.language.rank_offset=0 layout.images.rank_offset=0", 4, 2048, 576, "full"),
        ("0.8B", "layout.language.rank_offset=0 layout.images.rank_offset=0", 1, 256, 64, "none"),
        ("0.8B", "layout.language.tp=2 layout.images.tp=1", 4, 1024, 1000, "none"),
        ("0.8B", "layout.language.tp=1 layout.images.tp=1", 8, 2048, 2000, "full"),
        ("9B", "layout.language.tp=4 layout.images.tp=4", 2, 2048, 576, "full"),
        ("9B", "layout.language.tp=2 layout.language.pp=2 layout.images.tp=2 layout.images.dp=1", 1, 4096, 576, "full"),
        ("9B", "layout.language.tp=8 layout.language.rank_offset=0 layout.images.rank_offset=0", 8, 1024, 64, "none"),
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
    point = fit.Point("0.8B", "layout.language.tp=3", Workload(8, 0, 8, 1, 8), Settings(1, "none", False), 1.0)
    with pytest.raises(UserError, match="does not divide"):
        fit.Prepared(point)
    assert fit.layout_of("layout.language.tp=2 layout.world_size=4").world_size == 4
    assert Tuning() == point.tuning


def test_sizes_by_name_are_the_published_ones():
    assert {n: fit.published_config(n) for n in PUBLISHED} == {n: published(*PUBLISHED[n]) for n in PUBLISHED}
    with pytest.raises(UserError, match="'72b' is not one of"):
        fit.published_config("72B")


def test_results_of_the_benchmark_of_layouts_are_points():
    from benchmarks import fit_rates, layouts

    ranks = [{"components": ["language", "images"], "peak_gb": 20.0}]
    apart = [{"components": [name], "peak_gb": gb} for name, gb in (("language", 20.0), ("images", 5.0))]
    settings = {
        "shape": "0.8b", "image": 768, "images": 2, "tokens": 4096, "rows": 8, "micro": 2, "recompute": "none", "sequence_parallel": False,
        "freeze": "none",
    }  # fmt: skip
    known = rates.load("H200")
    for gpus, named in layouts.LAYOUTS.items():
        measured = {
            name: {
                "language": language,
                "images": images,
                "step_seconds": 1.0,
                "ranks": apart if "|" in name else ranks,
            }
            for name, (language, images) in named.items()
        }
        found = fit_rates.points_of(
            {"settings": settings, "layouts": measured | {"other": {"failed": "out of memory"}}}
        )
        assert len(found) == len(named)
        for name, compared in zip(named, fit.compare(found, known), strict=True):
            assert compared.layout.world_size == gpus and compared.layout.colocated == ("|" not in name)
            assert compared.peaks["images"][1] == (5e9 if "|" in name else 20e9) and compared.seconds[0] > 0
        assert found[0].workload.image_tokens == 2 * 24**2 and found[0].workload.images == 2
    page = fit_rates.PAGE.read_text()
    assert page.index(fit_rates.BEGIN) < page.index(fit_rates.END)
    assert fit_rates.known_card("NVIDIA H200") == "H200" and fit_rates.known_card("NVIDIA H100 80GB HBM3") == "H100"
