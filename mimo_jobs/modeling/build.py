"""From a config.json and a layout to this rank's part of a ``MimoModel``."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from transformers import PreTrainedConfig

from mimo_jobs.layout import IMAGES, LANGUAGE, ResolvedLayout
from mimo_jobs.modeling import cpu, kernels
from mimo_jobs.modeling.config import language_config, parse_hf_config, vision_config
from mimo_jobs.modeling.language import LanguageModel, language_spec
from mimo_jobs.modeling.mimo import Mimo
from mimo_jobs.modeling.vision import VisionTower, vision_spec
from mimo_jobs.parallel.grids import build_grids

ENCODER = "vision"
"""The only encoder of images; its checkpoint keys start with ``modality_submodules.images.encoders.vision.``"""


@dataclass(frozen=True)
class BuiltModel:
    """This rank's part of a model, and what it takes to run it.

    Attributes:
        model: holds this rank's components; the submodules may be wrapped later (DDP).
        hf: the whole model's config, defaults filled in.
        layout: where every component lives.
        grids: component to grid, all components.
        groups: component to this rank's process groups, only the components that live on this rank.
        configs: component to megatron-core config, all components.
        communicator: hands activations between disjoint components and pipeline stages; None when colocated.
    """

    model: Mimo
    hf: PreTrainedConfig
    layout: ResolvedLayout
    grids: dict[str, HyperCommGrid]
    groups: dict[str, ProcessGroupCollection]
    configs: dict[str, TransformerConfig]
    communicator: MultiModulePipelineCommunicator | None

    @property
    def language(self) -> LanguageModel | None:
        """This rank's stage of the decoder without wrappers, if it has one."""
        return unwrapped(self.model.language_model) if LANGUAGE in self.groups else None

    @property
    def vision(self) -> VisionTower | None:
        """This rank's shard of the vision tower without wrappers, if it has one."""
        if IMAGES not in self.groups:
            return None
        return unwrapped(self.model.modality_submodules[IMAGES]).encoders[ENCODER]


def unwrapped(module: Any) -> Any:
    """The module inside its wrappers (DDP, 16-bit)."""
    return unwrap_model(module)


def build(
    hf_config: Mapping[str, Any],
    layout: ResolvedLayout,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    float32_parameters: Collection[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> BuiltModel:
    """Build this rank's part of the model, parameters not initialised. Collective over the world.

    ``torch.distributed`` is initialised (NCCL with one CUDA device a rank, or gloo); nothing else has to be.

    Args:
        hf_config: config.json as it is on disk.
        layout: a resolved layout for exactly this world.
        dtype: of parameters and activations.
        sequence_parallel: split the decoder's activations along the sequence over tp; sequences must divide by tp.
        float32_parameters: endings of parameter names that stay in fp32 (e.g. ``"self_attention.A_log"``), for
            checkpoints that store them so.
        overrides: component to further ``TransformerConfig`` fields (e.g. recomputation).

    Raises:
        UserError: the config is not of a supported model, or the layout does not fit it.
    """
    cpu.install()
    hf, overrides = parse_hf_config(hf_config), overrides or {}
    world = build_grids(layout)
    language_groups, image_groups = world.groups.get(LANGUAGE), world.groups.get(IMAGES)
    language = language_config(
        hf,
        layout.components[LANGUAGE],
        pp_rank=language_groups.pp.rank() if language_groups else 0,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        deterministic_mode=not kernels.available("cuda" if torch.cuda.is_available() else "cpu", dtype),
        **overrides.get(LANGUAGE, {}),
    )
    vision = vision_config(hf, layout.components[IMAGES], dtype=dtype, **overrides.get(IMAGES, {}))
    _prepare_process(language, language_groups)
    model = Mimo(
        MimoModelConfig(
            language_model_spec=language_spec(hf, language, layout.components[LANGUAGE], language_groups),
            modality_submodules_spec={
                IMAGES: ModuleSpec(
                    module=VisionModalitySubmodules,
                    params={"pg_collection": image_groups},
                    submodules={"encoders": {ENCODER: vision_spec(hf, vision, image_groups)}},
                )
            },
            special_token_ids={IMAGES: hf.image_token_id},
            module_to_grid_map=world.grids,
        ),
        tp_group=language_groups.tp if language_groups else None,
        cp_group=language_groups.cp if language_groups else None,
    )
    model.model_type = ModelType.encoder_or_decoder  # pyright: ignore  # the pipeline schedules read it
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(float32_parameters)):
            parameter.data = parameter.data.float()
    configs = {LANGUAGE: language, IMAGES: vision}
    communicator = _communicator(layout, world.grids, language)
    return BuiltModel(model, hf, layout, world.grids, world.groups, configs, communicator)


def _communicator(
    layout: ResolvedLayout, grids: dict[str, HyperCommGrid], config: TransformerConfig
) -> MultiModulePipelineCommunicator | None:
    if layout.colocated:
        return None
    return MultiModulePipelineCommunicator(
        grids,
        {IMAGES: [LANGUAGE], LANGUAGE: []},
        config,
        dim_mapping={"s": 0, "b": 1, "h": 2},  # pyright: ignore[reportArgumentType]  # annotated as lists, used as ints
        module_output_ndim={IMAGES: 2},  # the tower's tokens are packed: (tokens, hidden)
    )


def _prepare_process(config: TransformerConfig, groups: ProcessGroupCollection | None) -> None:
    """Two process-wide things that megatron-core's layers take from globals and that have no argument.

    The gather buffer of sequence parallelism, and the CUDA generators that ``TransformerBlock.forward`` forks under it.
    """
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    if torch.cuda.is_available():
        tp_rank = groups.tp.rank() if groups else dist.get_rank()
        model_parallel_cuda_manual_seed(1234, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
