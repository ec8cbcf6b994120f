"""Compare a model's predictions with those of the same model in 8 bits, as `teacher.quantize: int8` stores it.

    python -m tools.bench.bench_int8_teacher DIR

DIR is a Hugging Face directory. The text is the documentation that every Python has, in samples of 256 tokens. Prints
the mean KL divergence, in nats a token, and both perplexities.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ddk_ds.command_line import positive, reports_user_errors
from ddk_ds.engine.int8 import Int8Linear
from ddk_ds.errors import ConfigError, DataError

LENGTH = 256
BATCH_SAMPLES = 8


@dataclass(frozen=True)
class Int8Effect:
    """Difference between a model in float32 and the same model with 8-bit layers, on one text."""

    tokens: int
    """Predicted tokens: all except the first of each sample."""
    kl: float
    """Mean KL divergence of the 8-bit model from the float32 model, nats a token."""
    float32_ppl: float
    int8_ppl: float


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison; return 0, or 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="directory of the model and its tokenizer")
    parser.add_argument("--samples", type=positive, default=64, help=f"of {LENGTH} tokens (default: %(default)s)")
    options = parser.parse_args(arguments)
    effect = measure(options.model, options.samples)
    print(f"{effect.tokens:,} tokens: KL {effect.kl:.4f} nats a token")
    print(f"perplexity: float32 {effect.float32_ppl:.2f}, int8 {effect.int8_ppl:.2f}")
    return 0


def measure(directory: Path, samples: int) -> Int8Effect:
    """Compare the two models on `samples` samples. Raises ConfigError or DataError where that is not possible."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: no directory of a model: it has no config.json")
    ids = _samples(directory, samples)
    original, quantized = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval() for _ in range(2)
    )
    quantize_linears(quantized.base_model.layers)
    kl, nll, int8_nll = 0.0, 0.0, 0.0
    with torch.inference_mode():
        for batch in ids.split(BATCH_SAMPLES):
            log_p, log_q = (model(batch).logits[:, :-1].log_softmax(-1) for model in (original, quantized))
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            nll -= log_p.gather(-1, batch[:, 1:, None]).sum().item()
            int8_nll -= log_q.gather(-1, batch[:, 1:, None]).sum().item()
    tokens = len(ids) * (LENGTH - 1)
    return Int8Effect(tokens, kl / tokens, math.exp(nll / tokens), math.exp(int8_nll / tokens))


def _samples(directory: Path, samples: int) -> Tensor:
    """Return the first (samples, LENGTH) token ids of Python's documentation."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt").input_ids[0]
    if len(ids) < samples * LENGTH:
        raise DataError(f"--samples {samples}: the text has only {len(ids) // LENGTH} samples of {LENGTH} tokens")
    return ids[: samples * LENGTH].view(samples, LENGTH)


def quantize_linears(layers: nn.ModuleList) -> None:
    """Replace every linear module of a model's layers by its 8-bit form."""
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                layer.set_submodule(name, Int8Linear(module.weight.data, module.bias))


if __name__ == "__main__":
    raise SystemExit(main())
