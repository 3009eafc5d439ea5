"""How fast a card is: the constants of the cost model, from ``rates.json`` beside this file, each with where it comes from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UsageError, did_you_mean

FILE = Path(__file__).with_name("rates.json")
ASSUMED = "assumed"  # how the source of such a number begins


@dataclass(frozen=True)
class Rates:
    """What `cost` reckons with. Those under "fitted" are what `fit.fit` adjusts to measurements.

    Attributes:
        card: name of the GPU, as `submission.GPU_MEMORY` has it.
        matrix, matrix_fp32: FLOP/s of a large matrix product in bf16, in fp32.
        hbm: bytes/s of the card's memory.
        nvlink: bytes/s of a card to the others of its node, one direction.
        network: bytes/s of a card to other nodes, one direction.
        links: share of nvlink or network that a collective reaches.
        latency: seconds of a collective or message of no length.
        language_ceiling, images_ceiling: share of the matrix rate that a component's products reach, were they large (fitted).
        mixing: the same of attention and of the delta rule.
        half_tokens: tokens (patches) of a microbatch with which a product is half as fast as with very many (fitted).
        half_width: geometric mean of a product's two widths on a rank with which it is half as fast as with very wide ones.
        launch: seconds of the host for one pass over one layer; a layer takes no less (fitted).
        step_overhead: seconds of a step that depend on nothing.
        memory_factor: what PyTorch allocates at most, over what `training.memory` says (fitted).
        memory_reserve: bytes of a card that training cannot have: CUDA context, NCCL's buffers, fragments.
        source: field -> where its number comes from.
    """

    card: str
    matrix: float
    matrix_fp32: float
    hbm: float
    nvlink: float
    network: float
    links: float
    latency: float
    language_ceiling: float
    images_ceiling: float
    mixing: float
    half_tokens: float
    half_width: float
    launch: float
    step_overhead: float
    memory_factor: float
    memory_reserve: float
    source: Mapping[str, str]

    @property
    def assumed(self) -> list[str]:
        """The constants that nobody has measured."""
        return [name for name in NUMBERS if self.source[name].startswith(ASSUMED)]


NUMBERS = tuple(f.name for f in fields(Rates) if f.name not in ("card", "source"))


def save(rates: Rates, file: Path = FILE) -> None:
    """Write a card's constants, as after `fit.fit`; those that all cards share are kept where they are."""
    table = json.loads(file.read_text())
    own = table["cards"].setdefault(rates.card, {"source": {}})
    for name in NUMBERS:
        number, source = getattr(rates, name), rates.source[name]
        if name in own or (number, source) != (table["common"][name], table["common"]["source"][name]):
            own[name], own["source"][name] = number, source
    file.write_text(json.dumps(table, indent=1) + "\n")
    _table.cache_clear()


@cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def cards() -> list[str]:
    """The cards whose rates are known."""
    return list(_table()["cards"])


def load(card: str) -> Rates:
    """The rates of a card, whatever the case of its name.

    Raises:
        UsageError: they are not known.
    """
    name = card.upper()
    if name not in _table()["cards"]:
        hint = did_you_mean(name, cards())
        raise UsageError(
            f"gpu={card}: how fast it is is not known{hint}; set gpu to the nearest of {', '.join(cards())}, and gpu_memory"
        )
    common, own = _table()["common"], _table()["cards"][name]
    return Rates(card=name, **(common | own | {"source": common["source"] | own["source"]}))
