"""Conversations as files hold them: each is checked, and becomes a text of JSON, as which it is a document."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pyarrow import parquet

from ddk_ds.data.columns import parquet_batches
from ddk_ds.data.recipe import Chat
from ddk_ds.errors import DataError

TOOLS = "tools"
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the first `given` are a prompt, and the tools that they can call."""

    messages: list[Message]
    given: int = 0
    tools: list[Any] | None = None


def fields_of(chat: Chat) -> Sequence[str]:
    """Return the fields that a record must have."""
    return (chat.messages_field,) if chat.form == "messages" else ("prompt", "completion")


def conversation_text(record: Any, chat: Chat, where: str) -> str | None:
    """Return the conversation of a record as JSON, in which keys keep their order; None if a field of it is null.

    Raises:
        DataError: the record lacks a field, or it holds no messages; `where` says where the record is.
    """
    fields = fields_of(chat)
    if not isinstance(record, dict) or not record.keys() >= set(fields):
        has = f"has the fields {', '.join(record)}" if isinstance(record, dict) else "is not an object"
        raise DataError(f"{where} lacks {' or '.join(fields)} (it {has}): set messages_field or form of its chat")
    if any(record[name] is None for name in fields):
        return None
    if chat.form == "messages":
        messages, given = _messages(record[fields[0]], fields[0], where), 0
    else:
        prompt, completion = (
            _messages(
                [{"role": role, "content": record[name]}] if isinstance(record[name], str) else record[name],
                name,
                where,
            )
            for name, role in zip(fields, ("user", "assistant"), strict=True)
        )
        messages, given = [*prompt, *completion], len(prompt)
    tools = _parsed(record.get(TOOLS), TOOLS, where)
    if not isinstance(tools, list | None):
        raise DataError(f"{where}: its {TOOLS} are {type(tools).__name__}, not a list of descriptions")
    return json.dumps({"messages": messages, "given": given, "tools": tools or None}, ensure_ascii=False)


def parse_conversation(text: str) -> Conversation:
    """Return the conversation of a text that `conversation_text` made."""
    return Conversation(**json.loads(text))


def plain_text(text: str) -> str:
    """Return what the messages of such a text say, which is compared with other texts."""
    return "\n".join(strings_in(parse_conversation(text).messages))


def strings_in(value: Any) -> Iterator[str]:
    """Yield each string among the values of lists and objects at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def parquet_conversations(path: Path, chat: Chat, where: str) -> Iterator[tuple[float, list[str | None]]]:
    """Yield the conversations of some rows of a file, as `conversation_text` returns them, after the share read so far.

    Raises:
        DataError: a column is missing, or a row holds no conversation.
        ArrowException, OSError: the file is damaged.
    """
    rows, fields = 0, list(fields_of(chat))
    with parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if not set(fields) <= set(names):
            fix = f"set messages_field or form of its chat: it has {', '.join(names)}"
            raise DataError(f"{where} has no columns {', '.join(fields)}; {fix}")
        for batch in parquet_batches(table, [*fields, *({TOOLS} & set(names))]):
            rows += batch.num_rows
            place = f"{where}, before row {rows + 1}"
            try:
                found = batch.to_pylist()
            except UnicodeDecodeError as error:  # pyarrow does not check that a writer's strings are UTF-8
                raise DataError(f"{place}: a conversation is not UTF-8 ({error}); exclude the file") from None
            records = ({name: _without_nulls(value) for name, value in row.items()} for row in found)
            yield rows / table.metadata.num_rows, [conversation_text(record, chat, place) for record in records]


def _without_nulls(value: Any) -> Any:
    """Return a value of parquet without the keys that only other rows have, which are null in it."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any, name: str, where: str) -> Any:
    """Return a value, or what it is the JSON of: columns of parquet often hold such text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name!r} is a text, and no JSON ({error})") from None


def _messages(value: Any, name: str, where: str) -> list[Message]:
    """Return messages without keys that are null, as transformers drops them."""
    found = _parsed(value, name, where)
    if not isinstance(found, list):
        raise DataError(f"{where}: {name!r} is {type(found).__name__}, not a list of messages")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            keys = f"the keys {', '.join(message)}" if isinstance(message, dict) else type(message).__name__
            raise DataError(
                f"{where}: a message of {name!r} has no text `role` (it has {keys}): write messages as "
                '{"role": "user", "content": ...}, with the roles that the template knows'
            )
    return [{key: item for key, item in cast(Message, message).items() if item is not None} for message in found]
