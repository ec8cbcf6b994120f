"""Compare a model's predictions with those of the same model in 8 bits, as `teacher.quantize` computes it.

    python -m tools.bench.bench_quantized_teacher DIR [--text TEXT] [--json FILE]

DIR is a Hugging Face directory. TEXT holds one <domain>.jsonl for each domain, as tools.bench.fetch_text writes them;
without it the text is the documentation that every Python has. The first samples of 256 tokens of each domain count.
Prints each form's perplexities, and its mean KL divergence from the model in bf16, in nats a token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_ds.command_line import positive, reports_user_errors
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.layers import layers_of
from ddk_ds.engine.quantized import quantize_layers
from ddk_ds.errors import ConfigError, DataError
from ddk_ds.files import write_text
from tools.bench.fault_campaign import made_with

LENGTH = 256
BATCH_SAMPLES = 8
BASE = "bf16"
FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    BASE: (torch.bfloat16, {}),
    "float32": (torch.float32, {}),
    "int8 in float32": (torch.float32, {"quantize": "int8"}),
    "int8": (torch.bfloat16, {"quantize": "int8"}),
    "int8_dynamic": (torch.bfloat16, {"quantize": "int8_dynamic"}),
    "fp8": (torch.bfloat16, {"quantize": "fp8"}),
    "fp8, first and last layer bf16": (torch.bfloat16, {"quantize": "fp8", "quantize_skip_layers": (0, -1)}),
}
"""Compute dtype and options of section `teacher`, by name."""


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; return 0, or 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="directory of the model and its tokenizer")
    parser.add_argument("--text", type=Path, help="directory of <domain>.jsonl files")
    parser.add_argument(
        "--samples", type=positive, default=64, help=f"of a domain, of {LENGTH} tokens (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args(arguments)
    domains = measure(options.model, options.text, options.samples)
    for name in FORMS:
        kl = {domain: values[name]["kl"] for domain, values in domains.items()}
        worst = max(kl, key=lambda domain: kl[domain])
        mean = sum(kl.values()) / len(kl)
        print(f"{name}: KL {mean:.4f} nats a token, at most {kl[worst]:.4f} ({worst}); perplexities")
        print("   ", ", ".join(f"{domain} {values[name]['ppl']:.2f}" for domain, values in domains.items()))
    if options.json is not None:
        content = {**made_with(), "samples": options.samples, "length": LENGTH, "domains": domains}
        write_text(options.json, json.dumps(content, indent=1))
    return 0


def measure(directory: Path, text: Path | None, samples: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return by domain and form the perplexity "ppl" and "kl", the KL of the form from the model in bf16.

    Raises ConfigError or DataError where that is not possible.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: no directory of a model: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = {name: _samples(tokenizer, name, parts, samples) for name, parts in _texts(text).items()}
    models = {form: _model(directory, form) for form in FORMS}
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, rows in ids.items():
        kl, nll = dict.fromkeys(FORMS, 0.0), dict.fromkeys(FORMS, 0.0)
        for batch in rows.split(BATCH_SAMPLES):
            base = _log_p(models[BASE], batch)
            for form, model in models.items():
                log_p = base if form == BASE else _log_p(model, batch)
                kl[form] += (base.exp() * (base - log_p)).sum(dtype=torch.float64).item()
                nll[form] -= log_p.gather(-1, batch[:, 1:, None]).sum(dtype=torch.float64).item()
        tokens = len(rows) * (LENGTH - 1)
        results[name] = {form: {"ppl": math.exp(nll[form] / tokens), "kl": kl[form] / tokens} for form in FORMS}
    return results


def _texts(directory: Path | None) -> dict[str, Iterator[str]]:
    """Return the documents of each domain."""
    if directory is None:
        return {"python_docs": iter(["\n".join(topics.values())])}
    files = sorted(directory.glob("*.jsonl"))
    if not files:
        raise DataError(f"--text {directory}: holds no <domain>.jsonl")
    return {file.stem: (json.loads(line)["text"] for line in file.open(encoding="utf-8")) for file in files}


def _samples(tokenizer: Any, name: str, documents: Iterator[str], samples: int) -> Tensor:
    """Return the first (samples, LENGTH) token ids of a domain's documents."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document).input_ids
        if len(ids) >= samples * LENGTH:
            return torch.tensor(ids[: samples * LENGTH]).view(samples, LENGTH)
    raise DataError(f"--samples {samples}: {name} has only {len(ids) // LENGTH} samples of {LENGTH} tokens")


def _model(directory: Path, form: str) -> Any:
    dtype, section = FORMS[form]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    if section:
        layers = layers_of(model.base_model, model.config.num_hidden_layers)
        quantize_layers(layers, Teacher(path=str(directory), **section), model.config.to_dict(), lambda _: None)
    return model


@torch.inference_mode()
def _log_p(model: Any, batch: Tensor) -> Tensor:
    """Return the log-probabilities (B, LENGTH - 1, V) of the next tokens, from float32 logits as in training."""
    hidden = model.base_model(batch, use_cache=False).last_hidden_state[:, :-1]
    return (hidden.float() @ model.get_output_embeddings().weight.float().T).log_softmax(-1)


if __name__ == "__main__":
    raise SystemExit(main())
