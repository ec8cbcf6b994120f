"""Conversations to token ids, and which of these are targets.

The assistant's turns are the parts that the template marks by `{% generation %}`. In a template without these marks, a
turn is what it adds to the text of the messages before it, rendered with the begin of an assistant's turn: both texts
must be found again at the begin of the complete conversation's, so nothing is guessed. What stands after the control
token that ends such a turn, a line's end as a rule, is no part of it. A token that reaches into a turn is a target, as
in transformers' `return_assistant_tokens_mask`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer

from ddk_ds.data.chat_template import ChatTemplate, Refused, Spans, special_tokens, template_source
from ddk_ds.data.conversations import Conversation, parse_conversation, strings_in
from ddk_ds.data.mds import Ids, Targets, token_dtype
from ddk_ds.data.recipe import Chat
from ddk_ds.data.tokenizer import TokenizerInfo
from ddk_ds.errors import DataError

_NAMES = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|<(?:start|end)_of_\w+>")
"""Tokens that templates write between turns: <|im_start|>, <start_of_turn>, and DeepSeek's with wide bars."""


@dataclass(frozen=True)
class ChatStyle:
    """The way in which conversations of a domain become tokens; another process can be sent it.

    `variables` is JSON of what the template sees beside messages and tools. Conversations of more than `most_tokens`
    are dropped; None: none are. `bos` is put before a conversation that does not begin with it.
    """

    source: str
    variables: str
    targets: str
    day: date | None
    split_tokens: bool
    most_tokens: int | None
    bos: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Return the hash of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def template(self) -> ChatTemplate:
        """Return the template, compiled. Raises DataError if it is none."""
        try:
            return ChatTemplate(self.source, json.loads(self.variables), self.day)
        except TemplateError as error:
            raise DataError(
                f"the chat template cannot be read as Jinja: {error}; mend it, or set chat.template"
            ) from error


def chat_style(chat: Chat, info: TokenizerInfo, sequence_length: int, bos: tuple[int, ...]) -> ChatStyle:
    """Return the style of a domain, tried on a question and an answer.

    Args:
        bos: the ids to begin with where the template writes none; () leaves it to the template.

    Raises:
        DataError: there is no template, it is no Jinja, or it writes tokens that the tokenizer does not have.
    """
    directory = info.path.parent
    style = ChatStyle(
        source=template_source(directory, chat.template),
        variables=json.dumps({**special_tokens(directory), **chat.template_options}),
        targets=chat.targets,
        day=chat.day,
        split_tokens=chat.split_tokens,
        most_tokens=sequence_length if chat.too_long == "drop" else None,
        bos=bos,
    )
    encoder = ChatEncoder(info, style)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with suppress(Refused):  # a template for other conversations
        encoder.check_tokens(encoder.rendered(Conversation(messages))[0], [])
    return style


class Conversations(NamedTuple):
    """The ids of some conversations in a row (n,), of those that are kept."""

    ids: Ids
    lengths: npt.NDArray[np.int64]
    """(k,) number of ids of each."""
    targets: Targets
    """(n,)."""
    num_bytes: list[int]
    """(k,) bytes of their rendered text."""
    kept: npt.NDArray[np.bool_]
    """True for k of all that were given."""
    dropped: dict[str, int]
    """Numbers of the others by the names of `Dropped`."""
    refusal: str
    """What the template said of the first one that it refused; "": it refused none."""


class ChatEncoder:
    """A function from conversations, as JSON, to ids and targets."""

    def __init__(self, info: TokenizerInfo, style: ChatStyle) -> None:
        """Compile the template of `style`. Raises DataError if it is none."""
        self.style = style
        self._template = style.template()
        self._controls = info.text.spelling
        self._dtype = token_dtype(info.vocab_size)
        # This one finds control tokens in a text: those that the template has written.
        self._tokenizer = Tokenizer.from_file(str(info.path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        known = json.loads(style.variables)
        self._named = [token for key, token in known.items() if key.endswith("_token") and token]
        self._single: dict[str, bool] = {}

    def __call__(self, texts: Sequence[str]) -> Conversations:
        """Return ids and targets of conversations.

        Raises:
            DataError: the turns of one cannot be found exactly, or the template writes a token that there is not.
        """
        dropped: Counter[str] = Counter()
        kept, rendered, refusal = np.zeros(len(texts), np.bool_), list[tuple[str, Spans]](), ""
        for number, text in enumerate(texts):
            conversation = parse_conversation(text)
            strings = [*strings_in(conversation.messages), *strings_in(conversation.tools)]
            if self._controls is not None and any(map(self._controls.search, strings)):
                dropped["spelled_controls"] += 1
                continue
            try:
                found = self.rendered(conversation)
            except Refused as error:
                refusal = refusal or str(error)
                dropped["refused"] += 1
                continue
            self.check_tokens(found[0], strings)
            kept[number] = True
            rendered.append(found)
        ids, masks, sizes = list[list[int]](), list[Targets](), list[int]()
        try:
            encodings = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"the tokenizer cannot encode a conversation: {error}; repair its tokenizer.json"
            ) from error
        places = np.flatnonzero(kept)
        for place, (text, spans), encoding in zip(places, rendered, encodings, strict=True):
            of_one, mask = self._begun(encoding.ids, _in_spans(encoding, spans))
            reason = self._reason(mask)
            if reason:
                dropped[reason] += 1
                kept[place] = False
                continue
            ids.append(of_one)
            masks.append(mask)
            sizes.append(len(text.encode()))
        return Conversations(
            np.array([token for of_one in ids for token in of_one], self._dtype),
            np.array([len(of_one) for of_one in ids], np.int64),
            np.concatenate([np.zeros(0, np.bool_), *masks]),
            sizes,
            kept,
            dict(dropped),
            refusal,
        )

    def _begun(self, ids: list[int], mask: Targets) -> tuple[list[int], Targets]:
        """Return ids and targets with the BOS in front, if it is asked for and not there."""
        bos = list(self.style.bos)
        if not bos or ids[: len(bos)] == bos:
            return ids, mask
        return [*bos, *ids], np.concatenate([np.full(len(bos), self.style.targets == "all"), mask])

    def _reason(self, mask: Targets) -> str:
        """Return the reason to drop a conversation with these targets; "": there is none."""
        if not mask.any():
            return "no_target"
        most = self.style.most_tokens
        return "too_long" if most is not None and len(mask) > most else ""

    def rendered(self, conversation: Conversation) -> tuple[str, Spans]:
        """Return the text of a conversation, and its parts that are targets.

        Raises:
            Refused: by the template.
            DataError: a turn of the assistant cannot be found exactly.
        """
        messages, given = conversation.messages, conversation.given
        if not messages:
            return "", []
        text, marked = self._template.render(messages, conversation.tools)
        if self.style.targets == "all":
            return text, [(0, len(text))]
        turns = [number for number in range(given, len(messages)) if messages[number]["role"] == "assistant"]
        if not self._template.marked:
            return text, [self._turn(conversation, number, text) for number in turns]
        first = self._begin(conversation, given, text) if given else 0
        return text, [(max(begin, first), end) for begin, end in marked if end > first]

    def _turn(self, conversation: Conversation, number: int, text: str) -> tuple[int, int]:
        """Return begin and end of message `number` in the conversation's text, after the begin of a turn."""
        begin = self._begin(conversation, number, text)
        until, _ = self._template.render(conversation.messages[: number + 1], conversation.tools)
        if not text.startswith(until) or len(until) < begin:
            raise self._not_found(number, until, text)
        shown = until.rstrip()
        ends = [match.end() for match in self._controls.finditer(shown)] if self._controls is not None else []
        return begin, len(shown) if ends and ends[-1] == len(shown) and len(shown) > begin else len(until)

    def _begin(self, conversation: Conversation, number: int, text: str) -> int:
        """Return where the answer to the first `number` messages begins in the conversation's text."""
        before, _ = self._template.render(conversation.messages[:number], conversation.tools, generation_prompt=True)
        if not text.startswith(before):
            raise self._not_found(number, before, text)
        return len(before)

    def _not_found(self, number: int, part: str, text: str) -> DataError:
        same = next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))
        return DataError(
            f"the assistant's turns cannot be found: the chat template writes the messages up to number {number + 1} "
            f"differently in the complete conversation, {part[same : same + 40]!r} as {text[same : same + 40]!r} after "
            f"{text[max(0, same - 40) : same]!r}, and has no {{% generation %}} marks. Give a template with such marks "
            "(chat.template), chat.targets=all, or chat.form=prompt_completion with the last answer as completion"
        )

    def check_tokens(self, text: str, strings: Sequence[str]) -> None:
        """Raise DataError if the template writes a token that the tokenizer does not have; `strings` are the messages'.

        The tokenizer would cut it into pieces.
        """
        if self.style.split_tokens:
            return
        for name in {*_NAMES.findall(text), *(token for token in self._named if token in text)}:
            if not self._is_single(name) and not any(name in string for string in strings):
                raise DataError(
                    f"the chat template writes {name!r}, which is no token of the tokenizer: it would be cut into "
                    f"{self._tokenizer.encode(name, add_special_tokens=False).tokens}. Use the template of this "
                    "tokenizer, or one whose special tokens it has (chat.template); chat.split_tokens=true if the "
                    "model was trained so"
                )

    def _is_single(self, name: str) -> bool:
        if name not in self._single:
            self._single[name] = len(self._tokenizer.encode(name, add_special_tokens=False).ids) == 1
        return self._single[name]


def _in_spans(encoding: Encoding, spans: Spans) -> Targets:
    """Return True for each token of an encoding that reaches into one of the spans of its text."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    found = np.zeros(len(offsets), np.bool_)
    for begin, end in spans:
        found |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
    return found


def as_recorded(chat: Chat, style: ChatStyle, refusal: str) -> dict[str, Any]:
    """Return what domains.json says of a domain's conversations, as plain JSON."""
    name = None if chat.template is None else Path(chat.template).name
    section = {**chat.model_dump(mode="json"), "template": name}
    return {**section, "template_sha256": style.sha256, "first_refusal": refusal}
