"""Records of a data source become rows of tokens: which field layouts are recognised, and how each is written out.

    layout                    fields                                    as text
    text, content             one text                                  packed with its neighbours
    prompt/response           prompt, response | completion             joined as they are
    question/answer           question, answer                          joined by a blank line
    instruction/input/output  Alpaca: instruction, input or not, output joined by blank lines
    messages                  OpenAI: [{role, content}, ...]            by the chat template
    conversations             ShareGPT: [{from, value}, ...]            by the chat template

The first layout of LAYOUTS that fits a record is taken. Fields that no layout names are ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = tuple[Mapping[str, Any], str]  # its fields, and its place "file:line" for messages

# Layout: whether its fields are texts or a list, and which fields a record must have. `content` is what the-stack and
# codeparrot call a text; it comes last, because any record of another kind may have a field of that name.
LAYOUTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "text": (str, ("text",)),
    "prompt/response": (str, ("prompt", "response")),
    "prompt/completion": (str, ("prompt", "completion")),
    "question/answer": (str, ("question", "answer")),
    "instruction/input/output": (str, ("instruction", "output")),
    "messages": (list, ("messages",)),
    "conversations": (list, ("conversations",)),
    "content": (str, ("content",)),
}
TEXTS = ("text", "content")  # layouts without a response
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}  # ShareGPT


class TokenRow(NamedTuple):
    """One sequence, before it is padded.

    Attributes:
        tokens: ids, at most the sequence length.
        prompt: how many of them, from the first on, are prompt.
        packed: True for a row that was cut from a stream of texts.
    """

    tokens: Sequence[int]
    prompt: int
    packed: bool = False


@dataclass
class Tally:
    """What has been read of a source so far.

    Attributes:
        layouts: records of each layout, in order of appearance.
        overlong: records whose prompt fills the sequence, so that they give no row.
        rest: tokens of texts that did not fill a row.
        complete: True once the last record has been read.
    """

    layouts: Counter[str] = field(default_factory=Counter)
    overlong: int = 0
    rest: int = 0
    complete: bool = False

    def counted(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yields the records and counts their layouts."""
        for record, place in records:
            self.layouts[layout_of(record, place)] += 1
            yield record, place
        self.complete = True

    def summary(self) -> str:
        """Returns what was recognised, and how many records of those read can be used."""
        read = sum(self.layouts.values())
        of_all = f"{'' if self.complete else 'the first '}{read:,} record{'s'[: read != 1]}"
        usable = f"{read - self.overlong:,} of {of_all} usable" if self.overlong else of_all
        return f"{' and '.join(self.layouts)}, {usable}"

    def why_empty(self, sequence_length: int) -> str:
        """Returns why a source gave no row."""
        if any(layout in TEXTS for layout in self.layouts):
            return (
                f"has {self.rest} tokens of text, less than one sequence of {sequence_length}; give more text or a "
                "smaller sequence length"
            )
        if not self.layouts:
            return "holds no usable sequence: it has no records"
        return f"holds no usable sequence: every prompt fills {sequence_length} tokens; give a larger sequence length"


def layout_of(record: Mapping[str, Any], place: str) -> str:
    """Returns the name of a record's layout; ValueError naming place and fields if it has none."""
    for name, (kind, fields) in LAYOUTS.items():
        if all(isinstance(record.get(key), kind) and (kind is str or record[key]) for key in fields):
            return name
    known = "; ".join(" and ".join(f'"{key}"' for key in fields) for _, fields in LAYOUTS.values())
    raise ValueError(f"{place} has the fields of no known layout ({known}); it has: {', '.join(record)}")


def token_rows(
    records: Iterable[Record], tokenizer: Any, *, sequence_length: int, labels: bool, tally: Tally
) -> Iterator[TokenRow]:
    """Yields rows of tokens, reading records only as far as needed.

    Texts are joined by the end-of-text token and cut into rows of exactly `sequence_length` tokens. A prompt with its
    response is a row of its own, cut at `sequence_length`; a prompt that fills the row leaves it out.

    Args:
        records: each with its place.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a row, at most.
        labels: False where every token counts, so that nothing is taken for a prompt.
        tally: is told of records left out, and of tokens that filled no row.

    Raises:
        ValueError: naming the place, for a record that cannot be used.
    """
    stream: list[int] = []
    for record, place in records:
        layout = layout_of(record, place)
        if layout in TEXTS:
            stream += text_tokens(tokenizer, record[layout])
            whole = len(stream) // sequence_length * sequence_length
            for start in range(0, whole, sequence_length):
                yield TokenRow(stream[start : start + sequence_length], 0, packed=True)
            del stream[:whole]
            tally.rest = len(stream)
            continue
        tokens, prompt = _response_row(record, layout, place, tokenizer, labels)
        if prompt < min(len(tokens), sequence_length):
            yield TokenRow(tokens[:sequence_length], prompt)
        else:
            tally.overlong += 1


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Returns a text's tokens and, if the tokenizer has one, the end-of-text token."""
    return tokenizer(text)["input_ids"] + _end(tokenizer)


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _response_row(
    record: Mapping[str, Any], layout: str, place: str, tokenizer: Any, labels: bool
) -> tuple[list[int], int]:
    """Returns all tokens of a record with a response, and how many are prompt; without labels none is."""
    if layout == "messages":
        return _chat_row(_messages(record["messages"], place), place, tokenizer, labels)
    if layout == "conversations":
        return _chat_row(_from_sharegpt(record["conversations"], place), place, tokenizer, labels)
    prompt, response = (record[key] for key in LAYOUTS[layout][1])
    if layout == "instruction/input/output" and record.get("input"):
        prompt += f"\n\n{record['input']}"
    if not layout.startswith("prompt/"):  # bare fields, where a prompt's author has placed the white space
        prompt += "\n\n"
    prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"] + _end(tokenizer)
    return prompt_ids + response_ids, len(prompt_ids) if labels else 0


def _messages(messages: list[Any], place: str) -> list[dict[str, Any]]:
    """Checks OpenAI's messages, and leaves out the empty fields that tables (parquet) give to every message.

    A template may ask whether a field is defined. Recent transformers leave empty ones out, too.
    """
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
        raise ValueError(f'{place}: every message must be an object with a "role" and a text "content"')
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _from_sharegpt(turns: list[Any], place: str) -> list[dict[str, Any]]:
    """Returns ShareGPT's turns as OpenAI's messages."""
    if not all(isinstance(t, dict) and all(isinstance(t.get(k), str) for k in ("from", "value")) for t in turns):
        raise ValueError(f'{place}: every turn of a conversation must be an object with a "from" and a text "value"')
    if unknown := [turn["from"] for turn in turns if turn["from"] not in ROLES]:
        raise ValueError(f'{place}: a turn is from "{unknown[0]}"; known are {", ".join(ROLES)}')
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _chat_row(messages: list[dict[str, Any]], place: str, tokenizer: Any, labels: bool) -> tuple[list[int], int]:
    """Returns the tokens of a chat up to the end of its last assistant message, or of all of it without labels."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{place} has chat messages, but the tokenizer has no chat template")
    write = _template(tokenizer, place)
    if not labels:
        return tokenizer(write(messages), add_special_tokens=False)["input_ids"], 0
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if last == 0:
        raise ValueError(f"{place} has no assistant message after a first one, so no response to score")
    prompt = write(messages[:last], add_generation_prompt=True)
    whole = write(messages[: last + 1])
    if not whole.startswith(prompt):
        raise ValueError(
            f"{place}: the chat template writes the prompt differently once it is answered; "
            'give "prompt" and "response" instead'
        )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prompt_ids + tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"], len(prompt_ids)


def _template(tokenizer: Any, place: str) -> Callable[..., str]:
    """Returns the tokenizer's chat template as a function of messages, which names the place if it refuses them."""

    def write(messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template raises what it likes, for roles that do not alternate among others
            raise ValueError(f"{place}: the chat template refuses the messages: {error}") from error

    return write
