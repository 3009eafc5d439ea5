"""`nemo-run report`: what is read from a record, how curves are thinned, where the page goes. tests/browser looks at the page."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mimo_jobs import cli, records
from mimo_jobs.errors import UserError
from mimo_jobs.report import charts, content, page
from mimo_jobs.report.charts import Line
from mimo_jobs.training import history
from tests import runs

VALUES = st.floats(allow_nan=True, allow_infinity=True)


class _Page(HTMLParser):
    """Tags, attributes that name an address, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for n, v in attrs if n in ("src", "href", "action", "data", "srcset", "xlink:href")]

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------------------------------------------------------- charts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(4, 500))
def test_thinning_keeps_both_ends_and_every_peak(values, most):
    points = list(enumerate(values))
    kept = charts.thinned(points, most)
    assert len(kept) <= max(most, 1) and set(kept) <= set(points) and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    for extreme in (min, max):
        assert extreme(v for _, v in kept) == extreme(values)


@given(st.lists(VALUES, min_size=1, max_size=60), st.booleans(), st.booleans())
@example([5e-324], True, False)
@example([0.0, 5e-324], False, False)
def test_a_chart_of_any_numbers_stays_inside(values, zero, log):
    made = charts.line_chart("t", [Line("a", list(enumerate(values)), "first")], zero=zero, log=log, marks=[0, 3])
    usable = [v for v in values if charts.usable(v)]
    assert (made is None) == (not usable)
    if made is None:
        return
    numbers = [float(n) for n in made.curves[0].path.replace("M", " ").replace("L", " ").split()]
    assert numbers and all(-0.1 <= n <= 1000.1 for n in numbers)
    assert all(-0.1 <= t.at <= 100.1 for t in [*made.x_ticks, *made.y_ticks, *made.marks, *made.lost])
    assert len(made.y_ticks) <= 20 and len(made.lost) == len(values) - len(usable)
    json.dumps(made.values, allow_nan=False)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=700))
@example([(5e-324, 0.0)])
def test_a_stack_of_any_numbers_stays_inside(values):
    parts = {
        "images": ("part-images", [(i, a) for i, (a, _) in enumerate(values)]),
        "data": ("part-data", [(i, b) for i, (_, b) in enumerate(values)]),
    }
    made = charts.stacked_chart("t", parts, list(enumerate(a for a, _ in values)))
    if made is None:
        return
    for curve in made.curves:
        numbers = [float(n) for n in curve.path.replace("M", " ").replace("L", " ").replace("Z", "").split()]
        assert all(-0.1 <= n <= 1000.1 for n in numbers)
    assert all(len(line["x"]) <= charts.MOST_BARS for line in made.values["lines"])
    json.dumps(made.values, allow_nan=False)


def test_a_curve_is_broken_where_values_are_no_numbers():
    made = charts.line_chart("t", [Line("a", [(1, 1.0), (2, 2.0), (3, math.nan), (4, 2.0), (5, 1.0)], "first")])
    assert made is not None and made.curves[0].path.count("M") == 2 and len(made.lost) == 1


def test_numbers_far_apart_get_a_logarithmic_axis():
    points = [(x, 10.0 ** (x % 5)) for x in range(20)]
    made = charts.line_chart("t", [Line("a", points, "first")], log=True)
    assert made is not None and [t.text for t in made.y_ticks] == ["1", "10", "100", "1000", "10k"]


def test_a_mean_has_no_lag_and_keeps_a_constant():
    assert charts.smoothed([(x, 2.0 * x) for x in range(100)], 11)[20:80] == [(x, 2.0 * x) for x in range(20, 80)]
    assert {y for _, y in charts.smoothed([(x, 3.0) for x in range(20)], 7)} == {3.0}


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.5, "1.5"), (9999, "9999"), (20000, "20k"), (2.5e6, "2.5M"), (1e-5, "1e-5"), (2.5e-4, "2.5e-4"), (-20000, "-20k"), (3e12, "3T")]
)  # fmt: skip
def test_numbers_on_axes_are_short(value, text):
    assert charts.compact(value) == text


# --------------------------------------------------------------------------------------------------------------- content


def test_everything_of_a_chain_is_there(tmp_path):
    found = content.of_run(runs.chain(tmp_path / "sft-1"))
    facts = {f.name: f.value for f in found.facts}
    assert (
        found.state == "done"
        and facts["recipe"] == "qwen35vl_sft"
        and facts["world size"] == "24"
        and facts["commit"] == "77e74ff2a998"
    )
    assert facts["GPU"] == "NVIDIA H100 80GB HBM3" and float(facts["GPU hours"]) == pytest.approx(
        (90 + 7600 + 60) * 24 / 3600, abs=0.01
    )
    (training,) = found.trainings
    tiles = {f.name: f for f in training.tiles}
    assert tiles["steps"].value == "3,199" and tiles["tokens"].value.endswith("M") and tiles["MFU"].value == "41 %"
    assert [c.title for c in training.charts] == [
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Model FLOPs utilisation",
        "Step time",
    ]
    assert all([m.text for m in c.marks] == ["resumed at step 1,500", "resumed at step 2,000"] for c in training.charts)
    assert [c.name for c in training.charts[-1].curves] == [
        "images",
        "language",
        "waiting",
        "data",
        "optimizer",
        "whole step",
    ]
    assert training.bad_count == 4 and len({(e.step, e.text) for e in training.bad}) == len(training.bad)
    (ranks,) = found.maps
    assert ranks.steps == "import, train, export" and [len(cells) for _, cells in ranks.nodes] == [8, 8, 8]
    assert ranks.nodes[2][1][0].title == "rank 16: images tp0 pp0 dp0"
    assert [(name, verdict) for name, verdict, _ in found.parity] == [("export", "bit-exact"), ("verify", "bit-exact")]
    assert any(e.kind == "checkpoint" for e in found.events) and found.events == sorted(
        found.events, key=lambda e: e.at
    )
    assert (
        next(s for s in found.steps if s["step"] == "train")["remarks"]
        == "3 attempts; requeued once; resumed at step 1,500, 2,000"
    )
    configured = dict(found.configuration)
    assert next(f.value for f in configured["train"] if f.name == "optimizer.images_lr") == "2e-06"


def test_what_differs_is_not_called_equal(tmp_path):
    run = runs.chain(tmp_path / "sft-1")
    different = {**runs.CERTIFICATE, "equal": False, "bit_exact": 759, "different": {"a": {}}}
    records.write_json(run.steps[3].directory / "result.json", {"status": "ok", "summary": different})
    name, verdict, facts = content.of_run(run).parity[1]
    assert (name, verdict, facts[0].value) == ("verify", "not proven", "759/760 tensors bit-exact")


def test_a_colocated_cell_has_both_components_and_idle_gpus_are_shown(tmp_path):
    both = {"language": {"tp": 2, "rank_offset": 0}, "images": {"tp": 1, "rank_offset": 0}}
    run = runs.write_run(
        tmp_path / "a", {"train": ("sft", {"layout": both})}, executor="slurm", profile={"gpus_per_node": 4}
    )
    (ranks,) = content.of_run(run).maps
    cells = ranks.nodes[0][1]
    assert [c.title for c in cells] == [
        "rank 0: language tp0 pp0 dp0 + images tp0 pp0 dp0",
        "rank 1: language tp1 pp0 dp0 + images tp0 pp0 dp1",
        "idle",
        "idle",
    ]


def test_what_is_named_like_a_secret_is_not_shown(tmp_path):
    run = runs.write_run(
        tmp_path / "a", {"train": ("sft", {"hub_token": "hf_verysecret", "logging": {"api_key": "verysecret"}})}
    )
    assert "verysecret" not in page.rendered(run)


@pytest.mark.parametrize(
    "damage",
    [
        {"progress.json": "[]"}, {"result.json": '{"status": "ok", "summary": {"tensors": "many"}}'}, {"result.json": '{"status": "ok", "summary": {"parity": {}}}'},
        {"events.jsonl": '{"time": 1e300, "event": "started"}\n{"time": 1, "event": "done", "job_id": 3}\n'}, {"metrics.jsonl": "\x00\n[]\n{}\n"},
        {"metrics.jsonl": '{"step": 1, "loss": 1e308}\n{"step": 9007199254740991, "loss": -1e308, "seconds.x": 1e308, "skipped": "inf"}\n'},
        {"metrics.jsonl": '{"step": 99999999999999999999999999, "loss": 1}\n{"time": 1e300, "step": 1, "event": "x"}\n'},
    ],
)  # fmt: skip
@pytest.mark.parametrize("job", ["sft", "verify", "export_hf"])
def test_a_damaged_record_still_has_a_page(tmp_path, damage, job):
    run = runs.write_run(
        tmp_path / "a",
        {"x": (job, {"layout": {"language": {"tp": "many"}}})},
        code=[],
        versions=3,
        profile="x",
        command={"a": 1},
    )
    for name, text in damage.items():
        (run.steps[0].directory / name).write_text(text)
    assert "</html>" in page.rendered(run)


def test_many_events_are_cut_and_said(tmp_path):
    run = runs.write_run(tmp_path / "a", {"x": ("sft", {})})
    runs.happened(run.steps[0], *((i, "note", {"reason": f"number {i}"}) for i in range(500)))
    found = content.of_run(run)
    assert (
        len(found.events) == content.MOST_EVENTS
        and found.events_left_out == 200
        and found.events[-1].text == "number 499"
    )


# -------------------------------------------------------------------------------------------------------------- the page


def test_a_page_asks_for_nothing_and_has_one_script(tmp_path):
    text = page.rendered(runs.chain(tmp_path / "sft-1"))
    seen = _Page(text)
    assert seen.addresses == ["data:,"] and not {"img", "iframe", "object", "embed", "form", "base"} & set(seen.tags)
    assert text.count("<script>") == 1 and "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert len(text) < 1_000_000


EVIL = "</script></style></title><script>alert(1)</script>\"' onload=alert(1) {{7*7}}"


def test_values_are_text(tmp_path):
    run = runs.write_run(tmp_path / "a", {"x": ("sft", {"model": EVIL})}, run_id=EVIL, recipe=EVIL)
    (run.steps[0].directory / history.FILE).write_text(
        history.line(1.0, {"step": 1, "loss": 1.0, f"seconds.{EVIL}": 1.0})
    )
    seen = _Page(page.rendered(run))
    assert (
        seen.tags.count("script") == 1 + 2 and seen.text.count("{{7*7}}") >= 3
    )  # the page's own, and two charts' values


def test_the_first_script_of_the_policy_is_the_page_s(tmp_path):
    """A change of page.js without its digest in the policy would leave the charts without values."""
    import base64
    import hashlib

    text = page.rendered(runs.chain(tmp_path / "sft-1"))
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text


# --------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path))
    return runs.chain(tmp_path / "runs" / "sft-20261122")


def test_the_page_goes_into_the_record(home, capsys):
    assert cli.main(["report", "sft-2026"]) == 0
    assert capsys.readouterr().out == f"report    {home.root / 'report.html'}\n"
    assert "sft-20261122" in (home.root / "report.html").read_text()
    assert (
        cli.main(["report", str(home.root), "-o", str(home.root / "x.html")]) == 0 and (home.root / "x.html").exists()
    )


@pytest.mark.parametrize(
    "option", [["-o", "page.html"], ["--output", "page.html"], ["--output=page.html"], ["-o", "."]]
)
def test_the_page_goes_where_it_is_wanted(home, tmp_path, monkeypatch, capsys, option):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["report", "latest", *option]) == 0
    place = tmp_path / "here" / ("report.html" if option[-1] == "." else "page.html")
    assert capsys.readouterr().out == f"report    {place}\n" and [p.name for p in place.parent.iterdir()] == [
        place.name
    ]


def test_the_page_can_be_printed(home, capsys):
    assert cli.main(["report", "latest", "-o", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")


def test_a_place_that_cannot_be_written_is_said(home, tmp_path, capsys):
    assert cli.main(["report", "latest", "-o", str(tmp_path / "no" / "where.html")]) == 1
    said = capsys.readouterr().err
    assert "No such file or directory" in said and "-o FILE" in said and "defect" not in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["report"], "report takes 1 argument"),
        (["report", "latest", "-o"], "--output needs a value"),
        (["report", "x", "-q"], "unknown option"),
    ],
)
def test_a_wrong_command_line(home, capsys, argv, said):
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err


def test_no_run_of_that_name(home):
    with pytest.raises(UserError, match="no run"):
        records.find("nothing-like-it", home.root.parent.parent)


def test_other_commands_do_not_wait_for_the_report_s_packages():
    code = "import sys, mimo_jobs.cli, mimo_jobs.commands; print([m for m in ('jinja2', 'plotly', 'torch', 'mimo_jobs.report') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys, mimo_jobs.report.page; print([m for m in ('plotly', 'torch', 'numpy', 'nemo_run') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
