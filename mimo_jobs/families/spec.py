"""What a model family declares: its tensors on both sides, and which rows go where. Standard library only.

A `Rule` relates whole Hugging Face tensors to whole checkpoint tensors by a permutation of rows: lay the rows of its HF
tensors end to end, lay the rows of its checkpoint tensors end to end, and every row on one side is one row on the other.
That makes every rule exact and invertible (`tests/unit/test_rules.py` holds the law), and no value is ever computed.
"""

import enum
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Dims = Mapping[str, int]
Shape = tuple[str | int, ...]
# (first row among the HF rows laid end to end, number of rows), in checkpoint order.
Pieces = list[tuple[int, int]]


class Cut(enum.Enum):
    """How tensor parallelism cuts a checkpoint tensor (megatron-core's sharded_state_dict)."""

    REPLICATED = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"
    GATED_ROWS = "gated rows"  # two halves, each cut by rows (mlp.apply_swiglu_sharded_factory)
    VOCAB = "vocabulary rows"  # rows, padded to a multiple of tp


@dataclass(frozen=True)
class Hf:
    """A Hugging Face tensor: name and shape; dimensions are names in the family's dims or numbers."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Stored:
    """A tensor of the MIMO checkpoint: key (without the component's prefix), shape, and its cut under TP."""

    key: str
    shape: Shape
    cut: Cut = Cut.REPLICATED


@dataclass(frozen=True)
class Rule:
    """One row of the weight map; see the module's docstring. ``order`` gives the row permutation."""

    stored: tuple[Stored, ...]
    hf: tuple[Hf, ...]
    order: Callable[[Dims], Pieces] | None = None  # None: rows keep their order


def consecutive(stored: Stored | Iterable[Stored], hf: Hf | Iterable[Hf]) -> Rule:
    """The rows of the HF tensors, in order, cut into the checkpoint tensors, in order (copy, concatenate, split)."""
    return Rule((stored,) if isinstance(stored, Stored) else tuple(stored), (hf,) if isinstance(hf, Hf) else tuple(hf))


@dataclass(frozen=True)
class BoundTensor:
    """A tensor with its numbers. ``rows`` and ``row_elements`` are those of its matrix view (first axis kept)."""

    name: str
    shape: tuple[int, ...]
    cut: Cut = Cut.REPLICATED

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_elements(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class BoundRule:
    """A rule of one layer of one model, with its numbers.

    Attributes:
        component: ``language`` or ``images``.
        stage: the layer it belongs to (its pipeline stage holds it), or ``"first"`` / ``"last"``.
    """

    component: str
    stage: int | str
    stored: tuple[BoundTensor, ...]
    hf: tuple[BoundTensor, ...]
    pieces: tuple[tuple[int, int], ...]


def bind(
    rules: Iterable[Rule], dims: Dims, component: str, stage: int | str, prefix: str, **names: object
) -> list[BoundRule]:
    """Give rules their numbers; ``{name}`` in tensor names is filled from ``names``, keys get ``prefix``."""

    def shape(symbolic: Shape) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else dims[d] for d in symbolic)

    bound = []
    for rule in rules:
        hf = tuple(BoundTensor(t.name.format(**names), shape(t.shape)) for t in rule.hf)
        stored = tuple(BoundTensor(prefix + t.key.format(**names), shape(t.shape), t.cut) for t in rule.stored)
        pieces = rule.order(dims) if rule.order else [(0, sum(t.rows for t in hf))]
        bound.append(BoundRule(component, stage, stored, hf, tuple(pieces)))
    return bound


@dataclass(frozen=True)
class WeightMap:
    """The whole map of one model.

    Attributes:
        rules: every rule bound to this model's numbers.
        aliases: HF name that may be absent -> HF name that it repeats (tied embeddings).
        passed_through: prefixes of HF names that are carried through the checkpoint untouched.
        num_layers: layers of the language model (for pipeline stages).
        divisors: per component, (what, value) that its tp must divide.
        groups: per component, (what, value) that tp divides or is a multiple of (KV heads, shared by ranks beyond).
    """

    rules: tuple[BoundRule, ...]
    aliases: Mapping[str, str]
    passed_through: tuple[str, ...]
    num_layers: int
    divisors: Mapping[str, tuple[tuple[str, int], ...]]
    groups: Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Family:
    """A model family: what `families.FAMILIES` registers under its ``model_type``.

    Attributes:
        model_type: Hugging Face's ``model_type``.
        weight_map: HF config (config.json as a dict) -> the model's weight map. Raises `UserError` for a config that
            the family does not support.
        rules_version: grows whenever the checkpoint's keys, shapes or row orders change.
        drop_passed_through: HF config -> the config of a model without the passed-through tensors.
    """

    model_type: str
    weight_map: Callable[[Mapping], WeightMap]
    rules_version: int
    drop_passed_through: Callable[[Mapping], dict]
