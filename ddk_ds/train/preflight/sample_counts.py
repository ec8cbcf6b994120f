"""Checks of the data: one tokenizer, and enough samples, against those held out and against what the run draws."""

from __future__ import annotations

import numpy as np

from ddk_ds.config import Config
from ddk_ds.config.run_config import corpus_samples, total_steps
from ddk_ds.train.inputs import Inputs
from ddk_ds.train.preflight.rows import Row, judged

# Up to 4 passes are nearly as good as new text; the worth of later ones falls fast (arXiv 2305.16264).
_PASSES = 4.0


def domain_samples(config: Config, inputs: Inputs) -> Row:
    """Warn of domains with fewer training samples than held-out ones, and of those drawn more than 4 times over.

    The run's draws are divided by the controller's proportions for a student that is equally good everywhere.
    """
    sizes = {name: inputs.manifest.domains[name].train.samples for name in inputs.names}
    draws = total_steps(config, corpus_samples(config.mixture, sizes)) * config.train.global_batch_samples
    ones = np.ones(len(sizes))
    shares = inputs.controller.start(ones, ones).proportions
    passes = {name: draws * share / size for (name, size), share in zip(sizes.items(), shares, strict=True)}
    limits = dict(zip(sizes, inputs.exhaustion.limits, strict=True))
    often = [f"{name} {passes[name]:.1f} times" for name in sizes if passes[name] > _PASSES and limits[name] is None]
    held_out = inputs.manifest.mostly_held_out(inputs.names)
    findings = []
    if held_out:
        findings.append(f"fewer samples to train on than held out: {', '.join(held_out)}")
    if often:
        findings.append(f"{draws:,} draws take samples again and again: {', '.join(often)}")
    found = "; ".join(findings) or f"the least domain has {min(sizes.values()):,} training samples"
    fix = (
        "prepare the data again with more text of these domains (max_bytes of the recipe) or a lower "
        "--validation-samples; mixture.exhaustion: cap with mixture.max_passes: 4 bounds how often they are drawn"
    )
    return judged("samples of domains", found, fail=False, warn=bool(findings), fix=fix)


def same_tokenizers(inputs: Inputs) -> Row:
    """Warn if student and teacher cut a probe text differently, or if the data's documents begin without the BOS.

    Vocabularies that differ were refused before.
    """
    found = f"one vocabulary of {inputs.vocabulary.size:,} tokens, which the shards were made with"
    if inputs.vocabulary.left_out:
        found += f"; {inputs.vocabulary.note}"
    fixes = []
    if inputs.cut_differently:
        found += f"; the teacher cuts {inputs.cut_differently:.2%} of a probe text's tokens differently"
        fixes.append("the teacher sees text as it was never trained on: choose a pair that shares one tokenizer")
    data, own = list(inputs.manifest.bos), list(inputs.tokenizer.bos)
    if data != own:
        found += f"; documents of the data begin with the ids {data}, the tokenizer itself begins a text with {own}"
        fixes.append("prepare the data again with tokenizer.add_bos: auto, unless the models were trained so")
    return judged("tokenizers and data", found, fail=False, warn=bool(fixes), fix="; ".join(fixes))
