"""Layouts that recipes share. ``dp`` and ``rank_offset`` are left to be filled, so no override conflicts with them."""

from typing import TYPE_CHECKING

from mimo_jobs.layout import ComponentLayout, ParallelLayout

if TYPE_CHECKING:
    import fiddle as fdl

SPLIT_8GPU = {"language": {"tp": 4}, "images": {"tp": 4}}


def layout(language: dict[str, int], images: dict[str, int]) -> "fdl.Config[ParallelLayout]":
    """A configuration of a `ParallelLayout` in which every field can be overridden."""
    import fiddle as fdl  # 0.4 s: only when a recipe is built

    return fdl.Config(
        ParallelLayout,
        language=fdl.Config(ComponentLayout, **language),
        images=fdl.Config(ComponentLayout, **images),
    )


def split_8gpu() -> "fdl.Config[ParallelLayout]":
    """One node: language TP4 on GPUs 0-3, images TP4 on GPUs 4-7."""
    return layout(**SPLIT_8GPU)


def split_3ranks() -> "fdl.Config[ParallelLayout]":
    """Three ranks: language TP2 on 0-1, images on 2."""
    return layout(language={"tp": 2}, images={"tp": 1})


def pipeline_3ranks() -> "fdl.Config[ParallelLayout]":
    """Three ranks: language PP2 on 0-1, images on 2."""
    return layout(language={"pp": 2}, images={"tp": 1})
