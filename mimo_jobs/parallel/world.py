"""The ranks of one conversion job: a small control channel over TCP, without torch.

Conversion moves no tensor between ranks. What they share is little: who failed first, how far everybody is, and a few
results at the end. Rank 0 listens, the others connect; a broken connection is a dead rank, seen at once. All ranks end
when one fails, with the first error.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimo_jobs.errors import JobFailed, UserError
from mimo_jobs.parallel import attempt
from mimo_jobs.parallel.progress import REPORT_SECONDS, ProgressFile

CONNECT_SECONDS = 600 if "SLURM_JOB_ID" in os.environ else 120  # ranks of a big Slurm job start minutes apart
GRACE_SECONDS = 5  # a rank stuck in a system call is ended this long after another failed
INTERRUPT_SECONDS = 1.0
FLUSH_SECONDS = 25  # a rank that was asked to stop flushes what it wrote; Slurm's KillWait is 30 s
INTERRUPTED = "interrupted"
ENDED, LATE = "ended unexpectedly", "did not start within"


class World:
    """This rank among the ranks of a job; a context manager. With one rank nothing is opened.

    Attributes:
        rank, size: this rank and how many there are.
        record: directory shared by all ranks where the job writes ``progress.json`` and finds rank 0's address.
        seconds: wall time of this rank's phases.
    """

    def __init__(self, rank: int = 0, size: int = 1, record: Path | str | None = None, run_id: str = "") -> None:
        self.rank, self.size, self.run_id = rank, size, run_id
        self.record = Path(record) if record is not None else None
        self.failure: tuple[int, str, int] | None = None  # rank, message and exit code of the first failure
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._results: dict[str, dict[int, Any]] = {}
        self._answers: dict[str, Any] = {}
        self._peers: dict[int, socket.socket] = {}
        self._server: socket.socket | None = None
        self._left: set[int] = set()
        self._done: dict[int, int] = {}
        self._phase, self._total, self._unit, self._note = "", 0, "B", ""
        self._reported = 0.0
        self._progress = ProgressFile(self.record) if self.record is not None and rank == 0 else None
        self._closing = False
        self._watchdog: threading.Timer | None = None
        self._readers: list[threading.Thread] = []
        self._clean_ups: list[Callable[[], None]] = []
        self.seconds: dict[str, float] = {}

    @classmethod
    def from_env(cls, record: Path | str | None = None, run_id: str = "") -> "World":
        """Rank and size as torchrun (RANK, WORLD_SIZE) or srun (SLURM_PROCID, SLURM_NTASKS) gives them, else one rank."""
        env = os.environ
        rank, size = env.get("RANK", env.get("SLURM_PROCID")), env.get("WORLD_SIZE", env.get("SLURM_NTASKS"))
        return cls(int(rank or 0), int(size or 1), record, run_id)

    # ------------------------------------------------------------------------------------------------ connecting

    def __enter__(self) -> "World":
        if self.size > 1:
            assert self.record is not None, "ranks find each other through the record directory"
            try:
                self._listen() if self.rank == 0 else self._connect()
                self.check()
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise
        return self

    @property
    def _address_file(self) -> Path:
        assert self.record is not None
        which = attempt.name() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return self.record / f".rank0-address-{which}.json"

    def _listen(self) -> None:
        server = socket.create_server(("", 0), backlog=self.size)
        self._server, token = server, secrets.token_hex(16)
        address = {"port": server.getsockname()[1], "token": token, "hosts": _own_hosts(), "pid": os.getpid()}
        temporary = self._address_file.with_suffix(".tmp")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(address, file)
        os.replace(temporary, self._address_file)
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(self._peers) < self.size - 1:
            self.check()
            server.settimeout(0.2)
            try:
                peer, _ = server.accept()
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = sorted(set(range(1, self.size)) - set(self._peers))
                raise JobFailed(f"ranks {missing} {LATE} {CONNECT_SECONDS} s of rank 0") from None
            peer.settimeout(10)
            try:
                hello = json.loads(_readline(peer))
                assert secrets.compare_digest(hello["token"], token) and 0 < hello["rank"] < self.size
            except (ValueError, KeyError, TypeError, AssertionError, OSError):
                peer.close()
                continue
            peer.settimeout(None)
            self._peers[hello["rank"]] = peer
            self._start_reader(peer, hello["rank"])  # at once: a rank that dies while others start is seen

    def _connect(self) -> None:
        deadline, own = time.monotonic() + CONNECT_SECONDS, socket.gethostname()
        while True:
            try:
                address = json.loads(self._address_file.read_text())
                if "failed" in address and not self._is_left_over():
                    raise JobFailed(*address["failed"])
                hosts = ["127.0.0.1"] if own in address["hosts"] else address["hosts"]
                peer = _first_connection(hosts, address["port"])
                break
            except (OSError, ValueError, KeyError) as error:
                if isinstance(error, JobFailed):
                    raise
                if self._rank_0_is_dead():
                    raise JobFailed("rank 0 ended before the others had started; see its log") from None
                if time.monotonic() > deadline:
                    raise JobFailed(f"rank {self.rank} could not reach rank 0 within {CONNECT_SECONDS} s") from None
                time.sleep(0.05)
        peer.sendall(_line({"token": address["token"], "rank": self.rank}))
        self._peers[0] = peer
        self._start_reader(peer, 0)

    def _rank_0_is_dead(self) -> bool:
        """Whether rank 0 published an address of this run, on this host, and its process is gone."""
        try:
            if self._is_left_over():
                return False
            address = json.loads(self._address_file.read_text())
            return address["hosts"][0] == socket.gethostname() and not Path(f"/proc/{address['pid']}").exists()
        except (OSError, ValueError, KeyError, IndexError):
            return False

    def _is_left_over(self) -> bool:
        """Whether the address is that of an earlier run of the same record."""
        return attempt.is_earlier(self._address_file, attempt.name())

    # ------------------------------------------------------------------------------------------------- messages

    def _start_reader(self, peer: socket.socket, rank: int) -> None:
        reader = threading.Thread(target=self._read, args=(peer, rank), daemon=True)
        self._readers.append(reader)
        reader.start()

    def _read(self, peer: socket.socket, rank: int) -> None:
        stream = peer.makefile("rb")
        with contextlib.suppress(OSError, ValueError):
            for line in stream:
                self._receive(rank, json.loads(line))
        if not self._closing and rank not in self._left:
            self._fail(rank, f"rank {rank} {ENDED} (killed, or out of memory?); see its log")

    def _receive(self, rank: int, message: dict) -> None:
        kind = message["kind"]
        if kind == "failed":
            self._fail(message["rank"], message["message"], message["code"])
        elif kind == "moved":
            with self._lock:
                self._done[rank] = message["done"]
            self._write_progress()
        elif kind == "leave":
            if message["failure"] is not None:
                self._fail(*message["failure"])
            with self._arrived:
                self._left.add(rank)
                self._arrived.notify_all()
        else:
            with self._arrived:
                if kind == "result":
                    self._results.setdefault(message["name"], {})[rank] = message["value"]
                else:
                    self._answers[message["name"]] = message["value"]
                self._arrived.notify_all()

    def _send(self, rank: int, message: dict) -> None:
        with contextlib.suppress(OSError, KeyError):  # gone, or not come yet
            self._peers[rank].sendall(_line(message))

    def _fail(self, rank: int, message: str, code: int = 1) -> None:
        """Remember the first failure, tell everybody, and end this process soon if its work does not notice."""
        with self._arrived:
            if self.failure is not None or self._closing:
                return
            self.failure = (rank, message, code)
            self._arrived.notify_all()
            if rank != self.rank:
                seconds = FLUSH_SECONDS if message == INTERRUPTED else GRACE_SECONDS
                self._watchdog = threading.Timer(seconds, os._exit, (1,))
                self._watchdog.daemon = True
                self._watchdog.start()
        if self.rank == 0:
            for peer in list(self._peers):
                self._send(peer, {"kind": "failed", "rank": rank, "message": message, "code": code})

    @property
    def main_host(self) -> str:
        """An address at which this rank has reached rank 0, which need not be on the first node."""
        return self._peers[0].getpeername()[0] if self.rank else "127.0.0.1"

    @property
    def lost(self) -> bool:
        """Whether the first failure is a rank that went silent or never came: it may not happen again."""
        return self.failure is not None and (
            ENDED in self.failure[1] or LATE in self.failure[1] or self.failure[1] == INTERRUPTED
        )

    def check(self) -> None:
        """Raise `JobFailed` with the first error when another rank has failed."""
        if self.failure is not None and self.failure[0] != self.rank:
            raise JobFailed(*self.failure[1:])

    # ------------------------------------------------------------------------------------------- used by the jobs

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """Every rank's JSON value in rank order on rank 0, None elsewhere. Raises `JobFailed` if a rank fails."""
        if self.rank != 0:
            self.check()
            self._send(0, {"kind": "result", "name": name, "value": value})
            return None
        with self._arrived:
            results = self._results.setdefault(name, {})
            results[0] = value
            self._arrived.wait_for(
                lambda: len(results) == self.size or self.failure is not None or bool(self._left - results.keys())
            )
        self.check()
        assert len(results) == self.size, f"ranks {sorted(self._left)} left before {name}"
        return [results[r] for r in range(self.size)]

    def broadcast(self, name: str, value: Any = None) -> Any:
        """Rank 0's JSON value on every rank."""
        if self.rank == 0:
            self.check()
            for peer in list(self._peers):
                self._send(peer, {"kind": "answer", "name": name, "value": value})
            return value
        with self._arrived:
            self._arrived.wait_for(lambda: name in self._answers or self.failure is not None or 0 in self._left)
        self.check()
        assert name in self._answers, f"rank 0 left before {name}"
        return self._answers[name]

    def barrier(self, name: str) -> None:
        """Nobody passes before everybody is here."""
        self.gather(name, None)
        self.broadcast(name)

    @contextlib.contextmanager
    def phase(self, name: str, total: int, unit: str = "B") -> Iterator[Callable[[int], None]]:
        """A stretch of work of ``total`` units over all ranks. Yields ``moved(n)``, which also raises `JobFailed`."""
        lock, mine = threading.Lock(), 0
        with self._lock:
            self._phase, self._total, self._unit, self._note = name, total, unit, ""
            self._done, self._reported = {}, 0.0

        def moved(n: int) -> None:
            nonlocal mine
            self.check()
            with lock:
                mine += n
                now = time.monotonic()
                if now - self._reported < REPORT_SECONDS:
                    return
                self._reported = now
            self._report(mine)

        with self.timed(name):
            yield moved
        self._report(mine)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall seconds of a stretch of this rank's work to ``seconds[name]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def progress(self, phase: str, done: int, total: int, unit: str = "B", note: str = "") -> None:
        """Report the state of a job whose rank 0 knows it; other ranks say nothing. Costs no time, however slow the disk is.

        Args:
            note: a few words of the moment, such as the loss.
        """
        with self._lock:
            self._phase, self._total, self._unit, self._note, self._done = phase, total, unit, note, {self.rank: done}
        self._write_progress()

    def say(self, text: str, kind: str = "") -> None:
        """Print a line on rank 0; ``kind``: what kind of line, such as ``warning``."""
        if self.rank == 0:
            print(f"{kind}: {text}" if kind else text, flush=True)

    def _report(self, done: int) -> None:
        if self.rank != 0:
            self._send(0, {"kind": "moved", "done": done})
            return
        with self._lock:
            self._done[0] = done
        self._write_progress()

    def _write_progress(self) -> None:
        if self._progress is None:
            return
        with self._lock:
            done = sum(self._done.values())
            state = {"phase": self._phase, "done": done, "total": self._total, "unit": self._unit}
            if self._note:
                state["note"] = self._note
        self._progress.put(state)

    # ------------------------------------------------------------------------------------------------- leaving

    def on_failure(self, clean_up: Callable[[], None]) -> None:
        """Call ``clean_up`` on rank 0 if the job fails, once no other rank works any more."""
        self._clean_ups.append(clean_up)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt) and self.size > 1:
            # A launcher interrupts the others because one died: give that news the time to arrive.
            with self._arrived:
                self._arrived.wait_for(lambda: self.failure is not None, INTERRUPT_SECONDS)
        heard = self.failure
        if error is not None and self.failure is None:
            message = str(error) or (INTERRUPTED if isinstance(error, KeyboardInterrupt) else repr(error))
            code = error.exit_code if isinstance(error, UserError) else 1
            if self.size == 1:
                self.failure = (self.rank, message, code)
            elif self.rank == 0:
                self._fail(0, message, code)
            else:
                self.failure = (self.rank, message, code)
                self._send(0, {"kind": "failed", "rank": self.rank, "message": message, "code": code})
        with self._lock:
            self._closing = True
            if self._watchdog is not None:
                self._watchdog.cancel()
        if self._progress is not None:
            self._progress.close()
        for peer in list(self._peers):
            self._send(peer, {"kind": "leave", "failure": self.failure})  # may overtake _fail's own message
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_WR)
        if self.rank == 0:
            if self._server is not None:
                self._server.close()
                self._leave_word_for_late_ranks()
            if error is not None:
                self._after_all_ranks()
        if isinstance(error, KeyboardInterrupt) and heard is not None:
            raise JobFailed(*heard[1:]) from None

    def _leave_word_for_late_ranks(self) -> None:
        """The address goes; a rank that was still to come finds the failure in its place."""
        if self.failure is None or len(self._peers) == self.size - 1:
            self._address_file.unlink(missing_ok=True)
            return
        temporary = self._address_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"failed": self.failure[1:]}))
        os.replace(temporary, self._address_file)

    def _after_all_ranks(self) -> None:
        """Run the clean-ups when every other rank is gone, or had its time to go."""
        interrupted = self.failure is not None and self.failure[1] == INTERRUPTED
        deadline = time.monotonic() + (FLUSH_SECONDS if interrupted else GRACE_SECONDS) + 1
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        for clean_up in self._clean_ups:
            clean_up()


def _own_hosts() -> list[str]:
    """Names and addresses under which other nodes may reach this one; the hostname first."""
    name = socket.gethostname()
    hosts = [name, socket.getfqdn(), os.environ.get("MASTER_ADDR", ""), os.environ.get("SLURMD_NODENAME", "")]
    return list(dict.fromkeys(h for h in hosts if h))


def _first_connection(hosts: list[str], port: int) -> socket.socket:
    problem: OSError = OSError("no address")
    for host in hosts:
        try:
            connected = socket.create_connection((host, port), timeout=10)
            connected.settimeout(None)
            return connected
        except OSError as error:
            problem = error
    raise problem


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _readline(peer: socket.socket, limit: int = 4096) -> bytes:
    """One line, byte by byte: the bytes after it belong to the reader thread."""
    line = bytearray()
    while not line.endswith(b"\n") and len(line) < limit:
        byte = peer.recv(1)
        if not byte:
            break
        line += byte
    return bytes(line)
