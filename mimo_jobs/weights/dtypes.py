"""Names and sizes of element types on both sides, and the explicit cast."""

from dataclasses import dataclass

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
    """Conversion of elements from one float dtype to another (round to nearest even, as torch does)."""

    source: str
    target: str

    def __call__(self, data: memoryview) -> memoryview:
        """``data`` holds whole elements of ``source``; returns new bytes of ``target``."""
        import ml_dtypes
        import numpy as np

        of = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
        with np.errstate(over="ignore", invalid="ignore"):
            return memoryview(np.frombuffer(data, of[self.source]).astype(of[self.target]).view(np.uint8))

    def scaled(self, nbytes: int) -> int:
        """Bytes of ``target`` for so many bytes of ``source``."""
        return nbytes // itemsize(self.source) * itemsize(self.target)


def cast_to(source: str, target: str | None) -> Cast | None:
    """The cast from ``source`` to ``target``; None when nothing changes."""
    return Cast(source, target) if target is not None and target != source and source in _CASTABLE else None
