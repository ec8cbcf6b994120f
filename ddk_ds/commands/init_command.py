"""Make a model with random weights from a Hugging Face configuration: a starting point for training from scratch.

ddk init --config configs/models/demo_student.json --tokenizer DIR --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ddk_ds.command_line import command_parser, parse, reports_user_errors


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Make and write the random model. Returns the exit code: 0, or 2 after an error that the user can fix."""
    parser = command_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON with the model's Hugging Face configuration")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device that draws the weights (default: %(default)s)"
    )
    options = parse(parser, arguments)
    from ddk_ds.engine.whole_models import make_random_model  # takes seconds that --help should not take

    parameters = make_random_model(options.config, options.tokenizer, options.out, options.seed, options.device)
    print(f"{options.out}: {parameters / 1e6:.2f} M parameters")
    return 0
