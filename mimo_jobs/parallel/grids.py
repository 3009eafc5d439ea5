"""Process groups of every component, as arguments: ``HyperCommGrid`` and ``ProcessGroupCollection`` of megatron-core.

``megatron.core.parallel_state`` is not initialised. Creating groups is collective over the whole world, so every rank
calls `build_grids` with the same layout, also for components that it is not in.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from mimo_jobs.errors import UsageError
from mimo_jobs.layout import Component, ResolvedLayout

_DIMS = ("tp", "cp", "dp", "pp")  # rank order inside a component, fastest first
_GROUPS = (*_DIMS, ("dp", "cp"), ("tp", "cp"), ("tp", "pp"), ("tp", "dp", "cp"), _DIMS)
_EXPERT_GROUPS = ("expt_tp", "ep", "expt_dp", ("expt_tp", "ep"), ("expt_tp", "ep", "pp"))


@dataclass(frozen=True)
class Grids:
    """All grids, and the groups of the components that this rank is in."""

    grids: dict[str, HyperCommGrid]
    groups: dict[str, ProcessGroupCollection]


def build_grids(layout: ResolvedLayout) -> Grids:
    """Create the groups of every component, in the layout's order. Collective over the world.

    Raises:
        UsageError: the job runs with another number of ranks than the layout has.
    """
    if dist.get_world_size() != layout.world_size:
        raise UsageError(f"layout needs {layout.world_size} ranks, the job has {dist.get_world_size()}")
    grids, groups = {}, {}
    with _same_ranks_once():
        for name, component in layout.components.items():
            grid = _make_grid(component)
            embedding = _embedding_groups(grid)
            if dist.get_rank() in component.ranks:
                groups[name] = _collect(grid, *embedding)
            grids[name] = grid
    return Grids(grids, groups)


@contextmanager
def _same_ranks_once() -> Iterator[None]:
    """Dimensions that are spread over the same ranks share groups: with tp=cp=pp=1 alone there are a dozen of one rank each.

    Every NCCL communicator costs time to start and memory of the GPU, also one of one rank.
    """
    create, made = dist.new_subgroups_by_enumeration, {}

    @functools.wraps(create)
    def created(ranks: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        key = tuple(map(tuple, ranks))
        if key not in made:
            made[key] = create(ranks, *args, **kwargs)
        return made[key]

    dist.new_subgroups_by_enumeration = created
    try:
        yield
    finally:
        dist.new_subgroups_by_enumeration = create


def _make_grid(component: Component) -> HyperCommGrid:
    """The grid with every group that MimoModel, its optimizer and its checkpoints ask for."""
    grid = HyperCommGrid([getattr(component, dim) for dim in _DIMS], list(_DIMS), rank_offset=component.rank_offset)
    for dims in _GROUPS:
        grid.create_pg(dims if isinstance(dims, str) else list(dims))
    expert_dp = component.size // (component.etp * component.ep * component.pp)
    grid.register_view(
        "expert",
        [component.etp, component.ep, expert_dp, component.pp],
        ["expt_tp", "ep", "expt_dp", "pp"],
        shared_dims=["pp"],
    )
    for dims in _EXPERT_GROUPS:
        grid.create_pg(dims if isinstance(dims, str) else list(dims), view="expert")
    return grid


def _embedding_groups(grid: HyperCommGrid) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """This rank's groups of first and last stage (tied embeddings) and of the first stage; None when it is in none."""
    pipelines = grid.get_rank_enum(["pp"])
    found = []
    for ranks in ([sorted({p[0], p[-1]}) for p in pipelines], [[p[0]] for p in pipelines]):
        group, _ = dist.new_subgroups_by_enumeration(ranks)
        found.append(group if any(dist.get_rank() in r for r in ranks) else None)
    return found[0], found[1]


def _collect(
    grid: HyperCommGrid, embd: dist.ProcessGroup | None, pos_embd: dist.ProcessGroup | None
) -> ProcessGroupCollection:
    """Groups under the names megatron-core looks for."""
    groups: Any = ProcessGroupCollection()  # its fields are not annotated as optional
    for dim in _DIMS:
        setattr(groups, dim, grid.get_pg(dim))
    groups.dp_cp = groups.intra_dp_cp = grid.get_pg(["dp", "cp"])
    groups.tp_cp = grid.get_pg(["tp", "cp"])
    groups.mp = grid.get_pg(["tp", "pp"])
    groups.tp_dp_cp = grid.get_pg(["tp", "dp", "cp"])
    groups.intra_dist_opt = grid.get_pg(list(_DIMS))
    groups.ep = grid.get_pg("ep", view="expert")
    groups.expt_tp = grid.get_pg("expt_tp", view="expert")
    groups.expt_dp = groups.intra_expt_dp = grid.get_pg("expt_dp", view="expert")
    groups.tp_ep = grid.get_pg(["expt_tp", "ep"], view="expert")
    groups.tp_ep_pp = grid.get_pg(["expt_tp", "ep", "pp"], view="expert")
    groups.embd, groups.pos_embd = embd, pos_embd
    return groups
