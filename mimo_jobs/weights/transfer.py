"""Moving bytes between files: contiguous ranges, columns of rows, blocks of columns joined into rows. No torch.

Every function moves through one small reused buffer per thread, so a rank's memory does not grow with the model.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from mimo_jobs.errors import UserError
from mimo_jobs.weights.dtypes import Cast

# What bounds a rank's memory. Copies with blocks of 256 KiB to 4 MiB were no different beyond this machine's noise.
BLOCK = 1 << 20
IOV_MAX = 1024  # limits.h: buffers in one preadv

_local = threading.local()


def buffer(nbytes: int) -> memoryview:
    """This thread's scratch buffer, grown when a single row is longer than `BLOCK`."""
    if len(getattr(_local, "scratch", b"")) < nbytes:
        _local.scratch = memoryview(bytearray(max(nbytes, BLOCK)))
    return _local.scratch[:nbytes]


class Files:
    """Open file descriptors by path, shared by the threads of a rank; a context manager that closes them."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, bool], int] = {}
        self._lock = threading.Lock()

    def reader(self, path: os.PathLike | str) -> int:
        return self._get(os.fspath(path), os.O_RDONLY | os.O_CLOEXEC, False)

    def writer(self, path: os.PathLike | str) -> int:
        """Created when missing and never truncated: several ranks write disjoint ranges of one file."""
        return self._get(os.fspath(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, True)

    def _get(self, path: str, flags: int, write: bool) -> int:
        with self._lock:
            if (path, write) not in self._open:
                self._open[path, write] = os.open(path, flags, 0o644)
            return self._open[path, write]

    def sync(self) -> None:
        """fsync every file opened for writing."""
        for (_, write), fd in self._open.items():
            if write:
                os.fsync(fd)

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def read_full(fd: int, into: memoryview, offset: int) -> None:
    """Fill ``into`` from ``offset``; raises `UserError` when the file ends first."""
    done = 0
    while done < len(into):
        n = os.preadv(fd, [into[done:]], offset + done)
        if n == 0:
            raise UserError(
                f"{_path(fd)}: ends at byte {offset + done}, {len(into) - done} bytes early: truncated while in use?"
            )
        done += n


def scatter_full(fd: int, into: list[memoryview], offset: int) -> None:
    """Fill buffers one after another from one contiguous range: the kernel puts each row where it belongs."""
    nbytes = sum(len(b) for b in into)
    n = os.preadv(fd, into, offset)
    if n == nbytes:
        return
    for block in into:  # a short read: finish buffer by buffer
        read_full(fd, block, offset)
        offset += len(block)


def write_full(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``."""
    view, done = memoryview(data), 0
    try:
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
    except OSError as error:
        raise UserError(
            f"{_path(fd)}: {error.strerror} after {offset + done} bytes; free some space, or choose another target"
        ) from None


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


Moved = Callable[[int], None]


def copy_range(
    source: int,
    source_offset: int,
    target: int,
    target_offset: int,
    nbytes: int,
    moved: Moved,
    cast: Cast | None = None,
) -> None:
    """Copy a contiguous range. ``moved`` is told the source bytes of every block."""
    write_rows([(source, source_offset, 0, nbytes)], nbytes, 1, target, target_offset, moved, cast)


def gather_columns(
    source: int,
    source_offset: int,
    row_bytes: int,
    first: int,
    stop: int,
    rows: int,
    target: int,
    target_offset: int,
    moved: Moved,
    cast: Cast | None = None,
) -> None:
    """Bytes ``[first, stop)`` of each of ``rows`` rows, packed one after another at ``target_offset``.

    Only the columns asked for are read: one pread a row, since the rest of the row belongs to other ranks.
    """
    width = stop - first
    per_block = max(1, BLOCK // width)
    for row in range(0, rows, per_block):
        count = min(per_block, rows - row)
        block = buffer(count * width)
        at = source_offset + row * row_bytes + first
        for i in range(count):
            read_full(source, block[i * width : (i + 1) * width], at + i * row_bytes)
        _write(target, block, target_offset, row * width, cast)
        moved(len(block))


# fd, offset of its first row, and its place in the joined row in bytes; a part's own rows are contiguous in its file
Part = tuple[int, int, int, int]


def joined_rows(parts: list[Part], row_bytes: int, rows: int) -> Iterator[memoryview]:
    """Whole rows from blocks of columns, a block of this thread's buffer at a time."""
    if len(parts) == 1:
        yield from blocks(parts[0][0], parts[0][1], rows * row_bytes)
        return
    per_block = max(1, min(IOV_MAX, BLOCK // row_bytes))
    for row in range(0, rows, per_block):
        count = min(per_block, rows - row)
        joined = buffer(count * row_bytes)
        for fd, offset, first, stop in parts:
            into = [joined[i * row_bytes + first : i * row_bytes + stop] for i in range(count)]
            scatter_full(fd, into, offset + row * (stop - first))
        yield joined


def write_rows(
    parts: list[Part],
    row_bytes: int,
    rows: int,
    target: int,
    target_offset: int,
    moved: Moved,
    cast: Cast | None = None,
) -> None:
    """Write joined rows one after another at ``target_offset``."""
    done = 0
    for block in joined_rows(parts, row_bytes, rows):
        _write(target, block, target_offset, done, cast)
        done += len(block)
        moved(len(block))


def _write(target: int, block: memoryview, target_offset: int, done: int, cast: Cast | None) -> None:
    if cast is None:
        write_full(target, block, target_offset + done)
    else:
        write_full(target, cast(block), target_offset + cast.scaled(done))


def blocks(fd: int, offset: int, nbytes: int) -> Iterator[memoryview]:
    """A range in blocks of this thread's buffer."""
    for done in range(0, nbytes, BLOCK):
        block = buffer(min(BLOCK, nbytes - done))
        read_full(fd, block, offset + done)
        yield block


def run_all(tasks: Iterable[Callable[[], None]], threads: int) -> None:
    """Run tasks on ``threads`` threads; the first error is raised after the running ones end, the rest never start."""
    if threads <= 1:
        for task in tasks:
            task()
        return
    failed = threading.Event()

    def guarded(task: Callable[[], None]) -> None:
        if failed.is_set():
            return
        try:
            task()
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(guarded, task) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:  # also an interrupt of this thread while it waits
            failed.set()
            raise
