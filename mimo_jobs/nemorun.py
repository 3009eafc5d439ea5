"""The recipes in NeMo-Run's own command line: ``nemorun recipes qwen35vl_import model=... target=...``.

NeMo-Run finds this module by its entry point group ``nemo_run.cli``. It parses and shows the configuration; when it
then calls the function, the same code as behind ``nemo-run`` checks the recipe and launches its ranks.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import fiddle as fdl
import nemo_run as run

from mimo_jobs import jobs, overrides
from recipes import RECIPES


def _function(name: str) -> Callable[..., None]:
    """A function with the fields of a recipe as its parameters, which runs the recipe."""
    job = RECIPES[name].job
    signed = jobs.JOBS[job] if job else overrides.recipe_function(name)

    def recipe(**arguments: Any) -> None:
        from mimo_jobs import cli

        given = {path: str(value) for path, value in overrides.flat(arguments).items() if value is not None}
        fields = overrides.recipe_fields(name)
        code = cli.guarded(lambda: cli.run_recipe(name, overrides.parse(given, fields), executor="local"))
        if code:
            sys.exit(code)

    # NeMo-Run's parser knows str, int, bool, Optional and dataclasses; our own check of the values comes after it.
    parameters = [
        p.replace(kind=p.KEYWORD_ONLY, annotation=_plain(p.annotation))
        for p in inspect.signature(signed).parameters.values()
        if p.name != "world"
    ]
    recipe.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    recipe.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    recipe.__name__ = recipe.__qualname__ = name
    recipe.__doc__ = overrides.summaries()[name]
    globals()[name] = recipe  # NeMo-Run serialises a function by module and name
    return recipe


def _plain(hint: Any) -> Any:
    """``Annotated[str, ...]`` and ``Literal[...]`` are ``str`` to NeMo-Run."""
    members = [_base(m) for m in overrides.members(hint)]
    return members[0] if len(members) == 1 else members[0] | None


def _base(hint: Any) -> Any:
    if hasattr(hint, "__metadata__"):
        return hint.__origin__
    return str if getattr(hint, "__args__", None) and all(isinstance(a, str) for a in hint.__args__) else hint


def _defaults(name: str, function: Callable[..., None]) -> Callable[[], Any]:
    """A factory of the recipe's own configuration, for NeMo-Run to apply overrides to."""

    def factory() -> run.Partial:
        required = {p: "" for p, f in overrides.recipe_fields(name).items() if f.default is overrides.REQUIRED}
        config = overrides.build(name, required)
        made: dict[str, Any] = {
            k: fdl.cast(run.Config, v) if isinstance(v, fdl.Config) else v
            for k, v in config.__arguments__.items()
            if k not in required
        }
        groups = {
            p.name: run.Config(p.annotation, **dict(vars(p.default)))  # NeMo-Run sets fields of configurations only
            for p in inspect.signature(jobs.JOBS[RECIPES[name].job or ""]).parameters.values()
            if dataclasses.is_dataclass(p.default) and p.name not in made
        }
        return run.Partial(function, **groups, **made)

    factory.__name__ = f"{name}_defaults"
    return factory


for _name, _entry in RECIPES.items():
    _made = _function(_name)
    run.cli.entrypoint(
        _made,
        name=_name,
        namespace="recipes",
        help=overrides.summaries()[_name],
        default_factory=_defaults(_name, _made) if _entry.job else None,
    )
