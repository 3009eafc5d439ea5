"""A PEFT adapter directory, read as data: its settings, checked, and where its tensors lie. No torch, and no peft.

```
ADAPTER/
  adapter_config.json         peft.LoraConfig
  adapter_model.safetensors   base_model.model.<module>.lora_A.weight (rank, in), .lora_B.weight (out, rank),
                              .lora_magnitude_vector (out,)
  mimo_adapter.json           ours: digest of the base, identity, versions; PEFT does not read it
```
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_jobs.checkpoint.manifest import Manifest, file_digest
from mimo_jobs.errors import UserError, did_you_mean
from mimo_jobs.families.spec import WeightMap
from mimo_jobs.weights.adapters import projections
from mimo_jobs.weights.json_files import read_object
from mimo_jobs.weights.plan import FLOATS
from mimo_jobs.weights.safetensors_io import Shard, TensorInfo, read_shard

if TYPE_CHECKING:
    from mimo_jobs.training.config import Lora

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MANIFEST_NAME = "mimo_adapter.json"
FORMAT = 1
PREFIX = "base_model.model."  # PeftModel.base_model is a LoraModel, whose .model is the transformers model
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")  # the last with DoRA alone

# Settings under which W + scale * B @ A is not all there is. Each must be absent, false, empty or "none".
_PLAIN = (
    "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication",
    "target_parameters", "trainable_token_indices", "lora_bias", "alora_invocation_tokens", "use_bdlora", "use_qalora",
    "kasa_config", "velora_config", "arrow_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# Initialisations that also change the base's weights.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter on disk.

    Attributes:
        rank, alpha, rslora, dora, dropout: as `mimo_jobs.training.config.Lora`.
        base_model: what the directory says it was trained on.
        modules: Hugging Face modules with an adapter.
        shard: the weights' file; ``tensors``: ``MODULE.lora_A`` / ``MODULE.lora_B`` -> place in it.
        base: digest of the base's weights (`base_digest`), None when nobody recorded it.
        identity: what made it (`conversion.identity`); empty when it is not ours.
    """

    directory: Path
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    base_model: str | None
    modules: tuple[str, ...]
    shard: Shard
    tensors: dict[str, TensorInfo]
    base: str | None
    identity: dict[str, Any]

    def applied_to(self, lora: "Lora") -> "Lora":
        """Settings to go on training it: its own rank, alpha, scaling and modules in place of those in ``lora``."""
        own = dict(rank=self.rank, alpha=self.alpha, rslora=self.rslora, dora=self.dora, targets=",".join(self.modules))
        return replace(lora, **own)


def tensor_name(module: str, part: str) -> str:
    """Name of a part of a module's adapter in the file."""
    return f"{PREFIX}{module}.{part}" + (".weight" if part != PARTS[2] else "")


def parts(dora: bool) -> tuple[str, ...]:
    """What an adapter of one module is made of."""
    return PARTS if dora else PARTS[:2]


def read_peft(directory: Path) -> PeftAdapter:
    """Read configuration and header; no tensor is read.

    Raises:
        UserError: no adapter there, a damaged one, or one with settings that are not plain LoRA.
    """
    if not (directory / CONFIG_NAME).is_file():
        what = "has no" if directory.is_dir() else "is no directory with an"
        raise UserError(f"{directory}: {what} {CONFIG_NAME}; give a directory that PEFT's save_pretrained wrote")
    path = directory / CONFIG_NAME
    config = read_object(path)
    rank, alpha = _check_config(config, path)
    if not (directory / WEIGHTS_NAME).is_file():
        old = "; it has adapter_model.bin: save it again with safe_serialization=True"
        hint = old if (directory / "adapter_model.bin").exists() else ""
        raise UserError(f"{directory}: has no {WEIGHTS_NAME}{hint}")
    shard = read_shard(directory / WEIGHTS_NAME)
    dora = bool(config.get("use_dora"))
    modules, tensors = _tensors(shard, directory / WEIGHTS_NAME, rank, dora)
    own = read_object(directory / MANIFEST_NAME) if (directory / MANIFEST_NAME).is_file() else {}
    if own and own.get("format") != FORMAT:
        raise UserError(
            f"{directory / MANIFEST_NAME}: format {own.get('format')!r}; this version of mimo_jobs reads {FORMAT}"
        )
    return PeftAdapter(
        directory, rank, alpha, bool(config.get("use_rslora")), dora, float(config.get("lora_dropout") or 0.0),
        config.get("base_model_name_or_path"), modules, shard, tensors, own.get("base"), own.get("identity") or {},
    )  # fmt: skip


def _check_config(config: dict[str, Any], path: Path) -> tuple[int, float]:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type={config.get('peft_type')!r} is not supported; supported: 'LORA'")
    for field in _PLAIN:
        value = config.get(field)
        if value and value != "none":
            raise UserError(
                f"{path}: {field}={json.dumps(value)[:80]} is not supported; merge the adapter into its base with PEFT "
                "(merge_and_unload, save_pretrained) and import that"
            )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights={start!r} changes the base's own weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it one for the base as it is"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{path}: r={rank!r}: expected an integer of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise UserError(f"{path}: lora_alpha={alpha!r}: expected a number")
    return rank, float(alpha)


def _tensors(shard: Shard, path: Path, rank: int, dora: bool) -> tuple[tuple[str, ...], dict[str, TensorInfo]]:
    ends = {tensor_name("", part).removeprefix(PREFIX): part for part in parts(dora)}
    found: dict[str, TensorInfo] = {}
    for name, info in shard.tensors.items():
        end = next((e for e in ends if name.endswith(e)), None)
        if end is None or not name.startswith(PREFIX):
            raise UserError(
                f"{path}: {name} is not part of a LoRA adapter of linear layers (expected {tensor_name('<module>', 'lora_A')})"
            )
        if info.dtype not in FLOATS:
            raise UserError(f"{path}: {name} has dtype {info.dtype}; supported: {', '.join(FLOATS)}")
        axis = PARTS.index(ends[end])
        if len(info.shape) != (1 if axis == 2 else 2) or (axis < 2 and info.shape[axis] != rank):
            raise UserError(f"{path}: {name} has shape {list(info.shape)}, but {CONFIG_NAME} says r={rank}")
        found[name.removeprefix(PREFIX).removesuffix(".weight")] = info
    modules = tuple(dict.fromkeys(n.rpartition(".")[0] for n in found))
    for module in modules:
        for part in parts(dora):
            if f"{module}.{part}" not in found:
                raise UserError(f"{path}: {tensor_name(module, part)} is missing; the adapter is incomplete")
    if not modules:
        raise UserError(f"{path}: holds no adapter")
    return modules, found


def check_adapter(adapter: PeftAdapter, weight_map: WeightMap, of: str) -> None:
    """Whether an adapter fits the base model ``of``, which the weight map is of.

    Raises:
        UserError: it names modules that the base has not, or was trained on a base of another size.
    """
    known = projections(weight_map)
    for module in adapter.modules:
        if module not in known:
            raise UserError(
                f"{adapter.directory}: has an adapter of {module}, which is no projection of {of}{did_you_mean(module, known)}"
            )
        a, b, *magnitude = (adapter.tensors[f"{module}.{part}"].shape for part in parts(adapter.dora))
        base = known[module]
        if (b[0], a[1]) != (base.out_features, base.in_features) or any(m != b[:1] for m in magnitude):
            raise UserError(
                f"{adapter.directory}: the adapter of {module} is for a weight of shape [{b[0]}, {a[1]}], but that of {of} is "
                f"[{base.out_features}, {base.in_features}]; it was trained on another model ({adapter.base_model})"
            )


def check_base(adapter: PeftAdapter, manifest: Manifest, checkpoint: Path) -> None:
    """Whether an adapter was trained on the weights of a checkpoint, as far as both sides know.

    Raises:
        UserError: the weights are others.
    """
    own = base_digest(manifest)
    if adapter.base and own and adapter.base != own:
        raise UserError(
            f"{adapter.directory}: was trained on weights other than those of {checkpoint} (base {adapter.base[:12]}, here "
            f"{own[:12]}); give the checkpoint that it was trained on, or remove {MANIFEST_NAME} from it to merge all the same"
        )


def base_digest(manifest: Manifest) -> str | None:
    """One digest of a checkpoint's weights, passed-through tensors left out; None when it has none of its own weights."""
    skipped = {*manifest.passed_through, *manifest.dropped, *manifest.aliases}
    digests = sorted((n, d) for n, d in manifest.digests.items() if n not in skipped)
    return file_digest(json.dumps(digests).encode()) if digests else None


def layout_of(
    modules: Sequence[str], weight_map: WeightMap, rank: int, dora: bool = False
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of an adapter's file, fp32."""
    known, found = projections(weight_map), []
    for module in modules:
        rows, columns = known[module].out_features, known[module].in_features
        shapes: list[tuple[int, ...]] = [(rank, columns), (rows, rank), (rows,)]
        found += [(tensor_name(module, p), "F32", shape) for p, shape in zip(parts(dora), shapes, strict=False)]
    return found
