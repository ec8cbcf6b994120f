"""tools/bench/bench_int8_teacher.py on the session's small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.bench import bench_int8_teacher as bench


def test_8_bits_change_little(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(workspace / "teacher"), "--samples", "9"]) == 0
    printed = capsys.readouterr().out
    found = re.fullmatch(
        r"([\d,]+) tokens: KL ([\d.]+) nats a token\nperplexity: float32 ([\d.]+), int8 ([\d.]+)\n", printed
    )
    assert found is not None, printed
    assert found[1] == "2,295"  # 9 samples, each without its first token
    effect = bench.measure(workspace / "teacher", 9)
    assert 0 < effect.kl < 0.05 and effect.int8_ppl != effect.float32_ppl
    assert effect.int8_ppl == pytest.approx(effect.float32_ppl, rel=0.01)


def test_wrong_input_is_one_line(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tmp_path)]) == 2
    assert "it has no config.json" in capsys.readouterr().err
    assert bench.main([str(workspace / "teacher"), "--samples", "1000000"]) == 2
    assert "--samples 1000000: the text has only" in capsys.readouterr().err
