"""``layout.language.tp=2`` on the command line: the fields of a recipe, their types, and how a value is read and set.

Fields come from signatures and dataclasses, so a wrong override is answered before Fiddle is imported (0.4 s).
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mimo_jobs import jobs, paths
from mimo_jobs.errors import UsageError, did_you_mean
from mimo_jobs.layout import ComponentLayout, ParallelLayout
from recipes import RECIPES

NONE_WORDS = ("none", "null")
BOOL_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Field:
    """A leaf that ``path=value`` can set. ``default`` is `REQUIRED` when there is none."""

    path: str
    type: Any
    default: Any
    doc: str


def summaries() -> dict[str, str]:
    """Recipe name -> first line of its docstring, read from the source: nothing is imported."""
    trees = {m: ast.parse(_source(m)) for m in {e.module for e in RECIPES.values()}}
    found = {}
    for name, entry in RECIPES.items():
        defs = [n for n in trees[entry.module].body if isinstance(n, ast.FunctionDef) and n.name == name]
        assert len(defs) == 1, f"{entry.module} has no function {name}"
        found[name] = (ast.get_docstring(defs[0]) or "").partition("\n")[0]
    return found


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec and spec.loader, module
    return spec.loader.get_source(module)  # pyright: ignore[reportAttributeAccessIssue]


def recipe_function(name: str) -> Callable[..., Any]:
    """The recipe's function, by its name in the table."""
    return getattr(importlib.import_module(RECIPES[name].module), name)


def recipe_fields(name: str) -> dict[str, Field]:
    """Every field of a recipe by its path: the parameters of its function first, then those of the job it configures."""
    own, job, steps = leaves(recipe_function(name)), RECIPES[name].job, RECIPES[name].steps
    if steps is not None:
        return own | _fields_of_steps(steps)
    if job is None:
        return own
    configured = leaves(jobs.JOBS[job])
    described = {
        p: f if f.doc or p not in configured else dataclasses.replace(f, doc=configured[p].doc) for p, f in own.items()
    }
    return described | {p: f for p, f in configured.items() if p not in own}


def steps_of(name: str) -> Mapping[str, str]:
    """Step -> job of a pipeline recipe; empty for the others."""
    return RECIPES[name].steps or {}


def _fields_of_steps(steps: Mapping[str, str]) -> dict[str, Field]:
    """``dtype`` sets every step that has it, ``export.dtype`` one; the steps' own inputs and outputs are the recipe's to choose."""
    each = {s: {p: f for p, f in leaves(jobs.JOBS[job]).items() if _is_setting(f)} for s, job in steps.items()}
    common: dict[str, Field] = {}
    for fields in each.values():
        common = {p: f for p, f in fields.items() if p not in steps} | common
    return common | {
        f"{s}.{p}": dataclasses.replace(f, path=f"{s}.{p}") for s, found in each.items() for p, f in found.items()
    }


def _is_setting(field: Field) -> bool:
    chosen = (jobs.Dir, jobs.File, jobs.ModelRef, jobs.DataRef)
    return "." in field.path or not any(m in chosen for m in members(field.type))


def step_field(path: str, steps: Mapping[str, str]) -> tuple[str | None, str]:
    """The step that a field of a pipeline sets, None when it sets all that have it, and the field's path in its job.

    A step may be called as a group of fields is: ``lora.lora.rank`` is a field of the step lora, and so is ``lora.seed``, while
    ``lora.rank`` sets the group ``lora`` of every step that has one.
    """
    step, _, field = path.partition(".")
    return (step, field) if step in steps and field in leaves(jobs.JOBS[steps[step]]) else (None, path)


def leaves(owner: Any, prefix: str = "", instance: Any = None) -> dict[str, Field]:
    """Leaf fields of a function's signature or of a dataclass, by dotted path; ``world`` is the rank's, not a field.

    Args:
        instance: of the dataclass ``owner``; its values are the defaults.
    """
    described = docs(owner)
    found = {}
    for name, parameter in inspect.signature(owner).parameters.items():
        hint, path = parameter.annotation, f"{prefix}{name}"
        if name == "world":
            continue
        assert not isinstance(hint, str), f"{owner.__name__}: annotate {name} with a type, not a string"
        default = getattr(instance, name, REQUIRED if parameter.default is parameter.empty else parameter.default)
        if dataclasses.is_dataclass(hint):
            found |= leaves(hint, f"{path}.", default if dataclasses.is_dataclass(default) else None)
        else:
            found[path] = Field(path, hint, default, described.get(name, ""))
    return found


def docs(owner: Any) -> dict[str, str]:
    """The ``name: text`` lines of a docstring's Args or Attributes."""
    _, _, rest = (inspect.getdoc(owner) or "").replace("Attributes:", "Args:").partition("Args:\n")
    block = re.sub(r"\n {6,}(?=\S)", " ", rest.partition("\n\n")[0])  # a text may go on, indented further
    return {n.strip(): text.strip() for n, colon, text in (line.partition(":") for line in block.splitlines()) if colon}


def example(name: str) -> str:
    """The arguments of the recipe's example, from its docstring."""
    lines = (inspect.getdoc(recipe_function(name)) or "").splitlines()
    return next((line.removeprefix("Example: ") for line in lines if line.startswith("Example: ")), "")


def split(arguments: Iterable[str]) -> dict[str, str]:
    """``["a.b=1"]`` -> ``{"a.b": "1"}``.

    Raises:
        UsageError: no ``=``, no name before it, or a field given twice.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        path, equals, value = argument.partition("=")
        if not equals or not path.strip():
            raise UsageError(
                f"unexpected argument {argument!r}: fields are set as name=value, without spaces around '='"
            )
        if path in found:
            raise UsageError(f"{path} is given twice: {found[path]!r} and {value!r}")
        found[path] = value
    return found


def parse(given: Mapping[str, str], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Read every value by the type of its field.

    Raises:
        UsageError: an unknown field, or a value that is not of the field's type; the message names both.
    """
    return {path: read(_known(path, fields), text) for path, text in given.items()}


def _known(path: str, fields: Mapping[str, Field]) -> Field:
    if path in fields:
        return fields[path]
    inside = [p for p in fields if p.startswith(f"{path}.")]
    if inside:
        raise UsageError(f"{path} is a group of fields; set one of {', '.join(inside)}")
    if path == "executor":
        raise UsageError("unknown field 'executor'; did you mean '--executor NAME'?")
    parents = [p for p in fields if path.startswith(f"{p}.")]
    if parents:
        raise UsageError(f"unknown field '{path}': {parents[0]} has no fields of its own; set {parents[0]}=VALUE")
    # A near miss in the last part is a better guess than a near miss of the whole path.
    parent, _, last = path.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in fields if p.rpartition(".")[0] == parent}
    hint = did_you_mean(last, siblings)
    if hint:
        near = hint.split("'")[1]
        hint = f"; did you mean '{siblings[near]}'?"
    else:
        hint = did_you_mean(path, fields)
    listed = "" if hint else f"; the fields are {', '.join(fields)}"
    raise UsageError(f"unknown field '{path}'{hint}{listed}")


def type_name(hint: Any) -> str:
    """How a type reads in help and errors: ``integer``, ``true or false``, ``directory``, ``keep or drop``."""
    options = members(hint)
    named = [_one_name(m) for m in options if m is not types.NoneType]
    return " or ".join(named + ["none"] * (types.NoneType in options))


def _one_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__metadata__[0]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(typing.get_args(hint))
    return {int: "integer", float: "number", bool: "true or false", str: "text"}.get(hint, str(hint))


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def read(field: Field, text: str) -> Any:
    """Read one value.

    Raises:
        UsageError: names the field, the type it has, and the value.
    """
    for hint in (m for m in members(field.type) if m is not types.NoneType):
        if types.NoneType in members(field.type) and text.lower() in NONE_WORDS:
            return None
        base = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            if text in choices:
                return text
            raise _wrong(field, text, did_you_mean(text, choices))
        if base is bool and text.lower() in BOOL_WORDS:
            return BOOL_WORDS[text.lower()]
        if base is int and INTEGER.fullmatch(text):
            return _in_range(field, int(text))
        if base is float and NUMBER.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        if base is str:
            if not text or "\0" in text:
                problem = "a NUL byte" if text else "an empty value"
                raise UsageError(f"{field.path}={text!r}: expected {type_name(field.type)}, got {problem}")
            if hint == jobs.DataRef:
                return paths.data_ref(text)
            return paths.absolute(text) if hint in (jobs.Dir, jobs.File) else text
    raise _wrong(field, text, "")


def _in_range(field: Field, value: int) -> int:
    """`ParallelLayout.resolve` says the same, but only once the recipe is built, and that imports Fiddle."""
    least = 0 if field.path.endswith(".rank_offset") else 1
    if "layout." in field.path and value < least:
        raise UsageError(f"{field.path}={value}: expected an integer of at least {least}")
    return value


def _wrong(field: Field, text: str, hint: str) -> UsageError:
    return UsageError(f"{field.path}={text!r}: expected {type_name(field.type)}{hint}")


def require(name: str, values: Mapping[str, Any]) -> None:
    """Raise a `UsageError`, with an example, unless every parameter that the recipe needs has a value."""
    missing = [p for p, f in leaves(recipe_function(name)).items() if f.default is REQUIRED and p not in values]
    if missing:
        needs = " and ".join(f"{m}=..." for m in missing)
        raise UsageError(f"recipes.{name} needs {needs}; for example\n  nemo-run recipes.{name} {example(name)}")


def model_refs(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The values that name a checkpoint by directory or hub id."""
    fields = leaves(recipe_function(name))
    return {p: values[p] for p, f in fields.items() if p in values and jobs.ModelRef in members(f.type)}


def check_layout(name: str, values: Mapping[str, Any]) -> None:
    """Resolve the layout that the recipe would have, without building it (Fiddle alone costs 0.4 s).

    Raises:
        UsageError: it does not resolve.
    """
    own, steps = RECIPES[name].layout, RECIPES[name].steps
    if own is None:
        return
    with_layout = [s for s, job in (steps or {}).items() if "layout.world_size" in leaves(jobs.JOBS[job])]
    for step in with_layout or [None]:
        chosen = {p: v for p, v in values.items() if p.startswith("layout.")}
        if step is not None:
            prefix = f"{step}."
            chosen |= {p.removeprefix(prefix): v for p, v in values.items() if p.startswith(f"{prefix}layout.")}
        try:
            _resolve(own, chosen)
        except UsageError as error:
            raise UsageError(f"{step}: {error}" if len(with_layout) > 1 else str(error)) from None


def _resolve(own: Mapping[str, Mapping[str, int]], chosen: Mapping[str, Any]) -> None:
    sizes: dict[str, dict[str, Any]] = {component: dict(fields) for component, fields in own.items()}
    for path, value in chosen.items():
        match path.split("."):
            case ["layout", component, field]:
                sizes.setdefault(component, {})[field] = value
    components = {component: ComponentLayout(**fields) for component, fields in sizes.items()}
    ParallelLayout(**components, world_size=chosen.get("layout.world_size")).resolve()


def build(name: str, values: Mapping[str, Any]) -> Any:
    """Call the recipe with the values that are its parameters, and set the others in the configuration it returns.

    Returns a ``fdl.Partial``, or a dict of them (a chain).
    """
    function = recipe_function(name)
    parameters = inspect.signature(function).parameters
    recipe = function(**{p: values[p] for p in parameters if p in values})
    steps = RECIPES[name].steps or {}
    set_by_user = [(p, v, *step_field(p, steps)) for p, v in values.items() if p not in parameters]
    # A step's own field wins over the common one, whatever their order.
    for path, value, step, field in sorted(set_by_user, key=lambda item: item[2] is not None):
        if not steps:
            _set(recipe, field, value)
            continue
        named = [step] if step else [s for s, job in steps.items() if field in leaves(jobs.JOBS[job])]
        if not any(s in recipe for s in named):
            raise UsageError(f"{path}: {_not_in_chain(name, named, recipe)}")
        for each in named:
            if each in recipe:
                _set(recipe[each], field, value)
    return recipe


def _not_in_chain(name: str, named: list[str], recipe: Mapping[str, Any]) -> str:
    """That none of the steps ``named`` is in the chain, and the recipe's own field that puts it there."""
    ways = [
        f"{p}={s}"
        for s in named
        for p, f in leaves(recipe_function(name)).items()
        if any(s in typing.get_args(m) for m in members(f.type) if typing.get_origin(m) is typing.Literal)
    ]
    hint = f"; set {' or '.join(ways)}" if ways else ""
    return f"is a field of {' and '.join(named)}, but the steps of this chain are {', '.join(recipe)}{hint}"


def defaults(name: str) -> dict[str, Any]:
    """Field path -> what the recipe sets when the user does not, `REQUIRED` where the user must."""
    own: dict[str, Any] = {p: f.default for p, f in leaves(recipe_function(name)).items()}
    if RECIPES[name].job is None and not steps_of(name):
        return own
    stand_ins = {p: "" for p, value in own.items() if value is REQUIRED}
    recipe = build(name, stand_ins)
    if steps := steps_of(name):  # a common field shows what the first step with it has
        each: dict[str, Any] = {}
        for step, job in steps.items():
            found = {p: f.default for p, f in leaves(jobs.JOBS[job]).items()}
            found |= flat(arguments(recipe[step])) if step in recipe else {}
            each = found | each | {f"{step}.{p}": v for p, v in found.items()}
        return each | own
    return flat(arguments(recipe)) | own


def _set(config: Any, path: str, value: Any) -> None:
    import fiddle as fdl

    *parents, last = path.split(".")
    for name in parents:
        child = getattr(config, name)
        if not isinstance(child, fdl.Buildable):  # a default that the recipe left as a plain dataclass
            child = fdl.Config(type(child), **{f.name: getattr(child, f.name) for f in dataclasses.fields(child)})
            setattr(config, name, child)
        config = child
    setattr(config, last, value)


def arguments(partial: Any) -> dict[str, Any]:
    """Every argument of a built ``fdl.Partial``, defaults included; ``world`` stays open for the rank."""
    import fiddle as fdl

    built = fdl.build(partial)
    bound = inspect.signature(built.func).bind_partial(**built.keywords)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "world"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dataclasses and dicts -> ``{"layout.language.tp": 2}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
