"""Learning from measured steps: the few constants that no data sheet has, by least squares on the logarithms of step time and peak memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mimo_jobs.conversion.preflight import as_layout
from mimo_jobs.conversion.tiny import published
from mimo_jobs.layout import ResolvedLayout
from mimo_jobs.planning.cost import CostModel
from mimo_jobs.planning.rates import Rates
from mimo_jobs.planning.sizes import Sizes
from mimo_jobs.planning.workload import Settings, Tuning, Workload

FITTED = (
    "language_ceiling",
    "images_ceiling",
    "half_tokens",
    "launch",
)  # of the step's time; memory_factor is fitted apart
SHARES = ("language_ceiling", "images_ceiling")  # at most 1
PRIOR = 0.03  # a constant that is e times what it was before counts as a point that is 3 % off, as far as the model itself is: few points do not tell all
NOTICED = 1e-3  # of a constant's change that a point must show for the constant to be called fitted
ROUNDS = 200


@dataclass(frozen=True)
class Point:
    """A measured step.

    Attributes:
        config: config.json, or the name of a published size such as ``9B``.
        layout: as it is typed: ``layout.language.tp=2 layout.images.tp=1 layout.world_size=8``.
        workload: all samples are alike, so ``max_length`` says nothing here.
        step_seconds: median of some steps after the first.
        peak_bytes: component -> most bytes that PyTorch allocated on its fullest rank; the same for both where they share ranks.
    """

    config: Mapping[str, Any] | str
    layout: str
    workload: Workload
    settings: Settings
    step_seconds: float
    peak_bytes: Mapping[str, float] = field(default_factory=dict)
    tuning: Tuning = field(default_factory=Tuning)
    gpus_per_node: int = 8


class Prepared:
    """A point with what does not depend on the rates. Raises `UserError` for a layout or config that is none."""

    def __init__(self, point: Point) -> None:
        config = published_config(point.config) if isinstance(point.config, str) else point.config
        self.point, self.sizes, self.layout = point, Sizes(config, point.tuning), layout_of(point.layout)
        self.sizes.check(self.layout)
        memory = self.sizes.memory(self.layout, point.settings, point.workload.tokens, point.workload.image_tokens)
        together = sum(m.total for m in memory.values())
        self.bytes = {name: together if self.layout.colocated else m.total for name, m in memory.items()}

    def seconds(self, rates: Rates) -> float:
        """Predicted, of a step."""
        point = self.point
        return (
            CostModel(self.sizes, point.workload, rates, point.gpus_per_node)
            .estimate(self.layout, point.settings)
            .seconds
        )


def published_config(name: str) -> dict[str, Any]:
    """config.json of a published size such as ``9B``, as far as it says how large the model is. Raises `UserError` for another name."""
    s = published(name.lower())
    text = {
        "num_hidden_layers": s.layers, "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads, "linear_num_value_heads": s.gdn_value_heads, "linear_num_key_heads": s.gdn_key_heads,
        "head_dim": s.head_dim, "linear_key_head_dim": s.gdn_key_dim, "linear_value_head_dim": s.gdn_value_dim, "vocab_size": s.vocab,
        "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    vision = {
        "depth": s.vision_depth, "hidden_size": s.vision_hidden, "intermediate_size": s.vision_ffn, "num_heads": s.vision_heads,
        "out_hidden_size": s.hidden, "in_channels": 3, "patch_size": s.patch, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": s.vision_positions,
    }  # fmt: skip
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": vision, "tie_word_embeddings": s.tied}


def layout_of(words: str) -> ResolvedLayout:
    """A layout as it is typed, resolved."""
    found: dict[str, Any] = {}
    for word in words.split():
        path, _, value = word.partition("=")
        parts = path.removeprefix("layout.").split(".")
        inside = found.setdefault(parts[0], {}) if len(parts) > 1 else found
        inside[parts[-1]] = int(value)
    return as_layout(found).resolve()


def fit(points: Sequence[Point], rates: Rates) -> Rates:
    """``rates`` with the constants that fit the points best; one that no point depends on stays as it was.

    Args:
        points: measured on the card of ``rates``; at least one.
    """
    prepared = [Prepared(p) for p in points]
    measured = np.log([p.step_seconds for p in points])

    def with_constants(logs: np.ndarray) -> Rates:
        return replace(rates, **dict(zip(FITTED, map(float, np.exp(logs)), strict=True)))

    def errors(logs: np.ndarray) -> np.ndarray:
        changed = with_constants(logs)
        return np.log([p.seconds(changed) for p in prepared]) - measured

    start = np.log([getattr(rates, name) for name in FITTED])
    found, told = _least_squares(errors, start)
    source = f"fitted to {len(points)} measured points"
    names = [name for name, noticed in zip(FITTED, told, strict=True) if noticed]
    chosen = {name: value for name, value in zip(FITTED, map(float, np.exp(found)), strict=True) if name in names}
    ratios = [np.log(p.point.peak_bytes[n] / p.bytes[n]) for p in prepared for n in p.point.peak_bytes if p.bytes[n]]
    if ratios:
        chosen["memory_factor"] = float(np.exp(np.mean(ratios)))
    return replace(rates, **chosen, source={**rates.source, **dict.fromkeys(chosen, source)})


def _least_squares(errors: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's method with a pull to ``start``.

    Returns:
        the logarithms of the constants, and for each whether any point depends on it.
    """
    highest = np.array([0.0 if name in SHARES else np.inf for name in FITTED])

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.concatenate([errors(logs), PRIOR * (logs - start)])

    def slopes(logs: np.ndarray, now: np.ndarray, step: float = 1e-5) -> np.ndarray:
        return np.stack([(residuals(logs - step * one) - now) / -step for one in np.eye(len(logs))], axis=1)

    at, now, damping = start, residuals(start), 1e-3
    slope = slopes(at, now)
    for _ in range(ROUNDS):
        square = slope.T @ slope
        step = np.linalg.solve(square + damping * np.diag(np.diag(square)), -slope.T @ now)
        tried = np.minimum(at + step, highest)
        after = residuals(tried)
        if after @ after < now @ now:
            moved = np.abs(tried - at).max()
            at, now, damping = tried, after, damping / 5
            slope = slopes(at, now)
            if moved < 1e-6:
                break
        elif (damping := damping * 4) > 1e9:
            break
    return at, (np.abs(slope[: -len(at)]) > NOTICED).any(axis=0)


@dataclass(frozen=True)
class Compared:
    """Predicted beside measured. ``peaks``: component -> bytes, (predicted, measured), of those that were measured."""

    point: Point
    layout: ResolvedLayout
    seconds: tuple[float, float]
    peaks: Mapping[str, tuple[float, float]]

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """For each GPU of the layout: predicted, measured."""
        tokens = self.point.workload.global_batch_size * self.point.workload.tokens / self.layout.world_size
        return tokens / self.seconds[0], tokens / self.seconds[1]


def compare(points: Sequence[Point], rates: Rates) -> list[Compared]:
    """What ``rates`` predict of each point, beside what was measured."""
    prepared = [Prepared(p) for p in points]
    return [
        Compared(
            p.point, p.layout, (p.seconds(rates), p.point.step_seconds),
            {name: (p.bytes[name] * rates.memory_factor, n) for name, n in p.point.peak_bytes.items()},
        )
        for p in prepared
    ]  # fmt: skip


def table(points: Sequence[Point], rates: Rates) -> str:
    """`compare` as a table in Markdown: tokens/s for each GPU and peak GB, predicted, measured, and by how much they differ."""
    lines = [
        "| model | layout | settings | tokens/s a GPU: predicted | measured | error | peak GB: predicted | measured | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in compare(points, rates):
        how, peaks = one.point.settings, one.peaks.values()
        settings = f"{how.micro_batch_size} x {one.point.workload.tokens}, recompute {how.recompute}" + (
            ", SP" if how.sequence_parallel else ""
        )
        predicted, measured = one.tokens_per_second
        model = one.point.config if isinstance(one.point.config, str) else "config.json"
        cells = [
            model, _layout(one.layout), settings, f"{predicted:,.0f}", f"{measured:,.0f}", _error(predicted, measured),
            *(", ".join(f"{pair[i] / 1e9:.3g}" for pair in peaks) for i in (0, 1)), ", ".join(_error(*pair) for pair in peaks),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _layout(layout: ResolvedLayout) -> str:
    """``language tp2 dp4, images dp8, colocated``."""
    sizes = []
    for name, c in layout.components.items():
        sizes.append(
            f"{name} " + (" ".join(f"{n}{getattr(c, n)}" for n in ("tp", "pp", "dp") if getattr(c, n) > 1) or "tp1")
        )
    return ", ".join([*sizes, *["colocated"] * layout.colocated])


def _error(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %"
