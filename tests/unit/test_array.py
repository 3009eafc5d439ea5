"""Job arrays without a cluster: how tensors are shared out, how a part goes on where it was, what reaches a shell."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from launchers import array
from launchers.array import HashPart, Part, VerifyPart, recorded, split
from launchers.profiles import Profile
from mimo_jobs.conversion.verify import verify_hf
from mimo_jobs.errors import UsageError, UserError
from mimo_jobs.weights.safetensors_io import TensorInfo, open_hf
from tests.hf_files import make_hf

Pair = tuple[Path, Path]
HOSTILE = "a b'c$(touch pwned)"


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = tmp_path_factory.mktemp("array") / HOSTILE
    return make_hf(root / "left"), make_hf(root / "right")


def one_tensor_a_time(part):
    part.batches = lambda names: [[n] for n in names]
    return part


def verify_part(sides: Pair, file) -> VerifyPart:
    a, b = (open_hf(side) for side in sides)
    return one_tensor_a_time(VerifyPart(file, list(a.tensors.values())[:6], (a, b), None))


def computed(part, monkeypatch) -> list[str]:
    """Names that the part computes from now on."""
    names, compute = [], type(part).compute
    monkeypatch.setattr(type(part), "compute", lambda self, batch: names.extend(batch) or compute(self, batch))
    return names


# ------------------------------------------------------------------------------------------------------ sharing out


def tensor(name: str, nbytes: int, file: str, offset: int) -> TensorInfo:
    return TensorInfo(name, "U8", (nbytes,), file, offset)


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 64, 500])
def test_parts_are_equal_contiguous_and_cover_everything_once(tasks):
    tensors = [tensor(f"{f}.{i}", 100 + 7 * i % 50, f"{f}.safetensors", 1000 * i) for f in "abc" for i in range(100)]
    parts = split(tensors[::-1], tasks)
    assert [t.name for part in parts for t in part] == [t.name for t in tensors]
    assert len(parts) == min(tasks, 300) or len(parts) > 250
    wanted = sum(t.nbytes for t in tensors) / tasks
    assert all(abs(sum(t.nbytes for t in part) - wanted) <= 150 for part in parts)


def test_the_number_of_tasks():
    def count(nbytes, **given):
        return len(split([tensor(str(i), nbytes // 200, "f", i) for i in range(200)], **given))

    assert [count(n) for n in (0, 200, 7_999_000_000, 17_000_000_000, 10**13)] == [1, 1, 1, 3, 64]
    assert count(200, tasks=5) == 5 and split([], 3) == [] and split([]) == []
    with pytest.raises(UsageError, match="tasks=0: expected an integer of at least 1"):
        count(200, tasks=0)


# ------------------------------------------------------------------------------------------------------ parts


def test_a_part_finds_what_verify_finds_and_travels(sides: Pair, tmp_path):
    a, b = (open_hf(side) for side in sides)
    part = pickle.loads(pickle.dumps(VerifyPart(tmp_path / "part", list(a.tensors.values())[:6], (a, b), None)))
    found, wanted = part(), verify_hf(*sides)
    assert {n: row["digest"] for n, row in found["rows"].items()} == {n: wanted["digests"][n] for n in part.sizes}
    assert sorted(found["files"]) == sorted({str(s / open_hf(s).tensors[n].file) for s in sides for n in part.sizes})


@pytest.mark.parametrize("torn", ["", '{"name": "model.langu', '{"name": "x"}\n[]\n7\n{}\n', "\0" * 40])
def test_a_part_goes_on_where_it_was(sides: Pair, tmp_path, monkeypatch, torn):
    whole = verify_part(sides, tmp_path / "whole")()
    part = verify_part(sides, tmp_path / "part")
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    part.file.write_text("".join(lines[:4]) + torn)  # the head and three tensors
    names = computed(part, monkeypatch)
    assert part() == whole
    assert names == list(part.sizes)[3:]
    assert set(recorded(part.file)[1]) == set(part.sizes)


@pytest.mark.parametrize("head", ["", '{"files"', "[]", '{"files": {}}'])
def test_a_part_without_its_head_starts_over(sides: Pair, tmp_path, monkeypatch, head):
    whole = verify_part(sides, tmp_path / "whole")()
    part = verify_part(sides, tmp_path / "part")
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    part.file.write_text(head + "\n" + "".join(lines[1:]))
    names = computed(part, monkeypatch)
    assert part() == whole and names == list(part.sizes)


def test_what_was_found_counts_only_for_the_same_files(tmp_path, monkeypatch):
    sides = make_hf(tmp_path / "left"), make_hf(tmp_path / "right")
    part = verify_part(sides, tmp_path / "part")
    part()
    names = computed(part, monkeypatch)
    part()
    assert names == []
    os.utime(part.sources[0])
    part()
    assert names == list(part.sizes)


def test_a_file_that_changes_meanwhile_is_no_result(tmp_path, monkeypatch):
    sides = make_hf(tmp_path / "left"), make_hf(tmp_path / "right")
    part = verify_part(sides, tmp_path / "part")
    compute = VerifyPart.compute
    monkeypatch.setattr(VerifyPart, "compute", lambda self, names: os.utime(part.sources[-1]) or compute(self, names))
    with pytest.raises(UserError, match="changed while it was being read"):
        part()
    os.remove(part.sources[0])
    with pytest.raises(UserError, match=r"No such file or directory; checkpoints must be where the nodes see them"):
        part()


def test_batches_are_written_as_they_are_known(tmp_path, monkeypatch):
    hf = open_hf(make_hf(tmp_path / "hf"))
    part = HashPart(tmp_path / "part", list(hf.tensors.values()), (hf,), None)
    assert list(part.batches(part.sizes)) == [list(part.sizes)]  # too small for more than one
    monkeypatch.setattr(array, "BATCH_BYTES", 1)
    batches = list(part.batches(part.sizes))
    assert [n for b in batches for n in b] == list(part.sizes) and 3 < len(batches) <= 9


def test_a_part_that_comes_no_further_gives_up():
    part = Part(Path("none"), [], (), None)
    for _ in range(2):
        part = part.checkpoint().function
    part.added = 1
    for _ in range(3):
        again = part.checkpoint()
        assert again.function is part and again.args == () and again.kwargs == {}
        part.added = 0
    with pytest.raises(UserError, match=r"stopped 3 times before anything was finished; set executor.time to more"):
        part.checkpoint()


# ------------------------------------------------------------------------------------------------------ digests


def test_digests_here(tmp_path):
    a, b = make_hf(tmp_path / "three"), make_hf(tmp_path / "one", single=True)
    steps = []
    found = array.hash_files(a, None, progress=lambda *step: steps.append(step))
    hf = open_hf(a)
    for name, t in hf.tensors.items():
        data = (a / t.file).read_bytes()[t.offset : t.offset + t.nbytes]
        wanted = {"digest": blake3(data).hexdigest(), "dtype": t.dtype, "shape": list(t.shape), "file": t.file}
        assert found["tensors"][name] == wanted
    assert steps[-1] == (hf.nbytes, hf.nbytes)
    assert found["total"] | {"digest": ""} == {"digest": "", "tensors": len(hf.tensors), "bytes": hf.nbytes}
    other = array.hash_files(b, None)["total"]["digest"]
    assert other != found["total"]["digest"]  # other bytes: the generator goes through the shards


def test_the_total_digest_does_not_see_files_but_sees_names_and_shapes(tmp_path):
    def total(name, **made):
        return array.hash_files(make_hf(tmp_path / name, **made), None)["total"]["digest"]

    entries = [("x", "U8", (2, 3)), ("y", "U8", (0,)), ("z", "U8", (0,))]
    same = total("a", entries=list(entries[1:]), shards=2)
    assert same == total("b", entries=list(entries[1:]), single=True)
    assert same != total("c", entries=[("y", "U8", (0,)), ("w", "U8", (0,))], single=True)
    assert same != total("d", entries=[("y", "U8", (0,)), ("z", "I8", (0,))], single=True)
    assert same != total("e", entries=[("y", "U8", (0,)), ("z", "U8", (0, 1))], single=True)


# ------------------------------------------------------------------------------------------------------ submitit


def script(profile: Profile, folder: Path) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command="true", folder=folder, map_count=2, **array.parameters("n", folder, profile))


def test_nothing_of_a_profile_is_run_but_setup(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\nenv > env; printf "%s\\n" "$@" > arguments\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    evil = "$(touch pwned) `touch pwned`; touch pwned\n#SBATCH --nodes=9\n'\" # \\"
    profile = Profile(
        account="a", qos="q", constraint="x&[y|z]", mem="4G", time="1:30", cpus_per_task=3, reservation="r",
        environment={"EVIL": evil}, modules=("cuda/12",), setup=("export SETUP=$((1 + 1))", "module() { echo $*; }"),
        sbatch=("--comment=$(touch pwned) # x", "--contiguous"),
    )  # fmt: skip
    text = script(profile, tmp_path)
    text = text.replace("module load", "true module load")
    run = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "pwned").exists()
    environment = (tmp_path / "env").read_text()
    assert evil in environment and "SETUP=2" in environment and "PYTHONSAFEPATH=1" in environment
    assert f"PYTHONPATH={Path(array.__file__).parent.parent}\n" in environment
    assert "--cpus-per-task=3" in (tmp_path / "arguments").read_text().splitlines()
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --comment='$(touch pwned) # x'" in options and "#SBATCH --contiguous" in options
    for option in (
        "time=2",
        "signal=USR2@30",
        "requeue",
        "mem=4G",
        "constraint='x&[y|z]'",
        "array=0-1%2",
        "reservation=r",
    ):
        assert f"#SBATCH --{option}" in options, option
    assert not any("wckey" in o or "gpu" in o or "gres" in o for o in options)


def test_what_is_asked_for_by_default(tmp_path):
    asked = array.parameters(
        "n", tmp_path, Profile(partition="gpus", cpu_partition="cpus", time="1-0", code="installed")
    )
    assert (asked["partition"], asked["time"], asked["cpus_per_task"], asked["signal_delay_s"]) == ("cpus", 1440, 4, 60)
    assert "unset PYTHONPATH" in asked["setup"] and not any("PYTHONPATH=" in line for line in asked["setup"])
    asked = array.parameters("n", tmp_path, Profile(partition="gpus"))
    assert (asked["partition"], asked["time"]) == ("gpus", 60)


@pytest.mark.parametrize("home", [HOSTILE, "percent%j", "back\\slash", "new\nline"])
def test_records_that_slurm_would_misread_are_refused(sides: Pair, tmp_path, monkeypatch, home):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / home))
    monkeypatch.setattr(array.shutil, "which", lambda name: name)  # as where there is Slurm
    with pytest.raises(UserError, match="has characters that submitit cannot pass on; set MIMO_JOBS_HOME"):
        array.verify(*sides, Profile())
    assert not list(tmp_path.glob("**/pwned"))


def test_without_slurm_it_says_so_and_leaves_nothing(sides: Pair, tmp_path, monkeypatch):
    monkeypatch.setenv("MIMO_JOBS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="is this a login node"):
        array.verify(*sides, Profile())
    assert not (tmp_path / "home").exists()
    with pytest.raises(UserError, match=r"log in to me@there, or set executor.ssh=none"):
        array.verify(*sides, Profile(ssh="me@there", venv="/v"))


def test_defaults_of_the_user_do_not_reach_sbatch(monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "theirs")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with array._slurm_environment():
        assert "SBATCH_PARTITION" not in os.environ and "SLURM_ARRAY_TASK_ID" not in os.environ
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert os.environ["SBATCH_PARTITION"] == "theirs" and os.environ["SLURM_ARRAY_TASK_ID"] == "7"


def raised(function) -> str:
    """As submitit tells it (submitit.core.core.Job.exception)."""
    import traceback

    try:
        function()
    except Exception:
        trace = traceback.format_exc()
    line = "----------------------"
    return (
        f"Job (task=0) failed during processing with trace:\n{line}\n{trace}\n{line}\nYou can check full logs with ..."
    )


def test_the_message_is_dug_out_of_submitits_exception():
    def fail(error):
        raise error

    def chained():
        try:
            {}["x"]
        except KeyError as error:
            raise ValueError("one\n  two\nthree: 3") from error

    assert array.last_words(raised(lambda: fail(UserError("/a b: gone")))) == "/a b: gone"
    assert array.last_words(raised(lambda: fail(UserError("first\n  second\n  third")))) == "first\n  second"
    assert array.last_words(raised(lambda: {}["x"])) == "KeyError: 'x'"
    assert array.last_words(raised(lambda: fail(AssertionError()))) == "AssertionError"
    assert array.last_words(raised(chained)) == "ValueError: one\n  two"
    assert array.last_words("no traceback") == "no traceback" and array.last_words("") == ""


def test_importing_it_is_cheap():
    code = "import sys, launchers.array; print([m for m in ('torch', 'submitit', 'nemo_run', 'fiddle') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_head_names_sizes_and_times(sides: Pair, tmp_path):
    part = verify_part(sides, tmp_path / "part")
    part()
    head = json.loads((tmp_path / "part").read_text().splitlines()[0])
    path, (size, mtime) = next(iter(head["files"].items()))
    assert (size, mtime) == (os.stat(path).st_size, os.stat(path).st_mtime_ns)
