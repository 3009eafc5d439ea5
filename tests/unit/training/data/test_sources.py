"""Every kind of data set that a user may have, and what is said of one that cannot be used."""

import io
import json
import pickle
import tarfile

import datasets
import pytest

from mimo_jobs.errors import UserError
from mimo_jobs.training.config import Dataset as Settings
from mimo_jobs.training.data import BadSample, open_source
from mimo_jobs.training.data.images import image_size, read_image
from tests.unit.training.data.conftest import chat, encoded, llava_row, noise, write_lines

PNG = encoded(noise(48, 32))


def answer(source, index):
    return source.conversation(index).messages[-1]["content"]


def test_json_lines_with_images_beside_them(tmp_path, picture):
    picture("images/a.png")
    rows = [llava_row("images/a.png", f"answer {i}") for i in range(5)]
    file = write_lines(tmp_path / "train.jsonl", rows)
    file.write_text(file.read_text().replace("\n", "\n\n", 1))  # a blank line is no row, but it is a line
    source = open_source(str(file), Settings())
    assert len(source) == 5 and source.schema == "llava"
    assert [source.id(i) for i in (0, 1, 4)] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:6"]
    assert answer(source, 4) == "answer 4"
    assert image_size(source.conversation(0).images[0]) == (32, 48)
    with pytest.raises(IndexError):
        source.conversation(5)


def test_rows_keep_what_json_says_whatever_their_neighbours_are(tmp_path):
    parts = [{"type": "text", "text": "hi"}]
    rows = [chat("text"), chat(parts), chat("x", note=1), chat("x", note=[2]), chat("x", note={"a": None})]  # type: ignore[arg-type]
    source = open_source(str(write_lines(tmp_path / "d.jsonl", rows)), Settings())
    assert [source.row(i) for i in range(5)] == rows
    assert [type(source.conversation(i).messages[0]["content"]) for i in (0, 1)] == [str, list]


@pytest.mark.parametrize(
    "document",
    [
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps({"version": 1, "data": rows}, indent=2),
        lambda rows: "\n".join(map(json.dumps, rows)),
        lambda rows: "\ufeff" + json.dumps(rows, indent=1),
    ],
)
def test_json_documents(tmp_path, document):
    file = tmp_path / "train.json"
    file.write_text(document([chat(answer="one"), chat(answer="two")]))
    source = open_source(str(file), Settings())
    assert (len(source), source.id(1), answer(source, 1)) == (2, "train.json:2", "two")


def test_parquet_with_images_in_it_is_not_decoded(tmp_path, monkeypatch):
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})}
    )  # fmt: skip
    rows = [chat("<image>what?", f"answer {i}", images=[{"bytes": PNG, "path": None}]) for i in range(3)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "d.parquet"))
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    source = open_source(str(tmp_path / "d.parquet"), Settings())
    assert (len(source), source.id(2), answer(source, 2)) == (3, "d.parquet:3", "answer 2")
    assert source.conversation(0).images[0].data == PNG


def test_plain_parquet_of_bytes(tmp_path):
    rows = {"image": [PNG, None], "caption": ["a cat", "a dog"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "d.parquet"))
    source = open_source(str(tmp_path / "d.parquet"), Settings())
    assert source.schema == "caption" and read_image(source.conversation(0).images[0]).size == (48, 32)
    with pytest.raises(BadSample, match="image is missing"):
        source.conversation(1)


def test_saved_to_disk_with_splits(tmp_path):
    truth = json.dumps({"gt_parse": {"total": "5"}})
    features = datasets.Features({"image": datasets.Image(), "ground_truth": datasets.Value("string")})
    one = datasets.Dataset.from_list([{"image": noise(48, 32), "ground_truth": truth}], features=features)
    datasets.DatasetDict({"train": one, "validation": one}).save_to_disk(str(tmp_path / "cord"))
    one.save_to_disk(str(tmp_path / "single"))
    source = open_source(str(tmp_path / "cord"), Settings(), split="validation")
    assert (source.schema, source.id(0), answer(source, 0)) == ("cord-v2", "cord/validation:1", '{"total":"5"}')
    assert read_image(source.conversation(0).images[0]).size == (48, 32)
    assert open_source(str(tmp_path / "single"), Settings()).id(0) == "single:1"
    with pytest.raises(UserError, match="no split 'test' in it, but train, validation"):
        open_source(str(tmp_path / "cord"), Settings(split="test"))


def _tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_of_captions_with_several_kinds_of_images(tmp_path):
    members = {"0.png": PNG, "0.txt": b"a cat", "1.jpg": encoded(noise(20, 10), "JPEG"), "1.txt": b"a dog"}
    source = open_source(str(_tar(tmp_path / "a.tar", members)), Settings())
    assert (len(source), source.schema, source.id(1), answer(source, 1)) == (2, "caption", "a.tar:2", "a dog")
    assert [image_size(source.conversation(i).images[0]) for i in (0, 1)] == [(32, 48), (10, 20)]


def test_webdataset_of_conversations(tmp_path):
    rows = [llava_row("x.png", "one"), llava_row(None, "two"), chat([{"type": "text", "text": "hi"}], "three")]  # type: ignore[arg-type]
    members = {"s/0.png": PNG}
    members |= {f"s/{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)}
    _tar(tmp_path / "train-0.tar", members)
    source = open_source(str(tmp_path), Settings(schema="llava"))
    assert [answer(source, 0), answer(source, 1)] == ["one", "two"]
    assert source.conversation(0).images[0].data == PNG
    assert answer(open_source(str(tmp_path), Settings(schema="messages")), 2) == "three"


def test_a_directory_by_split(tmp_path):
    write_lines(tmp_path / "train-00000.jsonl", [chat(answer="t0")])
    write_lines(tmp_path / "train-00001.jsonl", [chat(answer="t1")])
    write_lines(tmp_path / "val.jsonl", [chat(answer="v")])
    train, validation = open_source(str(tmp_path), Settings()), open_source(str(tmp_path), Settings(), "validation")
    assert [answer(train, i) for i in range(len(train))] == ["t0", "t1"] and train.id(1) == "train-00001.jsonl:1"
    assert answer(validation, 0) == "v" and train.fingerprint != validation.fingerprint
    with pytest.raises(UserError, match=r"no files of split 'test', but of train, validation; set dataset.split"):
        open_source(str(tmp_path), Settings(split="test"))


def test_images_from_another_directory(tmp_path, picture):
    picture("elsewhere/a.png")
    file = write_lines(tmp_path / "d" / "x.jsonl", [llava_row("a.png")])
    source = open_source(str(file), Settings(images=str(tmp_path / "elsewhere")))
    assert image_size(source.conversation(0).images[0]) == (32, 48)
    with pytest.raises(UserError, match=r"dataset.images=\S+none: no such directory"):
        open_source(str(file), Settings(images=str(tmp_path / "none")))


def test_the_fingerprint_changes_with_the_files_schema_and_images_only(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", [chat()])
    first = open_source(str(file), Settings()).fingerprint
    assert open_source(str(file), Settings(max_length=7)).fingerprint == first
    assert open_source(str(file), Settings(images=str(tmp_path.parent))).fingerprint != first
    write_lines(file, [chat(answer="a dog")])
    assert open_source(str(file), Settings()).fingerprint != first
    assert answer(open_source(str(file), Settings()), 0) == "a dog"


def test_a_source_pickles_as_paths(tmp_path):
    rows = [chat(answer="x" * 1000) for _ in range(500)]
    source = open_source(str(write_lines(tmp_path / "d.jsonl", rows)), Settings())
    pickled = pickle.dumps(source)
    assert len(pickled) < 50_000 and answer(pickle.loads(pickled), 499) == "x" * 1000


def test_rows_that_are_no_objects_are_bad_samples(tmp_path):
    source = open_source(str(write_lines(tmp_path / "d.jsonl", [chat(), [1], 5, None])), Settings())
    for index in (1, 2, 3):
        with pytest.raises(BadSample, match="the row is a"):
            source.conversation(index)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.jsonl", b'{"messages": []}\n{"messages": [\n', r"d.jsonl:2: damaged JSON"),
        ("d.jsonl", b'{"messages": []}\n\n{"a": "\xff"}\n', r"d.jsonl:3: damaged JSON \('utf-8'"),
        ("d.jsonl", b"", "no rows in it"),
        ("d.jsonl", b"\n\n", "no rows in it"),
        ("d.jsonl", b"[" * 100_000, r"d.jsonl:1: damaged JSON"),
        ("d.json", b'[{"messages": []},\n {"messages": }]', r"d.json:2: damaged JSON"),
        ("d.json", b"[]", "no rows in it"),
        ("d.json", b"5", "a int, expected an array of rows"),
        (
            "d.jsonl",
            b'{"prompt": "x", "response": "y"}',
            r"columns \(prompt, response\) fit no schema.*\n  messages: messages\n",
        ),
        ("d.parquet", b"nonsense", "cannot be read: Arrow"),
        ("d.tar", b"nonsense", "not a readable tar archive"),
        ("d.csv", b"a,b", r"the suffix '.csv' is not known, expected .jsonl, .ndjson"),
    ],
)
def test_unusable_files(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        open_source(str(tmp_path / name), Settings())


def test_no_such_file_names_a_neighbour(tmp_path):
    write_lines(tmp_path / "train.jsonl", [chat()])
    with pytest.raises(UserError, match=r"trian.jsonl: no such file; did you mean 'train.jsonl'"):
        open_source(str(tmp_path / "trian.jsonl"), Settings())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file in it ends in"):
        open_source(str(tmp_path / "empty"), Settings())
    with pytest.raises(UserError, match=r"do not fit dataset.schema=caption"):
        open_source(str(tmp_path / "train.jsonl"), Settings(schema="caption"))
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="data is empty"):
        open_source(" ", Settings())


def test_the_hub(monkeypatch):
    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([chat()])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("org/name", Settings(subset="en", split="test"))
    assert (asked, source.id(0)) == ([("org/name", "en", "test")], "org/name/test:1")

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"cannot be had from the hub .*hf download org/name --repo-type dataset"):
        open_source("org/name", Settings())
