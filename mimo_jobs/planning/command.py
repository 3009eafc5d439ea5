"""``nemo-run plan recipes.qwen35vl_sft model=DIR gpus=N``: what is asked, read and checked; then searched and shown."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.profiles import Profile
from mimo_jobs import console, jobs, overrides
from mimo_jobs.checkpoint.manifest import is_mimo, read_config, read_manifest
from mimo_jobs.checkpoint.peft_dir import check_adapter, read_peft
from mimo_jobs.conversion.identity import TRAINING
from mimo_jobs.errors import UsageError, UserError, did_you_mean
from mimo_jobs.families import family_of
from mimo_jobs.hub import locate_model
from mimo_jobs.planning import advice, rates, show
from mimo_jobs.planning.candidates import Pins
from mimo_jobs.planning.search import Question, search
from mimo_jobs.planning.workload import Tuning, Workload
from mimo_jobs.submission import GPU_MEMORY
from mimo_jobs.training.config import Dataset, Lora
from recipes import RECIPES

GPU = "H100"
MOST_GPUS = 1 << 14
# Fields, and groups of fields, of the recipe that a plan takes too.
OF_RECIPE = (
    "data",
    "target",
    "global_batch_size",
    "precision",
    "freeze",
    "micro_batch_size",
    "recompute",
    "sequence_parallel",
    "optimizer.state",
)
GROUPS = ("layout.", "lora.")


@dataclass(frozen=True)
class Asked:
    """The fields of a plan that are none of the recipe.

    Args:
        model: Hugging Face or MIMO checkpoint; its config alone is read
        gpus: how many GPUs there are; a layout may use fewer
        gpu: model of the GPU; without it that of the executor's profile, or H100
        gpu_memory: memory of a GPU in GB; without it that of the profile or of the model
        tokens: mean tokens of a sample, image tokens included
        image_tokens: mean image tokens of a sample; 0 for text alone
        images: mean images of a sample
        loss_tokens: mean tokens of a sample with a loss; without it all that are no image tokens
        max_length: tokens of the longest sample, for which there has to be memory; as dataset.max_length of the recipe
    """

    model: jobs.ModelRef
    gpus: int
    gpu: str | None = None
    gpu_memory: int | None = None
    tokens: int = 2048
    image_tokens: int = 576
    images: int = 1
    loss_tokens: int | None = None
    max_length: int = Dataset.max_length


def fields(recipe: str) -> dict[str, overrides.Field]:
    """Every field of a plan for a recipe by its path."""
    of_recipe = overrides.recipe_fields(recipe)
    return overrides.leaves(Asked) | {p: f for p, f in of_recipe.items() if p in OF_RECIPE or p.startswith(GROUPS)}


def run(
    words: Sequence[str], executor: str, of_executor: Mapping[str, str], profile: Profile | None, as_json: bool
) -> int:
    """Print the plan; returns the exit code.

    Args:
        words: the recipe, and fields as they are typed.
        of_executor: fields of the executor's profile that were typed; they are in ``profile`` already.

    Raises:
        UsageError: a field is wrong, or nothing is allowed; UserError: nothing fits.
    """
    recipe = _recipe(words)
    values = overrides.parse(overrides.split(words[1:]), fields(recipe))
    question = ask(recipe, values, profile)
    found = search(question)
    if not found.best:
        raise UserError(advice.nothing_fits(question, found))
    command = show.command(recipe, _given(values), executor, of_executor, question, found.best[0])
    if as_json:
        print(
            json.dumps(
                {"recipe": recipe, "model": values["model"]}
                | show.data(question, found)
                | {"command": ["nemo-run", *command]},
                indent=2,
            )
        )
        return 0
    out, best = console.make(), found.best[: show.SHOWN]
    out.print(show.title(recipe, values["model"], question), style="bold", soft_wrap=True)
    out.print(show.layouts_table(question, best))
    out.print(
        f"\nshares of the step's time, mean over the GPUs in use; memory with {', '.join(best[0].memory)}",
        soft_wrap=True,
        style="dim",
    )
    out.print(show.parts_table(question, best))
    out.print()
    for line in show.summary(question, found):
        out.print(line, soft_wrap=True)
    blanks = [word.partition("=")[2] for word in command if word in ("data=DATA", "target=TARGET")]
    out.print("next      " + (f"with your {' and '.join(blanks)}:" if blanks else "run the first:"))
    out.print(show.pasted(command), soft_wrap=True)
    return 0


def _recipe(words: Sequence[str]) -> str:
    known = [n for n, entry in RECIPES.items() if entry.job in TRAINING]
    usage = f"nemo-run plan recipes.{known[0]} model=DIR gpus=8"
    if not words or "=" in words[0]:
        raise UsageError(
            f"plan needs a recipe first: {' or '.join(f'recipes.{n}' for n in known)}; for example\n  {usage}"
        )
    name = words[0].removeprefix("recipes.")
    if name in known and words[0].startswith("recipes."):
        return name
    if name in RECIPES and name not in known:
        raise UsageError(
            f"{words[0]} trains nothing by itself: plan takes {' or '.join(f'recipes.{n}' for n in known)}"
        )
    raise UsageError(
        f"unknown recipe {words[0]!r}{did_you_mean(words[0], [f'recipes.{n}' for n in known])}\n  usage: {usage}"
    )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The user's fields as the recipe names them."""
    own = {f.name for f in dataclasses.fields(Asked)} - {"model"}
    kept = {p: v for p, v in values.items() if p not in own}
    return kept | ({"dataset.max_length": values["max_length"]} if "max_length" in values else {})


def ask(recipe: str, values: Mapping[str, Any], profile: Profile | None) -> Question:
    """The question that the fields ask, checked.

    Args:
        values: by path, as `overrides.parse` reads them.

    Raises:
        UserError: names the field, its bound and its value.
    """
    asked = fields(recipe)
    if missing := [n for n in ("model", "gpus") if n not in values]:
        raise UsageError(
            f"plan needs {' and '.join(f'{m}=...' for m in missing)}; for example\n  nemo-run plan recipes.{recipe} model=DIR gpus=8"
        )
    all_values = {p: f.default for p, f in asked.items()} | dict(values)
    gpus = _between("gpus", values["gpus"], 1, MOST_GPUS)
    machine, gpu_memory = _card(all_values, profile)
    world = values.get("layout.world_size")
    if world is not None and world > gpus:
        raise UsageError(f"layout.world_size={world}: there are gpus={gpus}; set gpus={world}, or a smaller world")
    workload = _workload(values, all_values)
    config = _config(values["model"])
    state = all_values.get("optimizer.state", "fp32")
    tuning = Tuning(all_values["precision"], all_values.get("freeze", "none"), _lora(recipe, values, config), state)
    arguments = _arguments(recipe, values)
    layout = {p.removeprefix("layout."): v for p, v in values.items() if p.startswith("layout.") and v is not None}
    pins = Pins(
        layout,
        values.get("micro_batch_size"),
        values.get("recompute"),
        values.get("sequence_parallel"),
    )
    per_node = profile.gpus_per_node if profile else console.GPUS_PER_NODE
    return Question(config, tuning, workload, gpus, per_node, gpu_memory, machine, pins, arguments)


def _between(field: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise UsageError(f"{field}={value}: expected an integer from {least} to {most}")
    return value


def _card(values: Mapping[str, Any], profile: Profile | None) -> tuple[rates.Rates, float]:
    """Rates and bytes of the GPU: what was given, then what the profile says."""
    named = values["gpu"] or (profile.gpu if profile else None) or GPU
    memory = values["gpu_memory"]
    if memory is None and values["gpu"] is None and profile:
        memory = profile.gpu_memory
    known = rates.load(named)
    if memory is not None and memory < 1:
        raise UsageError(f"gpu_memory={memory}: expected at least 1 (GB)")
    return known, (memory or GPU_MEMORY[known.card]) * 1e9


def _workload(values: Mapping[str, Any], all_values: Mapping[str, Any]) -> Workload:
    """Defaults give way to what was set: a ``max_length`` of 1024 makes the mean no longer than that."""
    longest = _between("max_length", all_values["max_length"], 2, 1 << 24)
    tokens = values.get("tokens", min(all_values["tokens"], longest))
    image_tokens = values.get("image_tokens", min(all_values["image_tokens"], tokens))
    loss_tokens = all_values["loss_tokens"]
    if tokens > longest:
        raise UsageError(f"tokens={tokens}: the mean is above max_length={longest}; set max_length={tokens} or more")
    _between("tokens", tokens, 1, longest)
    _between("image_tokens", image_tokens, 0, tokens)
    loss_tokens = (
        max(1, tokens - image_tokens) if loss_tokens is None else _between("loss_tokens", loss_tokens, 1, tokens)
    )
    batch = _between("global_batch_size", all_values["global_batch_size"], 1, 1 << 20)
    images = _between("images", all_values["images"], 1, max(1, image_tokens))
    return Workload(tokens, image_tokens, loss_tokens, batch, longest, images)


def _config(model: str) -> dict[str, Any]:
    """config.json of a checkpoint, or what a MIMO checkpoint has of it."""
    place = Path(locate_model(model, download=False))
    config = read_manifest(place).config if is_mimo(place) else read_config(place)
    family_of(config, place / "config.json")
    return config


def _lora(recipe: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> Lora | None:
    """The adapters' settings, of the adapter to go on from where there is one."""
    if RECIPES[recipe].job != "lora":
        return None
    lora = Lora(**{p.removeprefix("lora."): v for p, v in values.items() if p.startswith("lora.")})
    if lora.adapter is None:
        return lora
    found = read_peft(Path(lora.adapter))
    check_adapter(found, family_of(config).weight_map(config), str(values["model"]))
    return found.applied_to(lora)


def _arguments(recipe: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The job's arguments with what the user gave of them: what `checks.check_settings` looks at."""
    job = RECIPES[recipe].job
    assert job is not None
    found = {n: p.default for n, p in inspect.signature(jobs.JOBS[job]).parameters.items() if p.default is not p.empty}
    found |= {"source": values["model"], "target": values.get("target", "TARGET")}
    for path, value in values.items():
        group, _, name = path.partition(".")
        if not name and path in found:
            found[path] = value
        elif group in ("lora", "optimizer"):
            found[group] = dataclasses.replace(found[group], **{name: value})
    return found | {
        "dataset": dataclasses.replace(
            found["dataset"], max_length=values.get("max_length", found["dataset"].max_length)
        )
    }
