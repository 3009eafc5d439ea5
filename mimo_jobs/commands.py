"""The commands on recorded runs: status, list, logs, report, cancel, resume, diff. Each prints, and returns an exit code."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TextIO

from launchers import base, hook, profiles, slurm_commands
from mimo_jobs import console, monitor, paths, pipeline, provenance, records, running, submission
from mimo_jobs.conversion import publish
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.monitor import SeenRun
from mimo_jobs.records import SUCCEEDED, RunRecord

RECENT = 5
POLL_SECONDS = 0.5
SHORT_DIFF = 400
ENDING_SECONDS = 60.0  # twice Slurm's KillWait


def status(name: str | None, as_json: bool, everything: bool = False, wait: bool = False) -> int:
    """Runs under way (all of them, or the last few when none is), or one run in full."""
    home = paths.home()
    if name is not None:
        run = records.find(name, home)
        if wait:
            with console.watching(console.make(stderr=True)) as show:
                seen = monitor.wait(run, show)
        else:
            seen = monitor.look([run])[0]
        if as_json:
            print(json.dumps(seen.data(), indent=2, default=str))
        else:
            out = console.make()
            out.print(console.status_table([seen]))
            for line in console.note_lines(seen.steps):
                out.print(line, soft_wrap=True)
            _print_notes(out, seen)
            for one in seen.steps:
                if one.step.job == "verify" and (certificate := one.step.summary()) and one.state.state == "done":
                    out.print(console.parity_line(certificate))
            if wrong := next((s for s in seen.steps if s.state.state == "failed"), None):
                out.print(f"{wrong.step.name} failed: {wrong.state.reason}", soft_wrap=True)
                out.print(
                    f"logs      nemo-run logs {run.run_id}.{wrong.step.name}\nresume    nemo-run resume {run.run_id}",
                    soft_wrap=True,
                )
        return int(wait and seen.state != "done")
    seen_runs = monitor.look(_readable(home))
    shown = seen_runs if everything else [s for s in seen_runs if s.active] or seen_runs[:RECENT]
    if as_json:
        print(json.dumps({"runs": [s.data() for s in shown]}, indent=2, default=str))
        return 0
    out = console.make()
    if not shown:
        out.print(f"no runs in {home / 'runs'}", soft_wrap=True)
        return 0
    out.print(console.status_table(shown))
    for one in shown:
        for line in console.note_lines(one.steps, f"{one.run.run_id}."):
            out.print(line, soft_wrap=True)
    for note in dict.fromkeys(n for s in shown for n in s.notes):
        out.print(f"note: {note}", soft_wrap=True)
    if len(shown) < len(seen_runs):
        out.print(f"{len(seen_runs) - len(shown)} more runs: nemo-run list", style="dim")
    return 0


def _readable(home: Path) -> list[RunRecord]:
    found = []
    for root in records.all_runs(home):
        with contextlib.suppress(UserError):  # of another version, or damaged
            found.append(records.load(root))
    return found


def _print_notes(out: Any, seen: SeenRun) -> None:
    for note in seen.notes:
        out.print(f"note: {note}", soft_wrap=True)


def list_runs(as_json: bool) -> int:
    """Every run, a line each."""
    seen = monitor.look(_readable(paths.home()))
    if as_json:
        print(json.dumps({"runs": [s.data() for s in seen]}, indent=2, default=str))
        return 0
    out = console.make()
    if not seen:
        out.print(f"no runs in {paths.home() / 'runs'}", soft_wrap=True)
        return 0
    out.print(console.run_table(seen))
    return 0


# ------------------------------------------------------------------------------------------------------------------ logs


def logs(target: str, follow: bool) -> int:
    """Print the logs of ``ID``, ``ID.step`` or ``ID.step:component``; with ``follow`` until the step has ended."""
    if os.sep in target and Path(target).is_dir():
        name, step, component = target, "", ""
    else:
        head, _, component = target.partition(":")
        name, _, step = (head, "", "") if os.sep in head else head.partition(".")
    run = records.find(name, paths.home())
    steps = [run.step(step)] if step else [s for s in run.steps if s.state().state != "waiting"]
    shown = LogView(sys.stdout)
    found = 0
    told = ("", -console.TOLD_SECONDS)
    while True:
        # The state first: what is written before the end is then read after it.
        seen = monitor.look([run])[0].steps if follow else [monitor.Seen(s, s.state(), "", s.progress()) for s in steps]
        seen = [s for s in seen if s.step in steps]
        active = follow and any(s.state.state in ("queued", "running") for s in seen)
        for one in steps:
            files = [p for p in base.logs(one.directory) if not component or _is_of(p, component)]
            found += len(files)
            for path in files:
                shown.show(path, f"{one.name}/{_label(path, one.directory)}", last=not active)
        notes = "\n".join(line.plain for line in console.note_lines(seen))
        if notes and notes != told[0] and time.monotonic() - told[1] >= console.TOLD_SECONDS:
            told = (notes, time.monotonic())
            print(notes, file=sys.stderr)
        if not active:
            break
        time.sleep(POLL_SECONDS)
    if not found:
        what = f" of {component}" if component else ""
        known = sorted({p.stem.partition(".")[0] for s in steps for p in base.logs(s.directory)})
        raise UserError(
            f"{target}: no logs{what} yet"
            + (f"; there are {', '.join(known)}" if known else f"; nemo-run status {run.run_id} says why")
        )
    return 0


def _is_of(path: Path, component: str) -> bool:
    """``language`` and ``language.tp0`` both name ``language.tp0.pp1.log``; either part of ``language.tp0+images.tp0.log`` does."""
    return any(
        part == component or part.startswith(f"{component}.") for part in path.name.removesuffix(".log").split("+")
    )


def _label(path: Path, directory: Path) -> str:
    relative = path.relative_to(directory)
    return (
        relative.name.removesuffix(".log") if relative.parts[0] == "logs" or len(relative.parts) == 1 else str(relative)
    )


class LogView:
    """Prints what files have beyond what was printed of them already, each line with where it is from."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.at: dict[Path, int] = {}

    def show(self, path: Path, label: str, last: bool) -> None:
        """Print what is new; ``last``: nothing is coming, so a line without an end is one too."""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(self.at.get(path, 0))
            text = file.read()
            whole = text if last else text[: text.rfind(b"\n") + 1]  # the line being written waits for its end
            self.at[path] = self.at.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                print(f"{label} | {line}", file=self.out)
            self.out.flush()


# ---------------------------------------------------------------------------------------------------------------- report


def report(name: str, target: str | None) -> int:
    """Write a run's page and say where it lies; ``-`` prints the page itself."""
    from mimo_jobs.report import page  # jinja2

    place = page.write(records.find(name, paths.home()), target)
    if place is not None:
        print(f"report    {place}")
    return 0


# ---------------------------------------------------------------------------------------------------------------- cancel


def cancel(name: str) -> int:
    """End every step of a run that is queued or running."""
    run = records.find(name, paths.home())
    if pipeline.is_local(run.executor):
        print(f"{run.run_id}: {running.cancel(run)}")
        return 0
    with records.locked(run):
        seen = monitor.look([run])[0]
        if seen.notes:
            raise UserError(f"{run.run_id}: {seen.notes[0]}; nothing was cancelled")
        active = [s for s in seen.steps if s.state.state in ("queued", "running")]
        # By name, not by what the records say: nothing of this run may stay.
        ended = slurm_commands.cancel_named({submission.title(run, s.name) for s in run.steps}, submission.users(run))
        for one in active:
            if one.state.state == "queued":  # a running one writes its own last word
                one.step.add("cancelled", reason="cancelled by nemo-run cancel", exit_code=130)
                if "target" in one.step.arguments:
                    publish.remove_staging(Path(one.step.arguments["target"]), one.step.run_id)
                hook.call(
                    profiles.hook_words((run.about.get("profile") or {}).get("on_finish") or ""), run.run_id, one.step
                )
    told = ", ".join(f"{s.step.name} (job {s.state.job_id})" for s in active)
    print(
        f"{run.run_id}: "
        + (f"{told or f'jobs {ended}'} cancelled" if active or ended else "nothing of it is queued or runs")
    )
    return 0


# ---------------------------------------------------------------------------------------------------------------- resume


def resume(name: str, given: Mapping[str, str], force: bool, as_json: bool = False) -> int:
    """Go on with a run: what is done stays, what is queued or running is waited for, the rest runs again in order."""
    run = records.find(name, paths.home())
    with records.locked(run):
        if pipeline.is_local(run.executor):
            return _resume_here(run)
        return _resume_there(run, given, force, as_json)


def _resume_here(run: RunRecord) -> int:
    seen = monitor.look([run])[0]
    if seen.active:
        raise UserError(
            f"{run.run_id}: still runs (process {run.about.get('pid')}); nemo-run cancel {run.run_id} ends it"
        )
    plan = _planned_again(run, seen, {})
    if _is_done(run, seen, plan, ()):
        return 0
    print(f"{run.run_id}: from {plan.to_run[0].step.name}", file=sys.stderr)
    again = pipeline.record_at(run.root, run.run_id, plan, run.executor, {**run.about, **provenance.who()})
    running.run_chain(plan, again, console.Steps(console.make(stderr=True), len(plan.steps)))
    return 0


def _resume_there(run: RunRecord, given: Mapping[str, str], force: bool, as_json: bool) -> int:
    seen, active = _settled(run)
    plan = _planned_again(run, seen, active)
    if _is_done(run, seen, plan, active):
        return 0
    profile = profiles.from_plain(run.about.get("profile") or {}, profiles.parse(given))
    asked = submission.prepare(plan, profile, need_slurm=True)
    check_warnings(plan, force)
    about = {**run.about, **provenance.who(), "profile": profile.plain(), "cluster": slurm_commands.cluster_name()}
    again = pipeline.record_at(run.root, run.run_id, plan, run.executor, about)
    submission.check_requests(asked, again, run.root, set(active))
    if active:  # their code is in use
        again.write()
    else:
        provenance.describe(again, plan, None, ship=asked.code)
    queued = submission.submit(asked, again, active)
    if as_json:
        print(json.dumps({"run_id": run.run_id, "record": str(run.root), "jobs": queued}))
        return 0
    print(f"{run.run_id}: " + ", ".join(f"{n} queued as job {j}" for n, j in queued.items()))
    for planned in plan.steps:
        if planned.skip:
            print(f"  {planned.step.name} stays: {planned.why}")
    return 0


def _settled(run: RunRecord) -> tuple[SeenRun, dict[str, int]]:
    """The run once nothing of it is ending, and the jobs that later steps can wait for.

    A queued step behind one that has to run again waits for a job that will not succeed: it is cancelled, to be queued anew.
    """
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        seen = monitor.look([run])[0]
        if seen.notes:
            raise UserError(f"{run.run_id}: {seen.notes[0]}; resume it when Slurm answers")
        if not any(s.slurm == "COMPLETING" for s in seen.steps):
            break
        if time.monotonic() > deadline:
            raise UserError(
                f"{run.run_id}: a job of it has been ending for {ENDING_SECONDS:g} s; try again when squeue no longer shows it"
            )
        time.sleep(POLL_SECONDS)
    active: dict[str, int] = {}
    again = False
    for one in seen.steps:
        if one.state.state in ("queued", "running") and one.state.job_id is not None:
            if not again:
                active[one.step.name] = one.state.job_id
                continue
            slurm_commands.cancel([one.state.job_id])
            one.step.add("cancelled", reason="queued anew behind a step that runs again", exit_code=1)
        again = again or one.state.state not in SUCCEEDED
    return seen, active


def _is_done(run: RunRecord, seen: SeenRun, plan: pipeline.Plan, active: Collection[str]) -> bool:
    """Say that there is nothing to do, if there is nothing."""
    if any(p.step.name not in active for p in plan.to_run):
        return False
    print(f"{run.run_id}: nothing to do: " + ", ".join(f"{s.step.name} {s.state.state}" for s in seen.steps))
    return True


def _planned_again(run: RunRecord, seen: SeenRun, active: Mapping[str, Any]) -> pipeline.Plan:
    """The chain of a record, decided anew. Steps whose output says nothing about itself are done when the record says so."""
    done = {s.step.name for s in seen.steps if s.state.state in SUCCEEDED}
    return pipeline.make_plan(
        str(run.about.get("recipe")), [pipeline.step_of(s) for s in run.steps], True, active=set(active), done=done
    )


def check_warnings(plan: pipeline.Plan, force: bool) -> None:
    """Raise a `UsageError` for warnings, unless they are to be overridden."""
    if plan.warnings and not force:
        raise UsageError("\n  ".join(plan.warnings) + "\n  --force submits it all the same")
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------------ diff


def diff(left: str, right: str, as_json: bool) -> int:
    """What differs between two runs: configuration, profile, versions, commit, code. Exit code 0 whether or not they do."""
    a, b = (records.find(n, paths.home()) for n in (left, right))
    pairs = {key: (x, y) for key, (x, y) in _joined(_facts(a), _facts(b)).items() if x != y}
    if as_json:
        print(
            json.dumps(
                {"left": a.run_id, "right": b.run_id, "different": {k: list(v) for k, v in pairs.items()}},
                indent=2,
                default=str,
            )
        )
        return 0
    out = console.make()
    if not pairs:
        out.print("no difference in configuration, profile, versions or code")
        return 0
    out.print(console.diff_table(a.run_id, b.run_id, pairs))
    return 0


def _joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b])}


def _facts(run: RunRecord) -> dict[str, Any]:
    from mimo_jobs.overrides import flat

    about = run.about
    found = {"recipe": about.get("recipe"), "executor": run.executor}
    for step in run.steps:
        found |= flat(step.arguments, f"{step.name}.")
    found |= flat(about.get("profile") or {}, "executor.")
    found |= flat(about.get("versions") or {}, "version.")
    code = about.get("code") or {}
    found |= {"commit": code.get("commit"), "uncommitted": ", ".join(code.get("dirty") or []) or None}
    with contextlib.suppress(OSError):
        text = (run.root / "code.diff").read_text(errors="replace")
        found["code.diff"] = text if len(text) <= SHORT_DIFF else f"{text.count(chr(10))} lines, blake3 {_digest(text)}"
    return found


def _digest(text: str) -> str:
    from mimo_jobs.checkpoint.manifest import file_digest

    return file_digest(text.encode())[:12]
