"""Each method's first step equals an independent computation in plain torch: 2 ranks, 2 micro-batches each, fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.dist.ranks import run_ranks

pytestmark = pytest.mark.long("ten methods, 40 s of CPU; the losses have unit tests, and test_parity.py has DDK")

CASES = [
    # method, divergence in place of its own, share of the run that is done
    ("cpt", None, 0.0),
    ("kd", None, 0.5),
    ("minillm", None, 0.0),
    ("ddk", "jensen_shannon", 0.25),
    ("ddk", "skew_forward_kl", 0.0),
    ("ddk", "skew_reverse_kl", 0.0),
    ("ddk", "total_variation", 1.0),
    ("ted_filters", None, 0.0),
    ("ted", None, 0.0),
    ("doremi_proxy", None, 0.0),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("methods"))
    return run_ranks("tests.dist.methods_worker:first_steps", 2, folder=folder, cases=CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_first_step_equals_plain_torch(results: list[dict[str, Any]], number: int) -> None:
    result, plain = results[number], results[number]["plain"]
    np.testing.assert_allclose(result["ours"], plain["losses"], rtol=1e-5, atol=1e-7)
    # Nothing but what the method trains has a gradient; all of that has one.
    assert sorted(result["gradients"]) == result["plain_gradients"]
    for name, (difference, largest) in result["gradients"].items():
        assert largest > 0, name
        assert difference < 1e-5 * largest, name


def test_the_models_and_the_teachers_filters_are_frozen(results: list[dict[str, Any]]) -> None:
    by_method = {case[0]: result for case, result in zip(CASES, results, strict=True)}
    assert all(name.startswith(("backbone.", "head.")) for name in by_method["ted_filters"]["frozen"])
    assert set(by_method["ted_filters"]["gradients"]) == {
        f"filters.{model}.{pair}.weight" for model in ("student", "teacher") for pair in (0, 1)
    }
    assert by_method["ted"]["frozen"] == [f"filters.teacher.{pair}.weight" for pair in (0, 1)]


def test_the_methods_own_metrics(results: list[dict[str, Any]]) -> None:
    by_method = {case[0]: result for case, result in zip(CASES, results, strict=True)}
    ted, proxy = by_method["ted"], by_method["doremi_proxy"]
    assert ted["method_metrics"]["mse"] == pytest.approx(ted["plain"]["mse"], rel=1e-5)
    assert proxy["method_metrics"]["weights"] == pytest.approx(proxy["plain"]["weights"], rel=1e-5)
    weights = proxy["method_metrics"]["weights"]
    assert proxy["state"]["log_weights"] == pytest.approx(np.log(weights), rel=1e-12)
    rest = {key: value for key, value in proxy["state"].items() if key != "log_weights"}
    assert rest == {"weights": weights, "excess": proxy["method_metrics"]["excess"], "sum": weights, "steps": 1}
