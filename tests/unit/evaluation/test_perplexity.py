"""Perplexity and bits per byte by domain agree with known values of models and texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddk_ds.comm import SingleProcess
from ddk_ds.data.manifest import DomainInfo, load_manifest, write_manifest
from ddk_ds.data.mds import open_split, write_split
from ddk_ds.data.store import LocalStore
from ddk_ds.engine.model_files import ModelFiles, read_model
from ddk_ds.engine.whole_models import WholeModel, load_model
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.evaluation.perplexity import domain_score, open_held_out, score_domains
from ddk_ds.kernels import LogitForm, Options


@pytest.fixture
def files(tiny: Path) -> ModelFiles:
    return read_model(tiny / "model", "MODEL")


def whole_logits_losses(model: Any, samples: list[Any], vocab_size: int) -> list[float]:
    """Compute each sample's summed loss with plain transformers and torch, each document in a pass of its own."""
    with torch.no_grad():
        losses = []
        for sample in samples:
            ids, lengths = torch.from_numpy(sample.tokens.astype(np.int64)), sample.lengths
            documents = [ids] if lengths is None else ids.split(lengths.tolist())
            found = [model(input_ids=document[None]).logits[0, :-1, :vocab_size].double() for document in documents]
            labels = torch.cat([document[1:] for document in documents])
            losses.append(float(torch.nn.functional.cross_entropy(torch.cat(found), labels, reduction="sum")))
    return losses


@pytest.mark.parametrize("documents", ["auto", "joined"])
def test_it_is_the_loss_over_whole_logits(tiny: Path, files: ModelFiles, documents: Any) -> None:
    model, held_out = load_model(files.directory), open_held_out(tiny / "shards", documents)
    scores = score_domains(model, files, held_out, batch_size=4, limit=None)
    assert [score.domain for score in scores] == ["plain", "accents"]
    for score in scores:
        samples = list(held_out.samples(score.domain, None))
        losses = whole_logits_losses(model, samples, held_out.manifest.vocab_size)
        assert score.samples == len(samples) >= 9
        apart = sum(1 if sample.lengths is None else len(sample.lengths) for sample in samples)
        assert score.tokens == 32 * len(samples) - apart
        assert (apart > len(samples)) == (documents == "auto")
        assert score.perplexity == pytest.approx(math.exp(sum(losses) / score.tokens), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / score.text_bytes, rel=1e-5)
    first = score_domains(model, files, held_out, batch_size=1, limit=2)[0]
    losses = whole_logits_losses(model, list(held_out.samples("plain", 2)), held_out.manifest.vocab_size)
    assert first.perplexity == pytest.approx(math.exp(sum(losses) / first.tokens), rel=1e-5)


def test_tokens_that_are_no_targets_are_not_measured(tiny: Path, files: ModelFiles, tmp_path: Path) -> None:
    """Beside transformers' own loss, whose labels are -100 there."""
    manifest, splits, rng = load_manifest(tiny / "shards"), {}, np.random.default_rng(4)
    for split in ("train", "validation"):
        stored = open_split(LocalStore(tiny / "shards"), f"plain/{split}")
        samples = [stored.packed(number) for number in range(len(stored))]
        columns: dict[str, Any] = {"lengths": [sample.lengths for sample in samples]}
        columns["targets"] = list(rng.random((len(samples), 32)) < 0.3)
        shape: dict[str, Any] = {"sequence_length": 32, "dtype": manifest.dtype}
        made = write_split(tmp_path / "plain" / split, [sample.tokens for sample in samples], **shape, **columns)
        splits[split] = replace(getattr(manifest.domains["plain"], split), **made)
    write_manifest(replace(manifest, root=tmp_path, domains={"plain": DomainInfo(**splits, chat={})}))
    model, held_out = load_model(files.directory), open_held_out(tmp_path)
    [score] = score_domains(model, files, held_out, batch_size=4, limit=None)
    total, tokens, width = 0.0, 0, held_out.manifest.vocab_size
    for sample in held_out.samples("plain", None):
        assert sample.targets is not None and sample.lengths is not None
        ids = torch.from_numpy(sample.tokens.astype(np.int64))
        labels, lengths = ids.masked_fill(~torch.from_numpy(sample.targets), -100), sample.lengths.tolist()
        for document, of_document in zip(ids.split(lengths), labels.split(lengths), strict=True):
            count = int((of_document[1:] >= 0).sum())
            if count:
                logits = model(input_ids=document[None]).logits[..., :width]
                loss = model.loss_function(logits=logits, labels=of_document[None], vocab_size=width)
                total, tokens = total + float(loss) * count, tokens + count
    assert score.tokens == tokens and score.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_a_model_that_cannot_keep_documents_apart_is_refused(
    tiny: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def joined(_backbone: Any, ids: torch.Tensor, _positions: Any) -> Iterator[dict[str, torch.Tensor]]:
        yield {"input_ids": ids}

    held_out = open_held_out(tiny / "shards")
    monkeypatch.setattr("ddk_ds.engine.whole_models.backbone_pass", joined)
    with pytest.raises(ConfigError, match=r"does not keep documents apart: .*: give --documents joined"):
        score_domains(load_model(files.directory), files, held_out, batch_size=4, limit=1)
    mamba = {"model_type": "mamba", "vocab_size": 50, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    monkeypatch.setattr("ddk_ds.evaluation.perplexity.prepared_with", lambda *_: True)
    with pytest.raises(ConfigError, match=r"cannot keep documents apart: .* state .*: give --documents joined"):
        held_out.check_model(replace(files, config=mamba))
    open_held_out(tiny / "shards", "joined").check_model(replace(files, config=mamba))


def test_a_model_that_knows_nothing_has_the_vocabularys_perplexity(tiny: Path, files: ModelFiles) -> None:
    model, held_out = load_model(files.directory), open_held_out(tiny / "shards")
    model.get_output_embeddings().weight.zero_()
    for score in score_domains(model, files, held_out, batch_size=8, limit=None):
        assert score.perplexity == pytest.approx(held_out.manifest.vocab_size, rel=1e-5)
        assert score.bits_per_byte == pytest.approx(
            math.log2(held_out.manifest.vocab_size) * score.tokens / score.text_bytes, rel=1e-5
        )
        assert score.perplexity_stderr == pytest.approx(0.0, abs=1e-3)


def test_bytes_are_those_of_the_text(tiny: Path, files: ModelFiles) -> None:
    """A character of two bytes counts as two; a token with a part of a character counts as U+FFFD, three bytes."""
    held_out = open_held_out(tiny / "shards", "joined")
    plain, accents = score_domains(load_model(files.directory), files, held_out, batch_size=8, limit=None)
    for score in (plain, accents):
        split = held_out.manifest.domains[score.domain].validation
        first_tokens = split.samples  # the first of each sample is not predicted
        assert score.text_bytes == pytest.approx(split.bytes, rel=0.1)
        assert score.tokens == split.tokens - first_tokens
    assert accents.text_bytes / accents.tokens != plain.text_bytes / plain.tokens


def test_a_models_logit_form_is_kept(tiny: Path, files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held_out = load_model(files.directory), open_held_out(tiny / "shards")
    plain = score_domains(model, files, held_out, batch_size=8, limit=3)[0]
    monkeypatch.setitem(files.config, "logit_scale", 0.5)
    assert files.logit_form == LogitForm(0.5, 0.0)
    scaled = score_domains(model, files, held_out, batch_size=8, limit=3)[0]
    model.get_output_embeddings().weight.mul_(0.5)
    monkeypatch.delitem(files.config, "logit_scale")
    assert scaled.perplexity == pytest.approx(
        score_domains(model, files, held_out, batch_size=8, limit=3)[0].perplexity, rel=1e-5
    )
    assert scaled.perplexity != pytest.approx(plain.perplexity, rel=1e-3)


def test_standard_errors_of_known_losses() -> None:
    # Two samples of 10 tokens and 20 bytes: 10 and 30 nats.
    score = domain_score("d", np.array([10.0, 30.0]), np.array([10, 10]), [20, 20])
    assert score.perplexity == pytest.approx(math.exp(2.0))
    assert score.perplexity_stderr == pytest.approx(math.exp(2.0) * 1.0)  # per token 1 and 3: sd sqrt 2, over root 2
    assert score.bits_per_byte == pytest.approx(1 / math.log(2))
    assert score.bits_per_byte_stderr == pytest.approx(0.5 / math.log(2))  # 0.5 and 1.5 nats a byte
    assert domain_score("d", np.array([10.0]), np.array([10]), [20]).perplexity_stderr is None
    # Of 10 and 30 tokens: 2 nats a token; residuals -10 and 10 of 20 tokens on average, sd sqrt(200), over root 2.
    score = domain_score("d", np.array([10.0, 70.0]), np.array([10, 30]), [20, 60])
    assert (score.tokens, score.perplexity) == (40, pytest.approx(math.exp(2.0)))
    assert score.perplexity_stderr == pytest.approx(math.exp(2.0) * 0.5)


def test_shards_of_another_tokenizer_are_refused(tiny: Path, files: ModelFiles, tmp_path: Path) -> None:
    held_out = open_held_out(tiny / "shards")
    held_out.check_model(files)
    text = (tiny / "model" / "tokenizer.json").read_text().replace('"<|pad|>"', '"<|other|>"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="another tokenizer"):
        held_out.check_model(replace(files, directory=tmp_path))


def test_it_is_the_perplexity_of_a_run(tiny: Path, files: ModelFiles) -> None:
    """The evaluation during training, run on the same model without its engine, gives the same perplexity."""
    from ddk_ds.data.loader import HeldOutBatch, document_positions
    from ddk_ds.train.validation import perplexities

    model, held_out = load_model(files.directory), open_held_out(tiny / "shards")

    batches = [
        [
            HeldOutBatch(
                torch.from_numpy(sample.tokens.astype(np.int64))[None],
                torch.tensor([True]),
                document_positions([sample.lengths]),
            )
            for sample in held_out.samples(domain, None)
        ]
        for domain in held_out.manifest.domains
    ]
    options = Options(held_out.manifest.vocab_size, gamma=0.0, chunk_tokens=64)
    whole = WholeModel(model, files.logit_form)
    of_run = perplexities(whole, batches, options=options, device=torch.device("cpu"), comm=SingleProcess())  # type: ignore[arg-type]
    scores = score_domains(model, files, held_out, batch_size=4, limit=None)
    np.testing.assert_allclose([score.perplexity for score in scores], of_run, rtol=1e-5)


def test_a_loss_beyond_the_range_of_numbers_is_an_infinite_perplexity() -> None:
    largest = math.log(np.finfo(np.float64).max)  # 709.78: the last loss whose perplexity is a number
    tokens, sizes = np.full(3, 10), [40, 40, 40]
    below, above = (domain_score("d", np.full(3, 10 * loss), tokens, sizes) for loss in (0.999 * largest, 800.0))
    assert below.perplexity == pytest.approx(math.exp(0.999 * largest))
    assert above.perplexity == math.inf
    assert above.perplexity_stderr is None
    assert above.bits_per_byte == pytest.approx(10 * 800 / math.log(2) / 40)
