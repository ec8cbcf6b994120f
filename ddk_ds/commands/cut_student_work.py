"""The work of `ddk cut-student`, apart from it because torch and transformers take seconds to import."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ddk_ds.data.documents import Dropped, read_texts
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.mds import open_split
from ddk_ds.data.recipe import Source, SourceFile
from ddk_ds.data.same_cuts import prepared_with
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import TokenizerInfo
from ddk_ds.engine import pruning
from ddk_ds.engine.companion_files import copy_companions
from ddk_ds.engine.config_sizes import config_size
from ddk_ds.engine.expert_pruning import Uses, drop_experts
from ddk_ds.engine.model_files import ModelFiles, read_licence
from ddk_ds.engine.narrowing import narrow_heads, narrow_hidden, narrow_mlp
from ddk_ds.engine.whole_models import load_model
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.files import new_directory, write_text

BATCH_TOKENS = 1024  # keeps the logits small: 0.6 GB for a vocabulary of 152,000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """The ranking of the layers, and the student's loss and size."""

    ranking: pruning.Ranking
    uses: dict[int, Uses]
    """Tokens of each expert by the student's layers, if experts were dropped."""
    student_loss: float
    """Loss of the written student on the same text, in nats per token."""
    parameters: tuple[int, int]
    """Number of parameters of teacher and student."""


def check(options: argparse.Namespace, files: ModelFiles) -> None:
    """Check the options against the teacher's configuration, before its weights are read. Raises ConfigError."""
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"--out {options.out} exists and is not empty; remove it or name another")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no such directory; make it first")
    if stored_dtype(files) not in DTYPES:
        raise ConfigError(f"--teacher: its dtype is {stored_dtype(files)}, not one of {', '.join(DTYPES)}")
    for option, least in (("samples", 1), ("sequence_length", 2)):
        if getattr(options, option) < least:
            name = option.replace("_", "-")
            raise ConfigError(f"--{name} is {getattr(options, option)}: must be at least {least}")
    layers, least = _size(files, "num_hidden_layers"), len(pruning.kept_always(3))
    if not least <= options.layers <= layers:
        raise ConfigError(f"--layers is {options.layers}: must be {least} (first two, last) to the teacher's {layers}")
    widths = {"intermediate": "intermediate_size", "hidden": "hidden_size", "kv_heads": "num_key_value_heads"}
    if options.layers == layers and all(getattr(options, option) is None for option in (*widths, "experts")):
        raise ConfigError(f"--layers {layers} is all the teacher has: nothing is cut; give fewer")
    for option, key in widths.items():
        wanted = getattr(options, option)
        if wanted is not None and not 1 <= wanted < _size(files, key):
            raise ConfigError(
                f"--{option.replace('_', '-')} is {wanted}: must be at least 1 and less than the teacher's "
                f"{files.config[key]}"
            )
    if files.config.get("num_kv_shared_layers"):
        raise ConfigError(
            f"--teacher: {files.config.get('model_type')} shares keys and values between layers "
            "(num_kv_shared_layers), so its layers cannot be dropped one by one: choose another teacher to cut"
        )
    _check_experts(options, files)
    if options.hidden is not None and options.hidden % (heads := _size(files, "num_attention_heads")):
        fits = max(1, options.hidden // heads) * heads
        raise ConfigError(f"--hidden {options.hidden} is not a multiple of the {heads} attention heads; {fits} is")


def _check_experts(options: argparse.Namespace, files: ModelFiles) -> None:
    total, old = (config_size(files.config, name) for name in ("experts", "experts per token"))
    if options.experts is None:
        if options.experts_per_token is not None:
            raise ConfigError("--experts-per-token goes with --experts")
        return
    if not 1 <= options.experts < total:
        raise ConfigError(f"--experts is {options.experts}: must be at least 1 and less than the teacher's {total}")
    if not 1 <= (wanted := kept_per_token(options, files)) <= min(old, options.experts):
        raise ConfigError(
            f"--experts-per-token is {wanted}: must be at least 1, at most the teacher's {old}, and at most --experts"
        )


def kept_per_token(options: argparse.Namespace, files: ModelFiles) -> int:
    """Return the student's number of experts that compute a token: as asked, or the teacher's if so many are left."""
    return int(options.experts_per_token or min(config_size(files.config, "experts per token"), options.experts))


def make_student(options: argparse.Namespace, files: ModelFiles, batches: pruning.Batches) -> Result:
    """Rank the layers, cut the model, write it, and check the files by loading them.

    Raises ConfigError if the model cannot be cut or written.
    """
    model = load_model(files.directory)
    rows, largest = model.get_input_embeddings().weight.shape[0], max(int(ids.max()) for ids in batches)
    if largest >= rows:
        raise ConfigError(f"--teacher: its tokenizer gives token {largest}, it has {rows} embeddings: not a pair")
    before = model.num_parameters()
    ranking = pruning.rank_layers(model, batches, options.layers, greedy=options.greedy)
    changes = pruning.keep_layers(model, ranking.kept)
    model = _as_configured(model, changes, batches)
    # Narrowed after the layers are cut, since the activations then are the student's.
    uses: dict[int, Uses] = {}
    if options.experts is not None:
        more, uses = drop_experts(model, batches, options.experts, kept_per_token(options, files))
        changes |= more
        model = pruning.reconfigured(model, more)
    for size, narrow in (
        (options.intermediate, narrow_mlp),
        (options.kv_heads, narrow_heads),
        (options.hidden, narrow_hidden),
    ):
        if size is not None:
            more = narrow(model, batches, size)
            changes |= more
            model = pruning.reconfigured(model, more)
    after = model.num_parameters()
    for parameter in model.parameters():
        parameter.data = parameter.to(DTYPES[stored_dtype(files)])
    try:
        with new_directory(options.out) as partial:
            write_model(model, files, changes, partial)
            result = Result(ranking, uses, _loss_as_written(model.float(), partial, batches), (before, after))
            write_text(partial / "pruning.json", report(options, result))
    except OSError as error:
        raise ConfigError(f"--out {options.out} cannot be written: {error.strerror or error}") from error
    return result


def write_model(model: Any, files: ModelFiles, changes: pruning.Changes, directory: Path) -> None:
    """Write weights, config.json and the teacher's tokenizer to an empty directory.

    config.json gets the teacher's licence, which is that of the weights kept; its model card is not the student's.
    """
    model.save_pretrained(directory)  # under the names of a checkpoint, which can be others than the model's
    copy_companions(files.directory, directory)
    write_text(
        directory / "config.json", json.dumps({**files.config, **read_licence(files), **changes}, indent=2) + "\n"
    )


def stored_dtype(files: ModelFiles) -> str:
    """Return the weights' dtype as config.json names it; transformers 4 wrote torch_dtype."""
    return str(files.config.get("dtype") or files.config.get("torch_dtype") or "float32")


def read_batches(options: argparse.Namespace, tokenizer: TokenizerInfo) -> pruning.Batches:
    """Read the samples in batches (B, L). Raises DataError if there is too little text or the tokenizer differs."""
    samples = _from_text(options, tokenizer) if options.shards is None else _from_shards(options, tokenizer)
    return samples.split(max(1, BATCH_TOKENS // options.sequence_length))


def _from_text(options: argparse.Namespace, tokenizer: TokenizerInfo) -> torch.Tensor:
    if not options.text.is_file():
        raise DataError(f"--text {options.text}: there is no such file")
    needed = options.samples * options.sequence_length
    ids: list[int] = []
    for text in read_texts(SourceFile(options.text, options.text.name, Source(path=str(options.text))), Dropped()):
        ids += [*tokenizer.bos, *tokenizer.text.encode(text)]
        ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(options.samples, options.sequence_length)
    raise DataError(f"--text {options.text} has {len(ids):,} of {needed:,} tokens: give more, or lower --samples")


def _from_shards(options: argparse.Namespace, tokenizer: TokenizerInfo) -> torch.Tensor:
    store = LocalStore(options.shards)
    manifest = load_manifest(store)
    if not prepared_with(manifest, tokenizer):
        raise DataError(f"--shards {options.shards} is not of the teacher's tokenizer; prepare it with that")
    manifest.require_no_padding(
        "--shards are read without the borders of documents", "give --text", list(manifest.domains)
    )
    if options.sequence_length > (longest := manifest.sequence_length):
        raise DataError(f"--sequence-length is {options.sequence_length}, {options.shards} has {longest}: lower it")
    splits = [open_split(store, f"{name}/validation", manifest.vocab_size) for name in manifest.domains]
    rows = []
    for number in range(options.samples):
        split, index = splits[number % len(splits)], number // len(splits)
        if index >= len(split):
            raise DataError(f"--samples {options.samples}: a domain of {options.shards} has {len(split)}; give fewer")
        rows.append(torch.from_numpy(split.tokens(index).astype("int64"))[: options.sequence_length])
    return torch.stack(rows)


def report(options: argparse.Namespace, result: Result) -> str:
    """Return the content of pruning.json: losses in nats per token; layers have the teacher's numbers.

    `ranking` begins with the least important layer.
    """
    ranking = result.ranking
    kept_ranked = sorted(ranking.kept, key=lambda number: ranking.losses[number])
    content = {
        "teacher": str(options.teacher),
        "text": str(options.text or options.shards),
        "samples": options.samples,
        "sequence_length": options.sequence_length,
        "greedy": options.greedy,
        "loss": ranking.loss,
        "student_loss": result.student_loss,
        "loss_without": ranking.losses,
        "ranking": [*ranking.dropped, *kept_ranked],
        "always_kept": sorted(pruning.kept_always(len(ranking.losses))),
        "kept": ranking.kept,
        "intermediate": options.intermediate,
        "hidden": options.hidden,
        "kv_heads": options.kv_heads,
        "experts": {str(layer): use._asdict() for layer, use in result.uses.items()} or None,
        "parameters": {"teacher": result.parameters[0], "student": result.parameters[1]},
    }
    return json.dumps(content, indent=1) + "\n"


def table(ranking: pruning.Ranking) -> Table:
    """Return the table of layers: the loss without each, its increase, and whether the layer is kept."""
    result = Table(title=f"Layers (whole model: loss {ranking.loss:.4f})", box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("layer", "loss without it", "more by", "kept"):
        result.add_column(head, justify="right")
    always = pruning.kept_always(len(ranking.losses))
    for number, loss in enumerate(ranking.losses):
        kept = "always" if number in always else "yes" if number in ranking.kept else "no"
        result.add_row(str(number), f"{loss:.4f}", f"{loss - ranking.loss:+.4f}", kept)
    return result


def _size(files: ModelFiles, key: str) -> int:
    value = files.config.get(key)
    if not isinstance(value, int):
        raise ConfigError(f"--teacher: its config.json has no {key}; models like Llama, Qwen2 and GPT-NeoX can be cut")
    return value


def _as_configured(model: Any, changes: pruning.Changes, batches: pruning.Batches) -> Any:
    """Return the model of the layers kept as its class makes it. Raises ConfigError if that is another model.

    So it is if a layer's kind depends on its number in a way that the configuration cannot say.
    """
    try:
        result = pruning.reconfigured(model, changes)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--teacher: the cut {type(model).__name__} is no model of its kind: {reason}") from error
    _check_same(model, pruning.mean_loss(result, batches), batches, "as its class makes it")
    return result


def _loss_as_written(model: Any, directory: Path, batches: pruning.Batches) -> float:
    """Return the loss of the model in `directory`. Raises ConfigError if it differs from that of `model`."""
    written = pruning.mean_loss(load_model(directory), batches)
    _check_same(model, written, batches, "loaded from its files")
    return written


def _check_same(model: Any, loss: float, batches: pruning.Batches, how: str) -> None:
    if not math.isclose(loss, own := pruning.mean_loss(model, batches), rel_tol=1e-4):
        raise ConfigError(
            f"--teacher: the cut {type(model).__name__} has loss {own:.4f}, {how} {loss:.4f}: its layers depend on "
            "their places, and cannot be cut"
        )
