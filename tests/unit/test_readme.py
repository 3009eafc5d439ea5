"""What README says stays true: its numbers are those of the result files."""

import dataclasses

import pytest

from benchmarks import readme_table
from launchers.profiles import Profile
from mimo_jobs import overrides


@pytest.mark.parametrize(("name", "start", "end", "made"), readme_table.TABLES)
def test_tables_of_speed_are_those_of_the_results(name, start, end, made):
    shown = (readme_table.ROOT / name).read_text().split(start)[1].split(end)[0]
    assert shown.strip() == made().strip()


def test_every_field_of_a_profile_is_documented():
    text = (readme_table.ROOT / "docs/slurm.md").read_text()
    assert [f.name for f in dataclasses.fields(Profile) if f"`{f.name}`" not in text] == []


@pytest.mark.parametrize("name", ["qwen35vl_sft", "qwen35vl_lora"])
def test_every_setting_of_a_training_is_documented(name):
    text = (readme_table.ROOT / "docs/training.md").read_text()
    fields = [p for p in overrides.recipe_fields(name) if not p.startswith("layout.")]
    assert [p for p in fields if f"| `{p}` |" not in text] == []
