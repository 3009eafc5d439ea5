"""The ``nemo-run`` command. Help and usage errors answer before anything slow is imported.

Exit codes: 0 done, 1 failed (a job, or two checkpoints that differ), 2 a wrong command line, 130 interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from launchers import base
from mimo_jobs import help, overrides
from mimo_jobs.errors import UsageError, UserError, did_you_mean
from mimo_jobs.help import PROGRAM, RECIPE_OPTIONS, VERIFY_OPTIONS, VERIFY_USAGE
from recipes import RECIPES

if TYPE_CHECKING:
    from launchers.profiles import Profile
    from mimo_jobs.pipeline import Plan
    from mimo_jobs.records import RunRecord

SHORT = {"-h": "--help", "-y": "--yes", "-f": "--follow", "-o": "--output"}
WITH_VALUE = ("--executor", "--output")
DEBUG = "MIMO_JOBS_DEBUG"
LONGEST = 1000  # characters of a line of an error


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
        print(f"{_red(PROGRAM)}: {_shortened(str(error))}", file=sys.stderr)
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
        print(f"{_red(PROGRAM)}: {_shortened(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:
        if DEBUG in os.environ:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        print(f"{_red(PROGRAM)}: {text} (a defect; set {DEBUG}=1 for the traceback)", file=sys.stderr)
        return 1


def _shortened(text: str) -> str:
    """One screen: a value that somebody pasted may be a whole file."""
    lines = [
        line if len(line) <= LONGEST else f"{line[: LONGEST - 120]} ... {line[-100:]}" for line in text.splitlines()
    ]
    return "\n".join(lines)


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
    if command in help.COMMANDS:
        return _command(command, rest)
    if command.startswith("-"):
        known = ("--help", "--version")
        raise UsageError(f"unknown option {command}{did_you_mean(command, known) or '; options: ' + ', '.join(known)}")
    known = ("recipes", "verify", *help.COMMANDS, *(f"recipes.{n}" for n in RECIPES))
    hint = did_you_mean(command, known)
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
            if not value or (value.startswith("-") and (name, value) != ("--output", "-")):
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
    kind = base.check(executor)
    given = overrides.split(line.rest)
    where = {p: given.pop(p) for p in list(given) if p == "on_finish" or p.startswith("executor.")}
    fields = overrides.recipe_fields(name)
    values = overrides.parse(given, fields)
    overrides.require(name, values)
    overrides.check_layout(name, values)
    on_finish = where.pop("on_finish", None) if kind == "local" else None
    target = _target(executor, kind, where)

    options = Options(
        **{o.removeprefix("--"): True for o in ("--dryrun", "--json", "--wait", "--force") if o in line.options}
    )
    if "--executor" not in line.options and not options.dryrun:
        print(f"{PROGRAM}: no --executor given, running on this machine (--executor local)", file=sys.stderr)
    if target is not None and target.ssh:
        return _over_there(target, [f"recipes.{name}", *argv])
    return run_recipe(name, values, executor, options, target, [f"recipes.{name}", *argv], on_finish)


@dataclass(frozen=True)
class Options:
    """What may be asked of a recipe's run besides its fields."""

    dryrun: bool = False
    json: bool = False
    wait: bool = False
    force: bool = False


def _target(executor: str, kind: str, where: Mapping[str, str]) -> "Profile | None":
    """The profile of a Slurm executor with the ``executor.`` fields of the command line; None for this machine."""
    if kind == "local":
        if where:
            raise UsageError(
                f"{next(iter(where))}: --executor local has no such field; the fields of executors are those of --executor slurm"
            )
        return None
    from launchers import profiles

    return profiles.load(executor, profiles.parse({p.removeprefix("executor."): v for p, v in where.items()}))


def _over_there(profile: "Profile", argv: list[str]) -> int:
    """Run the same command on the cluster's login node."""
    from launchers import remote

    return remote.run(profile, argv)


def run_recipe(
    name: str, values: dict[str, Any], executor: str, options: Options | None = None, profile: "Profile | None" = None,
    words: list[str] | None = None, on_finish: str | None = None,
) -> int:  # fmt: skip
    """Build a recipe with ``values`` (by field path), check what can be checked, then run it, queue it, or show it.

    Raises:
        UserError: the recipe cannot run, or a step of it failed.
    """
    from launchers import profiles
    from mimo_jobs import console, pipeline, provenance, running, submission
    from mimo_jobs.hub import locate_model

    options = options or Options()
    hook_words = profiles.hook_words(on_finish or "")
    for path, reference in overrides.model_refs(name, values).items():
        values[path] = locate_model(reference, download=not options.dryrun, field=path)
    recipe = overrides.build(name, values)
    plan = pipeline.make_plan(name, pipeline.steps_of(recipe, name), resumable=bool(overrides.steps_of(name)))
    asked = submission.prepare(plan, profile, need_slurm=not options.dryrun) if profile is not None else None
    about = {} if options.dryrun else submission.about(profile, words or []) | {"on_finish": hook_words}
    run = pipeline.new_record(plan, executor, about)
    if options.dryrun:
        from mimo_jobs import dryrun

        dryrun.show(plan, run, values, asked, options.json)
        return 0
    if asked is None:
        base.make_record(run.root)
        provenance.describe(run, plan, recipe, ship=False)
        running_view = console.Steps(console.make(stderr=True), len(plan.steps))
        summaries = running.run_chain(plan, run, running_view)
        return _conclude(plan, run, summaries, options.json)
    from mimo_jobs import commands

    commands.check_warnings(plan, options.force)
    return _queued(plan, run, submission.start(asked, run, recipe), options)


def _queued(plan: "Plan", run: "RunRecord", jobs: Mapping[str, int], options: Options) -> int:
    """Say what was queued, under which ids, and what to type next; with --wait stay until it has ended."""
    if options.json and not options.wait:
        skipped = {p.step.name: p.why for p in plan.steps if p.skip}
        print(
            json.dumps(
                {
                    "run_id": run.run_id,
                    "record": str(run.root),
                    "jobs": dict(jobs),
                    "skipped": skipped,
                    "notes": plan.notes,
                },
                indent=2,
            )
        )
        return 0
    if not options.json:
        for note in plan.notes:
            print(f"note      {note}")
        for planned in plan.steps:
            name = planned.step.name
            told = f"job {jobs[name]}" if name in jobs else "skipped"
            print(f"{name:<9} {told}" + (f": {planned.why}" if planned.why else ""))
        print(f"run       {run.run_id}\nrecord    {run.root}")
        if jobs:
            from launchers import profiles

            there = f" --executor {run.executor}" if profiles.sent is not None else ""
            print(_next(f"{PROGRAM} status {run.run_id}{there}"))
    if options.wait:
        from mimo_jobs import commands

        return commands.status(run.run_id, options.json, wait=True)
    return 0


def _conclude(plan: "Plan", run: "RunRecord", summaries: Mapping[str, dict[str, Any]], as_json: bool) -> int:
    """Say where things are and what to type next; a chain that verified ends with the parity line."""
    from mimo_jobs import console
    from mimo_jobs.checkpoint.manifest import MANIFEST_NAME

    certificate = summaries.get("verify")
    if as_json:
        print(json.dumps({"run_id": run.run_id, "record": str(run.root), "steps": summaries}, indent=2, default=str))
        return 0
    last = plan.steps[-1].step
    places = {p.step.name: p.step.arguments["target"] for p in plan.steps if "target" in p.step.arguments}
    print(f"records   {run.root}")
    for name, place in places.items():
        print(f"{name if len(places) > 1 else 'target':<9} {place}")
    if plan.recipe == "quickstart":
        print(_next(f"{PROGRAM} recipes.qwen35vl_pipeline --help"))
    elif last.job in ("import_hf", "sft"):
        print(_next(f"{PROGRAM} recipes.qwen35vl_export source={_quoted(places[last.name])} target=DIR"))
    elif last.job == "lora" and os.path.exists(os.path.join(last.arguments["source"], MANIFEST_NAME)):
        source, adapter = _quoted(last.arguments["source"]), _quoted(places[last.name])
        print(_next(f"{PROGRAM} recipes.qwen35vl_export source={source} adapter={adapter} target=DIR"))
    elif last.job == "export_hf" and last.name in summaries:
        print(_next(after_export(places[last.name], summaries[last.name])))
        console.make().print(console.export_table(summaries[last.name]))
    if certificate is not None:
        print(console.parity_line(certificate))
    return 0


def after_export(place: str, summary: Mapping[str, Any]) -> str:
    """What to type next: a comparison with the original, or where its bytes are not wanted, a look that it loads."""
    if summary["trained"] or summary["parity"].get("merged") or summary["casts"] or summary["dropped"]:
        code = (
            f"from transformers import AutoModelForImageTextToText as Model; Model.from_pretrained({json.dumps(place)})"
        )
        return f"python -c {_quoted(code)}"
    return f"{PROGRAM} verify ORIGINAL_DIR {_quoted(place)}"


def _next(command: str) -> str:
    return f"next      {command}"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _command(name: str, argv: list[str]) -> int:
    """A command on recorded runs or executors."""
    line = _split(argv, help.COMMANDS[name].options)
    if "--help" in line.options:
        print(help.command(name))
        return 0
    fields = {
        w.partition("=")[0].removeprefix("executor."): w.partition("=")[2]
        for w in line.rest
        if w.startswith("executor.") and "=" in w
    }
    rest = [w for w in line.rest if not (w.startswith("executor.") and "=" in w)]
    if name == "plan":
        return _plan(rest, line.options.get("--executor", "local"), fields, "--json" in line.options)
    least, most = {"status": (0, 1), "list": (0, 0), "diff": (2, 2), "doctor": (0, 0)}.get(name, (1, 1))
    if not least <= len(rest) <= most or (fields and name not in ("resume", "doctor", "hash")):
        usage = f"{PROGRAM} {name} {help.COMMANDS[name].arguments}"
        raise UsageError(
            f"{name} takes {most if least == most else f'{least} or {most}'} argument{'s' * ((least, most) != (1, 1))}, got {' '.join(line.rest) or 'none'}\n  usage: {usage}"
        )
    as_json = "--json" in line.options
    if name == "doctor":
        return _doctor(line.options.get("--executor", "local"), fields, as_json)
    if name == "hash":
        return _hash(rest[0], line.options.get("--executor", "local"), fields, as_json)
    if (executor := line.options.get("--executor")) is not None:
        target = _target(executor, base.check(executor), {})
        if target is not None and target.ssh:
            return _over_there(target, [name, *argv])
    from mimo_jobs import commands

    match name:
        case "status":
            return commands.status(
                rest[0] if rest else None, as_json, "--all" in line.options, "--wait" in line.options
            )
        case "list":
            return commands.list_runs(as_json)
        case "logs":
            return commands.logs(rest[0], "--follow" in line.options)
        case "report":
            return commands.report(rest[0], line.options.get("--output"))
        case "cancel":
            return commands.cancel(rest[0])
        case "resume":
            return commands.resume(rest[0], fields, "--force" in line.options, as_json)
        case _:
            return commands.diff(rest[0], rest[1], as_json)


def _doctor(executor: str, fields: Mapping[str, str], as_json: bool) -> int:
    kind = base.check(executor)
    target = _target(executor, kind, fields)
    if target is not None and target.ssh:
        return _over_there(
            target,
            [
                "doctor",
                "--executor",
                executor,
                *(f"executor.{k}={v}" for k, v in fields.items()),
                *["--json"] * as_json,
            ],
        )
    from dataclasses import asdict

    from launchers import profiles
    from mimo_jobs import console, doctor

    checks = doctor.run(executor, profiles.parse(fields) if target is not None else {})
    if as_json:
        print(json.dumps({"executor": executor, "checks": [asdict(c) for c in checks]}, indent=2, default=str))
    else:
        console.make().print(doctor.table(checks))
    return int(any(c.state == "failed" for c in checks))


def _plan(words: list[str], executor: str, fields: Mapping[str, str], as_json: bool) -> int:
    target = _target(executor, base.check(executor), fields)
    if target is not None and target.ssh:
        more = [*(f"executor.{k}={v}" for k, v in fields.items()), *["--json"] * as_json]
        return _over_there(target, ["plan", *words, "--executor", executor, *more])
    from mimo_jobs.planning import command

    return command.run(words, executor, fields, target, as_json)


def _hash(place: str, executor: str, fields: Mapping[str, str], as_json: bool) -> int:
    kind = base.check(executor)
    target = _target(executor, kind, fields)
    if target is not None and target.ssh:
        return _over_there(target, ["hash", place, "--executor", executor, *["--json"] * as_json])
    from mimo_jobs import console, paths

    directory = paths.absolute(place)
    if not os.path.isdir(directory):
        raise UserError(f"{place}: no such directory")
    from pathlib import Path

    from launchers import array

    with console.Steps(console.make(stderr=True), 1).step("hash") as shown:

        def progress(done: int, total: int) -> None:
            shown.watch({"phase": "hash", "done": done, "total": total})

        found = array.hash_files(Path(directory), target, progress=progress)
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    for tensor, about in found["tensors"].items():
        print(f"{about['digest']}  {tensor}")
    print(f"{found['total']['digest']}  all {found['total']['tensors']:,} tensors")
    return 0


def _verify(argv: list[str]) -> int:
    line = _split(argv, VERIFY_OPTIONS)
    if "--help" in line.options:
        print(help.verify())
        return 0
    executor = line.options.get("--executor", "local")
    kind = base.check(executor)
    fields = {
        w.partition("=")[0]: w.partition("=")[2] for w in line.rest if kind != "local" and w.startswith("executor.")
    }
    rest = [w for w in line.rest if kind == "local" or not w.startswith("executor.")]
    if len(rest) != 2:
        raise UsageError(f"verify needs two directories, got {len(rest)}\n  usage: {VERIFY_USAGE}")
    target = _target(executor, kind, fields)
    if target is not None and target.ssh:
        return _over_there(target, ["verify", *argv])
    for place in rest:
        if not os.path.isdir(place):
            raise UserError(f"{place}: no such directory\n  usage: {VERIFY_USAGE}")

    from mimo_jobs import console, paths
    from mimo_jobs.conversion.verify import verify_hf

    left, right = (paths.absolute(p) for p in rest)
    with console.Steps(console.make(stderr=True), 1).step("verify") as shown:

        def progress(done: int, total: int) -> None:
            shown.watch({"phase": "compare", "done": done, "total": total})

        if target is None:
            certificate = verify_hf(left, right, progress=progress)
        else:
            from pathlib import Path

            from launchers import array

            certificate = array.verify(Path(left), Path(right), target, progress=progress)
    if "--json" in line.options:
        print(json.dumps(certificate, indent=2))
    else:
        console.make().print(console.certificate_table(certificate))
        print(console.parity_line(certificate))
    return 0 if certificate["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
