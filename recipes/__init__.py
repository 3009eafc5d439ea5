"""Recipes: functions that return a whole configuration. This table is all that the command line loads to list them."""

from collections.abc import Mapping
from dataclasses import dataclass

from recipes.layouts import SPLIT_8GPU


@dataclass(frozen=True)
class Entry:
    """Where a recipe lives, and the function of ``mimo_jobs.jobs`` that it configures (None: a chain of several).

    ``layout`` is the recipe's own, so that a layout that does not resolve is answered without building the recipe.
    ``steps``, step -> job, makes a chain a pipeline: its steps' fields can be set, and steps that are done are skipped. The recipe
    may leave some of them out.
    """

    module: str
    job: str | None
    layout: Mapping[str, Mapping[str, int]] | None = None
    steps: Mapping[str, str] | None = None


RECIPES = {
    "qwen35vl_import": Entry("recipes.qwen35vl", "import_hf", SPLIT_8GPU),
    "qwen35vl_export": Entry("recipes.qwen35vl", "export_hf", SPLIT_8GPU),
    "qwen35vl_sft": Entry("recipes.qwen35vl", "sft", SPLIT_8GPU),
    "qwen35vl_lora": Entry("recipes.qwen35vl", "lora", SPLIT_8GPU),
    "qwen35vl_pipeline": Entry(
        "recipes.qwen35vl",
        None,
        SPLIT_8GPU,
        {"import": "import_hf", "sft": "sft", "lora": "lora", "export": "export_hf", "verify": "verify"},
    ),
    "quickstart": Entry("recipes.quickstart", None),
}
