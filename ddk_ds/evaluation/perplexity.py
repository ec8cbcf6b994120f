"""Perplexity and bits per byte of a model on each domain's held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.data.loader import document_positions, target_mask
from ddk_ds.data.manifest import Manifest, load_manifest
from ddk_ds.data.mds import Packed, open_split
from ddk_ds.data.same_cuts import prepared_with
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.engine.attention import choose_attention, not_kept_apart
from ddk_ds.engine.attention_masks import use_own_masks
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.engine.split_check import leak_of_documents
from ddk_ds.engine.whole_models import WholeModel
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.evaluation.results import DomainScore
from ddk_ds.kernels import Options
from ddk_ds.methods import IGNORE_INDEX, next_token_labels, token_losses
from ddk_ds.mixture.domain_vectors import perplexity

_JOINED = "--documents: {} {}: give --documents joined, or leave the model out"


@dataclass(frozen=True)
class HeldOut:
    """Prepared data whose validation samples are measured."""

    manifest: Manifest
    root: Path
    masked: bool
    """True if the documents of a sample do not see each other."""

    def samples(self, domain: str, limit: int | None, vocab_size: int | None = None) -> Iterator[Packed]:
        """Yield the domain's first `limit` samples, with their documents' lengths if they are kept apart.

        Raises DataError if a shard is damaged, or holds an id >= `vocab_size`, by default that of the data.
        """
        split = open_split(LocalStore(self.root), f"{domain}/validation", vocab_size or self.manifest.vocab_size)
        for number in range(len(split) if limit is None else min(limit, len(split))):
            packed = split.packed(number)
            yield packed if self.masked else packed._replace(lengths=None)

    def check_model(self, files: ModelFiles) -> None:
        """Raise an error if a model does not fit, as far as that is plain without its weights.

        Raises DataError if the shards were made with another tokenizer, and ConfigError if documents are kept apart and
        the model cannot do that, or if it cannot be built.
        """
        if not prepared_with(self.manifest, load_tokenizer(files.directory)):
            raise DataError(
                f"--shards {self.root} were made with another tokenizer than that of {files.directory}: prepare the "
                "same text with its own (`ddk prepare`), and compare bits per byte, not perplexities"
            )
        if self.masked:
            choose_attention(files.config, files.directory, str(files.directory))
            if reason := not_kept_apart(files.config, files.directory):
                raise ConfigError(_JOINED.format(files.directory, f"cannot keep documents apart: {reason}"))


def open_held_out(root: Path, documents: Literal["auto", "masked", "joined"] = "auto") -> HeldOut:
    """Open the prepared data in `root`, whose documents are kept apart as `data.documents` of a run has it.

    Raises DataError if `root` holds no prepared data or damaged data, or lacks the documents' borders.
    """
    manifest = load_manifest(root)
    return HeldOut(manifest, root, manifest.masked(documents, "--documents"))


def score_domains(
    model: Any, files: ModelFiles, held_out: HeldOut, *, batch_size: int, limit: int | None
) -> list[DomainScore]:
    """Measure perplexity and bits per byte of a transformers causal LM on each domain, on the model's device.

    `limit` is the number of samples of each domain, or None for all. As in a run, the first token of a sample is not
    predicted, nor that of a document if documents are kept apart, nor one that is no target. Raises ConfigError if the
    model lets one document see another, DataError if a domain has no target.
    """
    tokenizer = load_tokenizer(files.directory).tokenizer
    vocab_size = min(held_out.manifest.vocab_size, len(model.get_output_embeddings().weight))
    if held_out.masked:
        use_own_masks()
        _check_documents(model, files, held_out, vocab_size)
    scores = []
    for domain in held_out.manifest.domains:
        samples = list(held_out.samples(domain, limit, vocab_size))
        firsts = range(0, len(samples), batch_size)
        parts = [_losses(model, files, samples[first : first + batch_size], vocab_size) for first in firsts]
        losses, predicted = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        if not predicted.any():
            raise DataError(f"domain {domain!r} of {held_out.root}: none of its {len(samples):,} samples has a target")
        texts = [
            tokenizer.decode(sample.tokens[1:][places[:-1]].tolist())
            for sample, places in zip(samples, predicted, strict=True)
        ]
        scores.append(domain_score(domain, losses, predicted.sum(1), [len(text.encode()) for text in texts]))
    return scores


def _check_documents(model: Any, files: ModelFiles, held_out: HeldOut, vocab_size: int) -> None:
    [sample] = held_out.samples(next(iter(held_out.manifest.domains)), 1, vocab_size)
    ids = torch.from_numpy(sample.tokens.astype(np.int64))[None].to(next(model.parameters()).device)
    if leak := leak_of_documents(WholeModel(model, files.logit_form), ids, vocab_size, SingleProcess()):
        raise ConfigError(_JOINED.format(files.directory, leak))


@torch.no_grad()
def _losses(
    model: Any, files: ModelFiles, samples: Sequence[Packed], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of -log p over each sample's predicted tokens (B,) float64, in nats, and where these are (B, L).

    A place is that of the token before the predicted one. As in a run, the softmax is over the tokenizer's `vocab_size`
    tokens; further rows of the head are padding.
    """
    ids = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64))
    positions = document_positions([sample.lengths for sample in samples])
    targets = target_mask([sample.targets for sample in samples], ids.shape[1])
    labels = next_token_labels(ids, positions, targets)
    device = next(model.parameters()).device
    nll = partial(token_losses, labels=labels.flatten().to(device), options=Options(vocab_size, gamma=0.0))
    losses = WholeModel(model, files.logit_form)(ids.to(device), nll, positions)
    return losses.view(len(ids), -1).sum(1, dtype=torch.float64).cpu(), labels != IGNORE_INDEX


def domain_score(
    domain: str, losses: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64], text_bytes: Sequence[int]
) -> DomainScore:
    """Compute perplexity and bits per byte of a domain, with their standard errors over the n samples.

    `losses` (n,) holds the summed loss of each sample in nats, `tokens` (n,) the number of its predicted tokens, and
    `text_bytes` (n,) the size of their text. The perplexity's standard error is that of the mean
    loss times the perplexity (delta method); None for an infinite perplexity. Both errors are None for a single sample.
    """
    number, size = len(losses), np.array(text_bytes, np.float64)
    loss = float(losses.sum() / tokens.sum())
    ppl = float(perplexity(loss))  # as in training
    bits = float(losses.sum() / math.log(2) / size.sum())
    perplexity_error = bits_error = None
    if number > 1:
        if math.isfinite(ppl):
            perplexity_error = ppl * _error_of_ratio(losses, tokens)
        bits_error = _error_of_ratio(losses / math.log(2), size)
    return DomainScore(
        *(domain, ppl, perplexity_error, bits, bits_error),
        *(number, int(tokens.sum()), int(size.sum())),
    )


def _error_of_ratio(losses: npt.NDArray[np.float64], of: npt.NDArray[Any]) -> float:
    """Return the standard error of the ratio of two sums over n > 1 samples, from the residuals of the first ones."""
    residuals = losses - losses.sum() / of.sum() * of
    return float(np.sqrt((residuals**2).sum() / (len(losses) - 1) / len(losses)) / of.mean())
