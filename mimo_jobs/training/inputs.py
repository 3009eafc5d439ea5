"""The data of a run: opened on every rank, the same on all of them, and cut into rows."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch.distributed as dist

from mimo_jobs.errors import UserError
from mimo_jobs.parallel.world import World
from mimo_jobs.training.args import TrainArgs
from mimo_jobs.training.data import Encoder, Lengths, Order, Source, measure, open_source, pack, share
from mimo_jobs.training.rows import Rows, steps_and_stop


def open_data(args: TrainArgs, world: World) -> tuple[Source, Source | None]:
    """Rank 0 first: it prepares what the datasets library caches."""

    def opened() -> tuple[Source, Source | None]:
        train = open_source(args.data, args.dataset)
        chosen = args.validation
        return train, open_source(chosen.data, args.dataset, chosen.split) if chosen.data else None

    found = opened() if world.rank == 0 else None
    world.barrier("data set")
    return found or opened()


def same_data(args: TrainArgs, source: Source, world: World) -> dict[str, Any]:
    """What the data set is (`Source.sketch`), the same on every rank.

    Raises:
        UserError: a rank sees another one, as with copies on the nodes' own disks.
    """
    own = source.sketch()
    seen = world.gather("data sets", [own, os.uname().nodename]) or []
    for rank, (sketch, host) in enumerate(seen):
        if sketch != own:
            raise UserError(
                f"data={args.data}: rank {rank} on {host} sees another data set than rank 0 on {seen[0][1]} "
                f"({in_words(own, sketch)}); every node needs the same files"
            )
    return own


def in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How two sketches differ."""
    for name, text in (("rows", "{} rows, {} here"), ("schema", "schema {}, {} here")):
        if before.get(name) != now[name]:
            return text.format(before.get(name), now[name])
    return "rows of other contents"


def rows_of(args: TrainArgs, source: Source, encoder: Encoder, world: World) -> tuple[Rows, int, list[str]]:
    """Samples of every row, the number of steps, and id and reason of the samples that are in no row."""
    order = Order(len(source), args.seed, args.dataset.shuffle)
    if args.dataset.packing:
        lengths, bad = _lengths(args, source, encoder, world)

        @cache  # indexes, of which a run has few epochs
        def epoch_rows(epoch: int) -> Sequence[Sequence[int]]:
            return pack(lengths, order.epoch(epoch), args.dataset.max_length)

        steps, stop = steps_and_stop(lambda e: len(epoch_rows(e)), args.global_batch_size, args.steps, args.epochs)
        return Rows(epoch_rows, args.global_batch_size, stop), steps, bad
    steps, stop = steps_and_stop(lambda _: len(source), args.global_batch_size, args.steps, args.epochs)
    return Rows(lambda epoch: [[int(i)] for i in order.epoch(epoch)], args.global_batch_size, stop), steps, []


def _lengths(args: TrainArgs, source: Source, encoder: Encoder, world: World) -> tuple[Sequence[int], list[str]]:
    """Tokens of every sample, each rank measuring a share; bad ones are negative, returned and named in the log."""
    start, stop = share(len(source), world.rank, world.size)
    world.progress("measure samples", 0, len(source), "samples")
    own = measure(source, encoder, start, stop, args.dataset.workers)
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, own)
    lengths = Lengths.join(parts)
    bad = list(lengths.reasons.values())
    for problem in bad:
        world.say(f"bad sample, left out: {problem}")
    if bad and args.dataset.on_bad == "stop":
        raise UserError(f"bad sample: {bad[0]}; set dataset.on_bad=skip to go on without it")
    if len(bad) == len(source):
        raise UserError(f"{args.data}: all {len(bad)} samples are bad, e.g. {bad[0]}")
    return lengths.values.tolist(), bad
