"""A real Slurm cluster of several nodes on this one machine, for tests that also break it.

Every daemon runs in the foreground as our child, in its own UTS and mount namespace: each node has its own hostname
and its own ``/etc/hosts``, that of the machine is never written. That bind mount also tells, for any process and
whoever its parent is by now, which cluster and node it belongs to; so a node can be cut from power and nothing is
left behind. Run as a script, this file is the guard that ends the cluster when the tests die without stopping it.

Debian's Slurm 22.05 (.ci/run installs the packages). Needs root (namespaces), no systemd, no cgroups.
"""

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmdbd", "slurmd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "srun", "unshare")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENDED = frozenset(
    ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"]
)
HOSTS = "mimo-slurm-hosts-"  # + owner's pid + a random word: the directory of the /etc/hosts files
MEMBER = re.compile(rf" /\S*{HOSTS}(\d+-\w+)/(\w+)(?://deleted)? /etc/hosts ")


def missing() -> str | None:
    """Why a cluster cannot be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of our own needs root"
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"{', '.join(absent)} not installed (the packages: see .ci/run)"
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


def members() -> list[tuple[int, str, str]]:
    """(process, cluster, host) of every process that runs on a host of a cluster of ours."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):  # ended meanwhile, a zombie, or the machine's own init
            if match := MEMBER.search(entry.read_text()):
                found.append((int(entry.parent.name), match[1], match[2]))
    return found


def kill_members(cluster: str, host: str | None = None) -> None:
    """SIGKILL everything on one host or on all of them, until nothing is left (processes may be forking)."""
    while pids := [pid for pid, owner, at in members() if owner == cluster and host in (None, at)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def finish(cluster: str, root: Path) -> None:
    """What is left of a cluster afterwards: its configuration and its logs."""
    kill_members(cluster)
    for name in ("db", "state", "spool"):
        shutil.rmtree(root / name, ignore_errors=True)


def kill_leftovers() -> None:
    """End the clusters whose owner died and whose guard did, too."""
    for cluster in {owner for _, owner, _ in members()}:
        if not Path(f"/proc/{cluster.split('-')[0]}").exists():
            kill_members(cluster)


def free_ports(count: int) -> list[int]:
    """Below the kernel's ephemeral range, so that no connection takes one before its daemon does."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found += [port] * (port not in found)
    return found


def listens(address: tuple[str, int] | str) -> bool:
    """On (host, port), or on the path of a Unix socket."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        probe.settimeout(1)
        return probe.connect_ex(address) == 0


class Cluster:
    """Nodes tnode1..N with fake GPUs; partitions batch (all nodes) and cpu (the last); QOS normal and high.

    A node is named by its number from 1 or by its name. Options (``reconfigure`` changes them on the fly):
    ``min_job_age`` seconds until squeue forgets a job that ended; ``preempt_send_user_signal``: a job that is being
    preempted gets its own ``--signal`` instead of SIGTERM at the start of the ``grace`` seconds; ``node_timeout``
    seconds until a silent node is DOWN.
    """

    def __init__(self, root: Path, nodes=3, gpus=8, cpus=32, memory_mb=64000, grace=12, **options: int):
        if len(str(root)) > 70:
            raise ValueError(f"{root}: too long for the Unix sockets under it")
        self.root, self.gpus, self.cpus, self.memory_mb, self.grace = root, gpus, cpus, memory_mb, grace
        self.options = {"min_job_age": 300, "preempt_send_user_signal": True, "node_timeout": 60} | options
        self._initial_options = dict(self.options)
        self.node_names = [f"tnode{i}" for i in range(1, nodes + 1)]
        self._network = f"127.0.{80 + os.getpid() % 170}"  # per process: rendezvous ports are fixed in some launchers
        self._head = f"{self._network}.250"
        self._ports = dict(zip(["ctld", "dbd", *self.node_names], free_ports(nodes + 2)))
        self._tag = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._daemons: dict[str, subprocess.Popen] = {}
        self._guard: subprocess.Popen | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> "Cluster":
        kill_leftovers()
        self._write_files()
        guard = [sys.executable, "-S", __file__, self._tag, str(self.root)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        try:
            munge = ["--foreground", "--force", f"--key-file={self.root}/munge.key", f"--socket={self.root}/munge"]
            munge += [f"--{kind}-file={self.root}/munged.{kind}" for kind in ("pid", "log", "seed")]
            self._spawn("munged", "thead", "munged", *munge)
            (self.root / "tmp").mkdir()  # in /tmp, a server that starts removes the temporary tables of all others
            made = subprocess.run(
                ["mariadb-install-db", f"--defaults-file={self.root}/my.cnf", "--user=root", "--skip-test-db"],
                env=self._environ, capture_output=True, text=True, start_new_session=True,
            )  # fmt: skip
            if made.returncode:
                raise RuntimeError(f"mariadb-install-db: {made.stdout}{made.stderr}")
            self.start_database()
            for words in (
                "add cluster mimo",
                "add qos high Priority=100 Preempt=normal PreemptMode=requeue",
                f"modify qos normal set GraceTime={self.grace}",
                "add account research Description=tests Organization=tests QOS=normal,high DefaultQOS=normal",
                "add user root Account=research DefaultAccount=research",
            ):
                self.run("sacctmgr", "-i", *words.split())
            self.start_controller()
            for name in self.node_names:
                self._start_slurmd(name)
            self.wait("the nodes", lambda: set(self.node_states().values()) == {"idle"})
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of the cluster, jobs included. The logs stay under root."""
        for daemon in self._daemons.values():  # one that has just been started need not be a member yet
            daemon.kill()
        finish(self._tag, self.root)
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        if self._guard and self._guard.stdin:
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    def repair(self) -> None:
        """As after ``start``: all daemons run, no job is left, every node is idle, the options are the first ones."""
        if not self._runs("mariadbd") or not self._runs("slurmdbd"):
            self.start_database()
        if not self._runs("slurmctld"):
            self.start_controller()
        self.cancel_all(wait=False)  # before a node comes back and starts one
        for name in self.node_names:
            if not self._runs(name):
                self.start_node(name)
        if self.options != self._initial_options:
            self.reconfigure(**self._initial_options)
        self.cancel_all()
        for name, state in self.node_states().items():
            if state.rstrip("*").startswith(("down", "drain")):
                self.resume(name)
        self.wait("idle nodes", lambda: set(self.node_states().values()) == {"idle"}, 60)

    # -- what tests ask -----------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def run(self, *command: str, seconds: float = 60) -> str:
        """Standard output of a client command, here on the login side; RuntimeError with its stderr if it fails."""
        environ = {**os.environ, **self.environment()}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """id, name, state, reason, nodes ("" or as tnode[1-2]) of every job squeue knows; ended ones for min_job_age."""
        lines = self.run("squeue", "-h", "-t", "all", "-o", "%i\t%j\t%T\t%r\t%N").splitlines()
        return [dict(zip(("id", "name", "state", "reason", "nodes"), line.split("\t"))) for line in lines]

    def wait_state(self, job_id: int | str, states: str | set[str], seconds: float = 30) -> dict[str, str]:
        """The job once it is in one of the states ("PENDING" or {"RUNNING", "COMPLETED"}); TimeoutError if it is not."""
        wanted, deadline = {states} if isinstance(states, str) else states, time.monotonic() + seconds
        while True:
            job = next((job for job in self.jobs() if job["id"] == str(job_id)), {"state": "not in squeue"})
            if job["state"] in wanted:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is not {'/'.join(sorted(wanted))} after {seconds} s: {job}")
            time.sleep(0.1)

    def wait(self, what: str, ready: Callable[[], bool], seconds: float = 30) -> None:
        """Poll until it is true (a client command that fails counts as not yet); TimeoutError with the daemons' output."""
        deadline, problem = time.monotonic() + seconds, "not ready"
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except RuntimeError as error:
                problem = str(error)
            time.sleep(0.05)
        tails = "\n".join(f"{log.name}: {log.read_text()[-600:]}" for log in sorted(self.root.glob("*.out")))
        raise TimeoutError(f"{what}: {problem} after {seconds} s\n{tails}")

    def node_states(self) -> dict[str, str]:
        """As sinfo says: idle, mixed, allocated, completing, down, draining...; a ``*`` behind it: does not answer."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").splitlines())

    def processes(self, node: int | str) -> list[int]:
        """Of a node: slurmd, slurmstepd, the tasks, whatever they started."""
        return [pid for pid, owner, host in members() if owner == self._tag and host == self._name(node)]

    # -- what tests do ------------------------------------------------------------------------------------------------

    def cancel_all(self, wait: bool = True) -> None:
        def left() -> list[str]:
            return [job["id"] for job in self.jobs() if job["state"] not in ENDED]

        if ids := left():
            self.run(
                "scancel", *{i.partition("_")[0] for i in ids}
            )  # a pending array is 12_[0-1%2], which scancel refuses
        if ids and wait:
            self.wait("the jobs' end", lambda: not left(), 60)

    def reconfigure(self, **options: int) -> None:
        self.options |= options
        self._write_slurm_conf()
        self.run("scontrol", "reconfigure")

    def start_controller(self) -> None:
        self._spawn("slurmctld", "thead", "slurmctld", "-D")
        self.wait("slurmctld", self._answers)

    def _answers(self) -> bool:  # asked before it listens, squeue would try for long
        return listens((self._head, self._ports["ctld"])) and bool(self.run("sinfo", "-h"))

    def stop_controller(self, kill: bool = False) -> None:
        self._end("slurmctld", kill)

    def restart_controller(self, kill: bool = False) -> None:
        self.stop_controller(kill)
        self.start_controller()

    def start_database(self) -> None:
        """MariaDB and slurmdbd."""
        if not self._runs("mariadbd"):
            # no users, a Unix socket only; slurmdbd makes its own database
            self._spawn("mariadbd", "thead", "mariadbd", f"--defaults-file={self.root}/my.cnf", "--skip-grant-tables")
            self.wait("mariadbd", lambda: listens(f"{self.root}/db.sock"))
        if not self._runs("slurmdbd"):
            self._spawn("slurmdbd", "thead", "slurmdbd", "-D")
            self.wait("slurmdbd", lambda: listens((self._head, self._ports["dbd"])))

    def stop_database(self) -> None:
        self._end("slurmdbd")
        self._end("mariadbd")

    def kill_node(self, node: int | str, noticed: bool = True) -> None:
        """Cut the power: slurmd, the slurmstepds, the tasks. ``noticed``: do not wait node_timeout to set it DOWN."""
        kill_members(self._tag, self._name(node))
        self._daemons[self._name(node)].wait()
        if noticed:
            self.set_down(node, "power cut")

    def start_node(self, node: int | str) -> None:
        """Power on, and back into service if it was DOWN."""
        name = self._name(node)
        if not self._runs(name):
            self._start_slurmd(name)
        if self.node_states()[name].startswith("down"):
            self.resume(name)
        self.wait(name, lambda: not re.search(r"down|unk|\*", self.node_states()[name]))

    def set_down(self, node: int | str, reason: str) -> None:
        """The controller requeues (or fails) the node's jobs; slurmd goes on."""
        self.run("scontrol", "update", f"NodeName={self._name(node)}", "State=DOWN", f"Reason={reason}")

    def resume(self, node: int | str) -> None:
        self.run("scontrol", "update", f"NodeName={self._name(node)}", "State=RESUME")

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _environ(self) -> dict[str, str]:
        """Of the daemons: nothing of ours, so that jobs see only what sbatch sends."""
        return {"PATH": PATH, "MYSQL_UNIX_PORT": f"{self.root}/db.sock", **self.environment()}

    def _name(self, node: int | str) -> str:
        name = f"tnode{node}" if isinstance(node, int) else node
        if name not in self.node_names:
            raise KeyError(f"{name} is none of {self.node_names}")
        return name

    def _runs(self, daemon: str) -> bool:
        return daemon in self._daemons and self._daemons[daemon].poll() is None

    def _spawn(self, daemon: str, host: str, *command: str) -> None:
        """unshare and sh replace themselves: the child is the daemon."""
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        hosts = self.root / (HOSTS + self._tag) / host
        with open(self.root / f"{daemon}.out", "ab") as output:
            self._daemons[daemon] = subprocess.Popen(
                ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", str(hosts), host, *command],
                env=self._environ, cwd=self.root, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _start_slurmd(self, name: str) -> None:
        self._spawn(name, name, "slurmd", "-D", "-N", name)

    def _end(self, daemon: str, kill: bool = False) -> None:
        process = self._daemons[daemon]
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # -- configuration ------------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        root, ports = self.root, self._ports
        for name in ("db", "state", "spool", "devices", HOSTS + self._tag):
            (root / name).mkdir(parents=True)
        (root / "munge.key").write_bytes(secrets.token_bytes(128))
        (root / "munge.key").chmod(0o400)
        for i in range(self.gpus):  # gres/gpu counts device files only
            (root / "devices" / f"gpu{i}").symlink_to("/dev/null")
        (root / "gres.conf").write_text(f"Name=gpu File={root}/devices/gpu[0-{self.gpus - 1}]\n" if self.gpus else "")
        (root / "cgroup.conf").write_text("CgroupAutomount=no\n")

        addresses = [f"{self._network}.{i} {name}" for i, name in enumerate(self.node_names, 1)]
        hosts = "\n".join([Path("/etc/hosts").read_text(), *addresses, f"{self._head} thead", ""])
        for host in ("thead", *self.node_names):  # one file a host: it is what marks the host's processes
            (root / (HOSTS + self._tag) / host).write_text(hosts)

        # no safety against the machine's own power cut: a start without a single fsync
        (root / "my.cnf").write_text(f"""[mariadbd]
user=root
datadir={root}/db
socket={root}/db.sock
pid-file={root}/db.pid
tmpdir={root}/tmp
skip-networking
skip-log-bin
performance-schema=OFF
innodb-flush-method=nosync
innodb-flush-log-at-trx-commit=0
innodb-doublewrite=OFF
innodb-buffer-pool-size=32M
innodb-log-file-size=16M
innodb-lock-wait-timeout=900
""")
        (root / "slurmdbd.conf").write_text(f"""
AuthType=auth/munge
AuthInfo=socket={root}/munge
DbdHost=thead
DbdAddr={self._head}
DbdPort={ports["dbd"]}
SlurmUser=root
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
""")
        (root / "slurmdbd.conf").chmod(0o600)
        self._write_slurm_conf()

    def _write_slurm_conf(self) -> None:
        root, options = self.root, self.options
        scheduler = "sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0,bf_window=1440"
        signals = "SlurmctldParameters=preempt_send_user_signal" if options["preempt_send_user_signal"] else ""
        size = f"CPUs={self.cpus} CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={self.memory_mb}"
        if self.gpus:
            size += f" Gres=gpu:{self.gpus}"
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={self._network}.{i} Port={self._ports[name]} {size}"
            for i, name in enumerate(self.node_names, 1)
        )
        # cred_expire is also how long a requeued job must wait; AccountingStoragePass is munge's socket towards
        # slurmdbd; ReturnToService=1: a node that a test sets DOWN stays so
        (root / "slurm.conf").write_text(f"""ClusterName=mimo
SlurmctldHost=thead({self._head})
SlurmctldPort={self._ports["ctld"]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge,cred_expire=5
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmdParameters=config_overrides
SlurmdTimeout={options["node_timeout"]}
ReturnToService=1
MinJobAge={options["min_job_age"]}
KillWait=5
{signals}
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters={scheduler}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={self._head}
AccountingStoragePort={self._ports["dbd"]}
AccountingStoragePass={root}/munge
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
PriorityType=priority/multifactor
PriorityWeightQOS=1000
PreemptType=preempt/qos
PreemptMode=REQUEUE
JobRequeue=1
{nodes}
PartitionName=batch Nodes=ALL Default=YES DefaultTime=01:00:00
PartitionName=cpu Nodes={self.node_names[-1]} DefaultTime=01:00:00
""")


if __name__ == "__main__":  # the guard: the pipe from the tests' process closes when they are done, or dead
    sys.stdin.read()
    finish(sys.argv[1], Path(sys.argv[2]))
