"""What other controllers would have decided: by their equations in plain numpy; what a cache holds of their samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ddk_ds.commands.replay_command import main
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.teacher_cache import PERPLEXITIES, TeacherCache, make_cache
from ddk_ds.data.teacher_place import LocalPlace
from ddk_ds.data.teacher_samples import Drawn
from ddk_ds.files import sealed
from ddk_ds.mixture.exhaustion import largest_remainder
from tools.bench.small_run import write_config

NAMES = ("python", "cpp", "mathematics")
TEACHER = np.array([4.0, 6.0, 8.0])
STUDENT = np.array([[20.0, 12.0, 9.0], [11.0, 10.0, 9.0], [6.0, 9.0, 8.5]])
SAMPLES = 32
CONDITIONS = {"keep": "sampled", "draws": 2, "vocab_size": 600}


def softmax(values: Any) -> Any:
    return np.exp(values) / np.exp(values).sum()


def eq1_and_2(alpha: float) -> list[Any]:
    """The paper's equations: Eq. 1 for the first interval, then Eq. 2."""
    shares = [softmax(STUDENT[0] / TEACHER)]
    for student in STUDENT[1:]:
        psi = shares[-1] * np.exp(student / TEACHER)
        shares.append(alpha * psi / psi.sum() + (1 - alpha) / 3)
    return shares


def excess(smoothing: float) -> list[Any]:
    """Algorithm 1 of Sheared LLaMA (smoothing 0) and of DoReMi, by the losses of the intervals."""
    shares = [np.full(3, 1 / 3)]
    for student in STUDENT[1:]:
        grown = shares[-1] * np.exp(np.maximum(np.log(student) - np.log(TEACHER), 0))
        shares.append((1 - smoothing) * grown / grown.sum() + smoothing / 3)
    return shares


def run_of(workspace: Path, folder: Path, *, teacher: bool = True, **sections: Any) -> Path:
    """The directory of a run of three intervals of 32 samples, whose proportions are those of Eq. 1 and 2."""
    method: dict[str, Any] = {"method": "ddk"} if teacher else {"method": "cpt", "teacher": None}
    mixture = {"ratio_cap": None, "initial_floor": 0.0, **({} if teacher else {"controller": "by_size"})}
    values = yaml.safe_load(write_config(workspace, folder, **method, **sections).read_text())
    values["mixture"] |= mixture
    run_dir = folder / "runs/run"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    domains = load_manifest(workspace / "shards").domains
    known = {f"content.domains.{name}": domains[name].fingerprint for name in NAMES}
    (run_dir / "run.json").write_text(json.dumps(known | {"data.validation_samples": 12}))
    sizes = np.array([domains[name].train.tokens for name in NAMES], np.float64)
    shares = eq1_and_2(0.5) if teacher else [sizes / sizes.sum()] * 3

    def by_domain(vector: Any) -> dict[str, Any]:
        return dict(zip(NAMES, np.asarray(vector).tolist(), strict=True))

    lines, owed, drawn = [], np.zeros(3), np.zeros(3, np.int64)
    for number, proportions in enumerate(shares):
        counts = largest_remainder(proportions, SAMPLES, owed)
        owed = owed + proportions / math.fsum(proportions) * SAMPLES - counts
        line = {"kind": "interval", "interval": number, "step": 4 * number, "student_ppl": by_domain(STUDENT[number])}
        line |= {"teacher_ppl": by_domain(TEACHER) if teacher else None, "ratio": None, "smoothed_ppl": None}
        line |= {"proportions": by_domain(proportions), "log_proportions": by_domain(np.log(proportions))}
        line |= {"asked": by_domain(counts), "counts": by_domain(counts), "owed": by_domain(owed), "alarms": []}
        lines.append(line | {"domain_tokens": by_domain(63 * drawn), "clock": {}})
        drawn += counts
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "event": "start",
        "time_s": 1.0,
        "mixture": {"train_tokens": by_domain(sizes.astype(int)), "schedule": None},
    }
    (run_dir / "events.jsonl").write_text(json.dumps(start) + "\n")
    return run_dir


def ask(run_dir: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of the command; its controllers by name, those with overrides with a `+` before it."""
    out = run_dir.parent / "what-if.json"
    main([str(run_dir), "--what-if", "--json", str(out), *arguments])
    found: dict[str, Any] = json.loads(out.read_text())
    own = {entry["controller"] for entry in found["controllers"] if entry["own"]}
    found["controllers"] = {
        ("+" if entry["controller"] in own and not entry["own"] else "") + entry["controller"]: entry
        for entry in found["controllers"]
    }
    return found


def shares_of(entry: dict[str, Any]) -> Any:
    return np.array([[interval["proportions"][name] for name in NAMES] for interval in entry["intervals"]])


def exp3(steps: list[int]) -> list[Any]:
    """Return the proportions of arXiv 2312.02406, Algorithm 1, where each step of an interval has the same losses."""
    rewards, shares, last = np.zeros(3), [np.full(3, 1 / 3)], 1 / 3
    for row in range(1, len(steps)):
        for _ in range(steps[row] - steps[row - 1]):
            rewards = 0.9 * rewards + 0.1 * np.log(STUDENT[row]) / shares[-1]
        now = min(1 / 3, float(np.sqrt(np.log(3) / (3 * steps[row]))))
        shares, last = [*shares, (1 - 3 * now) * softmax(last * rewards) + now], now
    return shares


def test_every_controller_by_its_equation(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_of(workspace, tmp_path)
    found = ask(run_dir)["controllers"]
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    own = found["ddk"]
    assert own["own"] and own["mean_distance"] < 1e-15
    assert [entry["counts"] for entry in own["intervals"]] == [line["counts"] for line in lines]
    sizes = np.array([load_manifest(workspace / "shards").domains[name].train.tokens for name in NAMES], np.float64)
    expected = {
        "ddk": eq1_and_2(0.5),
        "ddk_no_smoothing": [softmax(student / TEACHER) for student in STUDENT],
        "equal": [np.full(3, 1 / 3)] * 3,
        "by_size": [sizes / sizes.sum()] * 3,
        "sheared_llama": excess(0.0),
        "doremi_online": excess(1e-3),
        "ado": [np.full(3, 1 / 3)] * 3,  # three intervals of its prior
        "odm": exp3([line["step"] for line in lines]),
        "loss_softmax": [student / student.sum() for student in STUDENT],
        "kl_gap": [student / TEACHER / (student / TEACHER).sum() for student in STUDENT],
    }
    assert found.keys() == expected.keys()
    for name, shares in expected.items():
        np.testing.assert_allclose(shares_of(found[name]), shares, rtol=1e-12, err_msg=name)
        distances = [0.5 * np.abs(a - b).sum() for a, b in zip(shares, expected["ddk"], strict=True)]
        assert found[name]["mean_distance"] == pytest.approx(np.mean(distances), abs=1e-15)
        drawn = np.array([found[name]["samples"][domain] for domain in NAMES])
        assert drawn.sum() == 3 * SAMPLES and np.abs(drawn - SAMPLES * np.sum(shares, 0)).max() <= 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "the student would have been another one" in shown
    assert "static is not replayable: controller: static needs mixture.proportions" in shown
    assert "schedule is not replayable: controller: schedule needs mixture.schedule_file" in shown


def test_what_the_cache_holds(workspace: Path, tmp_path: Path) -> None:
    """All of python, every second sample that the run drew of cpp, nothing of mathematics."""
    run_dir = run_of(workspace, tmp_path)
    sizes = {name: domain.train.samples for name, domain in load_manifest(workspace / "shards").domains.items()}
    found = ask(run_dir)["controllers"]["equal"]
    assert found["cached"] is None and found["distinct"] == found["samples"]  # less than a pass of each
    make_cache(LocalPlace(tmp_path / "cache"), CONDITIONS)
    shas = {name: domain.train.sha for name, domain in load_manifest(workspace / "shards").domains.items()}
    cache = TeacherCache(LocalPlace(tmp_path / "cache"), CONDITIONS, shas, 600)
    said = Drawn(np.zeros((64, 2), np.int64), *np.zeros((2, 64), np.float32))
    for number in range(sizes["python"]):
        cache.add("python", number, said)
    for number in range(0, sizes["cpp"], 2):
        cache.add("cpp", number, said)
    cache.publish()
    controllers = ask(run_dir, "--cache", str(tmp_path / "cache"))["controllers"]
    for entry in controllers.values():
        assert entry["cached"]["python"] == entry["distinct"]["python"] > 0
        assert 0 < entry["cached"]["cpp"] < entry["distinct"]["cpp"]
        assert entry["cached"]["mathematics"] == 0 < entry["distinct"]["mathematics"]


def test_the_page_says_what_it_cannot_know(workspace: Path, tmp_path: Path) -> None:
    run_dir, page = run_of(workspace, tmp_path), tmp_path / "page.html"
    ask(run_dir, "--page", str(page))
    html = page.read_text()
    assert "the student would have been another one" in html.replace("\n", " ")
    assert "static is not replayable" in html and "--cache names one" in html
    assert html.count("<img src=") == len(NAMES) and "ddk (as run)" in html and "<script" not in html


def test_options_reach_the_controllers_that_have_them(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_of(workspace, tmp_path)
    found = ask(run_dir, "alpha=0.25", "proportions={python: 0.5, cpp: 0.25, mathematics: 0.25}")
    np.testing.assert_allclose(shares_of(found["controllers"]["+ddk"]), eq1_and_2(0.25), rtol=1e-12)
    np.testing.assert_allclose(shares_of(found["controllers"]["ddk"]), eq1_and_2(0.5), rtol=1e-12)
    np.testing.assert_allclose(shares_of(found["controllers"]["static"]), [[0.5, 0.25, 0.25]] * 3)
    assert found["not_replayable"].keys() == {"schedule"}
    for wrong, message in (("alhpa=0.25", "did you mean"), ("alpha=3", "less than or equal to 1")):
        assert main([str(run_dir), "--what-if", wrong]) == 2
        assert message in capsys.readouterr().err
    for arguments in (["--page", "x.html"], ["--what-if", "controller=equal"]):
        with pytest.raises(SystemExit):
            main([str(run_dir), *arguments])


def test_a_run_without_a_teacher_takes_the_caches_perplexities(workspace: Path, tmp_path: Path) -> None:
    run_dir = run_of(workspace, tmp_path, teacher=False)
    found = ask(run_dir)
    assert found["controllers"].keys() == {"by_size", "equal", "ado", "odm", "loss_softmax"}
    assert "controller ddk compares with a teacher, and this run has none" in found["not_replayable"]["ddk"]
    cache = tmp_path / "cache"
    make_cache(LocalPlace(cache), CONDITIONS)
    (cache / PERPLEXITIES).mkdir()
    for name, value in zip(NAMES, TEACHER, strict=True):
        held_out = load_manifest(workspace / "shards").domains[name].validation.sha
        record = {"validation": held_out, "perplexity": value, "data.validation_samples": 12}
        (cache / PERPLEXITIES / f"{name}.json").write_text(json.dumps(sealed(record)))
    controllers = ask(run_dir, "--cache", str(cache))["controllers"]
    np.testing.assert_allclose(shares_of(controllers["ddk"]), eq1_and_2(0.5), rtol=1e-12)
    # A number that is not what was written is none.
    file = cache / PERPLEXITIES / "mathematics.json"
    file.write_text(file.read_text().replace(str(value), str(value + 1)))
    assert "ddk" in ask(run_dir, "--cache", str(cache))["not_replayable"]
    # Held-out samples in another number are another measurement.
    record |= {"data.validation_samples": 13}
    (cache / PERPLEXITIES / "mathematics.json").write_text(json.dumps(sealed(record)))
    assert "ddk" in ask(run_dir, "--cache", str(cache))["not_replayable"]


def test_data_that_is_gone_or_replaced_gives_no_samples(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_of(workspace, tmp_path)
    known = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(known | {"content.domains.cpp": "another/one"}))
    assert ask(run_dir)["controllers"]["ddk"]["distinct"] is None
    assert "domain cpp has other samples than when the run was started" in " ".join(capsys.readouterr().out.split())


def test_a_controller_whose_domains_run_out(workspace: Path, tmp_path: Path) -> None:
    size = load_manifest(workspace / "shards").domains["python"].train.samples
    # A hundredth of python: Eq. 1 draws more of it in the first interval, equal sampling later.
    run_dir = run_of(workspace, tmp_path)
    limits = [f"max_passes={20 / size}", "exhaustion_by_domain={python: stop}"]
    found = ask(run_dir, *limits)["controllers"]
    assert "domain 'python' has" in found["equal"]["ended"] and found["equal"]["intervals"][2]["counts"] is None
    assert found["ddk"]["ended"] == "" and "before interval 0" in found["+ddk"]["ended"]
