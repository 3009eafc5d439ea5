"""From samples to what each component's forward pass takes, for one microbatch in any layout.

A *row* of the global batch is a sequence of the decoder: one sample, several (packed), or none (its sample was bad). A microbatch
has ``micro_batch_size`` rows for every data-parallel replica of the language component; replicas of the images component share the
same rows. Which rows exist, and how long everything is, all ranks know from the same `StepTable`, so sizes need no communication on
the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mimo_jobs.modeling.attention import Packed
from mimo_jobs.modeling.forward import mrope_position_ids
from mimo_jobs.modeling.loss import Targets
from mimo_jobs.modeling.mimo import ImagePlaces
from mimo_jobs.modeling.tensors import moved
from mimo_jobs.modeling.vision import Padding, Patches
from mimo_jobs.training.data.encode import IGNORED, Encoded


@dataclass(frozen=True)
class Shares:
    """Who works on which rows.

    Attributes:
        language, images: data-parallel size of each component.
        micro_batch_size: rows of one language replica in one microbatch.
        microbatches: microbatches of one optimizer step.
    """

    language: int
    images: int
    micro_batch_size: int
    microbatches: int

    @property
    def rows(self) -> int:
        """Rows of one microbatch, over all replicas."""
        return self.micro_batch_size * self.language

    @property
    def global_batch_size(self) -> int:
        return self.rows * self.microbatches

    def language_rows(self, microbatch: int, replica: int) -> range:
        """Rows of the global batch that a language replica trains on."""
        return self._rows(microbatch, replica, self.language)

    def images_rows(self, microbatch: int, replica: int) -> range:
        """Rows whose images an images replica encodes."""
        return self._rows(microbatch, replica, self.images)

    def slots(self, microbatch: int) -> list[range]:
        """Rows by the smallest unit that travels between the components: the replicas of the component that has more."""
        count = max(self.language, self.images)
        return [self._rows(microbatch, slot, count) for slot in range(count)]

    @property
    def padded(self) -> bool:
        """Whether image tokens travel padded: megatron-core exchanges equal sizes where replicas are split or joined."""
        return self.language != self.images

    def _rows(self, microbatch: int, part: int, parts: int) -> range:
        each, first = self.rows // parts, self.rows * microbatch
        return range(first + part * each, first + (part + 1) * each)


@dataclass(frozen=True)
class StepTable:
    """What every rank knows of every row of a step.

    Attributes:
        rows: row -> its good samples, as positions in ``ids``.
        ids: name of every sample of the step, bad ones included.
        tokens, image_tokens, loss_tokens: int64, of each sample.
        patch_pairs: int64, pairs of patches that attend to each other, of each sample.
        bad: positions of samples that are left out.
    """

    rows: Sequence[Sequence[int]]
    ids: Sequence[str]
    tokens: np.ndarray
    image_tokens: np.ndarray
    loss_tokens: np.ndarray
    patch_pairs: np.ndarray
    bad: Sequence[int] = ()

    def total(self, what: np.ndarray) -> int:
        """Sum over the good samples."""
        return int(sum(what[s] for row in self.rows for s in row))

    def images_in(self, rows: range) -> int:
        """Image tokens of some rows."""
        return int(sum(self.image_tokens[s] for row in rows for s in self.rows[row]))


@dataclass(frozen=True)
class Microbatch:
    """Arguments of ``Mimo.forward`` on this rank, with ``targets`` on language ranks."""

    inputs: dict[str, Any]
    seq_length: int

    def to(self, device: torch.device) -> "Microbatch":
        """On a device, copies not waited for."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pinned(self) -> "Microbatch":
        """In page-locked memory, from where copies to a GPU need no waiting."""
        return self._each(lambda t: t.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Microbatch":
        return Microbatch(moved(self.inputs, change), self.seq_length)


def padding_of(table: StepTable, shares: Shares, microbatch: int) -> int:
    """Rows that every slot's image tokens are padded to."""
    return max(table.images_in(rows) for rows in shares.slots(microbatch))


def images_inputs(
    hf: PreTrainedConfig, table: StepTable, shares: Shares, microbatch: int, replica: int, pixels: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[str, Any] | None:  # fmt: skip
    """Arguments of ``VisionTower.forward``, or None when no rank has an image to encode.

    Args:
        hf: the whole model's config.
        pixels: position of a sample -> float32 (patches, features) and int64 (images, 3); samples without images may be missing.
    """
    rows = shares.images_rows(microbatch, replica)
    made = [pixels[s] for row in rows for s in table.rows[row] if table.image_tokens[s]]
    inputs: dict[str, Any] = {"pixel_values": None}
    if made:
        inputs["pixel_values"] = torch.cat([p for p, _ in made])
        inputs["patches"] = Patches.of(torch.cat([g for _, g in made]), hf.vision_config)
    if not shares.padded:
        return inputs if made else None
    length = padding_of(table, shares, microbatch)
    if not length:
        return None
    own = [slot for slot in shares.slots(microbatch) if slot[0] in rows]
    filled = _filled([table.images_in(slot) for slot in own], length)
    inputs["padding"] = Padding(torch.from_numpy(filled), length * len(own))
    return inputs


def _filled(counts: Sequence[int], length: int) -> np.ndarray:
    """Rows that are no padding, of slots of ``length`` rows that begin with ``counts`` tokens: int64 (sum of counts,)."""
    return np.concatenate([np.arange(n, dtype=np.int64) + i * length for i, n in enumerate(counts)])


def language_inputs(
    hf: PreTrainedConfig,
    table: StepTable,
    shares: Shares,
    microbatch: int,
    replica: int,
    encoded: Mapping[int, Encoded],
    *,
    multiple: int = 1,
) -> Microbatch:
    """Everything that a language rank takes: all samples of its rows behind one another in one sequence, attended to each for itself.

    Nothing is padded to the longest row, and a batch of one needs no copies between megatron-core's (seq, batch) and the kernels'
    (batch, seq).

    Args:
        hf: the whole model's config.
        encoded: position of a sample -> the sample, for this replica's rows.
        multiple: the sequence is padded to a multiple of it (tp, under sequence parallelism).
    """
    samples = [encoded[s] for r in shares.language_rows(microbatch, replica) for s in table.rows[r]]
    lengths = [len(s.input_ids) for s in samples]
    length = -(-max(1, sum(lengths)) // multiple) * multiple
    if rest := length - sum(lengths):
        lengths.append(rest)  # the padding is a sample of its own
    ids = torch.zeros(1, length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    positions = torch.zeros(3, 1, length, dtype=torch.int64)
    at = 0
    for sample in samples:
        end = at + len(sample.input_ids)
        ids[0, at:end], labels[0, at:end] = sample.input_ids, sample.labels
        grid = sample.image_grid_thw if len(sample.image_grid_thw) else None
        positions[:, :, at:end] = mrope_position_ids(hf, ids[:, at:end], grid)
        at = end
    inputs: dict[str, Any] = dict(
        input_ids=ids, position_ids=positions, targets=Targets.of(labels, IGNORED), image_places=_places(hf, table, shares, microbatch, replica, ids),
        packing_kwargs={"packed": Packed.of(lengths)},
    )  # fmt: skip
    return Microbatch(inputs, length)


def _places(
    hf: PreTrainedConfig, table: StepTable, shares: Shares, microbatch: int, replica: int, ids: Tensor
) -> ImagePlaces:
    positions = (ids[0] == hf.image_token_id).nonzero()[:, 0]
    if not shares.padded:
        return ImagePlaces(torch.arange(len(positions)), positions)
    rows, length = shares.language_rows(microbatch, replica), padding_of(table, shares, microbatch)
    own = [slot for slot in shares.slots(microbatch) if slot[0] in rows]
    filled = torch.from_numpy(_filled([table.images_in(slot) for slot in own], length))
    assert len(filled) == len(positions), (len(filled), len(positions))
    return ImagePlaces(filled, positions)
