"""The page of a run in a real browser: it shows what it should, says nothing on its console, and asks the network for nothing."""

import os
from pathlib import Path

import pytest

from mimo_jobs import records
from mimo_jobs.report import page
from mimo_jobs.training import history
from tests import runs
from tests.browser import chromium

pytestmark = [pytest.mark.browser, pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed")]
EVIL = (
    "</script><script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>\"'><svg onload=alert(3)>{{7*7}}"
)
CHARTS = ["Loss", "Learning rate", "Gradient norm", "Throughput", "Model FLOPs utilisation", "Step time"]
OVERLAPS = """(() => {
  const found = [];
  for (const axis of document.querySelectorAll('.xaxis, .yaxis, figcaption, .node')) {
    const boxes = [...axis.querySelectorAll('span')].filter(e => !e.querySelector('span') && e.textContent.trim()).map(e => [e.textContent, e.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right - .5 && q.left < p.right - .5 && p.top < q.bottom - .5 && q.top < p.bottom - .5) found.push([a, b]);
    }));
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser():
    with chromium.started() as one:
        yield one


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.setenv("SLURM_CONF", "/dev/null")


def _shown(browser, run, tmp_path, **how):
    browser.said.clear()
    browser.asked.clear()
    place = page.write(run, str(tmp_path / "report.html"))
    assert place is not None
    browser.open(place, **how)
    return place


def _quiet(browser):
    assert browser.said == [] and browser.asked == []


@pytest.mark.parametrize("width", [1280, 800, 420])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_is_drawn_whole(browser, tmp_path, width, dark):
    place = _shown(browser, runs.chain(tmp_path / "sft-1"), tmp_path, width=width, dark=dark)
    assert (
        browser.value("[...document.querySelectorAll('figcaption .name')].map(e => e.firstChild.textContent.trim())")
        == CHARTS
    )
    assert browser.value("document.documentElement.dataset.charts") == str(len(CHARTS))  # the script ran to its end
    drawn = "[...document.querySelectorAll('path.curve, path.fill')].map(e => e.getBoundingClientRect()).filter(b => b.width > 100 && b.height > 1).length"
    assert browser.value(drawn) >= 5 + 3 + 5  # every line, every part of the step time
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OVERLAPS) == []
    assert (
        browser.value(
            "[...document.querySelectorAll('.tile, .cell, figcaption')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        )
        == 0
    )
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
    assert place.stat().st_size < 2_000_000
    _quiet(browser)
    if "MIMO_JOBS_SCREENSHOTS" in os.environ:
        browser.screenshot(
            Path(os.environ["MIMO_JOBS_SCREENSHOTS"]) / f"report-{width}-{'dark' if dark else 'light'}.png"
        )


def test_paper_is_white(browser, tmp_path):
    _shown(browser, runs.chain(tmp_path / "sft-1"), tmp_path, width=800, dark=True, media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("document.documentElement.scrollWidth") <= 800
    _quiet(browser)


def test_the_pointer_shows_values(browser, tmp_path):
    _shown(browser, runs.chain(tmp_path / "sft-1"), tmp_path)
    box = browser.value(
        "(() => { const b = document.querySelector('.area').getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })()"
    )
    assert browser.value("document.querySelector('.tip').hidden")
    browser.move(box[0] + box[2] * 0.5, box[1] + box[3] * 0.5)
    said = browser.value("document.querySelector('.tip').innerText")
    assert said.startswith("step 1,") and "training" in said and "validation" in said and "(step 1,500)" in said
    browser.move(2, 2)
    assert browser.value("document.querySelector('.tip').hidden")
    browser.value("document.querySelectorAll('.plot')[5].focus()")
    browser.command("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft", code="ArrowLeft")
    assert "language" in browser.value("document.querySelectorAll('.tip')[5].innerText")
    _quiet(browser)


def test_nothing_in_a_record_runs(browser, tmp_path):
    """Every name and text of a record holds a script; none runs, none asks for anything, and all are readable as text."""
    run = runs.write_run(
        tmp_path / "evil",
        {EVIL.replace("/", "∕"): ("sft", {"model": EVIL, EVIL: EVIL, "layout": {"language": {"tp": 2}, "images": {"tp": 1}}}), "verify": ("verify", {"left": EVIL})},
        run_id=EVIL, recipe=EVIL, host=EVIL, code={"commit": EVIL, "dirty": [EVIL]}, versions={EVIL: EVIL}, command=[EVIL], profile={EVIL: EVIL}, cluster=EVIL,
    )  # fmt: skip
    train, verify = run.steps
    runs.happened(train, (1, "started", {"host": EVIL, "nodes": EVIL, EVIL: EVIL}), (2, "failed", {"reason": EVIL}))
    runs.happened(verify, (3, "done", {}))

    records.write_json(
        verify.directory / "result.json", {"status": "ok", "summary": {**runs.CERTIFICATE, "left": EVIL, "right": EVIL}}
    )
    lines = runs.training_lines(range(1, 100))
    lines += [history.line(1.0, {"start": 99, "config": {"card": EVIL}})]
    lines += [
        history.line(2.0, {"step": 100, EVIL: 1.0, f"seconds.{EVIL}": 1.0, "loss": 1.0, "event": EVIL, "kind": kind})
        for kind in ("note", "bad sample", EVIL)
    ]
    lines += [history.line(3.0, {"step": 100, f"seconds.{EVIL}": 1.0, "loss": 1.0, "skipped": 3})]
    (train.directory / history.FILE).write_text("".join(lines))
    _shown(browser, run, tmp_path)
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.value("document.querySelectorAll('script:not([type])').length") == 1
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.body.innerText").count("{{7*7}}") > 15
    assert browser.value("document.documentElement.dataset.charts") == str(len(CHARTS))
    _quiet(browser)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_run_that_is_not_done(browser, tmp_path, state):
    run = runs.chain(tmp_path / "sft-1", last=900, state=state)
    with (run.steps[1].directory / history.FILE).open("a") as file:
        file.writelines(
            history.line(1.0, {"step": s, "loss": float("nan"), "grad_norm": float("inf")}) for s in range(900, 910)
        )
    _shown(browser, run, tmp_path)
    text = browser.value("document.body.innerText")
    assert browser.value("document.querySelectorAll('b.lost').length") == 20
    assert ("rank 5: loss is nan at step 3200" in text) == (state == "failed")
    _quiet(browser)


def test_a_run_of_many_steps_is_small_and_quick(browser, tmp_path):
    run = runs.write_run(tmp_path / "long", {"train": ("sft", {})})
    with (run.steps[0].directory / history.FILE).open("w") as file:
        file.writelines(runs.training_lines(range(1, 100_001)))
    place = _shown(browser, run, tmp_path)
    assert place.stat().st_size < 2_000_000
    assert browser.value("document.documentElement.dataset.charts") == str(len(CHARTS))
    assert browser.value(OVERLAPS) == []
    _quiet(browser)


def test_a_run_without_training(browser, tmp_path):
    run = runs.write_run(
        tmp_path / "import-1",
        {"import": ("import_hf", {"model": "/m", "layout": runs.SPLIT})},
        profile={"gpus_per_node": 8},
        executor="slurm",
    )
    _shown(browser, run, tmp_path)
    assert browser.value("document.querySelectorAll('figure').length") == 0
    assert browser.value("document.querySelectorAll('.cell').length") == 24
    assert browser.value("document.documentElement.dataset.charts") == "0"
    _quiet(browser)


def test_the_browser_would_tell(browser, tmp_path):
    """The checks above see a page that does what it must not."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<script>console.log('said'); fetch('http://127.0.0.1:9/x').catch(() => 0); null.x</script><img src='http://127.0.0.1:9/y.png'>"
    )
    browser.said.clear()
    browser.asked.clear()
    browser.open(bad)
    browser.value("new Promise(done => setTimeout(done, 300))")
    assert "said" in browser.said and any("TypeError" in s for s in browser.said)
    assert set(browser.asked) >= {"http://127.0.0.1:9/x", "http://127.0.0.1:9/y.png"}
