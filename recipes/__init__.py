"""Recipes: functions that return a whole configuration. This table is all that the command line loads to list them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Where a recipe lives, and the function of ``mimo_jobs.jobs`` that it configures (None: a chain of several)."""

    module: str
    job: str | None


RECIPES = {
    "qwen35vl_import": Entry("recipes.qwen35vl", "import_hf"),
    "qwen35vl_export": Entry("recipes.qwen35vl", "export_hf"),
    "quickstart": Entry("recipes.quickstart", None),
}
