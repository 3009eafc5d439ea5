"""Names and sizes of element types on both sides, and the explicit cast."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mimo_jobs.errors import UserError, did_you_mean

# safetensors name -> (bytes of an element, torch name). https://huggingface.co/docs/safetensors: the format's dtypes.
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"), "F32": (4, "float32"), "BF16": (2, "bfloat16"), "F16": (2, "float16"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"), "U8": (1, "uint8"), "BOOL": (1, "bool"),
}  # fmt: skip
FROM_TORCH = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
_CASTABLE = {"F64", "F32", "BF16", "F16"}
_SHORT = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp64": "F64", "half": "F16", "float": "F32"}


def itemsize(dtype: str) -> int:
    """Bytes of one element of a safetensors dtype."""
    return DTYPES[dtype][0]


def parse_dtype(value: str) -> str:
    """``bf16``, ``bfloat16``, ``BF16``, ``torch.bfloat16`` ... -> ``BF16``; raises `UserError` for anything else."""
    plain = value.removeprefix("torch.")
    name = _SHORT.get(plain.lower()) or FROM_TORCH.get(plain.lower()) or plain.upper()
    if name not in _CASTABLE:
        names = [DTYPES[c][1] for c in ("BF16", "F16", "F32", "F64")]
        raise UserError(f"dtype={value!r}: expected one of {', '.join(names)}{did_you_mean(value, names)}")
    return name


@dataclass(frozen=True)
class Cast:
    """Conversion of elements from one float dtype to another: round to nearest even, as torch does.

    NaNs keep sign and payload as far as the target has room for it (torch keeps only that they are NaN), so widening
    and narrowing again gives back every bit pattern.
    """

    source: str
    target: str

    def __call__(self, data: memoryview) -> memoryview:
        """``data`` holds whole elements of ``source``; returns new bytes of ``target``."""
        import ml_dtypes
        import numpy as np

        of = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
        values = np.frombuffer(data, of[self.source])
        with np.errstate(over="ignore", invalid="ignore"):
            made = values.astype(of[self.target])
        nan = np.isnan(values)
        if nan.any():
            raw = {2: np.uint16, 4: np.uint32, 8: np.uint64}
            bits = values[nan].view(raw[itemsize(self.source)]).astype(np.uint64)
            made.view(raw[itemsize(self.target)])[nan] = _nan_bits(bits, self.source, self.target)
        return memoryview(made.view(np.uint8))

    def scaled(self, nbytes: int) -> int:
        """Bytes of ``target`` for so many bytes of ``source``."""
        return nbytes // itemsize(self.source) * itemsize(self.target)


_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}


def _nan_bits(bits: Any, source: str, target: str) -> Any:
    """Bit patterns (uint64) of NaNs, moved to another format: sign, full exponent, the leading bits of the payload."""
    import numpy as np

    before, after = _MANTISSA_BITS[source], _MANTISSA_BITS[target]
    width = 8 * itemsize(target)
    sign = bits >> np.uint64(8 * itemsize(source) - 1)
    payload = bits & np.uint64((1 << before) - 1)
    payload = payload << np.uint64(after - before) if after >= before else payload >> np.uint64(before - after)
    payload = np.where(payload == 0, np.uint64(1 << (after - 1)), payload)  # an empty payload would be infinity
    exponent = ((1 << (width - 1 - after)) - 1) << after
    return sign << np.uint64(width - 1) | np.uint64(exponent) | payload


def widest(dtypes: Collection[str]) -> str | None:
    """The dtype that holds every value of ``dtypes`` exactly, None when the format has none (F64 beside others)."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F32" if set(dtypes) <= {"BF16", "F16", "F32"} else None


def cast_to(source: str, target: str | None) -> Cast | None:
    """The cast from ``source`` to ``target``; None when nothing changes."""
    return Cast(source, target) if target is not None and target != source and source in _CASTABLE else None
