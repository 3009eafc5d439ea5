"""Seconds of an optimizer step in a layout. docs/planning.md has the formulas in words; `rates.Rates` has the constants.

A rank's share of a microbatch takes ``max(products + traffic + communication, launching)``: the host queues kernels ahead of the card,
and whichever is slower sets the pace. Components on the same ranks add up; on ranks of their own they are stages of one pipeline.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mimo_jobs.layout import IMAGES, LANGUAGE, Component, ResolvedLayout, stage_layers
from mimo_jobs.planning.rates import Rates
from mimo_jobs.planning.sizes import Held, Sizes
from mimo_jobs.planning.workload import Settings, Workload
from mimo_jobs.training.flops import PASSES
from mimo_jobs.training.memory import GRADIENT, MASTER, MOMENTS, NARROW

PARTS: tuple[str, ...] = (
    LANGUAGE,
    IMAGES,
    "communication",
    "waiting",
    "optimizer",
)  # of a step's time, as metrics.jsonl has them


class Part(NamedTuple):
    """Seconds of one rank: computing, and in collectives and messages."""

    work: float
    communication: float

    @property
    def total(self) -> float:
        return self.work + self.communication


@dataclass(frozen=True)
class Estimate:
    """A step's time.

    Attributes:
        seconds: of a step.
        parts: seconds of each of `PARTS`, the mean over the layout's ranks; they add up to ``seconds``.
        microbatches: of a step.
    """

    seconds: float
    parts: dict[str, float]
    microbatches: int


class CostModel:
    """The cost of one model, workload and machine; parts that layouts share are reckoned once.

    Args:
        gpus_per_node: beyond which a group of ranks talks over the network.
    """

    def __init__(self, sizes: Sizes, workload: Workload, rates: Rates, gpus_per_node: int) -> None:
        self.sizes, self.workload, self.rates, self.gpus_per_node = sizes, workload, rates, gpus_per_node
        self._matrix = rates.matrix if sizes.itemsize < 4 else rates.matrix_fp32
        self._mixing = self._matrix * rates.mixing
        self._decoder = sizes.flops.language([workload.tokens], 0)
        d = sizes.dims
        self._decoder_mlp = 6 * workload.tokens * d["layers"] * d["hidden"] * d["ffn"] / self._decoder.weights
        self._patches = workload.image_tokens * sizes.dims["v_merge"] ** 2
        self._tower = sizes.flops.images([self._patches // workload.images] * workload.images)
        self._tower_mlp = 4 * self._patches * d["v_depth"] * d["v_hidden"] * d["v_ffn"] / max(1.0, self._tower.weights)
        self._stages: dict[tuple, list[Part]] = {}
        self._images: dict[tuple, Part] = {}
        self._ends: dict[tuple, tuple[float, float, float]] = {}

    def estimate(self, layout: ResolvedLayout, settings: Settings) -> Estimate:
        """The time of a step; the batch divides as `layout.check_batch` wants it."""
        language, images = layout.components[LANGUAGE], layout.components[IMAGES]
        rows = settings.micro_batch_size * language.dp
        count = self.workload.global_batch_size // rows
        stages = self._language(language, settings)
        tower = self._tower_part(images, rows // images.dp, settings)
        hand_over = self._hand_over(layout, settings)
        ends = {language: self._end(language, self._backward(stages[0], settings)), images: self._end(images, 0.0)}
        if layout.colocated:
            return self._one_after_the_other(count, stages[0], tower, hand_over, ends)
        first = Part(stages[0].work, stages[0].communication + hand_over)
        line = [Part(tower.work, tower.communication + hand_over), first, *stages[1:]]
        return self._pipeline(layout, count, line, ends)

    def _one_after_the_other(
        self, count: int, language: Part, tower: Part, hand_over: float, ends: Mapping[Component, Part]
    ) -> Estimate:
        exchanged = count * (language.communication + tower.communication + hand_over)
        exchanged += sum(e.communication for e in ends.values())
        optimizer = sum(e.work for e in ends.values()) + self.rates.step_overhead
        parts = dict(zip(PARTS, (count * language.work, count * tower.work, exchanged, 0.0, optimizer), strict=True))
        return Estimate(sum(parts.values()), parts, count)

    def _pipeline(
        self, layout: ResolvedLayout, count: int, stages: list[Part], ends: Mapping[Component, Part]
    ) -> Estimate:
        """Images, then the language's stages: the first microbatch takes the sum of all, each further one as long as the slowest."""
        language, images = layout.components[LANGUAGE], layout.components[IMAGES]
        longest = max(e.total for e in ends.values())
        times = [s.total for s in stages]
        seconds = sum(times) + (count - 1) * max(times) + longest + self.rates.step_overhead
        world = layout.world_size
        one = language.size / language.pp / world  # of all ranks, those of a stage
        shares = [images.size / world, *[one] * language.pp]
        exchanged = sum(s.communication * share for s, share in zip(stages, shares, strict=True)) * count
        exchanged += sum(e.communication * c.size / world for c, e in ends.items())
        optimizer = sum(e.work * c.size / world for c, e in ends.items()) + self.rates.step_overhead
        work = [count * s.work * share for s, share in zip(stages, shares, strict=True)]
        known = (sum(work[1:]), work[0], exchanged, optimizer)
        parts = dict(zip(PARTS, (*known[:3], seconds - sum(known), optimizer), strict=True))
        return Estimate(seconds, parts, count)

    # ------------------------------------------------------------------------------------------- computing, of a microbatch

    def _language(self, c: Component, settings: Settings) -> list[Part]:
        """A microbatch on each pipeline stage, forward and backward."""
        key = (c.tp, c.pp, c.size > self.gpus_per_node, settings)
        if key not in self._stages:
            layers = stage_layers(self.sizes.dims["layers"], c.pp)
            held = self.sizes.held(LANGUAGE, c.tp, c.pp)
            self._stages[key] = [self._stage(c, s, len(n), held[s], settings) for s, n in enumerate(layers)]
        return self._stages[key]

    def _stage(self, c: Component, stage: int, layers: int, held: Held, settings: Settings) -> Part:
        d, rows = self.sizes.dims, settings.micro_batch_size
        training = self.sizes.training[LANGUAGE]
        weights, mixing = PASSES[training]
        tokens, split = rows * self.workload.tokens, c.tp if settings.sequence_parallel else 1
        speed = self._speed(self.rates.language_ceiling, tokens, d["hidden"], d["ffn"] / c.tp)
        forward = self._decoder
        again, mixed_again = _again(settings, self._decoder_mlp)
        products = rows * (
            forward.weights * (weights + again) / speed + forward.mixing * (mixing + mixed_again) / self._mixing
        )
        inside = max(d["q_and_gate"] + 2 * d["kv"] + 2 * d["q"], d["gdn_qkv"] * 2 + 3 * d["gdn_value"]) + 3 * d["ffn"]
        values = tokens * (4 * d["hidden"] / split + inside / c.tp)
        device = layers * (products / c.tp / d["layers"] + self._traffic(values, 3 + again)) + self._gradients(held)
        if stage == c.pp - 1:  # the head is not computed again
            scored = rows * self.workload.loss_tokens
            fast = self._speed(self.rates.language_ceiling, scored, d["hidden"], d["vocab"] / c.tp)
            device += scored * self.sizes.flops.head * weights / c.tp / fast
            device += self._traffic(3 * scored * d["vocab"] / c.tp, 1)
        size = tokens * d["hidden"] * self.sizes.itemsize
        gathered = training == "trained" and settings.sequence_parallel
        blocks, _ = _again(settings, 0.5)  # of the two of a layer, the MLP
        exchanged = layers * self._layer_exchange(c.tp, size, 2 + blocks, settings.sequence_parallel, gathered)
        neighbours = (stage > 0) + (stage < c.pp - 1)
        messages = 2 * neighbours * self._message(size / split, c.size > self.gpus_per_node)
        launching = layers * self.rates.launch * (2 + blocks)
        return Part(max(device + exchanged, launching) - exchanged, exchanged + messages)

    def _tower_part(self, c: Component, rows: int, settings: Settings) -> Part:
        """The images of ``rows`` samples on one replica of the tower."""
        key = (c.tp, rows, settings.recompute)
        if key not in self._images:
            self._images[key] = self._tower_of(c, rows, settings)
        return self._images[key]

    def _tower_of(self, c: Component, rows: int, settings: Settings) -> Part:
        patches = rows * self._patches
        if not patches:
            return Part(0.0, 0.0)
        d, training = self.sizes.dims, self.sizes.training[IMAGES]
        weights, mixing = PASSES[training]
        trains = training != "frozen"
        again, mixed_again = _again(settings, self._tower_mlp) if trains else (0.0, 0.0)
        speed = self._speed(self.rates.images_ceiling, patches, d["v_hidden"], d["v_ffn"] / c.tp)
        forward = self._tower
        products = rows * (
            forward.weights * (weights + again) / speed + forward.mixing * (mixing + mixed_again) / self._mixing
        )
        values = patches * d["v_depth"] * (4 * d["v_hidden"] + (4 * d["v_hidden"] + 2 * d["v_ffn"]) / c.tp)
        device = products / c.tp + self._traffic(values, (3 if trains else 1) + again)
        device += self._gradients(self.sizes.held(IMAGES, c.tp, 1)[0])
        passes = 1 + trains + (_again(settings, 0.5)[0] if trains else 0)
        size = patches * d["v_hidden"] * self.sizes.itemsize
        exchanged = d["v_depth"] * self._layer_exchange(c.tp, size, passes, False, False)
        launching = d["v_depth"] * self.rates.launch * passes
        return Part(max(device + exchanged, launching) - exchanged, exchanged)

    def _speed(self, ceiling: float, tokens: float, width: float, other: float) -> float:
        """FLOP/s of products of so many tokens with matrices of so many rows and columns."""
        both = math.sqrt(width * other)
        filled = max(tokens, 1) / (tokens + self.rates.half_tokens) * both / (both + self.rates.half_width)
        return self._matrix * ceiling * filled

    def _traffic(self, values: float, passes: float) -> float:
        """What a layer computes (`training.memory`) is written and read once in the forward pass, twice in the backward pass."""
        return 2 * values * self.sizes.itemsize * passes / self.rates.hbm

    def _gradients(self, held: Held) -> float:
        """Each microbatch's gradient is written, read and added to the sum."""
        kept = NARROW if self.sizes.narrow else GRADIENT
        return (held.trained * (2 * self.sizes.itemsize + 2 * kept) + held.adapters * 4 * GRADIENT) / self.rates.hbm

    # ------------------------------------------------------------------------------------------------------ communication

    def _bandwidth(self, size: int, stride: int) -> float:
        """Bytes/s of a collective of ``size`` ranks, each ``stride`` after the other; every rank of a node has its own adapter."""
        near = min(size, max(1, self.gpus_per_node // stride))
        slowest = self.rates.nvlink if near >= size else min(self.rates.nvlink, self.rates.network * near)
        return slowest * self.rates.links

    def _layer_exchange(self, tp: int, size: float, passes: float, sequence_parallel: bool, gathered: bool) -> float:
        """Tensor parallelism: a ring all-reduce of two tensors of ``size`` bytes in each pass over a layer.

        Sequence parallelism halves each to a reduce-scatter and an all-gather.

        Args:
            gathered: its inputs are gathered once more, for the gradients of weights.
        """
        if tp == 1:
            return 0.0
        halves = 4 * passes + 2 * gathered
        calls = halves if sequence_parallel else 2 * passes
        return halves * (tp - 1) / tp * size / self._bandwidth(tp, 1) + calls * self.rates.latency

    def _message(self, size: float, far: bool) -> float:
        return size / ((self.rates.network if far else self.rates.nvlink) * self.rates.links) + self.rates.latency

    def _hand_over(self, layout: ResolvedLayout, settings: Settings) -> float:
        """Image tokens of a microbatch to the language, and their gradients back; on disjoint ranks one rank takes them for its tp group."""
        language, images = layout.components[LANGUAGE], layout.components[IMAGES]
        same = layout.colocated and language.tp == images.tp
        if same or not self.workload.image_tokens:
            return 0.0
        rows = settings.micro_batch_size * max(1, language.dp // images.dp)
        size = rows * self.workload.image_tokens * self.sizes.dims["hidden"] * self.sizes.itemsize
        hops = 1 if layout.colocated else 1 + (language.tp > 1)
        return 2 * hops * self._message(size, layout.world_size > self.gpus_per_node)

    # --------------------------------------------------------------------------------------------------- the end of a step

    def _end(self, c: Component, hidden: float) -> Part:
        """To step, and to reduce gradients and gather parameters, on the fullest rank of a component.

        Args:
            hidden: seconds of a backward pass, behind which gradients are reduced.
        """
        key = (c.name, c.tp, c.pp, c.dp)
        if key not in self._ends:
            self._ends[key] = self._end_of(c)
        stepping, reducing, gathering = self._ends[key]
        return Part(stepping, max(0.0, reducing - hidden) + gathering)

    def _end_of(self, c: Component) -> tuple[float, float, float]:
        held = max(self.sizes.held(c.name, c.tp, c.pp), key=lambda h: h.trained + h.adapters)
        itemsize, count = self.sizes.itemsize, held.trained + held.adapters
        gradient, moments = (NARROW, 2 * NARROW) if self.sizes.narrow else (GRADIENT, MOMENTS)
        # Zeroed, scaled; of the own share: norm, clipping, and AdamW, which reads and writes moments and fp32 copy.
        whole = gradient + 2 * gradient
        own = gradient + 2 * gradient + gradient + 2 * moments + 2 * MASTER + itemsize
        stepping = count * (whole + own / c.dp) / self.rates.hbm
        if c.dp == 1 or not count:
            return stepping, 0.0, 0.0
        way = (c.dp - 1) / c.dp / self._bandwidth(c.dp, c.tp)
        parameters = held.trained * itemsize + held.adapters * 4
        return stepping, count * gradient * way + self.rates.latency, parameters * way + self.rates.latency

    def _backward(self, stage: Part, settings: Settings) -> float:
        """Of a microbatch, the seconds of the backward pass: the last one's hide the reduction of the language's gradients."""
        weights, again = PASSES[self.sizes.training[LANGUAGE]][0], _again(settings, self._decoder_mlp)[0]
        return stage.work * (weights - 1 + again) / (weights + again)


def _again(settings: Settings, mlp: float) -> tuple[float, float]:
    """How often products with weights, and what mixes tokens, are computed again, if a share ``mlp`` of the former is of the MLPs."""
    return {"none": (0.0, 0.0), "selective": (mlp, 0.0), "full": (1.0, 1.0)}[settings.recompute]
