"""Checkpoints of random weights in published sizes."""

import json

import pytest

from mimo_jobs.conversion import tiny
from mimo_jobs.errors import UserError
from mimo_jobs.families import qwen35_vl
from tests.unit.test_rules import GOLDEN


def test_the_27b_shape_has_the_tensors_of_the_published_files():
    shape = tiny.published("27b")
    named = dict(tiny._shapes(tiny._config(shape), shape))
    assert {name: list(size) for name, size in named.items()} == GOLDEN["tensors"]
    assert shape.shards == 15 and len(named) == 1199


@pytest.mark.parametrize("name", ["0.8b", "4b", "9b", "27b"])
def test_a_published_shape_is_one_that_is_converted(name):
    config = json.loads(tiny._config(tiny.published(name)).to_json_string(use_diff=False))
    assert qwen35_vl.weight_map(config).rules


def test_an_unknown_shape_is_refused():
    with pytest.raises(UserError, match=r"'70b' is not one of 0\.8b, 4b, 9b, 27b"):
        tiny.published("70b")


def test_no_two_rows_of_a_large_tensor_are_alike():
    import torch

    value = tiny._value("model.language_model.embed_tokens.weight", (20_000, 1024), torch.Generator().manual_seed(0))
    assert len(torch.unique(value, dim=0)) == 20_000
    assert abs(value.float().std().item() - 0.5) < 0.01
