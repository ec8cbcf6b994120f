"""DDK: distil a large language model into a small one by domain knowledge, on DeepSpeed ZeRO-3.

    from ddk_ds import distil, load_ledger

The names below are imported when they are first used, so that `import ddk_ds` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_ds.comparison.method_stages import RunInterrupted
    from ddk_ds.errors import UserError
    from ddk_ds.notebook import Result, RunFailed, distil
    from ddk_ds.report.ledger_table import LedgerTable, Table, load_ledger

__all__ = ["LedgerTable", "Result", "RunFailed", "RunInterrupted", "Table", "UserError", "distil", "load_ledger"]

_HOMES = {"RunInterrupted": "comparison.method_stages", "UserError": "errors"}
_HOMES |= dict.fromkeys(("Result", "RunFailed", "distil"), "notebook")
_HOMES |= dict.fromkeys(("LedgerTable", "Table", "load_ledger"), "report.ledger_table")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
