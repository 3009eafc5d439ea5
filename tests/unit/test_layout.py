"""Placement of components: nothing given is moved, order does not matter, the world is tiled."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import ComponentLayout as C
from mimo_jobs.layout import ParallelLayout, check_batch, padded_vocab, resolve, stage_layers


def placed(world, **components):
    made = resolve(components, world)
    return {n: (c.rank_offset, c.dp) for n, c in made.components.items()}


@pytest.mark.parametrize(
    ("world", "language", "images", "expected"),
    [
        (2, C(dp=1), C(), {"language": (0, 1), "images": (1, 1)}),
        (4, C(dp=1), C(), {"language": (0, 1), "images": (1, 3)}),
        (5, C(tp=4, dp=1), C(dp=1), {"language": (0, 1), "images": (4, 1)}),
        (2, C(rank_offset=1), C(), {"language": (1, 1), "images": (0, 1)}),
        (3, C(rank_offset=1), C(), {"language": (1, 2), "images": (0, 1)}),
        (8, C(tp=4), C(tp=4), {"language": (0, 1), "images": (4, 1)}),
        (8, C(tp=4, rank_offset=4), C(tp=4), {"language": (4, 1), "images": (0, 1)}),
        (None, C(tp=2), C(rank_offset=2), {"language": (0, 1), "images": (2, 1)}),
        (2, C(tp=2), C(), {"language": (0, 1), "images": (0, 2)}),
        (8, C(tp=4, rank_offset=0), C(tp=2, rank_offset=0), {"language": (0, 2), "images": (0, 4)}),
        (17, C(tp=8, pp=2), C(), {"language": (0, 1), "images": (16, 1)}),
    ],
)
def test_missing_values_are_filled_in_either_order(world, language, images, expected):
    assert placed(world, language=language, images=images) == expected
    assert placed(world, images=images, language=language) == expected


@pytest.mark.parametrize(
    ("world", "language", "images", "said"),
    [
        (None, C(tp=4), C(rank_offset=3), ["layout.images starts at rank 3, expected 4", "overlaps language", "layout.images.rank_offset=4"]),
        (None, C(tp=4), C(rank_offset=6), ["layout.images starts at rank 6, expected 4", "leaves a gap beside language"]),
        (7, C(tp=2), C(tp=2), ["world_size=7", "language tp2", "images tp2", "world_size=4"]),
        (6, C(dp=3), C(dp=2), ["world_size=6", "world_size=5"]),
        (4, C(pp=4), C(), ["layout.language.pp=4", "colocated", "layout.images.rank_offset=4"]),
        (None, C(tp=0), C(), ["layout.language.tp=0", "at least 1"]),
        (None, C(), C(pp=2), ["layout.images.pp=2", "encoders", "layout.images.pp=1"]),
        (5, C(dp=3), C(dp=2), ["layout.images.dp=2", "layout.language.dp=3", "divide"]),
        (8, C(tp=4, rank_offset=0), C(tp=8, dp=2, rank_offset=0), ["layout.images", "16 ranks"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_field_and_fix(world, language, images, said):
    with pytest.raises(UsageError) as error:
        resolve({"language": language, "images": images}, world)
    for part in said:
        assert part in str(error.value)


small = st.builds(
    C, tp=st.sampled_from([1, 2, 3, 4]), pp=st.sampled_from([1, 2]), dp=st.sampled_from([None, None, 1, 2, 3]),
    rank_offset=st.sampled_from([None, None, None, 0, 1, 2, 4]),
)  # fmt: skip
encoder = st.builds(
    C,
    tp=st.sampled_from([1, 2, 4]),
    dp=st.sampled_from([None, 1, 2, 3]),
    rank_offset=st.sampled_from([None, None, 0, 1, 2, 4]),
)


@settings(max_examples=600, deadline=None)
@given(language=small, images=encoder, world=st.one_of(st.none(), st.integers(1, 20)))
def test_a_resolved_layout_tiles_the_world_and_keeps_what_was_given(language, images, world):
    def attempt(**components):
        try:
            return resolve(components, world)
        except UsageError as error:
            assert "layout." in str(error) or "world_size=" in str(error)
            return None

    made = attempt(language=language, images=images)
    assert made == attempt(images=images, language=language)
    if made is None:
        return
    assert world in (None, made.world_size)
    for name, before in (("language", language), ("images", images)):
        after = made.components[name]
        assert before.dp in (None, after.dp) and before.rank_offset in (None, after.rank_offset)
        assert (after.tp, after.pp) == (before.tp, before.pp)
        assert after.size == math.prod((after.tp, after.cp, after.dp, after.pp))
    sets = [set(c.ranks) for c in made.components.values()]
    assert set.union(*sets) == set(range(made.world_size))
    assert sets[0] == sets[1] if made.colocated else not sets[0] & sets[1]


def test_every_small_world_has_a_layout_for_one_free_encoder():
    for world in range(2, 33):
        made = ParallelLayout(language=C(dp=1), images=C(), world_size=world).resolve()
        assert made.components["images"].dp == world - 1


def test_coordinates_run_tp_first_and_holders_invert_them():
    made = ParallelLayout(language=C(tp=2, pp=3, dp=2), images=C(tp=4, rank_offset=12)).resolve()
    language = made.components["language"]
    seen = [tuple(language.coordinates(r)[k] for k in ("pp", "dp", "cp", "tp")) for r in language.ranks]
    assert seen == list(itertools.product(range(3), range(2), range(1), range(2)))
    for rank in language.ranks:
        at = language.coordinates(rank)
        assert rank in language.holders(at["tp"], at["pp"])


@given(layers=st.integers(1, 200), pp=st.integers(1, 16))
def test_stages_are_contiguous_and_differ_by_one_layer_at_most(layers, pp):
    stages = stage_layers(layers, pp)
    assert [i for s in stages for i in s] == list(range(layers)) and len(stages) == pp
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    assert [len(s) for s in stages] == sorted((len(s) for s in stages), reverse=True)


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(320, 4, 320), (321, 2, 322), (248320, 3, 248322)])
def test_vocabulary_is_padded_to_a_multiple_of_tp(vocab, tp, padded):
    assert padded_vocab(vocab, tp) == padded


def test_batches_that_a_component_cannot_share_are_named():
    layout = ParallelLayout(language=C(tp=2, dp=2), images=C(dp=4)).resolve()
    check_batch(layout, 16, 2)
    check_batch(layout, 12, 2)
    for batch, micro, message in (
        (10, 2, r"global_batch_size=10 .* micro_batch_size=2 .* layout\.language\.dp=2; set global_batch_size=8"),
        (
            8,
            1,
            r"micro_batch_size=1 times layout\.language\.dp=2 is 2 samples, .* layout\.images\.dp=4 .* set micro_batch_size=2",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            check_batch(layout, batch, micro)
