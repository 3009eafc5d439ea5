"""The ``nemo-run`` command. Help and usage errors answer before anything slow is imported.

Exit codes: 0 done, 1 failed (a job, or two checkpoints that differ), 2 a wrong command line, 130 interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

from launchers import base
from mimo_jobs import help, overrides
from mimo_jobs.errors import UsageError, UserError, did_you_mean
from mimo_jobs.help import PROGRAM, RECIPE_OPTIONS, VERIFY_OPTIONS, VERIFY_USAGE
from recipes import RECIPES

if TYPE_CHECKING:
    from mimo_jobs.pipeline import Run, Step

COMMANDS = ("recipes", "verify")
SHORT = {"-h": "--help", "-y": "--yes"}
WITH_VALUE = ("--executor",)
DEBUG = "MIMO_JOBS_DEBUG"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors of the user print one screen, without a traceback."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    return guarded(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def guarded(work: Callable[[], int]) -> int:
    """The exit code of ``work``; errors of the user and Ctrl-C become a message and a code."""
    try:
        return work()
    except UserError as error:
        print(f"{_red(PROGRAM)}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            f"{_red(PROGRAM)}: interrupted; its ranks were ended, and a target that was not complete is not there",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # `nemo-run ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a directory without permission
        print(f"{_red(PROGRAM)}: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if DEBUG in os.environ:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        print(f"{_red(PROGRAM)}: {text} (a defect; set {DEBUG}=1 for the traceback)", file=sys.stderr)
        return 1


def _stop(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _red(text: str) -> str:
    return f"\033[1;31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(help.program())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"{PROGRAM} (mimo-jobs {version('mimo-jobs')})")
        return 0
    command, rest = argv[0], argv[1:]
    if command == "recipes":
        if not rest or rest[0] in SHORT or rest[0] == "--help":
            print(help.recipes())
            return 0
        command, rest = f"recipes.{rest[0]}", rest[1:]  # as NeMo-Run's own command line has it
    if command.startswith("recipes."):
        return _recipe(command.removeprefix("recipes."), rest)
    if command == "verify":
        return _verify(rest)
    if command.startswith("-"):
        known = ("--help", "--version")
        raise UsageError(f"unknown option {command}{did_you_mean(command, known) or '; options: ' + ', '.join(known)}")
    hint = did_you_mean(command, (*COMMANDS, *(f"recipes.{n}" for n in RECIPES)))
    raise UsageError(f"unknown command {command!r}{hint}\n  {PROGRAM} --help lists the commands")


@dataclass
class _Line:
    """A parsed command line: options with their values, and the rest in order."""

    options: dict[str, str]
    rest: list[str]


def _split(argv: list[str], known: Mapping[str, str]) -> _Line:
    line, words = _Line({}, []), iter(argv)
    for word in words:
        if not word.startswith("-"):
            line.rest.append(word)
            continue
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if name not in known:
            raise UsageError(f"unknown option {name}{did_you_mean(name, known) or '; options: ' + ', '.join(known)}")
        if name in WITH_VALUE:
            value = value if equals else next(words, "")
            if not value or value.startswith("-"):
                raise UsageError(f"{name} needs a value: {known[name]}")
        elif equals:
            raise UsageError(f"{name} takes no value, got {value!r}")
        line.options[name] = value
    return line


def _recipe(name: str, argv: list[str]) -> int:
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES).replace("'", "'recipes.", 1)
        raise UsageError(f"unknown recipe {name!r}{hint}\n{help.recipe_list()}")
    line = _split(argv, RECIPE_OPTIONS)
    if "--help" in line.options:
        print(help.recipe(name))
        return 0
    executor = line.options.get("--executor", "local")
    base.check(executor)
    fields = overrides.recipe_fields(name)
    values = overrides.parse(overrides.split(line.rest), fields)
    overrides.require(name, values)
    overrides.check_layout(name, values)

    dryrun, as_json = "--dryrun" in line.options, "--json" in line.options
    if "--executor" not in line.options and not dryrun:
        print(f"{PROGRAM}: no --executor given, running on this machine (--executor local)", file=sys.stderr)
    return run_recipe(name, values, executor, dryrun, as_json)


def run_recipe(name: str, values: dict[str, Any], executor: str, dryrun: bool = False, as_json: bool = False) -> int:
    """Build a recipe with ``values`` (by field path), check what can be checked, then run it, or show it.

    Raises:
        UserError: the recipe cannot run, or a step of it failed.
    """
    from mimo_jobs import console, pipeline
    from mimo_jobs.hub import locate_model

    if "model" in values:
        values["model"] = locate_model(values["model"], download=not dryrun)
    steps = pipeline.steps_of(overrides.build(name, values), name)
    run = pipeline.make_run(name, steps, base.load(executor))
    for step in steps:
        step.layout  # noqa: B018  a layout that does not resolve is the first thing to say
    pipeline.check_targets(steps)
    # Later steps read what earlier ones write, so only the first can be checked now; each is checked before it starts.
    plan = pipeline.preflight(steps[0])
    if dryrun:
        _show_dryrun(run, values, plan, executor, as_json)
        return 0
    pipeline.run_chain(run, console.Steps(console.make(stderr=True), len(steps)), {steps[0].name: plan})
    return _conclude(run, as_json)


def _conclude(run: "Run", as_json: bool) -> int:
    """Say where things are and what to type next; a chain that verified ends with the parity line."""
    certificate = run.summaries.get("verify")
    if as_json:
        print(
            json.dumps({"run_id": run.run_id, "record": str(run.root), "steps": run.summaries}, indent=2, default=str)
        )
        return 0
    last = run.steps[-1]
    places = {s.name: s.arguments["target"] for s in run.steps if "target" in s.arguments}
    print(f"records   {run.root}")
    for name, place in places.items():
        print(f"{name if len(places) > 1 else 'target':<9} {place}")
    if last.job == "import_hf":
        print(_next(f"{PROGRAM} recipes.qwen35vl_export source={_quoted(places[last.name])} target=DIR"))
    elif last.job == "export_hf":
        from mimo_jobs import console

        print(_next(f"{PROGRAM} verify ORIGINAL_DIR {_quoted(places[last.name])}"))
        console.make().print(console.export_table(run.summaries[last.name]))
    elif run.name == "quickstart":
        print(_next(f"{PROGRAM} recipes.qwen35vl_import --help"))
    if certificate is not None:
        print(parity_line(certificate))
    return 0


def _next(command: str) -> str:
    return f"next      {command}"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def parity_line(certificate: Mapping[str, Any]) -> str:
    """``parity: 473/473 tensors bit-exact``."""
    every = certificate["tensors"] + len(certificate["only_left"]) + len(certificate["only_right"])
    return f"parity: {certificate['bit_exact']}/{every} tensors bit-exact"


def _show_dryrun(run: "Run", values: Mapping[str, Any], plan: Any, executor: str, as_json: bool) -> None:
    from mimo_jobs import console

    if as_json:
        print(json.dumps(_dryrun_data(run, plan, executor), indent=2, default=str))
        return
    out = console.make()
    for step in run.steps:
        chained = len(run.steps) > 1
        prefix = f"{step.name}: " if chained else ""
        layout = plan.layout if plan and step is run.steps[0] else step.layout
        ranks = f"{step.world_size} rank{'s' * (step.world_size > 1)}"
        out.print(f"{prefix}{step.job} on {executor}, {ranks}", style="bold")
        out.print(console.recipe_table(overrides.flat(step.arguments), {} if chained else values, layout))
        if layout:
            out.print("ranks", style="bold")
            out.print(console.rank_map(layout))
        if plan and step is run.steps[0]:
            out.print("plan", style="bold")
            out.print(console.plan_table(plan))
        out.print("command", style="bold")
        for text in _commands(run, step):
            out.print(text, soft_wrap=True)
        out.print()
    out.print(
        f"dry run: nothing was started or written; every run gets its own directory in {run.root.parent}",
        soft_wrap=True,
    )


def _commands(run: "Run", step: "Step") -> list[str]:
    from mimo_jobs import console
    from mimo_jobs.pipeline import IN_PROCESS

    if step.job in IN_PROCESS:
        return ["  in this process, no ranks"]
    return list(console.command_lines(run.launcher.commands(run.job(step))))


def _dryrun_data(run: "Run", plan: Any, executor: str) -> dict[str, Any]:
    from mimo_jobs.pipeline import IN_PROCESS

    steps = []
    for step in run.steps:
        layout = step.layout
        groups = [] if step.job in IN_PROCESS else run.launcher.commands(run.job(step))
        steps.append(
            {
                "name": step.name,
                "job": step.job,
                "world_size": step.world_size,
                "arguments": step.plain(),
                "layout": layout.as_layout() if layout else None,
                "commands": [{"ranks": list(g.ranks), "host": g.host, "command": g.command} for g in groups],
            }
        )
    summary = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name != "layout"} if plan else None
    return {"recipe": run.name, "executor": executor, "steps": steps, "plan": summary}


def _verify(argv: list[str]) -> int:
    line = _split(argv, VERIFY_OPTIONS)
    if "--help" in line.options:
        print(help.verify())
        return 0
    if len(line.rest) != 2:
        raise UsageError(f"verify needs two directories, got {len(line.rest)}\n  usage: {VERIFY_USAGE}")
    for place in line.rest:
        if not os.path.isdir(place):
            raise UserError(f"{place}: no such directory\n  usage: {VERIFY_USAGE}")

    from mimo_jobs import console, paths
    from mimo_jobs.conversion.verify import verify_hf

    left, right = (paths.absolute(p) for p in line.rest)
    with console.Steps(console.make(stderr=True), 1).step("verify") as shown:

        def progress(done: int, total: int) -> None:
            shown.watch({"phase": "compare", "done": done, "total": total})

        certificate = verify_hf(left, right, progress=progress)
    if "--json" in line.options:
        print(json.dumps(certificate, indent=2))
    else:
        console.make().print(console.certificate_table(certificate))
        print(parity_line(certificate))
    return 0 if certificate["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
