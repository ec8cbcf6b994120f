"""The controller is made before any model is loaded: a mistake in the section or its file is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk_ds.errors import ConfigError
from ddk_ds.mixture.controllers import make_controller
from ddk_ds.mixture.decide import Controller
from ddk_ds.train.interval import read_schedule
from tests.unit.mixture.mixture_section import section

NAMES = ["code", "prose"]
STAGES = """\
- from_interval: 0
  proportions: {code: 0.25, prose: 0.75}
- from_interval: 2
  proportions: {code: 1, prose: 0}
"""


def controller_of(**options: Any) -> Controller:
    mixture = section(**options)
    return make_controller(mixture, dict.fromkeys(NAMES, 100), read_schedule(mixture.schedule_file))


def test_a_schedule_comes_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(STAGES)
    controller = controller_of(controller="schedule", schedule_file=str(path))
    assert controller.state_dict()["stages"] == [[0, [0.25, 0.75]], [2, [1.0, 0.0]]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["No such file"]),
        ("- {from_interval: 0", ["cannot be read as YAML"]),
        ("\x00", ["cannot be read as YAML"]),
        (STAGES.replace("prose: 0}", "poems: 0}"), ["entry 2", "'poems' is not a domain"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, parts: list[str]) -> None:
    path = tmp_path / "stages.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        controller_of(controller="schedule", schedule_file=str(path))
    for part in (f"mixture.schedule_file {path}", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_of_the_section_reaches_the_controller() -> None:
    controller = controller_of(
        controller="doremi_online",
        prior={"code": 0.5, "prose": 0.5},
        step_size=2.0,
        smoothing=0.5,
        ppl_smoothing=0.25,
        floors={"code": 0.125},
        reference_losses={"code": 1.0, "prose": 2.0},
    )
    assert controller.state_dict() == {
        **{"name": "doremi_online", "names": NAMES, "prior": [0.5, 0.5], "reference": [1.0, 2.0]},
        **{"step_size": 2.0, "smoothing": 0.5, "ppl_smoothing": 0.25, "source": "held_out"},
        **{"exclude": [], "floors": [0.125, 0.0]},
    }
    state = controller_of(initial="equal", ratio_cap=3.0, alpha=0.25, exclude=["code"]).state_dict()
    assert (state["initial"], state["ratio_cap"], state["alpha"], state["exclude"]) == ("equal", 3.0, 0.25, ["code"])
