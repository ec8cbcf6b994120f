"""The files of a model's directory that go with its weights into a model made of it: tokenizer, templates, licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "vocab.json", "merges.txt", "vocab.txt"),
)
"""A tokenizer in each of its forms, and all its chat templates."""
COMPANIONS = (*TOKENIZER_FILES, "*.json", "*.txt", "LICENSE*", "NOTICE*")
"""The tokenizer, the settings of its generation, the licence."""
# Written anew, or a description of weights that are not copied.
_LEFT = re.compile(r"config\.json|.*\.index\.json|ddk_ds_export\.json|pruning\.json")
# Settings of an image, video or audio processor, which a text model does not have.
_PROCESSOR = re.compile(r"(video_)?pre?processor_config\.json|processor_config\.json")
_SENSES = ("image", "video", "audio", "feature_extractor", "patch")


def copy_companions(source: Path, target: Path, patterns: Sequence[str] = COMPANIONS) -> None:
    """Copy the files of a model's directory that match `patterns` and go with its weights into another directory."""
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        if not _left(path):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _left(path: Path) -> bool:
    if _PROCESSOR.fullmatch(path.name) is None:
        return _LEFT.fullmatch(path.name) is not None
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return True
    return any(sense in key for key in keys for sense in _SENSES)
