"""How much of a model a rank holds in a layout, from config.json alone: parameters of each pipeline stage, and memory."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimo_jobs.families import family_of
from mimo_jobs.families.qwen35_vl import dims
from mimo_jobs.layout import IMAGES, LANGUAGE, ComponentLayout, ParallelLayout, ResolvedLayout, stage_layers
from mimo_jobs.planning.workload import Settings, Tuning
from mimo_jobs.training import flops, memory
from mimo_jobs.training.memory import Memory
from mimo_jobs.training.preflight import ITEMSIZE
from mimo_jobs.weights import plan as plans
from mimo_jobs.weights.adapters import adapted_linears, check_stages, projections, targeted

_LAYER = re.compile(r"\.layers\.(\d+)\.")
Stage = int | str


@dataclass(frozen=True)
class Held:
    """Parameters of a rank: all, those of the model that train, those of adapters."""

    elements: int
    trained: int
    adapters: int


class Sizes:
    """A model, and what of it trains.

    Attributes:
        config: config.json.
        weight_map: of the model; ``dims``: its dimensions; ``flops``: what its tokens and patches cost.
        training: component -> how it trains, as `flops.Work.passes` takes it.
        itemsize: bytes of a parameter; ``narrow``: its gradient and moments have 16 bits.

    Raises:
        UserError: no supported model, or adapters that it cannot have.
    """

    def __init__(self, config: Mapping[str, Any], tuning: Tuning) -> None:
        self.config, self.tuning = config, tuning
        self.weight_map = family_of(config).weight_map(config)
        self.dims, self.flops = dims(config), flops.of_config(config)
        self.itemsize = ITEMSIZE[tuning.precision]
        self.narrow = tuning.state == "bf16" and self.itemsize < 4
        self._modules = targeted(self.weight_map, tuning.lora.targets) if tuning.lora else ()
        self.training = self._training()
        self._parts: dict[tuple[str, int], dict[Stage, tuple[int, int]]] = {}
        self._held: dict[tuple[str, int, int], list[Held]] = {}
        self._kept: dict[tuple, int] = {}
        self._memory: dict[tuple, Memory] = {}

    def _training(self) -> dict[str, flops.Training]:
        """As `training.run` counts model FLOPs."""
        if self.tuning.lora is None:
            frozen = self.tuning.freeze
            language = "passed" if frozen == LANGUAGE else "trained"
            return {LANGUAGE: language, IMAGES: "frozen" if frozen == IMAGES else "trained"}
        known = projections(self.weight_map)
        adapted = {known[m].component for m in self._modules}
        return {LANGUAGE: "lora", IMAGES: "lora" if IMAGES in adapted else "frozen"}

    def check(self, layout: ResolvedLayout) -> None:
        """Whether the model allows the layout's tp and pp. Raises `UsageError`."""
        plans.check_layout(self.weight_map, layout)
        if self.tuning.lora is not None:
            check_stages(self.weight_map, self._modules, self.tuning.lora.targets, layout)

    def held(self, component: str, tp: int, pp: int) -> list[Held]:
        """What a rank of each pipeline stage holds. The tensor parallel ranks of a stage hold equally much."""
        key = (component, tp, pp)
        if key not in self._held:
            self._held[key] = self._count(*key)
        return self._held[key]

    def _count(self, component: str, tp: int, pp: int) -> list[Held]:
        parts = self._of_layers(component, tp)
        stages = stage_layers(self.dims["layers"], pp) if component == LANGUAGE else [range(0)]
        trains = self.tuning.lora is None and self.tuning.freeze != component
        found = []
        for s, layers in enumerate(stages):
            ends = ["first"] * (s == 0) + ["last"] * (s == len(stages) - 1)
            whole = [parts.get(stage, (0, 0)) for stage in (*layers, *ends)]
            elements, adapters = sum(n for n, _ in whole), sum(n for _, n in whole)
            if component == LANGUAGE and self.weight_map.aliases and s == pp - 1 > 0:
                elements += (
                    self.dims["vocab"] * self.dims["hidden"] // tp
                )  # a tied head: the last stage has the embeddings, too
            found.append(Held(elements, elements if trains else 0, adapters))
        return found

    def _of_layers(self, component: str, tp: int) -> dict[Stage, tuple[int, int]]:
        """Layer, ``first`` or ``last`` -> parameters and adapters' parameters of one tensor parallel rank."""
        if (component, tp) in self._parts:
            return self._parts[component, tp]
        sizes = {
            LANGUAGE: ComponentLayout(dp=1),
            IMAGES: ComponentLayout(dp=1),
            component: ComponentLayout(tp=tp, dp=1),
        }
        layout = ParallelLayout(language=sizes[LANGUAGE], images=sizes[IMAGES]).resolve()
        rank = layout.components[component].rank_offset
        elements: dict[Stage, int] = {}
        for box in plans.boxes(self.weight_map, layout):
            rule = self.weight_map.rules[box.rule]
            if rule.component == component and rank in box.holders:
                elements[rule.stage] = elements.get(rule.stage, 0) + box.rows * box.columns
        adapters: dict[Stage, int] = {}
        if lora := self.tuning.lora:
            for key, layer in adapted_linears(self.weight_map, self._modules, layout, rank).items():
                at = _LAYER.search(key)
                stage = int(at[1]) if at and component == LANGUAGE else "first"
                adapters[stage] = adapters.get(stage, 0) + lora.rank * (len(layer.modules) * layer.columns + layer.rows)
        found = {stage: (n, adapters.get(stage, 0)) for stage, n in elements.items()}
        self._parts[component, tp] = found
        return found

    def memory(
        self, layout: ResolvedLayout, settings: Settings, length: int, image_length: int | None = None
    ) -> dict[str, Memory]:
        """Component -> memory of its fullest rank, as `training.preflight` has it.

        Args:
            length: tokens of a sample; image_length: image tokens of one, without it as many as there can be.
        """
        found = {}
        for name, c in layout.components.items():
            longest = image_length if name == IMAGES and image_length is not None else length
            kept = self._activations(name, layout, settings, longest)
            key = (name, c.tp, c.pp, c.dp * c.cp, kept)
            if key not in self._memory:
                stages = self.held(name, c.tp, c.pp)
                elements, trained, adapters = (
                    max(getattr(h, f) for h in stages) for f in ("elements", "trained", "adapters")
                )
                state = memory.state(elements, trained, adapters, c.dp * c.cp, self.itemsize, self.narrow)
                self._memory[key] = dataclasses.replace(state, activations=kept)
            found[name] = self._memory[key]
        return found

    def _activations(self, name: str, layout: ResolvedLayout, settings: Settings, length: int) -> int:
        language, images = layout.components[LANGUAGE], layout.components[IMAGES]
        if name == LANGUAGE:
            key: tuple = (name, language.tp, language.pp, settings, length)
        else:  # it works on the samples of so many replicas of the language, while so many stages have theirs under way
            share = language.dp / images.dp
            key = (
                name,
                images.tp,
                share,
                None if layout.colocated else language.pp,
                settings.micro_batch_size,
                settings.recompute,
                length,
            )
        if key not in self._kept:
            found = memory.activations(
                self.config, layout, micro_batch_size=settings.micro_batch_size, max_length=length, itemsize=self.itemsize,
                recompute=settings.recompute, sequence_parallel=settings.sequence_parallel,
                images_train=self.training[IMAGES] != "frozen", head_trains=self.tuning.lora is None and self.tuning.freeze != LANGUAGE,
            )  # fmt: skip
            self._kept[key] = found[name]
        return self._kept[key]
