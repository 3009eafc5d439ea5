"""What a report says: read from a run's record, which others wrote. Nothing here is HTML; page.html.j2 escapes every value."""

import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimo_jobs import console, monitor, pipeline, placement
from mimo_jobs.console import duration, size
from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.errors import UserError
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.monitor import Seen, SeenRun
from mimo_jobs.overrides import flat
from mimo_jobs.records import RunRecord, read_json
from mimo_jobs.report import charts
from mimo_jobs.report.charts import Chart, Line
from mimo_jobs.training import history
from mimo_jobs.training.history import PARTS, History

MOST_EVENTS = 300
MOST_BAD = 200
MOST_NODES = 1024
FEW_NODES = 8  # whose cells have room for coordinates
SMOOTH = 50  # points, from which a curve is shown smoothed too


@dataclass(frozen=True)
class Fact:
    """A name and its value, as text."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Happened:
    """A line of what happened. ``at``: epoch seconds."""

    at: float
    step: str
    kind: str
    text: str

    @property
    def when(self) -> str:
        return moment(self.at)[:19]  # the zone is said once, above


@dataclass(frozen=True)
class Cell:
    """A GPU: the parts of its rank, (component, its number among the colours, coordinates); none when it idles."""

    rank: int | None
    held: tuple[tuple[str, int, str], ...] = ()

    @property
    def title(self) -> str:
        if self.rank is None:
            return "idle"
        return f"rank {self.rank}: " + " + ".join(f"{name} {at}" for name, _, at in self.held)


@dataclass(frozen=True)
class Map:
    """Where the ranks of some steps are: their names, the components with their sizes, and the GPUs of every node."""

    steps: str
    components: Sequence[tuple[str, int, str, Mapping[str, int]]]
    nodes: list[tuple[str, list[Cell]]]
    few: bool
    more: str


@dataclass
class Training:
    """What was logged of a training step."""

    name: str
    tiles: list[Fact] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    bad: list[history.Event] = field(default_factory=list)
    bad_count: int = 0
    bad_listed: int = 0


@dataclass
class Content:
    """A whole report."""

    title: str
    state: str
    facts: list[Fact]
    failure: tuple[str, str] | None
    progress: list[str]
    steps: list[dict[str, str]]
    trainings: list[Training]
    maps: list[Map]
    parity: list[tuple[str, str, list[Fact]]]
    events: list[Happened]
    events_left_out: int
    configuration: list[tuple[str, list[Fact]]]
    notes: list[str]
    made: str


def of_run(run: RunRecord) -> Content:
    """Everything that is known of a run, whatever state it is in."""
    seen = monitor.look([run])[0]
    logged = {one.step.name: found for one in seen.steps if (found := history.read(one.step.directory)) is not None}
    wrong = next((s for s in seen.steps if s.state.state == "failed"), None)
    events = sorted(_events(seen, logged), key=lambda e: e.at)
    return Content(
        title=run.run_id,
        state=seen.state,
        facts=list(_facts(seen, logged)),
        failure=(wrong.step.name, wrong.state.reason) if wrong else None,
        progress=[line.plain for line in console.note_lines(seen.steps)],
        steps=[_row(one, logged.get(one.step.name)) for one in seen.steps],
        trainings=[_training(one, logged[one.step.name]) for one in seen.steps if one.step.name in logged],
        maps=list(_maps(run)),
        parity=list(_parity(seen)),
        events=events[-MOST_EVENTS:],
        events_left_out=max(0, len(events) - MOST_EVENTS),
        configuration=list(_configuration(run)),
        notes=seen.notes,
        made=moment(time.time()),
    )


def _part(about: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object in RUN.json; empty when it is missing or something else."""
    found = about.get(name)
    return found if isinstance(found, Mapping) else {}


def moment(at: float | None) -> str:
    """``2026-11-22 20:55:01 UTC``, in this machine's zone; empty for None and for what no clock shows."""
    if not at:
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))
    except (ValueError, OverflowError, OSError):
        return ""


# ---------------------------------------------------------------------------------------------------------------- header


def _facts(seen: SeenRun, logged: Mapping[str, History]) -> Iterator[Fact]:
    run, about = seen.run, seen.run.about
    yield Fact("recipe", str(about.get("recipe")))
    times = [e["time"] for s in run.steps for e in s.events()]
    if times:
        yield Fact("started", moment(min(times)))
        yield Fact("ended" if not seen.active else "last word", moment(max(times)))
    elapsed = sum(s.state.elapsed for s in seen.steps)
    yield Fact("duration", duration(elapsed) or "none", "of all attempts of all steps")
    if hours := sum(_gpu_seconds(s, logged.get(s.step.name)) for s in seen.steps) / 3600:
        yield Fact("GPU hours", f"{hours:,.2f}", "allocated")
    sizes = [layout.world_size for s in run.steps if (layout := _layout(s.arguments)) is not None]
    yield Fact("world size", str(max(sizes, default=1)), f"rank{'s' * (max(sizes, default=1) > 1)}")
    cards = {str(h.config["card"]) for h in logged.values() if h.config.get("card")}
    if cards:
        yield Fact("GPU", ", ".join(sorted(cards)))
    place = f"{about['cluster']}, " if about.get("cluster") else ""
    yield Fact("executor", run.executor, f"{place}from {about.get('host') or 'an unknown host'}")
    code = _part(about, "code")
    if commit := code.get("commit"):
        dirty = len(code["dirty"]) if isinstance(code.get("dirty"), list) else 0
        yield Fact("commit", str(commit)[:12], f"and {dirty} file{'s' * (dirty != 1)} not committed" if dirty else "")
    yield Fact("record", str(run.root))


def _gpu_seconds(one: Seen, logged: History | None) -> float:
    state = one.state
    if state.gpus:
        return state.gpu_seconds + max(0.0, state.elapsed - state.seconds) * state.gpus
    gpus = logged.config.get("gpus") if logged else None  # this machine's, which nobody allocated
    return state.gpu_seconds + (state.elapsed * gpus if isinstance(gpus, int) else 0.0)


def _row(one: Seen, logged: History | None) -> dict[str, str]:
    s = one.state
    layout = _layout(one.step.arguments)
    again = [f"{s.attempts} attempts"] * (s.attempts > 1) + [
        "requeued once" if s.requeues == 1 else f"requeued {s.requeues} times"
    ] * (s.requeues > 0)
    if logged and logged.resumed:
        again.append(f"resumed at step {', '.join(f'{r:,}' for r in logged.resumed)}")
    hours = _gpu_seconds(one, logged) / 3600
    return {
        "step": one.step.name, "job": one.step.job, "state": s.state, "started": moment(s.started)[:19], "elapsed": duration(s.elapsed),
        "ranks": str(layout.world_size) if layout else "", "gpu_hours": f"{hours:,.2f}" if hours else "", "slurm": str(s.job_id or ""),
        "nodes": s.nodes, "remarks": "; ".join(filter(None, [*again, "" if s.state == "failed" else s.reason])),
        "progress": console.progress_text(one.progress) if s.state == "running" else "",
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- training


def _training(one: Seen, logged: History) -> Training:
    bad = list(
        {(e.step, e.text): e for e in logged.events if e.kind == "bad sample"}.values()
    )  # a resumed run meets some again
    counted = int(_finite(logged.last.get("skipped")) or 0)
    return Training(
        one.step.name, list(_tiles(one, logged)), [c for c in _charts(logged) if c is not None], bad[:MOST_BAD], max(counted, len(bad)), len(bad)
    )  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and charts.usable(value) else None


def _tiles(one: Seen, logged: History) -> Iterator[Fact]:
    last = next(reversed(logged.steps), None)
    if last is None:
        return
    total = (one.progress or one.step.progress() or {}).get("total")
    yield Fact("steps", f"{last:,}", f"of {total:,}" if isinstance(total, int) and total >= last else "")
    if (loss := logged.last.get("loss")) is not None:
        yield Fact("loss", f"{loss:.4g}", "last step")
    best = min(((v, s) for s, v in logged.validation.items() if charts.usable(v)), default=None)
    if best:
        yield Fact("validation loss", f"{best[0]:.4g}", f"lowest, step {best[1]:,}")
    tokens = [v for _, v in logged.series("tokens") if charts.usable(v)]
    if tokens:
        whole = len(tokens) == last
        yield Fact(
            "tokens", charts.compact(sum(tokens) * (1 if whole else last / len(tokens))), "" if whole else "about"
        )
    for name, title, factor, unit in (
        ("tokens_per_second_per_gpu", "tokens/s/GPU", 1, "median"), ("mfu", "MFU", 100, "median"), ("seconds", "step time", 1, "median"),
    ):  # fmt: skip
        values = [
            v for _, v in logged.series(name)[1:] or logged.series(name) if charts.usable(v)
        ]  # the first step warms up
        if values:
            middle = statistics.median(values) * factor
            yield Fact(
                title,
                f"{middle:,.0f}"
                if middle >= 1000
                else f"{middle:.3g}" + {"MFU": " %", "step time": " s"}.get(title, ""),
                unit,
            )
    memory = [v for _, v in logged.series("memory_bytes") if charts.usable(v)]
    if memory and max(memory) > 0:
        yield Fact("peak memory", size(max(memory)), "of one GPU")


def _charts(logged: History) -> Iterator[Chart | None]:
    steps = [*logged.steps, *logged.validation]
    if not steps:
        return
    marks, over = logged.resumed, (min(steps), max(steps))
    loss = logged.series("loss")
    lines = [Line("training", loss, "raw fine" if len(loss) >= SMOOTH else "first")]
    if len(loss) >= SMOOTH:
        span = max(10, len(loss) // 100) | 1
        lines.append(Line(f"mean of {span:,} points", charts.smoothed(loss, span), "first"))
    if logged.validation:
        lines.append(Line("validation", list(logged.validation.items()), "second", dots=len(logged.validation) <= 200))
    yield charts.line_chart("Loss", lines, log=True, marks=marks, over=over, wide=True)
    rates = [Line("lr", logged.series("lr"), "first")]
    if other := logged.series("lr_images"):
        rates.append(Line("lr of images", other, "second"))
    yield charts.line_chart("Learning rate", [r for r in rates if r.points], zero=True, marks=marks, over=over)
    yield charts.line_chart(
        "Gradient norm",
        [Line("norm", logged.series("grad_norm"), "first fine")],
        log=True,
        zero=True,
        marks=marks,
        over=over,
    )
    speed = logged.series("tokens_per_second_per_gpu")
    yield charts.line_chart(
        "Throughput",
        [Line("tokens/s/GPU", speed, "first fine")],
        unit="tokens/s/GPU",
        zero=True,
        marks=marks,
        over=over,
    )
    share = [(x, 100 * y) for x, y in logged.series("mfu")]
    yield charts.line_chart(
        "Model FLOPs utilisation", [Line("MFU", share, "first fine")], unit="%", zero=True, marks=marks, over=over
    )
    names = dict.fromkeys(n for values in logged.steps.values() for n in values if n.startswith("seconds."))
    known = [p for p in PARTS if f"seconds.{p}" in names]
    others = [p for n in names if (p := n.removeprefix("seconds.")) not in PARTS]
    parts = {p: (f"part-{p if p in PARTS else 'other'}", logged.series(f"seconds.{p}")) for p in [*known, *others]}
    yield charts.stacked_chart(
        "Step time", parts, logged.series("seconds"), unit="s", marks=marks, over=over, wide=True
    )


# -------------------------------------------------------------------------------------------------------------- rank map


def _layout(arguments: Mapping[str, Any]) -> ResolvedLayout | None:
    if not isinstance(arguments.get("layout"), Mapping):
        return None
    try:
        return as_layout(arguments["layout"]).resolve()
    except (UserError, TypeError, AttributeError, AssertionError):  # a damaged record still has a report
        return None


def _maps(run: RunRecord) -> Iterator[Map]:
    """One map for the steps that share a layout."""
    layouts: dict[str, tuple[ResolvedLayout, list[str]]] = {}
    for step in run.steps:
        if (layout := _layout(step.arguments)) is not None and layout.world_size <= MOST_NODES * 8:
            layouts.setdefault(repr((layout.as_layout(), layout.world_size)), (layout, []))[1].append(step.name)
    gpus = None if pipeline.is_local(run.executor) else _part(run.about, "profile").get("gpus_per_node")
    for layout, steps in layouts.values():
        here = (
            type(gpus) is not int or not 1 <= gpus <= 64
        )  # of this machine's ranks it is not known which GPU they use
        few = min(layout.world_size, console.GPUS_PER_NODE)
        placed = (
            placement.place_ranks(layout.world_size, few)
            if type(gpus) is not int or here
            else placement.place(layout, gpus)
        )
        numbers = {name: i for i, name in enumerate(layout.components)}
        nodes = []
        for i, ranks in enumerate(placed.nodes):
            cells = [
                Cell(r, tuple((c.name, numbers[c.name], _at(c, r)) for c in layout.components_of(r))) for r in ranks
            ]
            idle = [Cell(None)] * (0 if here else placed.gpus_per_node - len(ranks))
            nodes.append(
                (
                    f"node {i}" if not here else f"ranks {console.ranks_text(range(ranks[0], ranks[-1] + 1))}",
                    cells + idle,
                )
            )
        components = [
            (c.name, numbers[c.name], console.ranks_text(c.ranks), {n: getattr(c, n) for n in ("tp", "pp", "dp", "cp", "ep")})
            for c in layout.components.values()
        ]  # fmt: skip
        where = "components share the ranks" if layout.colocated else "components on disjoint ranks"
        idle = "" if here else f"; {placed.idle} of {len(placed.nodes) * placed.gpus_per_node} GPUs idle"
        yield Map(
            ", ".join(steps), components, nodes, len(nodes) <= FEW_NODES, f"{layout.world_size} ranks, {where}{idle}"
        )


def _at(component: Any, rank: int) -> str:
    at = component.coordinates(rank)
    return " ".join(f"{n}{at[n]}" for n in ("tp", "pp", "dp", "cp") if n != "cp" or component.cp > 1)


# ------------------------------------------------------------------------------------------------- parity, events, fields


def _parity(seen: SeenRun) -> Iterator[tuple[str, str, list[Fact]]]:
    """(step, verdict, facts) of every verify and export."""
    for one in seen.steps:
        found = one.step.summary()
        try:
            if one.step.job == "verify" and found:
                facts = [
                    Fact("result", console.parity_line(found).removeprefix("parity: ")), Fact("left", str(found["left"])), Fact("right", str(found["right"])),
                    Fact("compared", f"{found['tensors']:,} tensors, {size(found['bytes'])} a side"), Fact("different", str(len(found["different"]))),
                    Fact("one side only", str(len(found["only_left"]) + len(found["only_right"]))),
                    *(Fact(text, "the same" if found[key] else "DIFFERENT") for key, text in (("same_files", "files"), ("same_metadata", "metadata"), ("same_config", "config.json"))),
                ]  # fmt: skip
                yield one.step.name, "bit-exact" if found["equal"] else "not proven", facts
            elif one.step.job == "export_hf" and isinstance(found.get("parity"), Mapping):
                yield one.step.name, *_export_parity(found, found["parity"])
        except (KeyError, TypeError, ValueError, AttributeError):
            yield one.step.name, "not proven", [Fact("result", "its certificate is damaged")]


def _export_parity(found: Mapping[str, Any], parity: Mapping[str, Any]) -> tuple[str, list[Fact]]:
    whose = "checkpoint" if found.get("trained") else "source"
    said = f"{parity['equal']:,} of {found['tensors']:,} tensors have the digests of the {whose}"
    facts = [Fact("result", said if parity["verified"] else "not verified (verify=false)")]
    facts.append(Fact("cast", console.cast_words(found.get("casts") or {}) or "none"))
    merged = int(parity.get("merged") or 0)
    if merged:
        facts.append(Fact("merged", f"{merged:,} with the adapter; before it, equal to the {whose}"))
    facts.append(Fact("certificate", str(found["certificate"])))
    if not parity["verified"] or parity["equal"] + parity["cast"] + merged != found["tensors"]:
        return "not proven", facts
    return "merged" if merged else "cast" if parity["cast"] else "bit-exact", facts


def _events(seen: SeenRun, logged: Mapping[str, History]) -> Iterator[Happened]:
    for one in seen.steps:
        name = one.step.name
        for event in one.step.events():
            beside = {
                k: v
                for k, v in event.items()
                if k not in ("time", "event", "reason", "title", "seen_by", "pid") and v not in (None, "", 0)
            }
            text = "; ".join(
                filter(
                    None, [str(event.get("reason") or ""), *(f"{k.replace('_', ' ')} {v}" for k, v in beside.items())]
                )
            )
            yield Happened(event["time"], name, event["event"], text)
        for event in logged[name].events if name in logged else ():
            if event.kind != "bad sample":
                yield Happened(event.time, name, event.kind, f"step {event.step:,}: {event.text}")


SECRET = re.compile(r"(token|secret|password|passwd|api_?key)$", re.IGNORECASE)


def _configuration(run: RunRecord) -> Iterator[tuple[str, list[Fact]]]:
    """Every field of every step, the executor's, and the versions. What is named like a secret is not shown: reports are sent around."""
    written = read_json(run.root / "config.json") or {}
    sections: dict[str, Any] = {s.name: written.get(s.name) or flat(s.arguments) for s in run.steps}
    sections["executor"] = flat(_part(run.about, "profile"))
    sections["versions"] = _part(run.about, "versions")
    words = run.about.get("command")
    if isinstance(words, list):
        sections["command"] = {"nemo-run": " ".join(map(str, words)), "directory": run.about.get("directory")}
    for name, fields in sections.items():
        if isinstance(fields, Mapping) and fields:
            yield (
                name,
                [Fact(str(k), "(not shown)" if SECRET.search(str(k)) and v else _text(v)) for k, v in fields.items()],
            )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
