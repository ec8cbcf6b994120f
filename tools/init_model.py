"""Make a model with random weights from a Hugging Face configuration: a starting point for training from scratch.

    python tools/init_model.py --config configs/models/demo_student.json --tokenizer DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.errors import ConfigError, UserError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a model with random weights.")
    parser.add_argument("--config", type=Path, required=True, help="JSON with the model's Hugging Face configuration")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer it is to use")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    options = parser.parse_args()
    try:
        parameters = init_model(options.config, options.tokenizer, options.out, options.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {parameters / 1e6:.2f} M parameters")
    return 0


def init_model(config: Path, tokenizer: Path, out: Path, seed: int) -> int:
    """Write the model and its tokenizer to `out`; returns the number of parameters."""
    if out.exists():
        raise ConfigError(f"--out {out} exists already; remove it or name another")
    if not config.is_file():
        raise ConfigError(f"--config {config}: there is no such file")
    info = load_tokenizer(tokenizer)
    values = json.loads(config.read_text())
    values |= {"vocab_size": info.vocab_size, "eos_token_id": info.eos_token_id, "bos_token_id": info.eos_token_id}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    model.save_pretrained(out)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)
    return model.num_parameters()


if __name__ == "__main__":
    sys.exit(main())
