"""The text of ``--help``: plain, under 100 columns, made from signatures and docstrings."""

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from mimo_jobs import overrides

PROGRAM = "nemo-run"
RECIPE_OPTIONS = {
    "--executor": "NAME: where to run; local is this machine, and the default",
    "--dryrun": "show the recipe, its ranks, the plan and the commands; run nothing",
    "--json": "print the result (or the dry run) as JSON",
    "--yes": "accepted for nemorun's sake; nothing is ever asked",
    "--help": "show the fields of a recipe",
}
VERIFY_OPTIONS = {"--json": "print the certificate as JSON", "--help": "show this"}
VERIFY_USAGE = f"{PROGRAM} verify HF_DIR OTHER_HF_DIR [--json]"


def program() -> str:
    """``nemo-run --help``."""
    return f"""{PROGRAM}: Hugging Face checkpoints to MegatronMIMO and back, bit for bit

usage: {PROGRAM} recipes.NAME field=value ... [--executor local] [--dryrun] [--json]
       {VERIFY_USAGE}

{recipe_list()}

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


def verify() -> str:
    """``nemo-run verify --help``."""
    return f"""usage: {VERIFY_USAGE}

Compare two Hugging Face checkpoints byte for byte and print the parity certificate. Exit code 1 when they differ.

options:
{_rows(VERIFY_OPTIONS)}"""


def recipe(name: str) -> str:
    """``nemo-run recipes.NAME --help``: fields with types and defaults, and an example that works."""
    fields, defaults = overrides.recipe_fields(name), overrides.defaults(name)
    own = {p: f"{_default(defaults[p])}{_sep(f)}{_doc(f)}" for p, f in fields.items() if p.count(".") < 2}
    return f"""recipes.{name}: {overrides.summaries()[name]}

usage: {PROGRAM} recipes.{name} field=value ... [--executor local] [--dryrun] [--json]

fields, with their defaults:
{_rows(own)}
{_components(fields, defaults)}
options:
{_rows(RECIPE_OPTIONS)}

example:
{example(name)}"""


def example(name: str) -> str:
    """The recipe's example as a command to paste, one field a line when it is long."""
    words = [f"{PROGRAM} recipes.{name}", *overrides.example(name).split(), "--executor local"]
    line = "  " + " ".join(words)
    return line if len(line) <= 100 else "  " + " \\\n    ".join(words)


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
