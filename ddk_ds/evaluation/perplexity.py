"""Perplexity and bits per byte of a model on each domain's held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddk_ds.data.manifest import Manifest, load_manifest
from ddk_ds.data.mds import open_split
from ddk_ds.data.same_cuts import prepared_with
from ddk_ds.data.store import LocalStore
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.engine.unloaded_models import backbone_of
from ddk_ds.errors import DataError
from ddk_ds.evaluation.results import DomainScore
from ddk_ds.kernels import Options, linear_nll
from ddk_ds.mixture.domain_vectors import perplexity


@dataclass(frozen=True)
class HeldOut:
    """Prepared data whose validation samples are measured."""

    manifest: Manifest
    root: Path

    def samples(self, domain: str, limit: int | None, vocab_size: int | None = None) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the token ids (L,) of the domain's first `limit` samples.

        Raises DataError if a shard is damaged, or holds an id >= `vocab_size`, by default that of the data.
        """
        split = open_split(LocalStore(self.root), f"{domain}/validation", vocab_size or self.manifest.vocab_size)
        for number in range(len(split) if limit is None else min(limit, len(split))):
            yield split.tokens(number).astype(np.int64)

    def check_model(self, directory: Path) -> None:
        """Raise DataError if the shards were made with another tokenizer than that of the model in `directory`."""
        if not prepared_with(self.manifest, load_tokenizer(directory)):
            raise DataError(
                f"--shards {self.root} were made with another tokenizer than that of {directory}: prepare the same "
                "text with its own (`ddk prepare`), and compare bits per byte, not perplexities"
            )


def open_held_out(root: Path) -> HeldOut:
    """Open the prepared data in `root`. Raises DataError if `root` holds no prepared data, or damaged data."""
    return HeldOut(load_manifest(root), root)


def score_domains(
    model: Any, files: ModelFiles, held_out: HeldOut, *, batch_size: int, limit: int | None
) -> list[DomainScore]:
    """Measure perplexity and bits per byte of a transformers causal LM on each domain, on the model's device.

    `limit` is the number of samples of each domain, or None for all. As in a run, the first token of a sample is not
    predicted.
    """
    tokenizer = load_tokenizer(files.directory).tokenizer
    vocab_size = min(held_out.manifest.vocab_size, len(model.get_output_embeddings().weight))
    scores = []
    for domain in held_out.manifest.domains:
        samples = list(held_out.samples(domain, limit, vocab_size))
        losses = np.concatenate(
            [
                sample_losses(model, files, np.stack(samples[start : start + batch_size]), vocab_size)
                for start in range(0, len(samples), batch_size)
            ]
        )
        text_bytes = [len(tokenizer.decode(sample[1:].tolist()).encode()) for sample in samples]
        scores.append(domain_score(domain, losses, len(samples[0]) - 1, text_bytes))
    return scores


@torch.no_grad()
def sample_losses(
    model: Any, files: ModelFiles, input_ids: npt.NDArray[np.int64], vocab_size: int
) -> npt.NDArray[np.float64]:
    """Return the sum of -log p over each sample's predicted tokens, in nats: input_ids (B, L) -> (B,) float64.

    As in a run, the softmax is over the tokenizer's `vocab_size` tokens; further rows of the head are padding.
    """
    ids = torch.from_numpy(input_ids).to(next(model.parameters()).device)
    hidden = backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    losses = linear_nll(
        hidden.flatten(0, 1),
        head.weight,
        ids[:, 1:].flatten(),
        options=Options(vocab_size, gamma=0.0, student_form=files.logit_form),
        bias=head.bias,
    )
    total: npt.NDArray[np.float64] = losses.view(len(ids), -1).sum(1, dtype=torch.float64).cpu().numpy()
    return total


def domain_score(
    domain: str, losses: npt.NDArray[np.float64], tokens_each: int, text_bytes: Sequence[int]
) -> DomainScore:
    """Compute perplexity and bits per byte of a domain, with their standard errors over the n samples.

    `losses` (n,) holds the summed loss of each sample in nats, `text_bytes` (n,) the size of its predicted text, and
    `tokens_each` is the number of predicted tokens of a sample. The perplexity's standard error is that of the mean
    loss times the perplexity (delta method); None for an infinite perplexity. Both errors are None for a single sample.
    """
    number, size = len(losses), np.array(text_bytes, np.float64)
    loss = float(losses.sum() / (number * tokens_each))
    ppl = float(perplexity(loss))  # as in training
    bits = float(losses.sum() / math.log(2) / size.sum())
    perplexity_error = bits_error = None
    if number > 1:
        if math.isfinite(ppl):
            perplexity_error = ppl * float(losses.std(ddof=1)) / tokens_each / math.sqrt(number)
        # The standard error of a ratio of sums, from the residuals of losses on bytes.
        residuals = losses / math.log(2) - bits * size
        bits_error = float(np.sqrt((residuals**2).sum() / (number - 1) / number) / size.mean())
    return DomainScore(
        *(domain, ppl, perplexity_error, bits, bits_error),
        *(number, number * tokens_each, int(size.sum())),
    )
