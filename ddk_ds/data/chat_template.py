"""Chat templates, rendered as transformers renders them, with the parts that `{% generation %}` marks.

transformers itself is the engine's: it takes seconds to import, in each process that encodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ddk_ds.data.conversations import Message
from ddk_ds.data.tokenizer import read_settings
from ddk_ds.errors import DataError

Spans = list[tuple[int, int]]
"""Begins and ends of parts of a text, in characters, in order."""
_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Refused(Exception):
    """A template refuses a conversation, or cannot render it; the message says why."""


class _Generation(Extension):
    """The tag `generation`: notes where in the rendered text its blocks lie."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Macro) -> str:
        written: list[str] = self.environment.written  # type: ignore[attr-defined]
        text, begin = str(caller()), sum(map(len, written))
        self.environment.spans.append((begin, begin + len(text)))  # type: ignore[attr-defined]
        return text


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Return JSON; jinja's own filter would write HTML's entities."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


class ChatTemplate:
    """A chat template; `marked` is True if it marks the assistant's parts by `{% generation %}`."""

    def __init__(self, source: str, variables: Mapping[str, Any], day: date | None) -> None:
        """Compile a template, which sees `variables` beside messages and tools.

        Raises:
            TemplateError: it is no Jinja.
            DataError: it asks for the day, and `day` is None.
        """
        if day is None and "strftime_now" in source and "strftime_now is defined" not in source:
            raise DataError("the chat template writes the day: set chat.day of the domain, for example 2026-12-01")
        environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        if day is not None:
            environment.globals["strftime_now"] = day.strftime
        self._environment, self._variables = environment, dict(variables)
        self._template = environment.from_string(source)
        self.marked = _MARK.search(source) is not None

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None, *, generation_prompt: bool = False
    ) -> tuple[str, Spans]:
        """Return the text of messages, and the parts of it that the template marks.

        With `generation_prompt` the text ends with the begin of an assistant's turn. Raises Refused.
        """
        written: list[str] = []
        self._environment.written, self._environment.spans = written, (spans := Spans())
        try:
            blocks = self._template.generate(
                **self._variables,
                messages=list(map(_with_reasoning, messages)),
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
            )
            for block in blocks:
                written.append(block)
        except Exception as error:  # what a template can do to a value that it does not expect
            raise Refused(f"{error}" or type(error).__name__) from error
        return "".join(written), spans


def _with_reasoning(message: Message) -> Message:
    """Return a message whose reasoning has the names that templates read, as transformers gives it."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def template_source(directory: Path, file: str | None) -> str:
    """Return the template in `file`, or else that of the tokenizer in `directory`.

    Raises:
        DataError: there is none, or the tokenizer has several and none is its default.
    """
    path = directory / "chat_template.jinja" if file is None else Path(file)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if file is not None:
        raise DataError(f"the chat template {path} does not exist: set chat.template of the domain to a Jinja file")
    named = read_settings(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(named, list):
        named = {entry["name"]: entry["template"] for entry in named}.get("default")
    if not isinstance(named, str):
        raise DataError(
            f"{directory} has no chat template, as tokenizers of base models: set chat.template of the domain to a "
            "Jinja file, for example that of the model's chat variant"
        )
    return named


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the special tokens that a tokenizer names, by the variables that templates know them by: bos_token, ..."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, token in read_settings(directory / name).items():
            content = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found
