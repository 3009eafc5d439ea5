"""Pickles as data: written from, and read into, inert values. Reading imports nothing and calls nothing."""

import io
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mimo_jobs.errors import UserError


@dataclass(frozen=True)
class Global:
    """A name that the pickle refers to, e.g. ``torch.Size``."""

    module: str
    name: str


@dataclass(eq=False)
class Call:
    """``function(*args)``, not called."""

    function: Global
    args: tuple


@dataclass(eq=False)
class Object:
    """An instance: its class and its state."""

    cls: Global
    state: Any


@dataclass(eq=False)
class Persistent:
    """A persistent id (``torch.save`` puts storages there)."""

    value: Any


@dataclass(eq=False)
class Items:
    """A dict whose keys are inert values."""

    pairs: list[tuple[Any, Any]]


def dumps(value: Any) -> bytes:
    """Pickle (protocol 2) of a tree of inert values, dicts, lists, tuples, strings, ints, bools and None."""
    return b"\x80\x02" + b"".join(_emit(value)) + b"."


def _emit(value: Any) -> Iterable[bytes]:
    match value:
        case None:
            yield b"N"
        case bool():
            yield b"\x88" if value else b"\x89"
        case int():
            if 0 <= value < 256:
                yield b"K" + bytes([value])
            elif -(1 << 31) <= value < 1 << 31:
                yield b"J" + struct.pack("<i", value)
            else:
                raw = pickle.encode_long(value)
                yield b"\x8a" + bytes([len(raw)]) + raw
        case str():
            raw = value.encode()
            yield b"X" + struct.pack("<I", len(raw)) + raw
        case Global():
            yield f"c{value.module}\n{value.name}\n".encode()
        case tuple():
            yield b"("
            for item in value:
                yield from _emit(item)
            yield b"t"
        case list():
            yield b"]("
            for item in value:
                yield from _emit(item)
            yield b"e"
        case dict():
            yield from _emit(Items(list(value.items())))
        case Items():
            yield b"}("
            for key, item in value.pairs:
                yield from _emit(key)
                yield from _emit(item)
            yield b"u"
        case Call():
            yield from _emit(value.function)
            yield from _emit(value.args)
            yield b"R"
        case Object():
            yield from _emit(value.cls)
            yield b")\x81"
            yield from _emit(value.state)
            yield b"b"
        case Persistent():
            yield from _emit(value.value)
            yield b"Q"
        case _:
            raise TypeError(f"cannot pickle {type(value)}")


def loads(raw: bytes, expected: Callable[[str, str], bool], what: str) -> Any:
    """Read a pickle into inert values. ``what`` names the file in errors.

    Raises:
        UserError: the pickle is damaged, or refers to a (module, name) that is not ``expected``. (It would not be
            imported or called either way; a name that has no business there means that the file is not what it seems.)
    """
    try:
        return _Reader(raw, expected, what).load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: damaged: {error}") from None


class _Reader(pickle.Unpickler):
    def __init__(self, raw: bytes, expected: Callable[[str, str], bool], what: str) -> None:
        super().__init__(io.BytesIO(raw))
        self._expected, self._what = expected, what

    def find_class(self, module: str, name: str) -> Any:
        if not self._expected(module, name):
            raise UserError(
                f"{self._what}: refers to {module}.{name}, which a checkpoint of weights does not need; refused"
            )
        return _stand_in(Global(module, name))

    def persistent_load(self, pid: Any) -> Persistent:
        return Persistent(tuple(_plain(v) for v in pid))


class _Named(type):
    """Metaclass of stand-ins: a class as far as the unpickler can see, a `Global` to us."""

    target: Global

    @property
    def name(cls) -> str:
        return cls.target.name


def _stand_in(target: Global) -> Any:
    """A class that stands for ``target``: calling it records the call, building it records the state."""

    class StandIn(metaclass=_Named):
        def __new__(cls, *args: Any) -> Any:
            made = object.__new__(cls)
            made.args, made.state, made.function, made.cls = args, None, target, target  # type: ignore[attr-defined]
            return made

        def __setstate__(self, state: Any) -> None:
            self.state = state

        def __setitem__(self, key: Any, value: Any) -> None:
            """Items of a dict subclass: nothing we read has any that matter."""

        def append(self, item: Any) -> None:
            """Items of a list subclass: likewise."""

    StandIn.target = target
    return StandIn


def _plain(value: Any) -> Any:
    return value.target if isinstance(value, _Named) else value
