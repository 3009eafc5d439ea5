"""What a run looks like on a terminal: the recipe, the rank map, the plan, progress, the parity certificate."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from launchers.base import RankGroup
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.placement import Placement, place_ranks
from mimo_jobs.weights.dtypes import itemsize

if TYPE_CHECKING:
    from mimo_jobs.monitor import Seen, SeenRun

GPUS_PER_NODE = 8
TOLD_SECONDS = 30.0  # between two lines of a step's progress where nothing can be redrawn
COLOURS = ("green", "blue", "magenta", "yellow")


def make(stderr: bool = False) -> Console:
    """A console on the present stdout or stderr. It keeps the stream: redirecting ``sys.stderr`` does not move it.

    No markup: paths and names hold brackets.
    """
    # Off a terminal rich assumes 80 columns and would cut paths and tensor names in logs.
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 120)


def size(count: float) -> str:
    """Bytes for people, in powers of ten as disks and checkpoints are sold: ``1.71 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def recipe_table(values: Mapping[str, Any], given: Mapping[str, Any], layout: ResolvedLayout | None) -> Table:
    """Every field with its value; what the user set is bold, what was filled in says so."""
    table = Table.grid(padding=(0, 2))
    for path, value in values.items():
        text = Text(str(value).lower() if isinstance(value, bool) or value is None else str(value))
        note = ""
        filled = _filled(path, layout) if value is None and layout else None
        if filled is not None:
            text, note = Text(str(filled)), "filled in"
        if path in given:
            text.stylize("bold")
            note = "set by you"
        table.add_row(f"  {path}", text, Text(note, style="dim"))
    return table


def _filled(path: str, layout: ResolvedLayout) -> int | None:
    parts = path.split(".")
    if parts == ["layout", "world_size"]:
        return layout.world_size
    if len(parts) == 3 and parts[0] == "layout" and parts[1] in layout.components:
        return getattr(layout.components[parts[1]], parts[2])
    return None


def ranks_text(ranks: range) -> str:
    """``0-3``, or ``5`` for a single rank."""
    return f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def rank_map(layout: ResolvedLayout, placed: Placement | None = None) -> Group:
    """A table of the components, and a picture: one row a node, one cell a GPU."""
    placed = placed or place_ranks(layout.world_size, GPUS_PER_NODE)
    gpus = placed.gpus_per_node
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "  component", "ranks", "nodes", *(Text(n.upper(), justify="right") for n in ("tp", "pp", "dp", "cp", "ep"))
    )
    styles = dict(zip(layout.components, COLOURS, strict=False))
    for name, c in layout.components.items():
        nodes = sorted({placed.node_of(r) for r in c.ranks})
        sizes = (Text(str(n), justify="right") for n in (c.tp, c.pp, c.dp, c.cp, c.ep))
        table.add_row(
            Text(f"  {name}", style=styles[name]),
            ranks_text(c.ranks),
            ranks_text(range(nodes[0], nodes[-1] + 1)),
            *sizes,
        )
    lines = []
    for node, ranks in enumerate(placed.nodes):
        line = Text(f"  node {node}  ")
        for rank in [*ranks, *[None] * (gpus - len(ranks))]:
            held = layout.components_of(rank) if rank is not None else []
            letters = "+".join(c.name[0].upper() for c in held)
            cell = f"[{letters}{rank}]" if held else "[ - ]"
            line.append(cell, style=styles[held[0].name] if held else "dim").append(" ")
        lines.append(line)
    idle = placed.idle
    where = "colocated" if layout.colocated else "on disjoint ranks"
    legend = ", ".join(f"{n[0].upper()} {n}" for n in layout.components)
    total = f"  {layout.world_size} rank{'s' * (layout.world_size > 1)}, components {where} ({legend})"
    every = len(placed.nodes) * gpus
    lines.append(Text(f"{total}; {idle} of {every} GPUs idle on nodes of {gpus}" if idle else f"{total}; no GPU idle"))
    return Group(table, *lines)


def plan_table(plan: Any) -> Table:
    """The summary of a preflight's weight plan."""
    table = Table.grid(padding=(0, 2))
    table.add_row("  tensors", f"{plan.tensors:,}, {size(plan.total_bytes)}")
    per_rank = plan.bytes_per_rank
    if per_rank:
        spread = f"{size(min(per_rank))} to {size(max(per_rank))} each"
        listed = ", ".join(f"{r}: {size(b)}" for r, b in enumerate(per_rank[:16]))
        table.add_row("  bytes of rank", listed if len(per_rank) <= 16 else spread)
    for label, names in (("  passed through", plan.passed_through), ("  tied", plan.tied)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            table.add_row(label, Text(f"{len(names)}: {', '.join(names[:3])}{more}"))
    table.add_row("  disk", f"{size(plan.disk_needed)} needed, {size(plan.disk_free)} free")
    for note in plan.notes:
        table.add_row("  note", Text(note))
    return table


def training_table(plan: Any) -> Table:
    """The summary of a fine-tuning's preflight: how much there is to do, and what a GPU holds."""
    table = Table.grid(padding=(0, 2))
    steps = f"{plan.steps:,}" if plan.steps is not None else "as many as the data has"
    table.add_row("  steps", steps + (f", of {plan.samples:,} samples" if plan.samples is not None else ""))
    share = f" ({100 * plan.trained / plan.parameters:.3g} %)" if plan.parameters else ""
    table.add_row("  parameters", f"{plan.parameters:,}, {plan.trained:,} train{share}")
    for name, held in plan.memory.items():
        parts = ", ".join(
            f"{part} {size(getattr(held, part))}" for part in ("weights", "gradients", "optimizer", "activations")
        )
        table.add_row(f"  GPU memory of {name}", Text(f"{size(held.total)}: {parts} (estimate, longest samples)"))
    table.add_row("  disk", f"{size(plan.disk_needed)} needed, {size(plan.disk_free)} free")
    for note in plan.notes:
        table.add_row("  note", Text(note))
    return table


def command_lines(groups: list[RankGroup]) -> Iterator[str]:
    """``ranks 0-3 on this machine`` and the command, quoted for a shell."""
    for group in groups:
        yield f"  rank{'s' * (len(group.ranks) > 1)} {ranks_text(group.ranks)} on {group.host}"
        yield f"    {shlex.join(group.command)}"


def certificate_table(certificate: Mapping[str, Any]) -> Table:
    """A parity certificate in words; the digests of every tensor stay in the JSON."""
    table = Table.grid(padding=(0, 2))
    table.add_row("  left", Text(certificate["left"]))
    table.add_row("  right", Text(certificate["right"]))
    table.add_row("  compared", f"{certificate['tensors']:,} tensors, {size(certificate['bytes'])} a side")
    table.add_row(
        "  bit-exact", Text(f"{certificate['bit_exact']:,}", style="green" if certificate["equal"] else "yellow")
    )
    for label, names in (
        ("different", [f"{n} ({_difference(d)})" for n, d in certificate["different"].items()]),
        ("only left", certificate["only_left"]),
        ("only right", certificate["only_right"]),
    ):
        table.add_row(f"  {label}", Text(_few(names), style="red" if names else ""))
    same = {"same_files": "files", "same_metadata": "metadata", "same_config": "config.json"}
    table.add_row(
        "  the same too", ", ".join(f"{name}: {'yes' if certificate[k] else 'NO'}" for k, name in same.items())
    )
    table.add_row("  versions", ", ".join(f"{k} {v}" for k, v in certificate["versions"].items()))
    return table


def parity_line(certificate: Mapping[str, Any]) -> str:
    """``parity: 473/473 tensors bit-exact``."""
    every = certificate["tensors"] + len(certificate["only_left"]) + len(certificate["only_right"])
    return f"parity: {certificate['bit_exact']}/{every} tensors bit-exact"


def export_table(summary: Mapping[str, Any]) -> Table:
    """The parity certificate of an export in words; parity.json beside the weights has every tensor's digest."""
    parity, table = summary["parity"], Table.grid(padding=(0, 2))
    whose = "checkpoint" if summary.get("trained") else "source"
    shards = "1 file" if summary["shards"] == 1 else f"{summary['shards']} shards and their index"
    table.add_row("  written", f"{summary['tensors']:,} tensors, {size(summary['bytes'])}, {shards}")
    exact = (
        f"{parity['equal']:,} (digests equal to the {whose}'s)" if parity["verified"] else "not verified (verify=false)"
    )
    table.add_row("  bit-exact", Text(exact, style="green" if parity["equal"] else "yellow"))
    if parity["unknown"] and parity["verified"]:
        table.add_row("  unknown", f"{parity['unknown']:,} (the checkpoint has no digest of them)")
    if parity.get("merged"):
        table.add_row("  merged", f"{parity['merged']:,} (with the adapter)")
    casts = cast_words(summary["casts"])
    table.add_row("  cast", Text(casts or "none", style="yellow" if casts else ""))
    table.add_row("  passed through", f"{summary['passed_through']:,}" if summary["passed_through"] else "none")
    table.add_row("  tied", ", ".join(summary["tied"]) or "none")
    table.add_row("  dropped", Text(f"{summary['dropped']:,}" if summary["dropped"] else "none"))
    table.add_row("  certificate", Text(summary["certificate"]))
    return table


def cast_words(casts: Mapping[str, int]) -> str:
    """``{"F32 to BF16": 97}`` -> ``97 F32 to BF16 (rounded)``; empty without casts."""

    def word(kind: str) -> str:
        before, after = kind.split(" to ")
        return f"{casts[kind]:,} {kind}" + (" (rounded)" if itemsize(after) <= itemsize(before) else "")

    return ", ".join(map(word, casts))


def _difference(found: Mapping[str, Any]) -> str:
    return (
        f"first at element {found['element']:,}" if "element" in found else f"{found['left']} against {found['right']}"
    )


def _few(names: list[str], shown: int = 5) -> str:
    """One name a line, the first few of them."""
    if not names:
        return "none"
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return f"{len(names):,}: " + "\n".join([*names[:shown], *more])


STATE_STYLES = {
    "done": "green", "skipped": "green", "running": "cyan", "queued": "yellow", "waiting": "dim", "failed": "bold red", "cancelled": "magenta",
}  # fmt: skip


def duration(seconds: float) -> str:
    """``4 s``, ``2:05``, ``1:02:03``; empty for nothing."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s" if seconds else ""
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def progress_text(progress: Mapping[str, Any] | None) -> str:
    """``import 45 % of 1.7 GB``."""
    if not progress or not progress.get("phase"):
        return ""
    total, done = progress.get("total") or 0, progress.get("done") or 0
    if not total:
        return str(progress["phase"])
    amount = size(total) if progress.get("unit", "B") == "B" else f"{total:g} {progress['unit']}"
    return f"{progress['phase']} {100 * done // total} % of {amount}"


def note_of(progress: Mapping[str, Any] | None) -> str:
    """What a job says of the moment beside how far it is, such as the loss; on one line, empty when it says nothing."""
    return " ".join(str((progress or {}).get("note") or "").split())


def note_lines(steps: "Sequence[Seen]", run: str = "") -> Iterator[Text]:
    """``train: 120 of 1000 steps · loss 1.2 · ...`` for every step that runs and says something."""
    for one in steps:
        note, progress = note_of(one.progress), one.progress or {}
        if note and one.state.state == "running":
            yield Text(
                f"{run}{one.step.name}: {progress.get('done')} of {progress.get('total')} {progress.get('unit')} · {note}"
            )


def status_table(runs: Sequence["SeenRun"]) -> Table:
    """One row a step; with several runs, each one's id above its steps."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("run" if len(runs) != 1 else "", "step", "state", "job", "nodes", "elapsed", "progress", "reason"):
        table.add_column(title, no_wrap=title in ("step", "state", "job", "elapsed"), overflow="fold")
    for seen in runs:
        for i, one in enumerate(seen.steps):
            s = one.state
            table.add_row(
                Text(seen.run.run_id if i == 0 and len(runs) != 1 else ""), Text(one.step.name), Text(s.state, style=STATE_STYLES[s.state]),
                str(s.job_id or ""), Text(s.nodes), duration(s.elapsed), progress_text(one.progress), Text(s.reason.partition("\n")[0]),
            )  # fmt: skip
    if len(runs) == 1:
        table.title = f"{runs[0].run.run_id}: {runs[0].state}"
        table.title_style, table.title_justify = "bold", "left"
    return table


@contextmanager
def watching(console: Console) -> "Iterator[Callable[[SeenRun], None]]":
    """Show a run while it is waited for: a live table on a terminal, elsewhere a line when a step's state changes."""
    if console.is_terminal:
        with Live(console=console, transient=True, refresh_per_second=4) as live:
            yield lambda seen: live.update(Group(status_table([seen]), *note_lines(seen.steps)))
        return
    told: dict[str, str] = {}
    last = -TOLD_SECONDS

    def show(seen: "SeenRun") -> None:
        nonlocal last
        for one in seen.steps:
            if told.get(one.step.name) != one.state.state:
                told[one.step.name] = one.state.state
                console.print(f"  {one.step.name}: {one.state.state}")
        if time.monotonic() - last >= TOLD_SECONDS:
            for line in note_lines(seen.steps):
                console.print("  ", line, sep="", soft_wrap=True)
                last = time.monotonic()

    yield show


def run_table(runs: Sequence["SeenRun"]) -> Table:
    """One row a run, newest first."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("run", "recipe", "executor", "state", "steps", "elapsed", "GPU hours"):
        table.add_column(title, overflow="fold")
    for seen in runs:
        finished = sum(s.state.state in ("done", "skipped") for s in seen.steps)
        hours = sum(s.state.gpu_seconds for s in seen.steps) / 3600
        table.add_row(
            Text(seen.run.run_id), Text(str(seen.run.about.get("recipe"))), Text(seen.run.executor), Text(seen.state, style=STATE_STYLES[seen.state]),
            f"{finished}/{len(seen.steps)}", duration(sum(s.state.elapsed for s in seen.steps)), f"{hours:.2f}" if hours else "",
        )  # fmt: skip
    return table


def diff_table(left: str, right: str, pairs: Mapping[str, tuple[Any, Any]]) -> Table:
    """What differs: field, the one value, the other."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("", left, right):
        table.add_column(title, overflow="fold")
    for name, (a, b) in pairs.items():
        table.add_row(Text(name), *(Text("" if v is None else str(v)) for v in (a, b)))
    return table


class _Amount(ProgressColumn):
    """``0.8 GB of 1.71 GB  ETA 0:02``; empty until the total is known."""

    def render(self, task: Task) -> Text:
        if not task.total:
            return Text("")
        if task.fields.get("unit", "B") == "B":
            amount = f"{size(task.completed)} of {size(task.total)}"
        else:
            amount = f"{task.completed:g} of {task.total:g} {task.fields['unit']}"
        left = task.time_remaining
        eta = f"  ETA {int(left) // 60}:{int(left) % 60:02d}" if left is not None and not task.finished else ""
        return Text(amount + eta, style="cyan")


class _Elapsed(ProgressColumn):
    """Seconds since the step began; a task of rich starts again with each phase."""

    def render(self, task: Task) -> Text:
        return Text(f"{time.monotonic() - task.fields['started']:.0f} s", style="dim")


class _Noted(Progress):
    """Bars, and below them what the step says of the moment, cut at the edge of the terminal."""

    note = ""

    def get_renderables(self) -> Iterator[Any]:
        yield from super().get_renderables()
        if self.note:
            yield Text(f"  {self.note}", style="dim", no_wrap=True, overflow="ellipsis")


class Steps:
    """Shows the steps of a run as they work. On a terminal a live line each; elsewhere a line when a phase changes."""

    def __init__(self, console: Console, count: int) -> None:
        self.console, self.count, self.number = console, count, 0

    @contextmanager
    def step(self, title: str) -> Iterator["StepView"]:
        """Show one step while it runs; the caller ends it with `StepView.done`."""
        self.number += 1
        label = f"{self.number}/{self.count} {title}" if self.count > 1 else title
        if not self.console.is_terminal:
            yield StepView(self.console, label, None)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Amount(),
            _Elapsed(),
        )
        with _Noted(
            *columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield StepView(self.console, label, live)

    def skipped(self, title: str, why: str) -> None:
        """A line for a step that does not run."""
        self.number += 1
        label = f"{self.number}/{self.count} {title}" if self.count > 1 else title
        self.console.print(Text.assemble(("- ", "dim"), f"{label}  ", (why, "dim")), soft_wrap=True)


class StepView:
    """One step on the screen."""

    def __init__(self, console: Console, label: str, live: _Noted | None) -> None:
        self.console, self.label, self.live = console, label, live
        self.started, self.phase = time.monotonic(), ""
        self.told, self.first = ("", -TOLD_SECONDS), (self.started, 0)  # (note, when); (when, done) of the phase
        self.task = live.add_task(label, total=None, started=self.started) if live else None

    def watch(self, progress: Mapping[str, Any]) -> None:
        """Take a progress record: ``{"phase", "done", "total", "unit", "note"}``, or a phase alone."""
        phase = str(progress.get("phase", "")) or self.phase
        total, done = progress.get("total") or None, progress.get("done") or 0
        if phase != self.phase:
            self.first = (time.monotonic(), done)
        if self.live is not None:
            self.live.note = note_of(progress)
        if self.live is None or self.task is None:
            if phase != self.phase:
                amount = f" {size(total)}" if total and progress.get("unit", "B") == "B" else ""
                self.console.print(f"  {self.label}: {phase}{amount}")
            self._tell(note_of(progress), done, total, str(progress.get("unit")))
        elif phase != self.phase:
            self.live.reset(self.task, description=f"{self.label}: {phase}", total=total)
            self.live.update(self.task, completed=done, unit=progress.get("unit", "B"))
        else:
            self.live.update(self.task, total=total, completed=done)
        self.phase = phase

    def _tell(self, note: str, done: int, total: int | None, unit: str) -> None:
        """Say a note on a line of its own, now and then, and the last one always."""
        now = time.monotonic()
        if not note or not total or note == self.told[0] or (now - self.told[1] < TOLD_SECONDS and done < total):
            return
        self.told = (note, now)
        since, before = self.first
        left = (now - since) / (done - before) * (total - done) if done > before else 0.0
        eta = f" · ETA {duration(left)}" if left >= 1 else ""
        self.console.print(Text(f"  {self.label}: {done} of {total} {unit}{eta} · {note}"), soft_wrap=True)

    def note(self, text: str) -> None:
        """Leave a line about the step, such as why it runs again."""
        self.console.print(Text(f"  {self.label}: {text}", style="dim"), soft_wrap=True)

    def done(self, text: str) -> None:
        """Leave a line that stays."""
        seconds = time.monotonic() - self.started
        self.console.print(Text.assemble(("✓ ", "green"), f"{self.label}  ", (f"{seconds:.1f} s", "dim"), f"  {text}"))
