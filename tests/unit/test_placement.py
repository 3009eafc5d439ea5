"""Placement of ranks on nodes: groups stay whole, few GPUs idle, and what is advised instead is really better."""

import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import ComponentLayout as C
from mimo_jobs.layout import ParallelLayout, resolve
from mimo_jobs.placement import Placement, advice, place, place_ranks

SMALL, LARGE = tuple(range(8)), tuple(range(8, 16))


def layout(language=None, images=None, **others):
    """Components as users write them, resolved."""
    return resolve({k: v for k, v in {"language": language, "images": images, **others}.items() if v}, None)


@pytest.mark.parametrize(
    ("language", "images", "gpus", "nodes"),
    [
        (C(tp=4), C(tp=4), 8, (SMALL,)),
        (C(tp=8, pp=2), C(), 8, (SMALL, LARGE, (16,))),
        (C(dp=16), C(), 8, (SMALL, LARGE, (16,))),
        (C(tp=4, dp=2), C(tp=4, dp=2), 8, (SMALL, LARGE)),
        (C(tp=2, cp=4), C(dp=1), 8, (SMALL, (8,))),
        # Filling in order would leave a third node with two ranks.
        (C(tp=3, dp=4), C(dp=4), 8, ((0, 1, 2, 3, 4, 5, 12, 13), (6, 7, 8, 9, 10, 11, 14, 15))),
        # Nothing can be saved: ranks stay in order, though nodes are not full.
        (C(tp=3, dp=2), C(tp=3, dp=1), 4, ((0, 1, 2), (3, 4, 5), (6, 7, 8))),
        # tp*cp = 16 does not fit a node, so only tp keeps together.
        (C(tp=4, cp=4), C(dp=1), 8, (SMALL, LARGE, (16,))),
        # Colocated: the larger groups hold the smaller.
        (C(tp=4, dp=3, rank_offset=0), C(tp=2, dp=6, rank_offset=0), 8, (SMALL, (8, 9, 10, 11))),
        (C(tp=6, dp=2, rank_offset=0), C(tp=2, dp=6, rank_offset=0), 8, ((0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11))),
        (C(tp=2), C(), 1, ((0,), (1,), (2,))),
    ],
)
def test_ranks_go_to_nodes_in_order_unless_that_takes_more_nodes(language, images, gpus, nodes):
    assert place(layout(language, images), gpus).nodes == nodes


@pytest.mark.parametrize(
    ("language", "images", "nodes", "said"),
    [
        (C(tp=16), C(dp=1), (SMALL, LARGE, (16,)), ["layout.language.tp=16", "1 of 1 group", "2 nodes a group"]),
        # A group larger than a node begins a fresh one; the ranks of others use what it leaves.
        (
            C(tp=12, dp=2),
            C(tp=4, dp=2),
            (SMALL, (8, 9, 10, 11, 24, 25, 26, 27), tuple(range(12, 20)), (20, 21, 22, 23, 28, 29, 30, 31)),
            ["layout.language.tp=12", "2 of 2 groups"],
        ),
        # ... even of a component that comes first
        (C(dp=2), C(tp=10), ((0, 1, 10, 11), tuple(range(2, 10))), ["layout.images.tp=10"]),
        (
            C(tp=16, dp=1, rank_offset=0),
            C(tp=4, dp=4, rank_offset=0),
            (SMALL, LARGE),
            ["layout.language.tp=16", "tensor-parallel traffic", "will cross nodes"],
        ),
    ],
)
def test_a_group_larger_than_a_node_has_consecutive_nodes_and_is_noted(language, images, nodes, said):
    placed = place(layout(language, images), 8)
    assert sorted(placed.nodes) == sorted(nodes)
    assert len(placed.notes) == 1 and all(part in placed.notes[0] for part in [*said, "gpus_per_node=8"])


def test_of_colocated_groups_that_do_not_fit_together_the_larger_stay_whole():
    colocated = layout(images=C(tp=6, dp=2, rank_offset=0), audio=C(tp=4, dp=3, rank_offset=0))
    placed = place(colocated, 8)
    assert placed.nodes == ((0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11))
    assert len(placed.notes) == 1 and "layout.audio.tp=4" in placed.notes[0] and "1 of 3 groups" in placed.notes[0]
    assert place(colocated, 12).notes == () and len(place(colocated, 12).nodes) == 1


def test_a_rank_is_found_by_node_and_local_rank():
    placed = place(layout(C(tp=3, dp=4), C(dp=4)), 8)
    assert [placed.node_of(r) for r in (0, 5, 6, 11, 12, 13, 14, 15)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [placed.local_rank(r) for r in (0, 5, 6, 12, 15)] == [0, 5, 0, 6, 7]
    with pytest.raises(KeyError):
        placed.node_of(16)


@pytest.mark.parametrize(
    ("nodes", "uniform"),
    [
        (((0, 1), (2, 3)), True),
        (((0, 1, 2),), True),
        (((0, 1), (2,)), False),
        (((0, 2), (1, 3)), False),
        (((2, 3), (0, 1)), False),
    ],
)
def test_block_distribution_serves_only_equal_nodes_in_rank_order(nodes, uniform):
    assert Placement(nodes, 4, ()).contiguous_uniform is uniform


@given(count=st.integers(1, 200), gpus=st.integers(1, 20))
def test_without_a_layout_nodes_are_filled_in_order(count, gpus):
    placed = place_ranks(count, gpus)
    assert [placed.node_of(r) for r in range(count)] == [r // gpus for r in range(count)]
    assert placed.world_size == count and placed.idle == -count % gpus and placed.notes == ()
    assert placed.contiguous_uniform is (count % gpus == 0 or count <= gpus)


@pytest.mark.parametrize("gpus", [0, -1, True, "8"])
def test_nodes_without_gpus_are_refused(gpus):
    made = layout(C(), C())
    for call in (lambda: place(made, gpus), lambda: place_ranks(3, gpus), lambda: advice(made, gpus)):
        with pytest.raises(UsageError, match="gpus_per_node"):
            call()


tps = st.sampled_from([1, 1, 2, 3, 4, 5, 6, 8, 12, 16])


@st.composite
def disjoint(draw):
    """Language and images side by side, either first; one dp divides the other."""
    few, many = (dp := draw(st.integers(1, 6))), dp * draw(st.integers(1, 4))
    dps = draw(st.permutations([few, many]))
    language = C(draw(tps), draw(st.integers(1, 3)), dps[0], draw(st.sampled_from([1, 1, 2, 4])))
    return layout(language, C(draw(tps), dp=dps[1], rank_offset=draw(st.sampled_from([None, 0]))))


@st.composite
def colocated(draw):
    """Language and encoders whose tp divide each other, or encoders of any tp."""
    nested = draw(st.sampled_from([[1, 2, 4, 8, 16], [1, 3, 6, 12], [1, 5], None]))
    sizes = draw(st.lists(st.sampled_from(nested or [1, 2, 3, 4, 5, 6, 8, 12]), min_size=2, max_size=3))
    world = math.lcm(*sizes) * draw(st.integers(1, 3))
    names = ["language" if nested else "audio", "images", "video"]
    return layout(**{n: C(tp, dp=world // tp, rank_offset=0) for n, tp in zip(names, sizes)})


layouts = st.one_of(disjoint(), colocated())


def kept_together(c, gpus):
    """The groups of a component that fit a node, with cp where that fits too."""
    size = c.tp * c.cp if c.tp * c.cp <= gpus else c.tp
    return [range(r, r + size) for r in range(c.ranks.start, c.ranks.stop, size)] if size <= gpus else []


def nodes_of(placed, ranks):
    return sorted({placed.node_of(r) for r in ranks})


nodes_of_gpus = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 16])


@settings(max_examples=300, deadline=None)
@given(made=layouts, gpus=nodes_of_gpus)
def test_every_rank_has_one_gpu_and_no_node_has_too_many(made, gpus):
    placed = place(made, gpus)
    assert sorted(r for node in placed.nodes for r in node) == list(range(made.world_size))
    assert all(node == tuple(sorted(node)) and 0 < len(node) <= gpus for node in placed.nodes)
    assert placed.world_size == made.world_size and placed.idle == len(placed.nodes) * gpus - made.world_size
    assert all(placed.nodes[placed.node_of(r)][placed.local_rank(r)] == r for r in range(made.world_size))
    assert placed == place(made, gpus)


@settings(max_examples=300, deadline=None)
@given(made=layouts, gpus=nodes_of_gpus)
def test_no_group_that_fits_a_node_is_split(made, gpus):
    placed = place(made, gpus)
    fitting = [tp for c in made.components.values() if (tp := c.tp) <= gpus]
    for c in made.components.values():
        # Unions of colocated groups may not fit; the largest groups that do are whole even then.
        if made.colocated and math.lcm(*fitting or [1]) > gpus and c.tp < max(fitting, default=0):
            continue
        for group in kept_together(c, gpus):
            assert len(nodes_of(placed, group)) == 1, (c, group)


@settings(max_examples=300, deadline=None)
@given(made=disjoint(), gpus=nodes_of_gpus)
def test_a_group_larger_than_a_node_fills_fresh_consecutive_ones(made, gpus):
    placed = place(made, gpus)
    for c in made.components.values():
        for start in range(c.ranks.start, c.ranks.stop, c.tp) if c.tp > gpus else ():
            used = nodes_of(placed, range(start, start + c.tp))
            assert used == list(range(used[0], used[0] + -(-c.tp // gpus)))
            assert [placed.node_of(start + i) for i in range(c.tp)] == [used[0] + i // gpus for i in range(c.tp)]


@settings(max_examples=300, deadline=None)
@given(made=layouts, gpus=nodes_of_gpus)
def test_exactly_the_split_groups_are_noted(made, gpus):
    placed = place(made, gpus)
    for c in made.components.values():
        groups = [range(r, r + c.tp) for r in range(c.ranks.start, c.ranks.stop, c.tp)]
        split = sum(len(nodes_of(placed, g)) > 1 for g in groups)
        noted = [n for n in placed.notes if n.startswith(f"layout.{c.name}.tp={c.tp} ")]
        assert len(noted) == (split > 0) and all(f" {split} of {len(groups)} group" in n for n in noted)


@settings(max_examples=300, deadline=None)
@given(made=disjoint(), gpus=nodes_of_gpus)
def test_never_more_nodes_than_filling_in_order_and_in_order_where_that_is_as_good(made, gpus):
    gpus = max(gpus, *(c.tp for c in made.components.values()))
    groups = sorted((g for c in made.components.values() for g in kept_together(c, gpus)), key=lambda g: g[0])
    in_order = [[]]
    for group in groups:
        if len(in_order[-1]) + len(group) > gpus:
            in_order.append([])
        in_order[-1] += group
    placed = place(made, gpus)
    assert len(placed.nodes) <= len(in_order)
    if len(placed.nodes) == len(in_order):
        assert placed.nodes == tuple(map(tuple, in_order))
    if all(gpus % len(g) == 0 for g in groups) and len({len(g) for g in groups}) == 1:
        assert [placed.node_of(r) for r in range(made.world_size)] == [r // gpus for r in range(made.world_size)]


@pytest.mark.parametrize(
    ("made", "gpus"),
    [
        (layout(C(tp=3, dp=1024), C(dp=1024)), 8),
        (layout(C(tp=3, dp=1024), C(dp=1024)), 512),
        (layout(C(dp=4096, rank_offset=0), C(dp=4096, rank_offset=0)), 8),
        (layout(C(tp=12, dp=170), C(tp=4, dp=510)), 8),
        (layout(C(tp=4095), C()), 8),
    ],
)
@pytest.mark.speed
def test_thousands_of_ranks_are_placed_at_once(made, gpus):
    def seconds():
        start = time.perf_counter()
        place(made, gpus)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.2


@pytest.mark.parametrize(
    ("language", "images", "gpus", "said"),
    [
        (C(tp=4), C(tp=4), 8, None),
        (C(tp=3, dp=4), C(dp=4), 8, None),
        (C(tp=8, pp=2), C(), 8, "7 of 24 GPUs stay idle on 3 nodes of 8; layout.images.dp=8 (24 ranks) would use them all"),
        # Of equals, the dp that batches are the easiest to share by: not layout.language.dp=23.
        (C(dp=16), C(), 8, "7 of 24 GPUs stay idle on 3 nodes of 8; layout.images.dp=8 (24 ranks) would use them all"),
        (C(tp=4), C(tp=2, dp=1), 8, "2 of 8 GPUs stay idle on 1 node of 8; layout.images.dp=2 (8 ranks) would use them all"),
        (C(dp=4094), C(), 8, "1 of 4096 GPUs stays idle on 512 nodes of 8; layout.images.dp=2 (4096 ranks) would use them all"),
        (
            C(tp=4, dp=3, rank_offset=0), C(tp=2, dp=6, rank_offset=0), 8,
            "4 of 16 GPUs stay idle on 2 nodes of 8; layout.language.dp=4 and layout.images.dp=8 (16 ranks) would use them all",
        ),
        (C(tp=3), C(tp=3), 8, "2 of 8 GPUs stay idle on 1 node of 8; layout.language.tp=4 (7 ranks on 1 node) would leave 1 idle"),
        (
            C(tp=3, dp=2, rank_offset=0), C(tp=3, dp=2, rank_offset=0), 8,
            "2 of 8 GPUs stay idle on 1 node of 8; no small change of the layout would use many more of them",
        ),
    ],
)  # fmt: skip
def test_advice_counts_idle_gpus_and_names_the_nearest_layout_that_uses_them(language, images, gpus, said):
    assert advice(layout(language, images), gpus) == said


def test_advice_names_only_what_the_model_allows():
    made = layout(C(tp=8, pp=2), C())
    assert "layout.images.tp=8 (24 ranks)" in str(advice(made, 8, lambda component, field, value: field != "dp"))
    nothing = advice(made, 8, lambda component, field, value: False)
    assert (
        nothing == "7 of 24 GPUs stay idle on 3 nodes of 8; no small change of the layout would use many more of them"
    )
    colocated = layout(C(tp=4, dp=3, rank_offset=0), C(tp=2, dp=6, rank_offset=0))
    assert "dp=8" not in str(advice(colocated, 8, lambda component, field, value: (component, value) != ("images", 8)))


def advised(made, text):
    """The layout that the sentence names: everything else as it was."""
    sizes = {n: {f: getattr(c, f) for f in ("tp", "pp", "dp", "cp")} for n, c in made.components.items()}
    changes = re.findall(r"layout\.(\w+)\.(\w+)=(\d+)", text)
    for component, field, value in changes:
        assert sizes[component][field] != int(value)
        sizes[component][field] = int(value)
    offset = 0 if made.colocated else None
    return changes, resolve({n: C(**s, rank_offset=offset) for n, s in sizes.items()}, None)


@settings(max_examples=300, deadline=None)
@given(made=layouts, gpus=nodes_of_gpus, odd=st.booleans())
def test_what_is_advised_idles_fewer_gpus(made, gpus, odd):
    now = place(made, gpus)
    asked = []

    def allowed(component, field, value):
        assert value >= 1
        asked.append((component, field, str(value)) if odd or value % 2 == 0 else None)
        return asked[-1] is not None

    text = advice(made, gpus, allowed)
    assert (text is None) == (now.idle == 0)
    if text is None:
        return
    assert text.startswith(f"{now.idle} of {len(now.nodes) * gpus} GPUs stay")
    if "no small change" in text:
        return
    changes, better = advised(made, text)
    placed = place(better, gpus)
    assert better.colocated == made.colocated and set(changes) <= set(asked)
    assert f"({placed.world_size} ranks" in text or f"({placed.world_size} rank on" in text or placed.world_size == 1
    assert placed.idle < now.idle and placed.idle * len(now.nodes) < now.idle * len(placed.nodes)
    assert len(placed.nodes) <= 2 * len(now.nodes)
    assert len(changes) == 1 or (made.colocated and all(field == "dp" for _, field, _ in changes[1:]))
    if placed.idle:
        assert text.endswith(f"would leave {placed.idle} idle")
    else:
        assert text.endswith(
            ("would use them all", f"would fill {len(placed.nodes)} node" + "s" * (len(placed.nodes) > 1))
        )


@settings(max_examples=100, deadline=None)
@given(dp=st.integers(1, 12), gpus=st.sampled_from([4, 8]))
def test_replicas_of_one_rank_can_always_fill_the_nodes_they_have(dp, gpus):
    made = ParallelLayout(language=C(dp=dp), images=C(dp=1)).resolve()
    text = advice(made, gpus)
    assert text is None or text.endswith("would use them all")
