"""Every layout worth reckoning: sizes that are powers of two or divide something, as far as layout and model accept them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import IMAGES, LANGUAGE, ComponentLayout, ParallelLayout, ResolvedLayout
from mimo_jobs.planning.sizes import Sizes

LARGEST_MICROBATCH = 64
FEW_GPUS = 64  # up to which more is tried
LARGEST_DP = 6  # of the language, on more GPUs: how many of the largest are tried


@dataclass(frozen=True)
class Pins:
    """What the user chose.

    Attributes:
        layout: field, such as ``language.tp`` or ``world_size`` -> value.
        micro_batch_size, recompute, sequence_parallel: None where they are free.
    """

    layout: Mapping[str, int]
    micro_batch_size: int | None = None
    recompute: str | None = None
    sequence_parallel: bool | None = None

    def size(self, component: str, field: str, default: Any = None) -> Any:
        """A field of a component's layout."""
        return self.layout.get(f"{component}.{field}", default)


@dataclass(frozen=True)
class Refused:
    """A layout that the model or the components together do not allow, and why."""

    why: str


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _thinned(numbers: Iterable[int], gpus: int, octaves: int = 1) -> list[int]:
    """Of many numbers some, ascending: on few GPUs the smallest and the largest of each octave (1, 2 to 3, 4 to 7, ...), on more the largest of
    so many octaves. Of one octave that leaves out no power of two."""
    few, found = gpus <= FEW_GPUS, {}
    for n in sorted(numbers):
        found.setdefault((n.bit_length() - 1) // (1 if few else octaves), []).append(n)
    return sorted({n for those in found.values() for n in (those[0] if few else those[-1], those[-1])})


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())] if most > 0 else []


def layouts(sizes: Sizes, gpus: int, gpus_per_node: int, batch: int, pins: Pins) -> Iterator[ResolvedLayout | Refused]:
    """Every layout of at most ``gpus`` ranks, each once.

    tp: powers of two and divisors of a node's GPUs, up to a node. pp: powers of two and divisors of the layers. The language's dp:
    divisors of the global batch, and as many as there is room for. The images' dp: what divides the language's, or is a multiple of it that
    microbatches can be shared by. Of many divisors some are tried (`_thinned`).
    """
    model = _Model(sizes)
    tps = sorted({*_powers(min(gpus, gpus_per_node)), *(d for d in divisors(gpus_per_node) if d <= gpus)})
    pps = sorted({*_powers(sizes.dims["layers"]), *divisors(sizes.dims["layers"])})
    for tp in _pinned(pins, LANGUAGE, "tp", tps):
        for pp in _pinned(pins, LANGUAGE, "pp", pps):
            unit = tp * pp * pins.size(LANGUAGE, "cp", 1)
            room = gpus // unit
            dividing = _thinned((d for d in divisors(batch) if d <= room), gpus)
            if gpus > FEW_GPUS:
                dividing = dividing[-LARGEST_DP:]
            fits = [*dividing, room] if room and room not in dividing else dividing
            for dp in (d for d in _pinned(pins, LANGUAGE, "dp", fits) if d <= room):
                yield from _with_images(model, gpus, batch, pins, tps, (tp, pp, dp, unit * dp))


def _with_images(
    model: "_Model", gpus: int, batch: int, pins: Pins, tps: list[int], language: tuple[int, int, int, int]
) -> Iterator[ResolvedLayout | Refused]:
    tp, pp, dp, taken = language
    pinned = pins.size(IMAGES, "dp")
    each = batch // dp if batch % dp == 0 else 1
    multiples = [dp * k for k in divisors(each) if k <= LARGEST_MICROBATCH]
    shared = sorted({dp, *_thinned({*divisors(dp), *multiples}, gpus, octaves=2)}) if pinned is None else [pinned]
    for images in _pinned(pins, IMAGES, "tp", tps):
        if pp == 1 and taken % images == 0 and pinned in (None, taken // images):
            yield from model.resolve(pins, (tp, pp, dp), (images, taken // images), colocated=True)
        for count in (d for d in shared if images * d <= gpus - taken):
            yield from model.resolve(pins, (tp, pp, dp), (images, count), colocated=False)


def _pinned(pins: Pins, component: str, field: str, free: Sequence[int]) -> Sequence[int]:
    value = pins.size(component, field)
    return free if value is None else [value]


class _Model:
    """What the model says of sizes, each asked once."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._verdicts: dict[tuple[str, int, int], str] = {}

    def resolve(
        self, pins: Pins, language: tuple[int, int, int], images: tuple[int, int], colocated: bool
    ) -> Iterator[ResolvedLayout | Refused]:
        """The layout, or why it is none; nothing where a pin wants another one."""
        world = pins.layout.get("world_size")
        for why in (self._verdict(LANGUAGE, *language[:2]), self._verdict(IMAGES, images[0], 1)):
            if why:
                yield Refused(why)
                return
        start = {"rank_offset": 0} if colocated else {}
        tp, pp, dp = language
        of_language = ComponentLayout(**(start | {"tp": tp, "pp": pp, "dp": dp} | _of(pins, LANGUAGE)))
        of_images = ComponentLayout(**(start | {"tp": images[0], "dp": images[1]} | _of(pins, IMAGES)))
        if colocated and (of_language.rank_offset or of_images.rank_offset):
            return
        try:
            found = ParallelLayout(of_language, of_images).resolve()
        except UsageError as error:
            yield Refused(str(error))
            return
        if found.colocated == colocated and world in (None, found.world_size):
            yield found

    def _verdict(self, component: str, tp: int, pp: int) -> str:
        """Why the model does not allow these sizes of a component; empty if it does."""
        key = (component, tp, pp)
        if key not in self._verdicts:
            one, other = ComponentLayout(tp=tp, pp=pp, dp=1), ComponentLayout(dp=1)
            layout = ParallelLayout(one, other) if component == LANGUAGE else ParallelLayout(other, one)
            try:
                self.sizes.check(layout.resolve())
                self._verdicts[key] = ""
            except UsageError as error:
                self._verdicts[key] = str(error)
        return self._verdicts[key]


def _of(pins: Pins, component: str) -> dict[str, int]:
    """The pinned fields of a component's layout."""
    return {path.partition(".")[2]: value for path, value in pins.layout.items() if path.startswith(f"{component}.")}


def micro_batches(layout: ResolvedLayout, gpus: int, batch: int, pins: Pins) -> list[int]:
    """micro_batch_size worth trying, ascending: what divides a language replica's share of the batch and the images' replicas can share."""
    if pins.micro_batch_size is not None:
        return [pins.micro_batch_size]
    dp = layout.components[LANGUAGE].dp
    each = max(1, layout.components[IMAGES].dp // dp)
    whole = divisors(batch // dp) if batch % dp == 0 else []
    tried = _thinned((n for n in whole if n <= LARGEST_MICROBATCH and n % each == 0), gpus)
    return tried or [1]  # the check of which says what is wrong
