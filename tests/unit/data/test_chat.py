"""Conversations: the tokens and targets are transformers' own where a template marks them, and exact where not."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from ddk_ds.commands.prepare_command import conversations
from ddk_ds.data import encoding as encoding_module
from ddk_ds.data import reading as reading_module
from ddk_ds.data.chat_encoding import ChatEncoder, Conversations, chat_style
from ddk_ds.data.conversations import conversation_text, plain_text
from ddk_ds.data.data_facts import pieces
from ddk_ds.data.documents import Dropped, Position, read_texts
from ddk_ds.data.encoding import Encoded
from ddk_ds.data.held_out import HeldOut
from ddk_ds.data.loader import MixtureDataset, validation_batches
from ddk_ds.data.long_documents import Part
from ddk_ds.data.mds import open_split
from ddk_ds.data.prepare import Plan, prepare
from ddk_ds.data.prepare_parts import prepare_in_parts
from ddk_ds.data.reading import Spool, TextBatch
from ddk_ds.data.recipe import Chat, Source, SourceFile, load_recipe
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import ConfigError, DataError
from tests.unit.data.corpus import make_texts, write_recipe
from tests.unit.data.tokenizer_kinds import make_tokenizer

TURNS = ["<|im_start|>", "<|im_end|>", "<tool>"]
CHATML = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role not in roles %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BODY = "{{ m.content }}{% for call in m.tool_calls or [] %}<tool>{{ call.name }}{% endfor %}{{ '<|im_end|>' }}"
UNMARKED = CHATML.replace("BODY", BODY)
MARKED = CHATML.replace(
    "BODY",
    f"{{% if m.role == 'assistant' %}}{{% generation %}}{BODY}{{% endgeneration %}}{{% else %}}{BODY}{{% endif %}}",
)
# As Llama's and Gemma's: it writes the BOS, strips messages, and marks no end of a turn.
STRIPPED = (
    "{{ bos_token }}{% for m in messages %}{%- if m['role'] == 'assistant' -%}{% generation %}{{ m.content | trim }}"
    "{{ eos_token }}{% endgeneration %}{% else %}[{{ m.role }}] {{ m.content | trim }} {% endif %}{% endfor %}"
)
ROLES = {"roles": ["system", "user", "assistant", "tool"]}
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Grüße, 你好?"}, {"role": "assistant", "content": "\n\nÄh … 😀 "}],
    [
        {"role": "system", "content": " be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}], "name": None},
        {"role": "tool", "content": "1 < 2"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ],
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of a byte-level and a SentencePiece-like tokenizer that know TURNS."""
    made = {}
    for kind in ("qwen", "llama_2"):
        directory = make_tokenizer(kind, make_texts(1, 60), tmp_path_factory.mktemp(kind))
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TURNS])
        tokenizer.save(str(directory / "tokenizer.json"))
        made[kind] = directory
    return made


def encoder_of(directory: Path, template: str, folder: Path, **options: Any) -> ChatEncoder:
    (folder / "t.jinja").write_text(template)
    chat = Chat(**{"template": str(folder / "t.jinja"), "template_options": ROLES, **options})
    info = load_tokenizer(directory)
    return ChatEncoder(info, chat_style(chat, info, 64, ()))


def encoded(encoder: ChatEncoder, messages: Any, chat: Chat = Chat(), **fields: Any) -> tuple[list[int], list[bool]]:  # noqa: B008
    record = {"messages": messages, **fields} if chat.form == "messages" else fields
    text = conversation_text(record, chat, "here")
    assert text is not None
    found = encoder([text])
    return found.ids.tolist(), found.targets.tolist()


@pytest.mark.parametrize("template", [MARKED, STRIPPED])
@pytest.mark.parametrize("kind", ["qwen", "llama_2"])
def test_ids_and_targets_are_those_of_transformers(
    tokenizers: dict[str, Path], tmp_path: Path, kind: str, template: str
) -> None:
    encoder, theirs = encoder_of(tokenizers[kind], template, tmp_path), AutoTokenizer.from_pretrained(tokenizers[kind])
    for messages, tools in ((TALKS[0], None), (TALKS[1], None), (TALKS[1], [{"name": "look", "ä": "<&>"}])):
        right = theirs.apply_chat_template(
            [{key: value for key, value in message.items() if value is not None} for message in messages],
            tools=tools,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **ROLES,
        )
        ids, targets = encoded(encoder, messages, tools=tools)
        assert ids == right["input_ids"]
        assert targets == [bool(one) for one in right["assistant_masks"]] and 0 < sum(targets) < len(targets)
        everything = encoded(encoder_of(tokenizers[kind], template, tmp_path, targets="all"), messages, tools=tools)
        assert everything == (ids, [True] * len(ids))


def test_turns_are_found_where_the_template_marks_none(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["qwen"])
    encoder, marked = (encoder_of(tokenizers["qwen"], text, tmp_path) for text in (UNMARKED, MARKED))
    for messages in TALKS:
        assert encoded(encoder, messages) == encoded(marked, messages)
    ids, targets = encoded(encoder, TALKS[1])
    shown = "".join(tokenizer.decode([token]) if chosen else "#" for token, chosen in zip(ids, targets, strict=True))
    assert [part for part in shown.split("#") if part] == ["<tool>look<|im_end|>", "two<|im_end|>", "four<|im_end|>"]
    # Without a control token at its end, a turn has all that it adds.
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant:{% endif %}"
    ids, targets = encoded(encoder_of(tokenizers["qwen"], plain, tmp_path), TALKS[0])
    assert (
        tokenizer.decode([token for token, chosen in zip(ids, targets, strict=True) if chosen]) == " \n\nÄh … 😀 \n\n"
    )


def test_turns_that_are_written_anew_later_are_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """As Qwen3's template, which leaves reasoning out of all turns but the last."""
    text = UNMARKED.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}hm {% endif %}{{ m.content }}"
    )
    encoder = encoder_of(tokenizers["qwen"], text, tmp_path)
    one, several = TALKS
    assert any(encoded(encoder, one)[1])
    with pytest.raises(
        DataError, match=r"cannot be found: .* number 3 differently .*'hm .*generation.*chat.targets=all"
    ):
        encoded(encoder, several)
    pair = Chat(form="prompt_completion")
    ids, targets = encoded(encoder, None, pair, prompt=several[:-1], completion=several[-1:])
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["qwen"])
    found = [token for token, chosen in zip(ids, targets, strict=True) if chosen]
    assert tokenizer.decode(found) == "hm four<|im_end|>"
    # With marks, those before the completion do not count.
    marked = encoder_of(tokenizers["qwen"], MARKED, tmp_path)
    ids, targets = encoded(marked, None, pair, prompt=several[:-1], completion=several[-1:])
    assert tokenizer.decode([token for token, chosen in zip(ids, targets, strict=True) if chosen]) == "four<|im_end|>"
    assert encoded(marked, None, pair, prompt="one", completion="two") == encoded(
        marked, [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    )


def test_a_template_must_fit_the_tokenizer(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    other = MARKED.replace("im_start", "turn")
    with pytest.raises(DataError, match=r"writes '<\|turn\|>', which is no token of the tokenizer: .* into \['<'"):
        encoder_of(tokenizers["qwen"], other, tmp_path)
    assert encoded(encoder_of(tokenizers["qwen"], other, tmp_path, split_tokens=True), TALKS[0])[1]
    # A user may write of such a token.
    talk = [{"role": "user", "content": "what is <|turn|>?"}, TALKS[0][1]]
    assert any(encoded(encoder_of(tokenizers["qwen"], MARKED, tmp_path), talk)[1])
    with pytest.raises(DataError, match=r"cannot be read as Jinja: .*set chat.template"):
        encoder_of(tokenizers["qwen"], "{% for %}", tmp_path)
    info = load_tokenizer(tokenizers["qwen"])
    with pytest.raises(DataError, match=r"has no chat template.*set chat.template"):
        chat_style(Chat(), info, 64, ())
    with pytest.raises(DataError, match=r"none.jinja does not exist"):
        chat_style(Chat(template=str(tmp_path / "none.jinja")), info, 64, ())
    dated = MARKED + "{{ strftime_now('%d %B %Y') }}"
    with pytest.raises(DataError, match=r"writes the day: set chat.day"):
        encoder_of(tokenizers["qwen"], dated, tmp_path)
    ids, _ = encoded(encoder_of(tokenizers["qwen"], dated, tmp_path, day=date(2026, 12, 1)), TALKS[0])
    assert AutoTokenizer.from_pretrained(tokenizers["qwen"]).decode(ids).endswith("01 December 2026")


def test_a_bos_is_not_doubled(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    info = load_tokenizer(tokenizers["qwen"])
    assert info.bos
    for template, added in ((STRIPPED, 0), (MARKED, 1)):
        bare = encoder_of(tokenizers["qwen"], template, tmp_path)
        begun = ChatEncoder(info, replace(bare.style, bos=info.bos))
        (ids, targets), (more, of_more) = encoded(bare, TALKS[0]), encoded(begun, TALKS[0])
        assert more == [*info.bos] * added + ids and of_more == [False] * added + targets
        assert more.count(info.bos[0]) == 1


def write_talks(folder: Path, count: int) -> list[dict[str, Any]]:
    """Write c.jsonl: conversations of two turns, one of them twice, and one for each reason to leave it out."""
    texts = make_texts(3, 2 * count, num_words=8)
    talks = [
        {"messages": [{"role": "user", "content": texts[2 * i]}, {"role": "assistant", "content": texts[2 * i + 1]}]}
        for i in range(count)
    ]
    others: list[dict[str, Any]] = [
        talks[0],
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": "alone"}]},
        {"messages": [{"role": "robot", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "no"}]},
        {"messages": [{"role": "user", "content": "long"}, {"role": "assistant", "content": " ".join(texts)}]},
    ]
    (folder / "c.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in [*talks, *others]))
    return talks


def write_chat_recipe(folder: Path, tokenizer: Path, **options: Any) -> Path:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(9, 60)))
    (folder / "t.jinja").write_text(UNMARKED)
    chat = {"template": "t.jinja", "template_options": ROLES, **options}
    domains = {"text": {"sources": ["text.jsonl"]}, "chat": {"sources": ["c.jsonl"], "chat": chat}}
    return write_recipe(folder / "r.yaml", domains)


def test_conversations_stay_whole_and_what_is_dropped_is_counted(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    talks, plan = write_talks(tmp_path, 60), Plan(128, validation_samples=4)
    recipe = write_chat_recipe(tmp_path, tokenizers["qwen"], too_long="drop")
    manifest = prepare(load_recipe(recipe), tokenizers["qwen"], tmp_path / "out", plan)
    domain, info = manifest.domains["chat"], load_tokenizer(tokenizers["qwen"])
    dropped = {key: value for key, value in vars(domain.dropped).items() if value}
    assert dropped == {
        **dict.fromkeys(("duplicates", "missing", "refused", "spelled_controls", "too_long"), 1),
        "no_target": 2,
    }
    assert domain.chat is not None and domain.chat["first_refusal"] == "no role robot"
    assert domain.chat["template"] == "t.jinja" and domain.chat["targets"] == "assistant"
    encoder = encoder_of(tokenizers["qwen"], UNMARKED, tmp_path)
    right = sorted(encoded(encoder, talk["messages"]) for talk in talks)
    found, targets = [], 0
    for split in ("train", "validation"):
        opened = open_split(LocalStore(tmp_path / "out"), f"chat/{split}")
        for number in range(len(opened)):
            packed = opened.packed(number)
            assert packed.lengths is not None and packed.targets is not None
            targets += int(packed.targets.sum())
            borders = np.cumsum(packed.lengths)[:-1]
            parts = zip(np.split(packed.tokens, borders), np.split(packed.targets, borders), strict=True)
            found += [(ids.tolist(), mask.tolist()) for ids, mask in parts]
            chosen = [
                info.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
                for ids in np.split(packed.tokens, np.flatnonzero(np.diff(packed.targets)) + 1)
            ]
            shown = "".join(piece.text if piece.target else "#" for piece in pieces(packed, info))
            assert [part for part in shown.split("#") if part] == chosen[1 - packed.targets[0] :: 2]
    padding = ([info.eos_token_id], [False])
    assert sorted(one for one in found if one != padding) == right
    splits = (domain.train, domain.validation)
    assert sum(split.target_tokens for split in splits) == targets and sum(split.documents for split in splits) == 60
    assert sum(split.cut_documents for split in splits) == 0 and domain.dropped.tail_tokens == 0
    assert manifest.domains["text"].chat is None and manifest.domains["text"].train.target_tokens == -1
    # Text beside it is joined and cut as ever; a joined run can use both.
    assert (manifest.packing_of("text"), manifest.packing_of("chat")) == ("cut", "best_fit")
    assert not manifest.masked("joined", "data.documents")
    share = conversations(manifest).columns[2]
    assert list(share.cells) == [f"{targets / sum(split.tokens for split in splits):.1%}"]
    dataset = MixtureDataset(tmp_path / "out", ["text", "chat"], masked=True)
    assert dataset.read(0)[0].targets is None and dataset.read(len(dataset) - 1)[0].targets is not None
    of_text, of_chat = validation_batches(
        tmp_path / "out", ["text", "chat"], num_samples=4, rank=0, world=1, micro_batch=4
    )
    assert of_text[0].targets is None and of_chat[0].targets is not None


def test_a_killed_preparation_goes_on_and_other_templates_do_not(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are those of one that was not killed; the text's are those of a preparation without conversations."""
    write_talks(tmp_path, 60)
    recipe, plan = load_recipe(write_chat_recipe(tmp_path, tokenizers["qwen"])), Plan(128, validation_samples=4)
    monkeypatch.setattr(reading_module, "BATCH_BYTES", 1500)
    monkeypatch.setattr(reading_module, "PART_SECONDS", 0.0)
    whole = prepare(recipe, tokenizers["qwen"], tmp_path / "whole", plan)
    assert sum(split.cut_documents for split in (whole.domains["chat"].train, whole.domains["chat"].validation)) == 1
    calls, encode = [0], encoding_module.ChatEncoder.__call__

    def killed(self: ChatEncoder, texts: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(ChatEncoder, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, tokenizers["qwen"], tmp_path / "again", plan)
    other = tmp_path / "t.jinja"
    other.write_text(MARKED)
    with pytest.raises(DataError, match=r"templates was .* --start-anew"):
        prepare(recipe, tokenizers["qwen"], tmp_path / "again", plan)
    other.write_text(UNMARKED)
    prepare(recipe, tokenizers["qwen"], tmp_path / "again", replace(plan, workers=2))
    first, second = (
        {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "whole", tmp_path / "again")
    )
    assert first == second and calls[0] == 4


def test_conversations_that_are_screened_out_take_their_targets_along(tmp_path: Path) -> None:
    """Of three conversations the encoder has dropped the second; the third has text of a benchmark."""
    parts = [Part(text) for text in "abc"]
    batch = TextBatch(parts, [], [bytes([n] * 16) for n in range(3)], [0] * 3, Position(), Dropped(), 0)
    kept = np.array([True, False, True])
    ids, targets = np.arange(7, dtype=np.uint16), np.array([0, 1, 1, 0, 1, 0, 1], bool)
    found = Conversations(ids, np.array([3, 4]), targets, [10, 20], kept, {"refused": 1}, "no")
    spool = Spool(tmp_path, "x", "uint16", has_targets=True)
    spool.append_batch(batch, Encoded(ids, found.lengths, 0, found), np.array([True, False]))
    spool.append_batch(batch, Encoded(ids, found.lengths, 0, found))
    spool.close()
    stored = [np.concatenate(list(read(HeldOut(0), validation=False))) for read in (spool.ids, spool.targets)]
    assert stored[0].tolist() == [0, 1, 2, *range(7)] and stored[1].tolist() == [0, 1, 1, *targets]
    [(_, records)] = spool.records()
    assert records["bytes"].tolist() == [10, 10, 20] and records["tokens"].tolist() == [3, 3, 4]
    assert (spool.num_documents, spool.num_tokens) == (3, 10)
    talk = {"messages": [{"role": "user", "content": 'a "b"\nc'}]}
    assert plain_text(conversation_text(talk, Chat(), "here") or "") == 'user\na "b"\nc'


def test_what_holds_no_conversation_is_named(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    messages, pair = Chat(), Chat(form="prompt_completion")
    talk = {"role": "user", "content": "a"}
    for record, chat, message in (
        ({"text": "a"}, messages, r"here lacks messages \(it has the fields text\): set messages_field or form"),
        ({"messages": {"role": "user"}}, messages, "'messages' is dict, not a list"),
        ({"messages": "hello"}, messages, "'messages' is a text, and no JSON"),
        ({"messages": [{"from": "human", "value": "a"}]}, messages, r"no text `role` \(it has the keys from, value\)"),
        ({"messages": [talk], "tools": {"a": 1}}, messages, "tools are dict, not a list"),
        ({"prompt": "a"}, pair, "lacks prompt or completion"),
    ):
        with pytest.raises(DataError, match=message):
            conversation_text(record, chat, "here")
    assert conversation_text({"messages": json.dumps([talk])}, messages, "here") == conversation_text(
        {"messages": [{**talk, "name": None}]}, messages, "here"
    )
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [talk]}) + "\n")
    recipe = write_chat_recipe(tmp_path, tokenizers["qwen"])
    with pytest.raises(ConfigError, match=r"a domain with `chat` reads jsonl or parquet, whole: leave out max_chars"):
        load_recipe(recipe, ["domains.chat.max_chars=5"])
    with pytest.raises(ConfigError, match=r"domains.chat.chat.target: unknown key, did you mean 'targets'"):
        load_recipe(recipe, ["domains.chat.chat.target=all"])
    nothing: Any = None
    with pytest.raises(DataError, match=r"conversations of chat are packed by best fit.*: leave out --engine"):
        prepare_in_parts(load_recipe(recipe), tokenizers["qwen"], tmp_path / "out", Plan(32, 1), nothing, 1)
    with pytest.raises(DataError, match=r"'chat' is empty: .* no_target 1"):
        prepare(load_recipe(recipe), tokenizers["qwen"], tmp_path / "out", Plan(32, validation_samples=1))


def test_rows_of_parquet_are_those_of_jsonl(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    """A table gives every message all keys that one has, null where it has none."""
    rows = [{"messages": TALKS[0]}, {"messages": TALKS[1]}, {"messages": None}]
    files = {"jsonl": tmp_path / "c.jsonl", "parquet": tmp_path / "c.parquet"}
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), files["parquet"])
    found = {}
    encoder = encoder_of(tokenizers["qwen"], MARKED, tmp_path)
    for kind, path in files.items():
        dropped = Dropped()
        texts = list(read_texts(SourceFile(path, path.name, Source(path=str(path)), chat=Chat()), dropped))
        assert dropped.missing == 1
        found[kind] = encoder(texts).ids.tolist()
    assert found["jsonl"] == found["parquet"] and len(found["jsonl"]) > 50
