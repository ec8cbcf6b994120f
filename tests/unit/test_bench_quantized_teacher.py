"""tools/bench/bench_quantized_teacher.py on the session's small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench import bench_quantized_teacher as bench


def test_8_bits_change_little(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("code", "prose"):
        documents = [json.dumps({"text": f"{name} {number} and some more of it. " * 40}) for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(documents))
    out = tmp_path / "out.json"
    assert bench.main([str(workspace / "teacher"), "--text", str(tmp_path), "--samples", "9", "--json", str(out)]) == 0
    domains = json.loads(out.read_text())["domains"]
    assert list(domains) == ["code", "prose"]
    for forms in domains.values():
        assert forms["bf16"]["kl"] == 0
        kl = {form: values["kl"] for form, values in forms.items()}
        assert 0 < kl["int8 in float32"] < 0.05 and 0 < kl["int8"] < kl["int8_dynamic"] < kl["fp8"] < 0.2, kl
        assert kl["fp8, first and last layer bf16"] != kl["fp8"]
        for form, values in forms.items():
            assert values["ppl"] == pytest.approx(forms["float32"]["ppl"], rel=0.05), form
    printed = capsys.readouterr().out
    worst = max(domains, key=lambda name: domains[name]["fp8"]["kl"])
    assert f"at most {domains[worst]['fp8']['kl']:.4f} ({worst})" in printed


def test_wrong_input_is_one_line(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([str(tmp_path)]) == 2
    assert "it has no config.json" in capsys.readouterr().err
    assert bench.main([str(workspace / "teacher"), "--samples", "1000000"]) == 2
    assert "--samples 1000000: python_docs has only" in capsys.readouterr().err
    assert bench.main([str(workspace / "teacher"), "--text", str(tmp_path)]) == 2
    assert "holds no <domain>.jsonl" in capsys.readouterr().err
