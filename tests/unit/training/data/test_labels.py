"""Loss is on exactly what the assistant writes, whatever the chat template."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimo_jobs.training.config import Dataset as Settings
from mimo_jobs.training.data import BadSample, Conversation, Encoder
from tests.unit.training.data import templates

END = "<|im_end|>"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def learned(encoder, messages) -> str:
    """Text of the tokens that are predicted; checks that labels are shifted by one."""
    done = encoder.encode(Conversation(messages))
    kept = done.labels != -100
    assert not kept[-1] and kept.any()
    assert bool((done.labels[:-1][kept[:-1]] == done.input_ids[1:][kept[:-1]]).all())
    return encoder.tokenizer.decode(done.labels[kept], skip_special_tokens=False)


TURNS = [user("q1"), assistant("first"), user("q2"), assistant("second")]
THOUGHT = "<think>\nbecause\n</think>\n\nyes"
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}

CASES = {
    "plain": ("QWEN2_5_VL", [user("q"), assistant("a cat")], "a cat" + END),
    "with a system message": ("QWEN2_5_VL", [system("s"), user("q"), assistant("a cat")], "a cat" + END),
    "every turn": ("QWEN2_5_VL", TURNS, f"first{END}second{END}"),
    "content that is in the prompt too": ("QWEN2_5_VL", [user("yes yes"), assistant("yes"), user("assistant"), assistant("assistant")], f"yes{END}assistant{END}"),
    "a thought is text without a template for it": ("QWEN2_5_VL", [user("q"), assistant(THOUGHT)], THOUGHT + END),
    "text around a thought": ("QWEN2_5_VL", [user("q"), assistant("hm <think>b</think> c </think> yes")], "hm <think>b</think> c </think> yes" + END),
    "white space behind": ("QWEN2_5_VL", [user("q"), assistant("a cat \n")], "a cat \n" + END),
    "characters of several bytes": ("QWEN2_5_VL", [user("q"), assistant("Ünïcödé 猫 🐈")], "Ünïcödé 猫 🐈" + END),
    "empty thought is the prompt's": ("QWEN3", [user("q"), assistant("yes")], "yes" + END),
    "thought in the content": ("QWEN3", [user("q"), assistant(THOUGHT)], THOUGHT + END),
    "thought beside the content": ("QWEN3", [user("q"), assistant("yes", reasoning_content="because")], THOUGHT + END),
    "thoughts of earlier turns are dropped": ("QWEN3", [user("q"), assistant(THOUGHT), user("r"), assistant(THOUGHT)], f"yes{END}{THOUGHT}{END}"),
    "tool calls": ("QWEN3", [user("q"), assistant("look", tool_calls=[CALL]), {"role": "tool", "content": "5"}, assistant("five")], 'look\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>' + END + "five" + END),
    "3.5: empty thought": ("QWEN3_5", [user("q"), assistant("  yes\n")], "yes" + END),
    "3.5: opening tag is in the prompt": ("QWEN3_5", [user("q"), assistant(THOUGHT)], "because\n</think>\n\nyes" + END),
    "3.5: beside the content": ("QWEN3_5", [user("q"), assistant("yes", reasoning_content=" because ")], "because\n</think>\n\nyes" + END),
    "3.5: only a closing tag": ("QWEN3_5", [user("q"), assistant("because</think>yes")], "because\n</think>\n\nyes" + END),
    "3.5: earlier turns": ("QWEN3_5", [system("s"), *TURNS[:2], user("r"), assistant(THOUGHT), user("t"), assistant("no")], f"first{END}yes{END}no{END}"),
    "3.5: white space inside": ("QWEN3_5", [user("q"), assistant(" <think>\n\n because\n</think>\n  yes ")], "because\n</think>\n\n  yes" + END),
    "3.5: a thought alone": ("QWEN3_5", [user("q"), assistant("<think>because</think>")], "because\n</think>\n\n" + END),
    "generation": ("GENERATION", TURNS, f"first{END}second{END}"),
    "generation without the end": ("GENERATION_WITHOUT_END", TURNS, f"first{END}second{END}"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_learned(case, with_template):
    template, messages, expected = CASES[case]
    assert learned(Encoder(with_template(getattr(templates, template)), Settings()), messages) == expected


def test_the_rendering_is_the_processors_own(with_template):
    for name, messages, _ in CASES.values():
        encoder = Encoder(with_template(getattr(templates, name)), Settings())
        text = encoder.processor.apply_chat_template(messages, tokenize=False)
        ids = encoder.processor(text=[text])["input_ids"][0]
        assert encoder.encode(Conversation(messages)).input_ids.tolist() == list(ids)


def test_tokens_that_reach_over_borders(merging_processor):
    for name, messages, expected in CASES.values():
        (merging_processor / "chat_template.jinja").write_text(getattr(templates, name))
        encoder = Encoder(str(merging_processor), Settings())
        assert learned(encoder, messages) == expected
        text = encoder.processor.apply_chat_template(messages, tokenize=False)
        assert (
            encoder.encode(Conversation(messages)).input_ids.tolist() == encoder.processor(text=[text])["input_ids"][0]
        )
        assert len(encoder.tokenizer.encode("assistant")) == 1


def test_spans_of_generation_are_those_of_transformers(with_template):
    encoder = Encoder(with_template(templates.GENERATION), Settings())
    theirs = encoder.tokenizer.apply_chat_template(
        TURNS, chat_template=templates.GENERATION, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = encoder.encode(Conversation(TURNS)).labels
    assert [label != -100 for label in labels[:-1].tolist()] == [bool(m) for m in theirs["assistant_masks"][1:]]


TEXT = st.text("ab \n<>/猫é\u0301{}'\"\\", max_size=12)
ANSWERS = TEXT | st.builds("<think>{}</think>{}".format, TEXT, TEXT) | st.builds("{}</think>{}".format, TEXT, TEXT)


@pytest.mark.parametrize("name", ["QWEN2_5_VL", "QWEN3", "QWEN3_5"])
def test_any_answer_is_learned_or_a_bad_sample(name, with_template):
    encoder = Encoder(with_template(getattr(templates, name)), Settings())
    seen = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(TEXT, ANSWERS), min_size=1, max_size=3), st.booleans())
    def check(turns, first):
        messages = [system("s")] if first else []
        for question, reply in turns:
            messages += [user(question), assistant(reply)]
        try:
            text = learned(encoder, messages)
        except BadSample as error:
            seen.append("tool calls alone" in str(error))  # or an empty answer, which the schemas refuse
            return
        seen.append(True)
        answers = [reply.split("</think>")[-1].strip() for _, reply in turns]
        if all(answers):  # a thought alone is not rendered in earlier turns
            assert text.count(END) == len(turns) and text.endswith(END)
            for piece, expected in zip(text.split(END), answers, strict=False):
                assert piece.strip().endswith(encoder.tokenizer.decode(encoder.tokenizer.encode(expected)))

    check()
    assert all(seen)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (templates.QWEN3_5, [assistant("yes")], "refuses it: No user query"),
        (templates.QWEN3_5, [user("q"), {"role": "tool", "content": "x"}, assistant("a")], "refuses it: Unexpected message role"),
        (templates.QWEN2_5_VL.replace("<|im_end|>", "</s>"), [user("q"), assistant("a")], "no end token"),
        ("{% for m in messages %}{{ m.content|upper }}<|im_end|>{% endfor %}", [user("q"), assistant("a")], "cannot be followed"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", [user("q"), assistant("a")], "cannot render it"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}", [user("q"), assistant("a")], "cannot be followed"),
        ("{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}", [user("q"), assistant("a")], "cannot be followed"),
        ("{% generation %}{% endgeneration %}{% for m in messages %}{{ m.content }}{% endfor %}", [user("q"), assistant("a")], "no token of the assistant"),
    ],
)  # fmt: skip
def test_what_cannot_be_located_is_a_bad_sample(template, messages, reason, with_template):
    with pytest.raises(BadSample, match=reason):
        Encoder(with_template(template), Settings()).encode(Conversation(messages))
