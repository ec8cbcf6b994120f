"""The small run that tests work on."""

from __future__ import annotations

from tools.small_run import ROOT, make_workspace, run_tool, without_clock, write_config

__all__ = ["ROOT", "make_workspace", "run_tool", "without_clock", "write_config"]
