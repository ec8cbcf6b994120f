"""Mutants of a source file: cosmic-ray's operators, without those that change no behaviour that a test should notice.

Left out are messages (f-strings and `raise` statements), annotations, decorators, `strict=` of zip and `if
TYPE_CHECKING`. cosmic-ray has no operator for strings, so docstrings and plain texts are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_BINARY = "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul LShift_RShift RShift_LShift "
_BINARY += "BitOr_BitAnd BitAnd_BitOr"
_COMPARISONS = "Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is"
_UNARY = "Delete_Not Delete_USub Delete_Invert"
_OTHERS = "AddNot ReplaceAndWithOr ReplaceOrWithAnd ReplaceTrueWithFalse ReplaceFalseWithTrue NumberReplacer "
_OTHERS += "ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer ZeroIterationForLoop"
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in _BINARY.split()),
    *(f"core/ReplaceComparisonOperator_{name}" for name in _COMPARISONS.split()),
    *(f"core/ReplaceUnaryOperator_{name}" for name in _UNARY.split()),
    *(f"core/{name}" for name in _OTHERS.split()),
)


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str
    """Path below the repository."""
    line: int
    part: str
    """Name of the class or function at the file's top that holds the change; "" outside of them."""
    function: tuple[int, int] | None
    """First and last line of the outermost function that holds the change; None outside of functions."""
    operator: str
    occurrence: int
    """Number of the operator's place in the file, from 0."""

    @property
    def path(self) -> str:
        """Absolute path of the file."""
        return str(ROOT / self.file)

    def source(self) -> str:
        """Return the complete changed source of the file."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        return str(mutate_code(Path(self.path).read_text(), get_operator(self.operator)(), self.occurrence))

    def difference(self) -> tuple[str, str]:
        """Return the changed lines before and after, joined."""
        was, now = Path(self.path).read_text().splitlines(), self.source().splitlines()
        begin = next(i for i, pair in enumerate(zip(was, now, strict=False)) if pair[0] != pair[1])
        ends = zip(reversed(was[begin:]), reversed(now[begin:]), strict=False)
        end = next((i for i, pair in enumerate(ends) if pair[0] != pair[1]), 0)
        return _joined(was[begin : len(was) - end]), _joined(now[begin : len(now) - end])


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yield every mutant of a file (path below the repository)."""
    # Not at the top: the documentation's checks import this, and `make setup` installs no cosmic-ray.
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    tree = get_ast((ROOT / file).read_text())
    for name in OPERATORS:
        operator = get_operator(name)()
        occurrence = -1
        for node in ast_nodes(tree):
            for (line, column), _end in operator.mutation_positions(node):
                occurrence += 1
                parents = list(_parents(tree.get_leaf_for_position((line, column))))
                if not any(_is_noise(child, parent) for child, parent in parents):
                    yield Mutant(file, line, _part(parents), _function(parents), name, occurrence)


def _parents(leaf: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (node, its parent) from a leaf to the root of parso's tree."""
    while leaf.parent is not None:
        yield leaf, leaf.parent
        leaf = leaf.parent


def _is_noise(child: Any, parent: Any) -> bool:
    """Return True if a change of `child` changes a message, an annotation, a decorator or a check of the typing."""
    match parent.type:
        case "raise_stmt" | "fstring" | "decorator" | "tfpdef":
            return True
        case "parameters":
            return bool(child.type == "operator")
        case "annassign":
            return child is parent.children[1]
        case "funcdef":
            return child is parent.annotation
        case "atom_expr" | "power":  # a dotted name in `except`, which cosmic-ray cannot change
            return any(above.type == "except_clause" for _, above in islice(_parents(parent), 3))
        case "argument":
            return bool(parent.children[0].get_code(include_prefix=False) == "strict")
        case "if_stmt":
            return bool(child.get_code(include_prefix=False) == "TYPE_CHECKING")
    return False


def _part(parents: list[tuple[Any, Any]]) -> str:
    named = [str(parent.name.value) for _, parent in parents if parent.type in ("funcdef", "classdef")]
    return named[-1] if named else ""


def _function(parents: list[tuple[Any, Any]]) -> tuple[int, int] | None:
    outermost = None
    for child, parent in parents:
        if parent.type == "funcdef" and child is parent.children[-1]:
            outermost = parent.start_pos[0], parent.end_pos[0]
    return outermost


def _joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())
