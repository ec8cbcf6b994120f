"""tools/bench/docs_check.py accepts the pages of documentation, and finds faults in wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import docs_check
from tools.bench.docs_check import Command, commands, help_faults, parser_of, scripts


def test_the_pages_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs_check.main([]) == 0, capsys.readouterr().err
    checked = int(capsys.readouterr().out.splitlines()[-1].split()[0])  # libraries may print before
    assert checked > 60


def test_every_tool_is_looked_at() -> None:
    names = {path.as_posix() for path in scripts()}
    assert {"launch/distill.py", "launch/slurm/submit.py", "tools/export_hf.py", "tools/bench/docs_check.py"} <= names
    assert "tools/bench/faults.py" not in names  # which has no main()


def test_commands_of_a_page() -> None:
    text = """# Title

    D=runs/x; export A=b
    A=b python tools/summary.py \\
      runs/demo
    for m in a b; do
      deepspeed --num_gpus 2 launch/distill.py --config configs/demo_$m.yaml
    done
    make setup && source .venv/bin/activate
    python - file <<'END'
    import sys
    END

Text with `make demo` and `python -m tools.bench.bench_loader
--json FILE`, but `python` alone is no command.
"""
    shown = list(commands(text))
    assert [(command.line, command.text.split()[0]) for command in shown] == [
        (4, "A=b"),
        (7, "deepspeed"),
        (9, "make"),
        (10, "python"),
        (14, "make"),
        (14, "python"),
    ]
    assert shown[0].words == ["python", "tools/summary.py", "runs/demo"]
    assert shown[3].script == "import sys"
    assert shown[5].words == ["python", "-m", "tools.bench.bench_loader", "--json", "1"]


def test_what_is_optional_is_parsed_too() -> None:
    text = "python tools/export_hf.py RUN [--step S] [--dtype bf16|fp32] data.domains=[a,b] [key=value ...]"
    words = ["--step", "1", "--dtype", "bf16", "data.domains=[a,b]", "..."]
    assert Command(1, text).words == ["python", "tools/export_hf.py", "1", *words]


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("make dmeo", "there is no target dmeo"),
        ("python tools/sumary.py runs/demo", "tools/sumary.py: there is no such file"),
        ("python tools/summary.py --all runs/demo", "unrecognized arguments: --all"),
        ("python tools/summary.py", ""),
        ("python tools/prepare_data.py --recipe x.yaml --out DIR", "are required: --tokenizer, --sequence-length"),
        ("ddk plan --config my.yaml --nodes 2", "--config and --gpu are needed, except with --known-points"),
        ("ddk preflight --config my.yaml --nodes 4", "--nodes 4: give --gpus-per-node or --ranks too"),
        ("python -m tools.bench.bench_step --impl trl", "name its interpreter by --trl-python"),
        ("python tools/export_hf.py RUN --dtype fp8", "invalid choice: 'fp8'"),
        ("python tools/export_hf.py RUN --step last", "invalid int value: 'last'"),
        ("python launch/slurm/submit.py ... --dry", "it has no option --dry"),
        ("deepspeed --gpus 2 launch/distill.py --config my.yaml", "--gpus: not one of the launcher's options"),
        ("deepspeed launch/distill.py --config configs/dmeo.yaml", "configs/dmeo.yaml: there is no such file"),
        ("deepspeed launch/distill.py --config my.yaml mixture.alhpa=0.3", "mixture.alhpa=0.3: there is no such key"),
        ("deepspeed launch/distill.py --config my.yaml mixture.floors.code=0.1", ""),
        ("deepspeed launch/distill.py --config configs/demo.yaml mixture.alpha=3", "mixture.alpha=3: input should be"),
        ("python tools/replay.py runs/demo alpha=0.3", ""),
        ("python tools/replay.py runs/demo mixture.alpha=0.3", "mixture.alpha=0.3: there is no such key"),
        ("pip install -e '.[gpu]'", "there is no extra gpu"),
        ("python -m pytest tests/nothing", "tests/nothing: there is no such file"),
        ("python -m nothing", "there is no module nothing"),
        ("python tools/summary.py 'runs/demo", "No closing quotation"),
        ("python tools/check_setup.py --fast", "takes no arguments"),
    ],
)
def test_a_wrong_command_is_found(command: str, fault: str) -> None:
    faults = docs_check.command_faults(Command(1, command))
    assert (fault in "; ".join(faults)) if fault else faults == []


def test_wrong_files_links_and_keys_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "See docs/nothing.md, `tools/export_hf.py` and [a picture](results/none.png).\n"
        "`mixture.alhpa=0.3`, `mixture.alpha: 0.3`, `manifest.json`, [the paper](https://arxiv.org/abs/2407.16154)\n"
        "\n    python - <<'END'\n    import\n    END\n"
    )
    assert docs_check.main([str(page)]) == 1
    faults = [line.removeprefix(str(page)) for line in capsys.readouterr().err.splitlines()]
    assert [fault.split(": ")[0] for fault in faults] == [":4", ":1", ":1", ":2"]
    for text, fault in zip(("invalid syntax", "docs/nothing.md", "results/none.png", "alhpa"), faults, strict=True):
        assert text in fault


def test_a_help_out_of_style_is_found() -> None:
    parser = parser_of(Path("tools/bench/docs_check.py"))
    assert parser is not None and help_faults(parser) == []
    parser.description = "Checks"
    parser.add_argument("--bare")
    parser.add_argument("--loud", help="Shout it.")
    parser.add_argument("--python", help="Python of that machine")
    assert [fault.split()[0] for fault in help_faults(parser)] == ["'Checks'", "--bare", "--loud:"]
