"""Which component of the model lives on which ranks, and how it is cut there.

Components are either *colocated* (all on the same rank set, possibly with different TP and DP) or *disjoint*; together
they tile the world. Inside a component the rank order is that of megatron-core's ``HyperCommGrid([tp, cp, dp, pp])``:
tp varies fastest, then cp, dp, pp.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from mimo_jobs.errors import UsageError

LANGUAGE = "language"
IMAGES = "images"


@dataclass(frozen=True)
class ComponentLayout:
    """Parallel sizes of one component as a user writes them; ``None`` is filled in by `ParallelLayout.resolve`.

    Attributes:
        tp: tensor parallel size.
        pp: pipeline parallel size; encoders have 1.
        dp: data parallel size; filled so that the components tile the world.
        cp: context parallel size; encoders have 1.
        ep: expert parallel size; 1 for dense models.
        etp: tensor parallel size of the experts; ``tp`` when not given.
        rank_offset: first global rank of the component; filled so that there is no gap.
    """

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    rank_offset: int | None = None


@dataclass(frozen=True)
class ParallelLayout:
    """The layout of every component. ``world_size=None`` means the smallest world the components need."""

    language: ComponentLayout = ComponentLayout()
    images: ComponentLayout = ComponentLayout()
    world_size: int | None = None

    def resolve(self) -> "ResolvedLayout":
        """Fill what is missing and check that the components tile the world.

        Raises:
            UsageError: a size out of range, components that overlap in part, a gap, or a world they cannot fill.
        """
        return resolve({f.name: getattr(self, f.name) for f in fields(self) if f.name != "world_size"}, self.world_size)


@dataclass(frozen=True)
class Component:
    """A component with every size known. ``ranks`` are global ranks."""

    name: str
    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    etp: int
    rank_offset: int

    @property
    def size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def ranks(self) -> range:
        return range(self.rank_offset, self.rank_offset + self.size)

    def coordinates(self, rank: int) -> dict[str, int]:
        """``{"tp", "cp", "dp", "pp"}`` of a global rank of this component; tp varies fastest (HyperCommGrid's order)."""
        assert rank in self.ranks, (rank, self)
        local, found = rank - self.rank_offset, {}
        for name in ("tp", "cp", "dp", "pp"):
            local, found[name] = divmod(local, getattr(self, name))
        return found

    def holders(self, tp: int, pp: int) -> list[int]:
        """Global ranks (one per dp and cp) that hold the shard of tensor rank ``tp`` on pipeline stage ``pp``."""
        return [
            self.rank_offset + tp + self.tp * (cp + self.cp * (dp + self.dp * pp))
            for dp in range(self.dp)
            for cp in range(self.cp)
        ]


@dataclass(frozen=True)
class ResolvedLayout:
    """Every component placed; ``components`` is in canonical order: language first, the others by name."""

    components: Mapping[str, Component]
    world_size: int
    colocated: bool

    def components_of(self, rank: int) -> list[Component]:
        """The components that live on a global rank."""
        return [c for c in self.components.values() if rank in c.ranks]

    def as_layout(self) -> dict[str, dict[str, int]]:
        """Plain data for manifests and records: component -> its sizes and offset."""
        sizes = ("tp", "pp", "dp", "cp", "ep", "etp", "rank_offset")
        return {n: {s: getattr(c, s) for s in sizes} for n, c in self.components.items()}


def resolve(components: Mapping[str, ComponentLayout], world_size: int | None) -> ResolvedLayout:
    """Place components in a world. The result does not depend on their order and keeps every value that was given.

    Missing ``dp`` are all given one common value; missing ``rank_offset`` are filled without gaps in canonical order
    (language first, the others by name). Disjoint ranks are preferred; components are colocated when they are given
    the same offset, or when disjoint ranks cannot fill the world and each of them alone can.

    Raises:
        UsageError: no such placement exists; the message names the component, the bound and a fix.
    """
    ordered = {n: components[n] for n in sorted(components, key=lambda n: (n != LANGUAGE, n))}
    for name, component in ordered.items():
        _check_sizes(name, component)
    if world_size is not None:
        _check_int("world_size", world_size, 1)
    offsets = [c.rank_offset for c in ordered.values()]
    given = [o for o in offsets if o is not None]
    same_offset = len(given) == len(ordered) > 1 and len(set(given)) == 1
    if world_size is None:
        world_size = _smallest_world(ordered, same_offset)
        if not same_offset:
            ordered = {n: replace(c, dp=c.dp or 1) for n, c in ordered.items()}
    placed, problem = (None, "") if same_offset else _place_disjoint(ordered, world_size)
    if placed is None and len(set(given)) <= 1 and (same_offset or not given or given[0] == 0):
        colocated, colocated_problem = _place_colocated(ordered, world_size)
        language = ordered.get(LANGUAGE)
        ambiguous = "ways; choose one" in problem and language is not None and (language.pp > 1 or language.cp > 1)
        if colocated is not None and not ambiguous:
            return _checked(colocated, world_size, colocated=len(ordered) > 1)
        problem = problem if not same_offset else colocated_problem
    if placed is None:
        raise UsageError(problem)
    return _checked(placed, world_size, colocated=False)


def stage_layers(num_layers: int, pp: int) -> list[range]:
    """Layers of each pipeline stage; the first ``num_layers % pp`` stages hold one more (the last one has the head)."""
    base, more = divmod(num_layers, pp)
    starts = list(itertools.accumulate((base + (s < more) for s in range(pp)), initial=0))
    return [range(a, b) for a, b in itertools.pairwise(starts)]


HEAD_BLOCK_BYTES = 2 << 30  # of logits and their gradients that a rank has at a time (`modeling.loss`)


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary tensors in a checkpoint: ``vocab_size`` rounded up to a multiple of ``tp``."""
    return -(-vocab_size // tp) * tp


def check_divides(name: str, field: str, size: int, what: str, value: int) -> None:
    """Raise a `UsageError` unless ``layout.<name>.<field>=size`` divides ``value`` (named ``what``)."""
    if value % size:
        fits = [d for d in range(1, value + 1) if value % d == 0 and d <= max(size * 2, 8)]
        raise UsageError(
            f"layout.{name}.{field}={size} does not divide {what}={value} of the model; "
            f"set layout.{name}.{field} to one of {', '.join(map(str, fits))}"
        )


def check_batch(layout: ResolvedLayout, global_batch_size: int, micro_batch_size: int) -> None:
    """A global batch is whole micro-batches of every language replica, whose samples the replicas of encoders share evenly.

    Raises:
        UsageError: naming the component and the batch sizes that fit.
    """
    _check_int("micro_batch_size", micro_batch_size, 1)
    _check_int("global_batch_size", global_batch_size, 1)
    language = layout.components[LANGUAGE].dp
    together = micro_batch_size * language
    for c in layout.components.values():
        if together % c.dp:  # c.dp is then a multiple of language's (`ParallelLayout.resolve`)
            fits = c.dp // language
            raise UsageError(
                f"micro_batch_size={micro_batch_size} times layout.language.dp={language} is {together} samples, which "
                f"layout.{c.name}.dp={c.dp} replicas cannot share; set micro_batch_size={-(-micro_batch_size // fits) * fits}"
            )
    if global_batch_size % together:
        near = max(1, round(global_batch_size / together)) * together
        raise UsageError(
            f"global_batch_size={global_batch_size} is no multiple of micro_batch_size={micro_batch_size} times "
            f"layout.language.dp={language}; set global_batch_size={near}"
        )


MOST_RANKS = 1 << 20  # far beyond any machine: a typing mistake is answered at once


def _check_int(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{field}={value!r}: expected an integer of at least {least}")
    if value > MOST_RANKS:
        raise UsageError(f"{field}={value}: expected at most {MOST_RANKS}")


def _check_sizes(name: str, c: ComponentLayout) -> None:
    for field in ("tp", "pp", "cp", "ep"):
        _check_int(f"layout.{name}.{field}", getattr(c, field), 1)
    for field, least in (("dp", 1), ("etp", 1), ("rank_offset", 0)):
        if getattr(c, field) is not None:
            _check_int(f"layout.{name}.{field}", getattr(c, field), least)
    if name != LANGUAGE:
        for field in ("pp", "cp", "ep"):
            if getattr(c, field) != 1:
                raise UsageError(
                    f"layout.{name}.{field}={getattr(c, field)}: encoders are dense and have {field}=1; "
                    f"set layout.{name}.{field}=1"
                )
    if c.tp * c.cp * (c.dp or 1) % c.ep:
        raise UsageError(f"layout.{name}.ep={c.ep} does not divide tp*cp*dp={c.tp * c.cp * (c.dp or 1)}")


def _unit(c: ComponentLayout) -> int:
    return c.tp * c.cp * c.pp


def _smallest_world(components: Mapping[str, ComponentLayout], same_offset: bool) -> int:
    sizes = {n: _unit(c) * (c.dp or 1) for n, c in components.items()}
    if same_offset:
        return max(sizes.values())
    return sum(sizes.values())


def _filled(name: str, c: ComponentLayout, dp: int, rank_offset: int) -> Component:
    return Component(name, c.tp, c.pp, dp, c.cp, c.ep, c.etp or c.tp, rank_offset)


def _sizes_text(components: Mapping[str, ComponentLayout]) -> str:
    def one(n: str, c: ComponentLayout) -> str:
        named = "*".join(f"{k}{getattr(c, k)}" for k in ("tp", "cp", "pp") if getattr(c, k) > 1) or "tp1"
        return f"{n} {named}{f'*dp{c.dp}' if c.dp else ''} = {_unit(c) * (c.dp or 1)}{'' if c.dp else ' * dp'}"

    return ", ".join(one(n, c) for n, c in components.items())


def _place_disjoint(components: Mapping[str, ComponentLayout], world: int) -> tuple[dict[str, Component] | None, str]:
    free = [n for n, c in components.items() if not c.dp]
    left = world - sum(_unit(c) * c.dp for c in components.values() if c.dp)
    units = [_unit(components[n]) for n in free]
    candidates = [dict(zip(free, dp, strict=True)) for dp in _fillings(units, left)]
    tilings = [t for dp in candidates if (t := _tile(components, dp, world))]
    # One common dp wins; otherwise the offsets that were given must leave a single choice.
    common = [t for t in tilings if len({t[n].dp for n in free}) <= 1]
    if common or len(tilings) == 1:
        return (common or tilings)[0], ""
    if tilings:
        choices = " or ".join(", ".join(f"layout.{n}.dp={t[n].dp}" for n in free) for t in tilings[:2])
        return None, f"world_size={world} can be filled in {len(tilings)} ways; choose one, e.g. {choices}"
    if candidates:
        return None, _offset_problem(components, candidates[0], world)
    smallest = sum(_unit(c) * (c.dp or 1) for c in components.values())
    return None, (
        f"world_size={world} cannot be tiled by {_sizes_text(components)} ranks side by side, "
        f"nor does each of them fill it alone; set world_size={smallest}, or another dp"
    )


def _fillings(units: list[int], left: int) -> list[tuple[int, ...]]:
    """All tuples of dp >= 1 with ``sum(unit * dp) == left``, the one with equal dp first."""
    if not units:
        return [()] if left == 0 else []
    total = sum(units)
    found = [(left // total,) * len(units)] if left >= total and left % total == 0 else []
    if len(units) == 1 or len(units) > 2:
        return found
    others = ((dp, (left - units[0] * dp) // units[1]) for dp in range(1, (left - units[1]) // units[0] + 1))
    fitting = (dp for dp in others if units[0] * dp[0] + units[1] * dp[1] == left and dp not in found)
    return found + list(
        itertools.islice(fitting, 4096)
    )  # worlds up to 4096 ranks whole; beyond, offsets may need dp too


def _tile(
    components: Mapping[str, ComponentLayout], dp: Mapping[str, int], world: int, ignore: str | None = None
) -> dict[str, Component] | None:
    """Components side by side over ``range(world)`` at the offsets given (but not ``ignore``'s), or None."""
    sizes = {n: _unit(c) * (c.dp or dp[n]) for n, c in components.items()}
    pins = {n: c.rank_offset for n, c in components.items() if c.rank_offset is not None and n != ignore}
    pinned = sorted((offset, n) for n, offset in pins.items())
    # Open components are tried in canonical order first, so the first tiling found is the canonical one.
    for order in itertools.permutations(n for n in components if n not in pins):
        placed, waiting, at = {}, list(order), 0
        for start, name in [*pinned, (world, "")]:
            while waiting and at + sizes[waiting[0]] <= start:
                placed[waiting[0]] = at
                at += sizes[waiting.pop(0)]
            if at != start:
                break
            if name:
                placed[name], at = start, start + sizes[name]
        else:
            if not waiting:
                return {n: _filled(n, c, c.dp or dp[n], placed[n]) for n, c in components.items()}
    return None


def _offset_problem(components: Mapping[str, ComponentLayout], dp: Mapping[str, int], world: int) -> str:
    """Name the component whose offset overlaps its neighbour or leaves a gap, and the offset that would fit."""
    pinned = [n for n, c in components.items() if c.rank_offset is not None]
    for name in reversed(pinned):
        tiling = _tile(components, dp, world, ignore=name)
        if tiling is None:
            continue
        start, fits, size = components[name].rank_offset or 0, tiling[name].rank_offset, tiling[name].size
        others = [c for n, c in tiling.items() if n != name]
        hit = next((c for c in others if c.rank_offset < start + size and start < c.rank_offset + c.size), None)
        near = next((f"{c.name} ends there" for c in others if c.rank_offset + c.size == fits), "the first rank")
        what = f"overlaps {hit.name}" if hit else f"leaves a gap beside {' and '.join(c.name for c in others)}"
        return f"layout.{name} starts at rank {start}, expected {fits} ({near}): it {what}; set layout.{name}.rank_offset={fits}"
    named = ", ".join(f"layout.{n}.rank_offset={components[n].rank_offset}" for n in pinned)
    return (
        f"{named}: {_sizes_text(components)} ranks do not tile world_size={world} without overlap or gap from there; "
        "leave the offsets out to have them filled"
    )


def _place_colocated(components: Mapping[str, ComponentLayout], world: int) -> tuple[dict[str, Component] | None, str]:
    placed = {}
    for name, c in components.items():
        if c.rank_offset not in (None, 0):
            return None, (
                f"layout.{name}.rank_offset={c.rank_offset} leaves ranks 0 to {c.rank_offset - 1} without a component; "
                f"set layout.{name}.rank_offset=0"
            )
        dp = c.dp or world // _unit(c)
        if dp < 1 or _unit(c) * dp != world:
            return None, (
                f"layout.{name} covers {_unit(c) * max(dp, 1)} ranks ({_sizes_text({name: c})}) but colocated components "
                f"share all {world} ranks; set layout.{name}.dp so that tp*cp*pp*dp={world}, or give the components "
                "different rank_offset"
            )
        placed[name] = _filled(name, c, dp, 0)
    return placed, ""


def _checked(placed: dict[str, Component], world: int, colocated: bool) -> ResolvedLayout:
    language = placed.get(LANGUAGE)
    for c in placed.values():
        if c.tp * c.cp * c.dp % c.ep:
            raise UsageError(f"layout.{c.name}.ep={c.ep} does not divide tp*cp*dp={c.tp * c.cp * c.dp}")
        if c is language or language is None:
            continue
        if max(c.dp, language.dp) % min(c.dp, language.dp):
            raise UsageError(
                f"layout.{c.name}.dp={c.dp} and layout.language.dp={language.dp}: one must divide the other "
                f"(whole batches are handed from {c.name} to language); set layout.{c.name}.dp"
            )
        if colocated and (language.pp > 1 or language.cp > 1):
            size = "pp" if language.pp > 1 else "cp"
            raise UsageError(
                f"layout.language.{size}={getattr(language, size)}: colocated components have pp=1 and cp=1 "
                f"(megatron-core's ColocatedBridgeCommunicator); set layout.language.{size}=1, or put {c.name} on its "
                f"own ranks with layout.{c.name}.rank_offset={language.size}"
            )
    return ResolvedLayout(placed, world, colocated)
