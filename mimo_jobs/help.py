"""The text of ``--help``: plain, under 100 columns, made from signatures and docstrings."""

import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_jobs import overrides

PROGRAM = "nemo-run"
RECIPE_OPTIONS = {
    "--executor": "NAME: where to run; local is this machine, and the default; slurm or slurm:NAME a profile of executors.toml",
    "--dryrun": "show the recipe, its ranks, the plan and the commands or scripts; run nothing",
    "--wait": "with slurm: wait for the end, and exit 1 unless every step is done",
    "--force": "submit in spite of warnings",
    "--json": "print the result (or the dry run) as JSON",
    "--yes": "accepted for nemorun's sake; nothing is ever asked",
    "--help": "show the fields of a recipe",
}
VERIFY_OPTIONS = {
    "--executor": "NAME: slurm or slurm:NAME shares the work out over an array of CPU jobs",
    "--json": "print the certificate as JSON",
    "--help": "show this",
}
VERIFY_USAGE = f"{PROGRAM} verify HF_DIR OTHER_HF_DIR [--executor slurm] [--json]"
RUN = "ID is a run's id, the beginning of one, latest, or the directory of a record"


@dataclass(frozen=True)
class Command:
    """A command on recorded runs or executors: its arguments, what it does, its options and an example."""

    arguments: str
    text: str
    options: Mapping[str, str]
    example: str
    more: str = ""


THERE = {"--executor": "NAME: a profile with ssh: of the runs on that login node"}
JSON = {"--json": "print JSON"}
HELP = {"--help": "show this"}
COMMANDS = {
    "plan": Command(
        "recipes.NAME model=DIR gpus=N [FIELD=VALUE ...]", "which layout to train in: predicted speed and memory of every one, and the command of the best",
        {"--executor": "NAME: slurm or slurm:NAME gives the GPU, and how many a node has", **JSON, **HELP},
        "plan recipes.qwen35vl_sft model=/models/Qwen3.5-9B gpus=8 tokens=2048 image_tokens=576",
        "A field of the recipe that is set is kept, such as layout.language.tp=4, micro_batch_size=1 or freeze=images; the others are chosen",
    ),
    "status": Command(
        "[ID]", "steps of a run, or of all that are under way: state, job, nodes, elapsed, progress, reason",
        {"--all": "every run", "--wait": "until the run has ended; exit 1 unless it is done", **THERE, **JSON, **HELP}, "status latest", RUN,
    ),
    "list": Command("", "every run, a line each", {**THERE, **JSON, **HELP}, "list"),
    "logs": Command(
        "ID[.STEP][:COMPONENT]", "the logs of a run, of a step, or of a component's ranks",
        {"--follow": "print what is added until the steps have ended (-f)", **THERE, **HELP}, "logs -f latest.import:language", RUN,
    ),
    "report": Command(
        "ID", "a run as one HTML page: curves, ranks, steps, configuration, parity; works without a network",
        {"--output": "FILE: where to write it (-o); without it report.html in the run's record; - prints it", **THERE, **HELP},
        "report latest -o report.html", RUN,
    ),
    "cancel": Command("ID", "end every step of a run that is queued or running", {**THERE, **HELP}, "cancel latest", RUN),
    "resume": Command(
        "ID [executor.FIELD=VALUE ...]", "go on with a run at its failed step; what is done stays",
        {"--force": "submit in spite of warnings", **THERE, **JSON, **HELP}, "resume latest executor.time=02:00:00", RUN,
    ),
    "diff": Command("ID ID", "what differs between two runs: fields, profile, versions, code", {**THERE, **JSON, **HELP}, "diff latest RUN", RUN),
    "doctor": Command(
        "[executor.FIELD=VALUE ...]", "check this machine, or a cluster with a small real job",
        {"--executor": "NAME: local, slurm or slurm:NAME", **JSON, **HELP}, "doctor --executor slurm",
    ),
    "hash": Command(
        "HF_DIR", "blake3 of every tensor of a checkpoint",
        {"--executor": "NAME: slurm or slurm:NAME shares the work out over an array of CPU jobs", **JSON, **HELP},
        "hash checkpoints/hf --executor slurm",
    ),
}  # fmt: skip


def program() -> str:
    """``nemo-run --help``."""
    return f"""{PROGRAM}: Hugging Face checkpoints to MegatronMIMO and back, bit for bit

usage: {PROGRAM} recipes.NAME field=value ... [--executor NAME] [--dryrun] [--json]
       {PROGRAM} COMMAND ...

{recipe_list()}

commands:
{_rows({"verify": "compare two Hugging Face checkpoints byte for byte", **{n: c.text for n, c in COMMANDS.items()}})}

options:
{_rows(RECIPE_OPTIONS | {"--version": "show the version"})}

{PROGRAM} recipes.NAME --help shows the fields of a recipe. Start here:
  {PROGRAM} recipes.quickstart --executor local"""


def recipes() -> str:
    """``nemo-run recipes --help``."""
    return f"{recipe_list()}\n\n{PROGRAM} recipes.NAME --help shows the fields of one"


def recipe_list() -> str:
    """Every recipe with its line."""
    return "recipes:\n" + _rows({f"recipes.{name}": text for name, text in overrides.summaries().items()})


def command(name: str) -> str:
    """``nemo-run COMMAND --help``."""
    known = COMMANDS[name]
    usage = " ".join(w for w in (PROGRAM, name, known.arguments, "[options]") if w)
    more = f"\n\n{known.more}." if known.more else ""
    fields = ""
    if name == "doctor":
        fields = f"\n\nfields of a profile, also as executor.FIELD=VALUE on every command line (docs/slurm.md):\n{_rows(_profile())}"
    elif name == "plan":
        fields = f"\n\nfields besides the recipe's (docs/planning.md):\n{_rows(_asked())}"
    return f"""usage: {usage}

{known.text[0].upper()}{known.text[1:]}.{more}

options:
{_rows(known.options)}{fields}

example:
  {PROGRAM} {known.example}"""


def _profile() -> dict[str, str]:
    from launchers.profiles import Profile

    return overrides.docs(Profile)


def _asked() -> dict[str, str]:
    from mimo_jobs.planning.command import Asked

    return {p: _row(f, f.default) for p, f in overrides.leaves(Asked).items()}


def verify() -> str:
    """``nemo-run verify --help``."""
    return f"""usage: {VERIFY_USAGE}

Compare two Hugging Face checkpoints byte for byte and print the parity certificate. Exit code 1 when they differ.

options:
{_rows(VERIFY_OPTIONS)}"""


def recipe(name: str) -> str:
    """``nemo-run recipes.NAME --help``: fields with types and defaults, and an example that works."""
    steps = overrides.steps_of(name)
    fields = {p: f for p, f in overrides.recipe_fields(name).items() if overrides.step_field(p, steps)[0] is None}
    defaults = overrides.defaults(name)
    own = {p: _row(f, defaults[p]) for p, f in fields.items() if "." not in p or p == "layout.world_size"}
    return f"""recipes.{name}: {overrides.summaries()[name]}

usage: {PROGRAM} recipes.{name} field=value ... [--executor NAME] [executor.FIELD=value] [--dryrun] [--json]

fields, with their defaults:
{_rows(own)}
{_components(fields, defaults)}{_groups(fields, defaults)}{_of_steps(name)}
options:
{_rows(RECIPE_OPTIONS)}

example:
{example(name)}"""


def example(name: str) -> str:
    """The recipe's example as a command to paste, one field a line when it is long."""
    words = [f"{PROGRAM} recipes.{name}", *overrides.example(name).split(), "--executor local"]
    line = "  " + " ".join(words)
    return line if len(line) <= 100 else "  " + " \\\n    ".join(words)


def _of_steps(name: str) -> str:
    steps = overrides.steps_of(name)
    if not steps:
        return ""
    listed = ", ".join(f"{s}.FIELD" for s in steps)
    text = f"The fields above set every step that has them; {listed} set one step's, where it is in the chain."
    return f"\n{textwrap.fill(text, 100)}\n"


def _groups(fields: Mapping[str, overrides.Field], defaults: Mapping[str, Any]) -> str:
    """The fields of each group of settings (``optimizer.lr``) in a table of its own."""
    groups: dict[str, dict[str, str]] = {}
    for path, field in fields.items():
        group, _, leaf = path.rpartition(".")
        if group and not path.startswith("layout."):
            groups.setdefault(group, {})[f".{leaf}"] = _row(field, defaults[path])
    return "".join(f"\n{group}:\n{_rows(rows)}\n" for group, rows in groups.items())


def _row(field: overrides.Field, default: Any) -> str:
    return f"{_default(default)}{_sep(field)}{_doc(field)}"


def _components(fields: Mapping[str, overrides.Field], defaults: Mapping[str, Any]) -> str:
    """The fields of ``layout.language`` and ``layout.images`` in one table: they are the same."""
    deep = [p for p in fields if p.count(".") == 2]
    if not deep:
        return ""
    parents = list(dict.fromkeys(p.rpartition(".")[0] for p in deep))
    rows = {}
    for leaf in dict.fromkeys(p.rpartition(".")[2] for p in deep):
        values = [_default(defaults[f"{parent}.{leaf}"], unset="auto") for parent in parents]
        rows[f".{leaf}"] = (
            f"{values[0] if len(set(values)) == 1 else ' / '.join(values):<6} {_doc(fields[f'{parents[0]}.{leaf}'])}"
        )
    return f"\n{' and '.join(parents)}:\n{_rows(rows)}\n"


def _default(value: Any, unset: str = "none") -> str:
    if value is overrides.REQUIRED:
        return "required"
    return unset if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _sep(field: overrides.Field) -> str:
    return f" ({overrides.type_name(field.type)})  "


def _doc(field: overrides.Field) -> str:
    return field.doc.rstrip(".").replace("``", "")


def _rows(rows: Mapping[str, str]) -> str:
    """Two columns, the second wrapped under itself."""
    left = max(map(len, rows)) + 4
    columns = min(100, max(60, shutil.get_terminal_size().columns))
    lines = []
    for name, text in rows.items():
        indent = " " * left
        filled = textwrap.fill(text, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        lines.append(f"  {name:<{left - 2}}{filled[left:]}".rstrip())
    return "\n".join(lines)
