"""Write the table of docs/models.md from what `tools.bench.model_families` found with both versions of transformers.

python -m tools.bench.models_page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = {major: DOCS / "results" / f"model_families_{major}.json" for major in ("4", "5")}
"""What was found, by the first number of transformers' version."""
_BEGIN, _END = "<!-- the table -->\n", "<!-- its end -->\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    page = DOCS / "models.md"
    page.write_text(with_table(page.read_text(), table([json.loads(file.read_text()) for file in RESULTS.values()])))
    return 0


def with_table(page: str, lines: str) -> str:
    """Return the page with other lines between the marks of its table."""
    before, _, rest = page.partition(_BEGIN)
    return f"{before}{_BEGIN}{lines}{_END}{rest.partition(_END)[2]}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table of all families; a dash where one has not been tried.

    It has a column for each result: how the family works; and one for documents that are kept apart, if that was tried.
    """
    columns: dict[str, dict[str, str]] = {}
    for result in results:
        columns[f"transformers {result['transformers']}"] = result["families"]
        if "documents" in result:
            columns[f"documents apart, {result['transformers']}"] = result["documents"]
    lines = [f"| family | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for family in sorted({family for result in results for family in result["families"]}):
        cells = [of_column.get(family, "-").replace("|", "/") for of_column in columns.values()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
