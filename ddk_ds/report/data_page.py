"""The page of a run's data: what people look at before they spend a week on it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from ddk_ds.data.data_facts import DomainFacts, pieces, token_text
from ddk_ds.data.manifest import Manifest
from ddk_ds.data.mds import Packed
from ddk_ds.data.tokenizer import TokenizerInfo
from ddk_ds.report.charts import Chart, Curve, Panel
from ddk_ds.report.page import Section, links_to, write_still_page
from ddk_ds.report.result_tables import table

_BINS = 40


def write_data_page(
    path: Path, manifest: Manifest, split: str, facts: Sequence[DomainFacts], info: TokenizerInfo
) -> None:
    """Write the page to `path`. Raises ConfigError if it cannot be written."""
    lengths = [_lengths(one, manifest.sequence_length, number) for number, one in enumerate(facts)]
    parts = [
        Section("domains", "Domains", _counts(facts, manifest), []),
        Section("lengths", "Lengths of documents", "", [chart for chart in lengths if chart is not None]),
        Section("tokens", "Most frequent tokens", "".join(_tokens(one, info) for one in facts), []),
        *(Section(f"samples_{one.name}", f"Samples of {one.name}", _samples(one, info), []) for one in facts),
    ]
    if all(one.lengths is None for one in facts):
        parts.pop(1)
    about = _about(manifest, facts) + links_to(parts)
    write_still_page(path, "--html", f"{manifest.root}, {split}", about, parts)


def _about(manifest: Manifest, facts: Sequence[DomainFacts]) -> str:
    looked, of = sum(len(one.numbers) for one in facts), sum(one.samples for one in facts)
    shards, of_shards = sum(one.shards_read for one in facts), sum(one.shards for one in facts)
    known = "with the borders of their documents" if manifest.borders else "without borders of documents"
    adopted = [name for name, domain in manifest.domains.items() if domain.adopted]
    items = [
        f"{manifest.sequence_length:,} tokens a sample, {known}; vocabulary of {manifest.vocab_size:,}, "
        f"fingerprint {manifest.tokenizer_fingerprint[:12]}",
        f"looked at {looked:,} of {of:,} samples, in {shards:,} of {of_shards:,} shards",
        *([f"adopted: {', '.join(adopted)}"] if adopted else []),
    ]
    return f'<ul class="remarks">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def _counts(facts: Sequence[DomainFacts], manifest: Manifest) -> str:
    rows = []
    for one in facts:
        domain = manifest.domains[one.name]
        train = domain.train
        documents = [f"{value:,.0f}" for value in one.quantiles] or ["-"] * 3
        rows.append(
            [
                one.name,
                f"{train.tokens:,}",
                f"{train.samples:,}",
                f"{domain.validation.samples:,}",
                "-" if domain.adopted else f"{train.tokens / max(1, train.documents):,.0f}",
                f"{len(one.numbers):,}",
                f"{one.duplicates:,}",
                *documents,
                f"{one.control / one.tokens:.2%}",
                f"{one.padding / one.tokens:.2%}",
                f"{one.targets / one.tokens:.2%}",
                f"{one.bytes_per_token:.2f}",
                f"{one.replaced / max(1, one.characters):.3%}",
            ]
        )
    headings = ["domain", "train tokens", "train samples", "held-out samples", "tokens a document", "looked at"]
    headings += ["equal to another", "in a sample: 5 %", "median", "95 %", "control tokens", "padding", "targets"]
    headings += ["bytes per token", "no text"]
    caption = (
        "Equal to another: samples with the same ids as one before. In a sample: tokens that a document has in one, so "
        "that one over a sample's end counts twice. Bytes per token: of ordinary tokens. No text: characters that "
        "stand for bytes which are no UTF-8, without those at a sample's ends"
    )
    return table(headings, rows, caption, "domains")


def _lengths(one: DomainFacts, longest: int, number: int) -> Chart | None:
    """Return the histogram of the lengths of a domain's documents; None if they are not known."""
    if one.lengths is None or not len(one.lengths):
        return None
    edges = np.unique(np.linspace(0, longest, _BINS + 1).round())
    counts, _ = np.histogram(one.lengths, edges + 0.5)
    shares = counts / len(one.lengths)
    steps = Curve(one.name, f"domain:{one.name}", 0, np.repeat(edges, 2)[1:-1], np.repeat(shares, 2))
    return Chart(
        name=f"lengths_{number}",
        title=one.name,
        panels=[Panel("", [steps])],
        x_label="tokens of a document in a sample",
        y_label="share of the documents",
        caption=f"{len(one.lengths):,} documents in {len(one.numbers):,} samples; the last bin has whole samples.",
        y_format="share",
        from_zero=True,
    )


def _tokens(one: DomainFacts, info: TokenizerInfo) -> str:
    rows = [[repr(token_text(info, number)), f"{number}", f"{count / one.tokens:.2%}"] for number, count in one.top]
    return table([one.name, "id", "share"], rows, f"of {one.tokens:,} tokens", "tokens")


def _samples(one: DomainFacts, info: TokenizerInfo) -> str:
    html = ""
    for number, packed in one.examples:
        text = f'<dt>sample {number:,}</dt><dd tabindex="0">{sample_html(packed, info)}</dd>'
        html += f'<div class="sample long"><dl>{text}</dl></div>'
    return f'<div class="samples">{html}</div>'


def sample_html(packed: Packed, info: TokenizerInfo) -> str:
    """Return a sample as HTML: borders as lines, control tokens marked, tokens that are no targets pale."""
    html, document = "", 0
    for piece in pieces(packed, info):
        html += "<hr>" if piece.document != document else ""
        document = piece.document
        text = f"<mark>{escape(piece.text)}</mark>" if piece.control else escape(piece.text)
        html += text if piece.target else f"<small>{text}</small>"
    return html
