"""Lengths of a run: steps of its intervals, its last step, its micro-batches, and what does not fit together."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from ddk_ds.config import Config, Mixture
from ddk_ds.config.run_config import corpus_samples, interval_ends, interval_steps, total_steps
from ddk_ds.errors import ConfigError
from tests.unit.mixture.mixture_section import config_with


def steps_of(count: int, **mixture: float) -> list[int]:
    return [interval_steps(Mixture(**mixture), interval) for interval in range(count)]  # type: ignore[arg-type]


def test_intervals_grow_by_their_factor_and_never_to_nothing() -> None:
    assert steps_of(4, interval_steps=10) == [10, 10, 10, 10]
    assert steps_of(4, interval_steps=10, interval_growth=1.5) == [10, 15, 22, 34]  # 22.5 and 33.75; halves to even
    assert steps_of(6, interval_steps=8, interval_growth=0.25) == [8, 2, 1, 1, 1, 1]  # 0.5, 0.125, ...
    growing = Mixture(interval_steps=3, interval_growth=2.0)
    assert [interval_steps(growing, t) for t in (38, 39, 2000)] == [3 * 2**38, 2**40, 2**40]  # 2000 overflows a float


def test_a_student_is_measured_at_the_end_of_every_interval() -> None:
    mixture = Mixture(interval_steps=4, interval_growth=1.5)  # 4, 6, 9, 14 (13.5)
    assert interval_ends(mixture, 20) == [4, 10, 19, 20]
    assert interval_ends(mixture, 19) == [4, 10, 19]
    assert interval_ends(mixture, 4) == [4] and interval_ends(mixture, 3) == [3]


def test_excluded_domains_are_no_samples_of_the_corpus() -> None:
    assert corpus_samples(Mixture(exclude=("b",)), {"a": 5, "b": 7, "c": 9}) == 14


@pytest.mark.parametrize(
    ("stop", "last"),
    [
        ({"steps": 15}, 15),
        ({"intervals": 3}, 19),
        ({"steps": 15, "intervals": 2}, 10),
        ({"steps": 15, "intervals": 3}, 15),
        # 4 samples a step: 16 samples are 4 steps, which the first interval has; 17 need the second.
        ({"data_once": True, "samples": 16}, 4),
        ({"data_once": True, "samples": 17}, 10),
        ({"data_once": True, "samples": 41}, 19),
        ({"data_once": True, "samples": 41, "steps": 18}, 18),
        ({"data_once": True, "samples": 0}, 0),
    ],
)
def test_the_last_step_is_that_of_the_first_end(stop: dict[str, Any], last: int) -> None:
    samples = stop.pop("samples", 1000)
    assert total_steps(config_with({"interval_steps": 4, "interval_growth": 1.5}, stop=stop), samples) == last


def config_of(total: int, micro: int) -> Config:
    return config_with({}, train={"global_batch_samples": total, "micro_batch_samples": micro})


@pytest.mark.parametrize(("total", "micro", "ranks", "count"), [(24, 2, 3, 4), (24, 8, 3, 1), (7, 1, 7, 1)])
def test_a_batch_is_divided_between_ranks_and_micro_batches(total: int, micro: int, ranks: int, count: int) -> None:
    assert config_of(total, micro).micro_batches(ranks) == count == Fraction(total, micro * ranks)


@pytest.mark.parametrize(
    ("total", "micro", "ranks", "words"),
    [
        # 24 = 5 x 4 + 4: 20 or 40 on 4 ranks; micro-batches 1, 2, 3, 6 fit 4 ranks; 5 does not divide 24.
        (
            24,
            5,
            4,
            "= 20: change one of the three: train.global_batch_samples=20 or 40; train.micro_batch_samples=3 or 6",
        ),
        (24, 5, 1, "= 5: FIX train.global_batch_samples=20 or 25; train.micro_batch_samples=4 or 6"),
        # 10 ranks do not divide 24; micro-batches of 2 do on 1, 2, 3, 4, 6, 12 ranks.
        (24, 2, 10, "= 20: FIX train.global_batch_samples=20 or 40; 6 or 12 ranks"),
        (4, 4, 2, "= 8: FIX train.global_batch_samples=8; train.micro_batch_samples=2; 1 ranks"),
        (4, 1, 8, "= 8: FIX train.global_batch_samples=8; 4 ranks"),
    ],
)
def test_a_batch_that_cannot_be_divided_names_what_fits(total: int, micro: int, ranks: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(total, micro).micro_batches(ranks)
    assert str(caught.value).endswith(words.replace("FIX", "change one of the three:"))


def refused(**sections: Any) -> bool:
    try:
        config_with({}, **sections)
    except ConfigError:
        return True
    return False


def test_sections_that_do_not_fit_together_are_refused() -> None:
    assert [refused(optimizer={"warmup_steps": n}) for n in (99, 100, 101)] == [False, True, True]
    assert not refused(optimizer={"warmup_steps": 100}, stop={"intervals": 2})
    assert refused(optimizer={"warmup_steps": 10_000}, stop={"intervals": 2})
    late = {"schedule": "wsd", "warmup_steps": 40}
    assert [refused(optimizer={**late, "decay_steps": n}) for n in (60, 61)] == [False, True]
    assert refused(optimizer={"warmup_steps": 40, "decay_steps": 20}) and not refused(optimizer=late)
    lengths = {"sequence_length": 32, "path": "data"}
    for tokens, wrong in ((31, False), (32, True)):
        samples = {"samples_every": 10, "sample_tokens": tokens}
        assert refused(monitor=samples, data=lengths) == wrong
        assert not refused(monitor={**samples, "samples_every": 0}, data=lengths)
    assert refused(method="ted") and not refused(method="ted", ted={"filters": "filters.safetensors"})
    twice = {"path": "data", "domains": ["a", "b", "a"]}
    assert refused(data=twice) and not refused(data={**twice, "domains": ["a", "b"]})


def test_ranks_share_samples_only_where_that_is_right() -> None:
    shared = {"train": {"sequence_parallel": 4, "global_batch_samples": 6, "micro_batch_samples": 1}}
    assert config_with({}, **shared, data={"path": "data", "sequence_length": 32}).micro_batches(8) == 3
    for ranks, words in ((6, "does not divide the number of ranks"), (2, "does not divide the number of ranks")):
        with pytest.raises(ConfigError, match=words):
            config_with({}, **shared, data={"path": "data", "sequence_length": 32}).micro_batches(ranks)
    assert refused(**shared, data={"path": "data", "sequence_length": 30})
    cached = {"path": "t", "cache": {"path": "caches/t"}}
    assert refused(**shared, teacher=cached) and not refused(teacher=cached)
    assert refused(**shared, method="ted", ted={"filters": "filters.safetensors"})


@pytest.mark.parametrize("place", ["optimizer", "student", "teacher", None])
def test_what_goes_to_nvme_needs_its_directory(place: str | None) -> None:
    sections: dict[str, Any] = {"optimizer": {"warmup_steps": 0}}
    if place is not None:
        key = "offload" if place == "optimizer" else "offload_params"
        sections[place] = {**({} if place == "optimizer" else {"path": place}), key: "nvme"}
        sections["optimizer"]["warmup_steps"] = 0
    assert refused(**sections) == (place is not None)
    assert not refused(**sections, train={"nvme_path": "/local/nvme", "global_batch_samples": 4})


def test_what_the_teacher_computes_at_once_is_its_pass() -> None:
    assert config_with({}, teacher={"path": "t", "micro_batches_per_pass": 3}).teacher_pass_size == 3
    alone = config_with({"controller": "equal"}, method="cpt", teacher=None)
    assert (alone.teacher_pass_size, alone.run_dir.name, alone.seed) == (1, "run", 0)


@pytest.mark.parametrize("controller", ["ddk", "ddk_no_smoothing", "sheared_llama", "doremi_online"])
def test_without_a_teacher_nothing_compares_with_one(controller: str) -> None:
    alone: dict[str, Any] = {"method": "cpt", "teacher": None}
    with pytest.raises(ConfigError, match="compares with a teacher"):
        config_with({"controller": controller}, **alone)
    if not controller.startswith("ddk"):
        config_with({"controller": controller, "reference_losses": {"a": 1.0}}, **alone)
    with pytest.raises(ConfigError, match=r"stop.discrepancy compares with a teacher"):
        config_with({"controller": "equal"}, **alone, stop={"steps": 100, "discrepancy": 0.1})


@pytest.mark.parametrize("name", ["step_s", "evaluation_s"])
def test_a_limit_of_time_is_longer_than_a_rank_may_wait_for_a_store(name: str) -> None:
    """It may wait 100 s, and 20 s in its last attempt; 0 is no limit."""
    data = {"path": "data", "cache_dir": "/cache", "download_patience_s": 100.0, "download_timeout_s": 20.0}
    limits = {"step_s": 500.0, "evaluation_s": 500.0}
    found = [refused(data=data, limits={**limits, name: limit}) for limit in (0.0, 0.5, 120.0, 120.5)]
    assert found == [False, True, True, False]
    assert not refused(data={**data, "cache_dir": None}, limits={**limits, name: 10.0})
