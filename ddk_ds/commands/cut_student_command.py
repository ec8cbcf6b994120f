"""Cut a student out of a teacher: it keeps the most important layers and experts, and can be made narrower.

ddk cut-student --teacher DIR --out DIR --layers 12 --shards data/mine [--intermediate 4096]

The text should be held-out text of the run's domains. Everything is computed on the CPU in float32, so the teacher
takes four bytes of memory per parameter. `pruning.json` in the student's directory lists the loss without each layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.files import write_text


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Make the student. Returns the exit code: 0, or 2 after an error that the user can fix."""
    options = parse_arguments(arguments)
    # Imports torch and transformers, which takes seconds that --help should not take.
    from ddk_ds.commands import cut_student_work as work
    from ddk_ds.data.tokenizer import load_tokenizer
    from ddk_ds.engine.model_files import read_model

    console = Console()
    files = read_model(options.teacher, "--teacher")
    work.check(options, files)
    batches = work.read_batches(options, load_tokenizer(options.teacher))
    with console.status("cutting"):
        result = work.make_student(options, files, batches)
    if options.json is not None:
        write_text(options.json, work.report(options, result))
    console.print(work.table(result.ranking))
    before, after = (number / 1e6 for number in result.parameters)
    console.print(f"loss on the text: {result.ranking.loss:.4f}, of the student {result.student_loss:.4f}")
    console.print(f"{options.out}: {after:,.2f} M parameters of {before:,.2f} M")
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="directory of a Hugging Face causal LM")
    parser.add_argument("--out", type=Path, required=True, help="directory for the student; new, or empty")
    parser.add_argument(
        "--layers", type=int, required=True, help="layers to keep, including the first two and the last"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, help="held-out text: .jsonl (field text), .parquet or plain, also .gz, .zst")
    text.add_argument("--shards", type=Path, help="prepared data: held-out samples from each domain in turn")
    parser.add_argument("--samples", type=int, default=8, help="number of samples of text (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="measure again after each dropped layer")
    parser.add_argument("--intermediate", type=int, help="neurons to keep of each gated MLP")
    parser.add_argument(
        "--hidden", type=int, help="channels to keep (models like Llama and Gemma); a multiple of the heads"
    )
    parser.add_argument("--kv-heads", type=int, help="heads of keys and values to keep, each with its heads of queries")
    parser.add_argument("--experts", type=int, help="experts to keep in each layer: those that the text uses most")
    parser.add_argument(
        "--experts-per-token", type=int, help="with --experts: experts that compute a token (default: the teacher's)"
    )
    parser.add_argument("--json", type=Path, help="file for a copy of pruning.json")
    return parse(parser, arguments)
