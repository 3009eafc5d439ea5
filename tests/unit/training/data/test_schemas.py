"""Rows to conversations, and what of a row makes it a bad sample."""

import base64
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_jobs.training.data.samples import BadSample
from mimo_jobs.training.data.schemas import SCHEMAS, caption, cord_v2, fits, llava, messages, schema_of, sharegpt
from tests.unit.training.data.conftest import chat, encoded, llava_row, noise

PNG = encoded(noise(8, 8))
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def test_messages_with_strings_and_parts():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?", "index": None}]
    done = messages(
        {"messages": [{"role": "user", "content": parts}, ANSWER], "images": [{"bytes": PNG, "path": None}]}, "/"
    )
    assert done.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert done.messages[1] == ANSWER and done.images[0].data == PNG


def test_images_inline_in_every_form(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    forms = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": "b.png"},
        {"type": "image", "path": "/x/c.png"},
        {"type": "image", "url": "file:///x/c%20d.png"},
        {"type": "image", "image": PNG},
        {"type": "image", "image": noise(8, 8)},
    ]
    done = messages({"messages": [{"role": "user", "content": forms}, ANSWER]}, str(tmp_path))
    assert [i.path for i in done.images[2:5]] == [str(tmp_path / "b.png"), "/x/c.png", "/x/c d.png"]
    assert {i.data for i in (*done.images[:2], *done.images[5:])} == {PNG}


def test_placeholders_in_strings_only_where_there_is_an_images_column():
    with_column = messages(chat("<image>\nwhat?", images=["a.png"]), "/d")
    assert with_column.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert messages(chat("write <image> tags"), "/d").messages[0]["content"] == "write <image> tags"


def test_the_index_of_a_part_says_which_image():
    parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
    done = messages({"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["a.png", "b.png"]}, "/")
    assert [image.path for image in done.images] == ["/b.png", "/a.png"]


def test_reasoning_and_tool_calls_are_kept_and_nulls_are_not():
    given = {"role": "assistant", "content": "x", "reasoning_content": "r", "tool_calls": None, "weight": 1}
    done = messages({"messages": [USER, given]}, "/")
    assert done.messages[1] == {"role": "assistant", "content": "x", "reasoning_content": "r"}


def test_llava_and_sharegpt():
    done = llava(llava_row("a.png"), "/d")
    assert [m["role"] for m in done.messages] == ["user", "assistant"] and done.images[0].path == "/d/a.png"
    assert llava({"conversations": llava_row(None)["conversations"], "image": None}, "/d").images == []
    row = llava_row(None) | {"system": "be brief", "images": None}
    assert [m["role"] for m in sharegpt(row, "/d").messages] == ["system", "user", "assistant"]


def test_a_list_of_objects_stored_by_field():
    fields = {"from": ["human", "gpt"], "value": ["hi", "yes"]}
    assert llava({"conversations": fields}, "/").messages == [USER, ANSWER]


def test_cord_and_caption():
    truth = {"gt_parse": {"menu": [{"nm": "Café", "price": "1.0"}]}, "meta": {}}
    done = cord_v2({"image": {"bytes": PNG}, "ground_truth": json.dumps(truth)}, "/")
    assert done.messages[1]["content"] == '{"menu":[{"nm":"Café","price":"1.0"}]}'
    assert caption({"image": PNG, "text": "a cat"}, "/").messages[1]["content"] == "a cat"
    assert caption({"file_name": "a.png", "caption": "a cat"}, "/d").images[0].path == "/d/a.png"


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        (["messages", "images"], "messages"),
        (["id", "image", "conversations"], "llava"),
        (["conversations", "images"], "sharegpt"),
        (["image", "ground_truth"], "cord-v2"),
        (["image", "text"], "caption"),
        (["text"], None),
        ([], None),
    ],
)
def test_auto_looks_at_columns(columns, schema):
    assert schema_of(columns) == schema
    assert schema is None or fits(schema, columns)


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        ("messages", {"messages": None}, "messages is missing or null"),
        ("messages", {"messages": "hello"}, "messages is a str, expected list"),
        ("messages", {"messages": []}, "no message of the assistant among 0"),
        ("messages", {"messages": [USER]}, "no message of the assistant among 1"),
        ("messages", {"messages": [None, ANSWER]}, r"messages\[0\] is a NoneType"),
        ("messages", {"messages": [[USER], ANSWER]}, r"messages\[0\] is a list"),
        (
            "messages",
            {"messages": [{"role": "bot", "content": "x"}]},
            r"messages\[0\].role is 'bot', expected one of system",
        ),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "role is"),
        ("messages", {"messages": [{"role": "user", "content": 5}, ANSWER]}, "content is a int, expected a string"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER]}, "part of type 'audio'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "text .with a text."),
        ("messages", {"messages": [{"role": "user", "content": [3]}, ANSWER]}, "part of type None"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "message 2, of the assistant, is empty",
        ),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "is empty"),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": PNG}]}]},
            "has an image",
        ),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "there are 0 images"),
        ("messages", chat("hi", images=["a.png"]), "0 image placeholders for 1 images"),
        ("messages", chat("<image><image>", images=["a.png"]), "placeholder 2, but there are 1 images"),
        ("messages", chat("<image>", images=["https://x.org/a.png"]), "is a URL: training reads no network"),
        ("messages", chat("<image>", images=[None]), "an image that is a NoneType"),
        ("messages", chat("<image>", images=[{"bytes": None, "path": None}]), "an image without bytes and path"),
        ("messages", chat("<image>", images=[b""]), "no bytes"),
        ("messages", chat("<image>", images=["data:image/png;base64,%%%"]), "not base64"),
        ("messages", chat("<image>", images=["a\0b"]), "zero byte"),
        ("llava", {"conversations": None}, "conversations is missing or null"),
        ("llava", llava_row(None) | {"image": "a.png"}, "0 <image> placeholders for 1 images"),
        ("llava", llava_row("a.png") | {"image": ["a.png", "b.png"]}, "1 <image> placeholders for 2 images"),
        (
            "llava",
            {"conversations": [{"from": "dog", "value": "x"}]},
            r"conversations\[0\].from is 'dog', expected one of human",
        ),
        ("llava", {"conversations": [{"from": "human", "value": None}]}, "value is a NoneType"),
        ("sharegpt", {"conversations": [7]}, r"conversations\[0\] is a int"),
        ("cord-v2", {"image": PNG, "ground_truth": "{"}, "ground_truth is not JSON"),
        ("cord-v2", {"image": PNG, "ground_truth": "[1]"}, "no gt_parse"),
        ("cord-v2", {"image": None, "ground_truth": '{"gt_parse": {"a": 1}}'}, "image is missing"),
        ("caption", {"image": PNG, "caption": " "}, "caption is empty"),
        ("caption", {"image": PNG, "caption": 5}, "caption is a int, expected str or list"),
        ("caption", {"image": PNG}, "text is missing"),
    ],
)
def test_hostile_rows_are_bad_samples_with_a_reason(schema, row, reason):
    with pytest.raises(BadSample, match=reason):
        SCHEMAS[schema](row, "/d")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=9)
    | st.sampled_from(["<image>", "user", "assistant", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "image", "images", "from", "value", "index", "url", "messages"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "conversations", "image", "images", "text", "ground_truth"]), JSON))
def test_any_json_is_a_conversation_or_a_bad_sample(row):
    for schema in SCHEMAS.values():
        try:
            done = schema(row, "/d")
        except BadSample:
            continue
        parts = [p for m in done.messages if isinstance(m["content"], list) for p in m["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(done.images)
