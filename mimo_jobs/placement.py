"""Which node every rank runs on: tensor-parallel groups stay inside a node, and as few GPUs as possible stay idle.

The groups of a component are runs of consecutive ranks (tp varies fastest, then cp), so whatever has to share a node is
a range of ranks. Ranges that need not be neighbours may be packed in another order than that of their ranks.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import LANGUAGE, Component, ComponentLayout, ResolvedLayout, resolve

FIELDS = ("dp", "tp", "pp")  # what `advice` may change, the first first
MOST_TRIED = 24  # layouts that `advice` places for one field of one component: keeps thousands of ranks under a second

Block = list[range]  # one range of ranks that shares a node, or several that follow each other over nodes of their own
Allowed = Callable[[str, str, int], bool]  # (component, field, value) -> whether the model's shapes permit it
Change = dict[tuple[str, str], int]  # (component, field) -> value


@dataclass(frozen=True)
class Placement:
    """Every global rank on a node.

    Attributes:
        nodes: global ranks on each node, ascending inside a node. Rank 0 need not be on node 0.
        gpus_per_node: GPUs allocated on each node; never fewer than its ranks.
        notes: sentences for the user: tensor-parallel groups that had to be split over nodes.
    """

    nodes: tuple[tuple[int, ...], ...]
    gpus_per_node: int
    notes: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def idle(self) -> int:
        """Allocated GPUs without a rank."""
        return len(self.nodes) * self.gpus_per_node - self.world_size

    @property
    def contiguous_uniform(self) -> bool:
        """Whether rank r is on node r // k with the same k ranks on every node, as ``srun --ntasks-per-node=k`` does."""
        k = len(self.nodes[0])
        return all(node == tuple(range(i * k, (i + 1) * k)) for i, node in enumerate(self.nodes))

    def node_of(self, rank: int) -> int:
        """Index in `nodes`. Raises KeyError for a rank outside the world."""
        return self._where[rank][0]

    def local_rank(self, rank: int) -> int:
        """Index of a rank in its node. Raises KeyError for a rank outside the world."""
        return self._where[rank][1]

    @cached_property
    def _where(self) -> dict[int, tuple[int, int]]:
        return {rank: (n, local) for n, node in enumerate(self.nodes) for local, rank in enumerate(node)}


def place(layout: ResolvedLayout, gpus_per_node: int) -> Placement:
    """Place every rank so that each tensor-parallel group that fits a node is on one (with cp, where tp*cp fits too).

    Ranks stay in order when that needs no more nodes than packing the groups (first fit, largest first). Colocated
    components whose groups share ranks are kept together while the union fits; else the larger groups stay whole. A
    group larger than a node has consecutive nodes and begins a fresh one; others may use the GPUs it leaves.

    Raises UsageError for ``gpus_per_node`` below 1.
    """
    _check_gpus(gpus_per_node)
    blocks = _blocks(layout, gpus_per_node)
    nodes = _in_order(blocks, gpus_per_node)
    if (len(nodes) - 1) * gpus_per_node >= layout.world_size:
        nodes = min(nodes, _packed(blocks, gpus_per_node), key=len)  # the first, in order, when equal
    placed = Placement(tuple(tuple(sorted(chain(*node))) for node in nodes), gpus_per_node)
    return replace(placed, notes=tuple(_notes(layout, placed)))


def place_ranks(count: int, gpus_per_node: int) -> Placement:
    """Place ``count`` >= 1 ranks in order, without a layout. Raises UsageError for ``gpus_per_node`` below 1."""
    _check_gpus(gpus_per_node)
    assert count >= 1, count
    starts = range(0, count, gpus_per_node)
    return Placement(tuple(tuple(range(s, min(s + gpus_per_node, count))) for s in starts), gpus_per_node)


def advice(layout: ResolvedLayout, gpus_per_node: int, allowed: Allowed | None = None) -> str | None:
    """One sentence about the GPUs that stay idle and the nearest layout that idles fewer; None when none is idle.

    The layout named differs in one field of one component (colocated ones: and in the dp of the others, so that all
    sizes stay equal), was resolved and placed, and needs at most twice the nodes. One that leaves no GPU idle is
    preferred, then more ranks on the same nodes, then the nearest number of ranks, the fewest nodes, and dp over tp
    over pp. ``allowed=None`` permits every value. Raises UsageError for ``gpus_per_node`` below 1.
    """
    now = place(layout, gpus_per_node)
    if not now.idle:
        return None
    count = len(now.nodes)
    stay, total = "stay" if now.idle > 1 else "stays", count * gpus_per_node
    said = f"{now.idle} of {total} GPUs {stay} idle on {_some(count, 'node')} of {gpus_per_node}; "
    found = _neighbour(layout, now, allowed or (lambda component, field, value: True))
    if found is None:
        return said + "no small change of the layout would use many more of them"
    change, placed = found
    said += " and ".join(f"layout.{name}.{field}={value}" for (name, field), value in change.items())
    ranks, nodes = _some(placed.world_size, "rank"), _some(len(placed.nodes), "node")
    if placed.idle:
        return f"{said} ({ranks} on {nodes}) would leave {placed.idle} idle"
    return f"{said} ({ranks}) would {'use them all' if len(placed.nodes) == count else f'fill {nodes}'}"


def _check_gpus(gpus: int) -> None:
    if not isinstance(gpus, int) or isinstance(gpus, bool) or gpus < 1:
        raise UsageError(f"gpus_per_node={gpus!r}: expected an integer of at least 1")


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _groups(c: Component, size: int) -> Iterator[range]:
    return (range(start, start + size) for start in range(c.ranks.start, c.ranks.stop, size))


def _blocks(layout: ResolvedLayout, gpus: int) -> list[Block]:
    """The ranges of ranks to keep on one node, in rank order; those under one group larger than a node are one block."""
    head, length = list(range(layout.world_size)), [1] * layout.world_size  # rank -> start of its range -> its length
    sizes = {n: c.tp * c.cp if c.tp * c.cp <= gpus else c.tp for n, c in layout.components.items()}
    groups = list(chain(*(_groups(c, sizes[n]) for n, c in layout.components.items())))
    for group in sorted(groups, key=lambda g: (-len(g), g[0])):
        first, last = head[group[0]], head[group[-1]]
        stop = last + length[last]
        if stop - first <= gpus:
            head[first:stop] = [first] * (stop - first)
            length[first] = stop - first
    follows = {head[r] for g in groups if len(g) > gpus for r in g if head[r] != head[g[0]]}
    blocks = []
    for at in sorted(set(head)):
        if at not in follows:
            blocks.append([])
        blocks[-1].append(range(at, at + length[at]))
    return blocks


def _in_order(blocks: Iterable[Block], gpus: int) -> list[list[range]]:
    """Fill nodes in rank order without splitting a range; a block of several ranges begins a fresh node."""
    nodes, room = [], 0
    for block in blocks:
        for part in block:
            if len(part) > room or (len(block) > 1 and part is block[0]):
                nodes.append([])
                room = gpus
            nodes[-1].append(part)
            room -= len(part)
    return nodes


def _packed(blocks: Iterable[Block], gpus: int) -> list[list[range]]:
    """First fit over ranges of decreasing size, after the blocks that have nodes of their own."""
    nodes, runs = [], []  # runs: the nodes that stay neighbours
    with_room = [[] for _ in range(gpus + 1)]  # free GPUs -> heap of indices of nodes
    for block in sorted(blocks, key=lambda b: (len(b) == 1, -len(b[0]), b[0].start)):
        heaps = [h for h in with_room[len(block[0]) :] if h] if len(block) == 1 else []
        if heaps:
            changed = [heapq.heappop(min(heaps, key=lambda h: h[0]))]
            nodes[changed[0]] += block
        else:
            runs.append(_in_order([block], gpus))
            changed = range(len(nodes), len(nodes) + len(runs[-1]))
            nodes += runs[-1]
        for i in changed:
            heapq.heappush(with_room[gpus - sum(map(len, nodes[i]))], i)
    return list(chain(*sorted(runs, key=lambda run: min(part.start for node in run for part in node))))


def _notes(layout: ResolvedLayout, placed: Placement) -> Iterator[str]:
    for c in layout.components.values():
        spans = [len({placed.node_of(r) for r in group}) for group in _groups(c, c.tp)]
        if split := sum(s > 1 for s in spans):
            larger = "is more than" if c.tp > placed.gpus_per_node else "and what shares its ranks exceed"
            yield (
                f"layout.{c.name}.tp={c.tp} {larger} gpus_per_node={placed.gpus_per_node}: tensor-parallel traffic of "
                f"{split} of {_some(len(spans), 'group')} of {c.name} will cross nodes ({max(spans)} nodes a group)"
            )


def _neighbour(layout: ResolvedLayout, now: Placement, allowed: Allowed) -> tuple[Change, Placement] | None:
    """The best layout that differs in one field and idles fewer GPUs: its change and its placement."""
    gpus, most = now.gpus_per_node, 2 * len(now.nodes) * now.gpus_per_node

    def cost(world: int, nodes: int) -> tuple[int, ...]:
        idle, growth = nodes * gpus - world, world - now.world_size
        return idle > 0, growth < 0 or nodes > len(now.nodes), idle, abs(growth), nodes, growth < 0

    options = []
    for field, c in product(FIELDS, layout.components.values()):
        for value in _values(c, field, most, gpus):
            world = c.size // getattr(c, field) * value + (0 if layout.colocated else now.world_size - c.size)
            # Among equals: dp first, then the dp that batches are the easiest to share by.
            dps = [value if (o, field) == (c, "dp") else o.dp for o in layout.components.values()]
            if value != getattr(c, field) and world <= most:
                bound = (cost(world, -(-world // gpus)), FIELDS.index(field), math.lcm(*dps))
                options.append((*bound, len(options), (c.name, field), value, world))
    best, least, tried = None, (True, True, now.idle), Counter()
    # No placement costs less than this bound, so the search ends where the bound reaches the best one found.
    for bound, _, _, _, where, value, world in sorted(options):
        if bound >= least:
            break
        # The dp of colocated components follow, where they can.
        others = [c for c in layout.components.values() if layout.colocated and c.name != where[0]]
        change = {where: value} | {(c.name, "dp"): world * c.dp // c.size for c in others if world != c.size}
        possible = tried[where] < MOST_TRIED and not any(world * c.dp % c.size for c in others)
        if not possible or not all(allowed(name, field, v) for (name, field), v in change.items()):
            continue
        if placed := _placed(layout, change, gpus):
            tried[where] += 1
            count, found = len(placed.nodes), cost(placed.world_size, len(placed.nodes))
            # Fewer in number, and clearly in share: another layout for one GPU in a thousand helps nobody.
            fewer = placed.idle < now.idle and 4 * placed.idle * len(now.nodes) <= 3 * now.idle * count
            if fewer and found < least and count <= 2 * len(now.nodes):
                best, least = (change, placed), found
    return best


def _values(c: Component, field: str, most: int, gpus: int) -> Iterable[int]:
    """Values worth trying, from a quarter of the present one: dp up to ``most`` ranks, tp up to a node, pp up to 4x."""
    size = getattr(c, field)
    last = {"dp": most // (c.size // size), "tp": max(gpus, size), "pp": 4 * size if c.name == LANGUAGE else 0}[field]
    near = range(-(-size // 4), last + 1)
    return near if field != "tp" else (v for v in near if not v & (v - 1) or size % v == 0 or gpus % v == 0)


def _placed(layout: ResolvedLayout, change: Change, gpus: int) -> Placement | None:
    sizes = {n: ComponentLayout(c.tp, c.pp, c.dp, c.cp, c.ep, c.etp) for n, c in layout.components.items()}
    sizes = {n: replace(c, rank_offset=0 if layout.colocated else None) for n, c in sizes.items()}
    for (name, field), value in change.items():
        sizes[name] = replace(sizes[name], **{field: value})
    try:
        return place(resolve(sizes, None), gpus)
    except UsageError:
        return None
