"""Write docs/configuration.md from the configuration's own descriptions, defaults and limits.

python -m tools.bench.config_reference [--check]
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ddk_ds.config import METHODS, Config
from ddk_ds.config.keys import section_of
from ddk_ds.config.paths import PathKind
from ddk_ds.files import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
_HEAD = """# Configuration

Every key of a run's YAML file, made from `ddk_ds/config/` by `python -m tools.bench.config_reference`.
Defaults are the paper's settings. A key of a section is overridden on the command line as `section.key=value`, for
example `mixture.alpha=0.3`, or `data.domains=[code,text]` for a list. An unknown key, a wrong type or a combination
that does not fit ends the start with an error that names the fix. `--print-config` shows what a run resolves to,
with `--ranks` it also checks that the batch fits that number of ranks:

    python launch/distill.py --config configs/demo.yaml --print-config --ranks 2 mixture.alpha=0.3

`configs/demo.yaml` is a whole example.

**Paths.** A relative path begins at the directory of the file that names it: in `configs/demo.yaml`, `../runs` is the
clone's `runs/`. The shell names what stands on the command line or in an environment variable (`${oc.env:DIR}/data`):
there a relative path begins where you start the command. So does the default of `output_dir`, which no file names. The
same rule holds for recipes, for grids of `tools/compare.py`, and for `student.path` and `teacher.path` if there is such
a file or directory; if not, `Qwen/Qwen1.5-1.8B` is a name on the hub (`./Qwen` never is). `~` is your home directory.
`--print-config`, a run's `config.yaml` and a Slurm job have the absolute paths.
"""
_KINDS = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything", type(None): "null"}
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "min_length": "at least {}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page. Returns 0, or 1 if --check finds that the page is out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only check that the page is up to date")
    options = parser.parse_args(arguments)
    text = reference()
    if not options.check:
        write_text(PAGE, text)
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(
            f"{PAGE.name} is not what the configuration says: run python -m tools.bench.config_reference",
            file=sys.stderr,
        )
        return 1
    return 0


def reference() -> str:
    """Return the text of the page."""
    top = {name: field for name, field in Config.model_fields.items() if section_of(field) is None}
    parts = [_HEAD, "## The run\n", _table("", top)]
    for name, field in Config.model_fields.items():
        section = section_of(field)
        if section is not None:
            title = f"## {name}" + ("" if not field.is_required() else " (required)")
            parts += [f"{title}\n", f"{_one_line(field.description or section.__doc__)}\n"]
            parts.append(_table(f"{name}.", section.model_fields))
    return "\n".join([*parts, _presets()])


def _table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    return _markdown([["key", "type", "default", "description"], ["---"] * 4, *_rows(prefix, fields)])


def _rows(prefix: str, fields: dict[str, FieldInfo]) -> Iterator[list[str]]:
    for name, field in fields.items():
        section = section_of(field)
        kind = "section, or null" if section is not None else _kind(field.annotation, field.metadata)
        yield [f"`{prefix}{name}`", kind, _default(field), _one_line(field.description)]
        if section is not None:
            yield from _rows(f"{prefix}{name}.", section.model_fields)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe the type of a key in words: `Annotated[int, Field(ge=1)] | None` -> "integer >= 1, or null"."""
    bounds = ", ".join(_bounds(metadata))
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _kind(inner, [item for field in more for item in getattr(field, "metadata", [field])])
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Literal:
            return ", ".join(f"`{value}`" for value in arguments)
        case origin if origin in (Union, types.UnionType):
            return ", or ".join(_kind(part, metadata) if part is not type(None) else "null" for part in arguments)
        case origin if origin is dict:
            return f"mapping of {_kind(arguments[1])}"
        case origin if origin is tuple and arguments[-1] is Ellipsis:
            return f"list of {_kind(arguments[0])}"
        case origin if origin is tuple:
            return f"[{', '.join(_kind(part) for part in arguments)}]"
    mark = next((item for item in metadata if isinstance(item, PathKind)), None)
    if mark is not None:
        return "path, or hub name" if mark.hub else "path"
    return f"{_KINDS[annotation]} {bounds}".rstrip()


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        for name, text in _BOUNDS.items():
            if getattr(item, name, None) is not None:
                yield text.format(f"{getattr(item, name):g}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple():
            return f"[{', '.join(map(str, value))}]"
    return str(value)


def _presets() -> str:
    rows = [["method", "mixture.controller", "loss.divergence", "teacher"], ["---"] * 4]
    for name, preset in METHODS.items():
        divergence, teacher = preset.divergence or "not computed", "yes" if preset.teacher else "no"
        rows.append([f"`{name}`", preset.controller, divergence, teacher])
    return f"## What a method sets\n\nUnless the key is given beside the method (docs/methods.md).\n\n{_markdown(rows)}"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("<", "\\<")


if __name__ == "__main__":
    raise SystemExit(main())
