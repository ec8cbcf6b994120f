"""The section teacher.cache: a run that needs what a cache cannot hold is refused, with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from ddk_ds.config import Config, load_config
from ddk_ds.errors import ConfigError
from ddk_ds.kernels import DIVERGENCES

CACHE = "teacher.cache.path=said"
TOPK = "teacher.cache.keep=topk"


def config(*overrides: str) -> Config:
    return load_config("configs/demo.yaml", [CACHE, *overrides])


def test_what_a_cache_has() -> None:
    assert config().teacher.cache.keep == "sampled"  # type: ignore[union-attr]
    for divergence in DIVERGENCES:
        assert config(TOPK, f"loss.divergence={divergence}").loss.divergence == divergence
    assert config(TOPK, "method=minillm").loss.divergence == "reverse_kl"


def test_the_fills_of_several_teachers() -> None:
    others = ("teacher.by_domain.code=/c", "teacher.by_domain.web=/w", "teacher.by_domain.news=/w")
    found = config("teacher.path=/t", "teacher.cache.mode=read_only", *others)
    found.check_teaching()
    fills = found.teachings(["a", "code", "news", "b", "web"])
    assert [fill[:2] for fill in fills] == [
        ['teacher.path="/t"', "data.domains=[a,b]"],
        ['teacher.path="/c"', "data.domains=[code]"],
        ['teacher.path="/w"', "data.domains=[news,web]"],
    ]
    for fill in fills:
        of_one = config("teacher.path=/t", "teacher.cache.mode=read_only", *others, *fill)
        assert of_one.loads_teacher and of_one.teachings(["a"]) == [[]] and of_one.run_dir == found.run_dir
    assert config().teachings(["a"]) == [[]]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        *(
            (f"loss.divergence={name}", f"drawn .* the forward KL alone .* the run has loss.divergence: {name}:")
            for name in DIVERGENCES[1:]
        ),
        ("method=minillm", r"\(keep: topk gives every divergence, biased\), and the run has loss.divergence: rev"),
        ("loss.temperature_end=1.0", "tokens drawn at one temp.* the run has loss.temperature_end: 1.0"),
        ("loss.temperature_end=1.0 " + TOPK, "has no other temperature, and the run has loss.temperature_end: 1.0"),
        ("method=ted ted.filters=somewhere", "method: ted, which needs the teacher itself"),
        ("method=doremi_proxy " + TOPK, "method: doremi_proxy, which needs the teacher itself"),
        ("teacher.cache.draws=0", "teacher.cache.draws.*0.*greater than or equal to 1"),
        ("teacher.cache.draws=65536", "teacher.cache.draws.*65536.*less than or equal to 65535"),
        (TOPK + " teacher.cache.top_k=0", "teacher.cache.top_k.*0.*greater than or equal to 1"),
        (TOPK + " teacher.cache.top_k=4097", "teacher.cache.top_k.*4097.*less than or equal to 4096"),
        ("teacher.by_domain.web=models/web", "teacher.by_domain: a run loads one teacher at most: set .*read_only"),
        ("teacher.by_domain.web=models/web teacher.cache=null", "one teacher at most: set teacher.cache.path"),
        ("teacher.cache.keep=top_k", "teacher.cache.keep.*top_k"),
    ],
)
def test_what_it_has_not(overrides: str, reason: Any) -> None:
    with pytest.raises(ConfigError, match=f"(?s){reason}"):
        config(*overrides.split())
