"""Tensors inside of what holds them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor


def moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``move`` done to every tensor in it, through dicts and dataclasses; all else as it is."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: moved(one, move) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: moved(getattr(value, f.name), move) for f in dataclasses.fields(value)}
        )
    return value
