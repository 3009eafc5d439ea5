"""Which characters of a rendered conversation the assistant wrote, for any chat template.

A template with ``{% generation %}`` says it itself. Of another one, the conversation is rendered a second time with every
answer (and its reasoning) replaced by a mark. What is around the marks is the template's own text; putting the answers
back must give the first rendering exactly, and then their places are known. Nothing is searched for.
"""

import re
from collections.abc import Callable, Sequence

from mimo_jobs.training.data.samples import BadSample, Message

Span = tuple[int, int]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def generation_spans(text: str, spans: Sequence[Span], ends: Sequence[str]) -> list[Span]:
    """Spans of ``{% generation %}`` blocks, with the end token that follows one included."""
    done = []
    for start, stop in spans:
        after = text[stop:]
        end = next((e for e in ends if after.lstrip().startswith(e)), None)
        inside = any(text[start:stop].rstrip().endswith(e) for e in ends)
        done.append((start, stop if inside or end is None else text.index(end, stop) + len(end)))
    return done


def marked_spans(
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], str],
    prompt: Callable[[], str],
    ends: Sequence[str],
) -> tuple[str, list[Span]]:
    """Render a conversation and find what the assistant wrote: content, reasoning where it is rendered, and the end token.

    Args:
        messages: contents of the assistant are strings
        render: a conversation to its text
        prompt: what the template adds to have the assistant write; asked for only when there is reasoning
        ends: tokens that end a turn

    Returns:
        The rendering, and one span a turn, in order: from the first character that generation would have to write. An
        empty thought that the template writes before an answer counts as prompt.

    Raises:
        BadSample: an answer cannot be located.
    """
    text = render(messages)
    mark = "mimojobsmark"
    while mark in text or any(mark in str(message) for message in messages):
        mark += "x"
    copies, cores = _marked(messages, mark)
    pieces = re.split(rf"{mark}(\d+[ra])z", render(copies))
    names = pieces[1::2]
    whole = "".join(cores[piece] if i % 2 else piece for i, piece in enumerate(pieces))
    if whole != text or [n for n in names if n[-1] == "a"] != [n for n in cores if n[-1] == "a"]:
        raise BadSample(
            "the chat template changes an answer in a way that cannot be followed; use one with {% generation %}"
        )
    return text, _spans(messages, pieces, cores, prompt, ends)


def _marked(messages: Sequence[Message], mark: str) -> tuple[list[Message], dict[str, str]]:
    """Messages with marks for answers, and by name (``3r`` reasoning of message 3, ``3a`` answer) what a mark replaces.

    White space and the tags of a thought stay where they are: so a template treats both renderings alike, and what it
    strips is seen.
    """
    copies, cores = [], {}
    for number, message in enumerate(messages):
        message = dict(message)
        if message["role"] == "assistant":
            content, reasoning = message["content"], message.get("reasoning_content")
            before, tag, answer = content.rpartition("</think>")
            if reasoning is not None:
                message["reasoning_content"] = _replaced(reasoning, f"{number}r", mark, cores)
            elif tag:
                thought, *rest = before.split("</think>")  # Qwen's templates take the first thought and the last answer
                lead, opening, thought = thought.rpartition("<think>")
                thought = _replaced(thought, f"{number}r", mark, cores)
                before = "</think>".join([lead + opening + thought, *rest])
            message["content"] = before + tag + _replaced(answer, f"{number}a", mark, cores)
            if f"{number}r" not in cores and f"{number}a" not in cores:
                raise BadSample(f"message {number + 1}: tool calls alone need a chat template with {{% generation %}}")
        copies.append(message)
    return copies, cores


def _replaced(value: str, name: str, mark: str, cores: dict[str, str]) -> str:
    if not (core := value.strip()):
        return value
    cores[name] = core
    before, _, after = value.partition(core)
    return f"{before}{mark}{name}z{after}"


def _spans(
    messages: Sequence[Message],
    pieces: list[str],
    cores: dict[str, str],
    prompt: Callable[[], str],
    ends: Sequence[str],
) -> list[Span]:
    """Spans of the turns, from the pieces of the marked rendering: template text and names of marks in turn."""
    spans, position, turns = [], 0, [name[:-1] for name in pieces[1::2]] + [""]
    start = None
    for place, name in enumerate(pieces[1::2]):
        before, after = pieces[2 * place], pieces[2 * place + 2]
        position += len(before)
        if start is None:
            start = position
            if name[-1] == "r":
                # what the prompt does not hold, as an opening <think>, is written by the model
                header = prompt()
                found = before.rfind(header) if header else -1
                start = position if found < 0 else position - len(before) + found + len(header)
        position += len(cores[name])
        if turns[place] != turns[place + 1]:
            calls = bool(messages[int(turns[place])].get("tool_calls"))
            spans.append((start, position + _end(after, ends, calls)))
            start = None
    return spans


def _end(after: str, ends: Sequence[str], calls: bool) -> int:
    """Characters from the end of an answer to the end of its end token."""
    found = min(((at, end) for end in ends if (at := after.find(end)) >= 0), default=None)
    if found is None or (after[: found[0]].replace("</think>", "").strip() and not calls):
        raise BadSample(f"the chat template puts no end token ({', '.join(ends)}) behind an answer, but {after[:40]!r}")
    return found[0] + len(found[1])
