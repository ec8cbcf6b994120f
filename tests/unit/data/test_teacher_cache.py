"""The cache of what a teacher says: parts that join, whole or not at all, and every damage named."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_ds.data.packed_ids import pack, unpack
from ddk_ds.data.teacher_cache import CONDITIONS_FILE, TeacherCache, make_cache
from ddk_ds.data.teacher_place import PARTS, SAMPLES_FILE, LocalPlace
from ddk_ds.data.teacher_samples import NO_LABEL, Drawn, Record, coding_of
from ddk_ds.errors import CheckpointError, ConfigError, DataError
from ddk_ds.files import sealed, unsealed
from tests.kept import said_of

VOCAB, DRAWS, LENGTH = 151_646, 12, 7
CONDITIONS = {"teacher": "abc", "temperature": 1.0, "keep": "sampled", "draws": DRAWS}
SHAS = {"web": "1", "code": "2"}


def said(seed: int) -> Drawn:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(VOCAB - 9, VOCAB, (LENGTH, DRAWS)), 1)
    return Drawn(ids, *(rng.random(LENGTH).astype(np.float32) for _ in range(2)))


def opened(path: Path, **changes: Any) -> TeacherCache:
    values = {"conditions": CONDITIONS, "shas": SHAS, "vocab_size": VOCAB, **changes}
    place = LocalPlace(path)
    make_cache(place, values["conditions"])
    return TeacherCache(place, values["conditions"], values["shas"], values["vocab_size"])


def filled(path: Path) -> Path:
    """Write a part with three samples, and return the part's directory."""
    cache = opened(path)
    for number, (domain, place) in enumerate([("web", 3), ("code", 0), ("web", 1)]):
        cache.add(domain, place, said(number))
    cache.publish()
    (part,) = (path / PARTS).iterdir()
    return part


def equal(left: Record | None, right: Drawn) -> bool:
    return left is not None and all(map(np.array_equal, said_of(coding_of(CONDITIONS, VOCAB), left, LENGTH), right))


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(1, 32), count=st.integers(1, 100), seed=st.integers(0, 1000))
def test_numbers_are_packed_to_their_bits(bits: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, count)
    packed = pack(numbers, bits)
    assert len(packed) == -(-count // 8) * bits
    # By the definition: number i has the bits from i * bits on of one large number.
    whole = int.from_bytes(packed, "little")
    assert [whole >> i * bits & (1 << bits) - 1 for i in range(count)] == numbers.tolist()
    back = unpack(torch.frombuffer(bytearray(packed), dtype=torch.uint8), bits)
    assert back[:count].tolist() == numbers.tolist() and not back[count:].any() and len(back) < count + 8


def test_what_was_added_is_there_before_and_after_it_is_written(tmp_path: Path) -> None:
    cache = opened(tmp_path / "cache")
    cache.add("web", 3, said(0))
    assert equal(cache.read("web", 3), said(0)) and cache.read("web", 4) is cache.read("code", 3) is None
    assert len(cache.known("web")) == 0
    cache.publish()
    assert equal(cache.read("web", 3), said(0)) and cache.known("web").tolist() == [3]
    assert equal(opened(tmp_path / "cache").read("web", 3), said(0))


def test_parts_of_several_writers_join(tmp_path: Path) -> None:
    first, second, reader = (opened(tmp_path / "cache") for _ in range(3))
    for number in range(20):
        (first, second)[number % 2].add("web", number, said(number))
    for cache in (first, second):
        cache.add("code", 5, said(99))  # both wrote it: it is the same
        cache.publish()
    assert reader.read("web", 1) is None
    reader.refresh()
    assert all(equal(reader.read("web", number), said(number)) for number in range(20))
    assert equal(reader.read("code", 5), said(99)) and reader.known("code").tolist() == [5]


def test_the_teachers_mean_loss_of_what_is_there(tmp_path: Path) -> None:
    """Each sample counts once, by its labels: the last position has none, nor has the last one of a document."""
    first, second = opened(tmp_path / "cache"), opened(tmp_path / "cache")
    assert np.isnan(first.mean_loss("web"))
    for cache, numbers in ((first, (0, 1, 2)), (second, (2, 3))):
        for number in numbers:
            log_probs = np.array([-1.0 - number, -0.5, 0, 0, 0, 0, 0], np.float32)
            cache.add("web", number, said(number)._replace(label_log_probs=log_probs))
        cache.publish()
    assert opened(tmp_path / "cache").mean_loss("web") == pytest.approx((1.5 + 2.5 + 3.5 + 4.5) / 4 / (LENGTH - 1))
    of_one_label = np.array([-8.0, *[NO_LABEL] * (LENGTH - 1)], np.float32)
    first.add("web", 7, said(7)._replace(label_log_probs=of_one_label))
    first.publish()
    found = opened(tmp_path / "cache").mean_loss("web")
    assert found == pytest.approx((1.5 + 2.5 + 3.5 + 4.5 + 8.0) / (4 * (LENGTH - 1) + 1))


def test_what_is_no_distribution_is_refused(tmp_path: Path) -> None:
    cache, one = opened(tmp_path / "cache"), said(0)
    for wrong, reason in (
        (one._replace(ids=one.ids + 9), f"the id {VOCAB} is outside of the vocabulary of 151,646 tokens"),
        (one._replace(entropy=one.entropy * np.float32(np.nan)), "is not finite"),
        (one._replace(label_log_probs=one.label_log_probs * np.float32(np.inf)), "is not finite"),
    ):
        with pytest.raises(DataError, match=f"sample 4 of domain 'web': .*{reason}.*is the teacher whole"):
            cache.add("web", 4, wrong)
    assert cache.read("web", 4) is None


def test_a_part_is_written_when_there_is_enough_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_ds.data.teacher_cache.PART_BYTES", 600)
    cache = opened(tmp_path / "cache")
    for number in range(20):
        cache.add("web", number, said(number))
    assert 3 < len(list((tmp_path / "cache" / PARTS).iterdir())) < 10
    assert all(equal(cache.read("web", number), said(number)) for number in range(20))


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming import MDSWriter

    cache = opened(tmp_path / "cache")
    cache.add("web", 3, said(0))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MDSWriter, "write", full)
        with pytest.raises(CheckpointError, match="No space left"):
            cache.publish()
    assert list((tmp_path / "cache" / PARTS).iterdir()) == []
    cache.publish()
    assert equal(opened(tmp_path / "cache").read("web", 3), said(0))


def test_a_part_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    part = filled(tmp_path / "cache")
    copytree(part, part.with_name(".partial-0123") / "0123")
    (part.with_name(".partial-0123") / "0123/index.json").unlink()
    assert opened(tmp_path / "cache").known("web").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({**CONDITIONS, "teacher": "def"}, "computed with teacher 'abc', the run has 'def'"),
        ({**CONDITIONS, "temperature": 2.0, "draws": 3}, "temperature 1.0, the run has 2.0; draws 12, the run has 3"),
        (
            {"teacher": "abc", "temperature": 1.0, "keep": "topk", "top_k": 5},
            "keep 'sampled', the run has 'topk'; draws 12, the run has None; top_k None, the run has 5",
        ),
        ({**CONDITIONS, "new": 1}, "new None, the run has 1"),
    ],
)
def test_other_conditions_are_refused(tmp_path: Path, conditions: dict[str, Any], message: str) -> None:
    filled(tmp_path / "cache")
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "cache", conditions=conditions)


def test_other_samples_of_a_domain_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    with pytest.raises(ConfigError, match="is of other samples of domain 'code'"):
        opened(tmp_path / "cache", shas={**SHAS, "code": "3"})
    assert opened(tmp_path / "cache", shas={"web": "1"}).known("web").tolist() == [1, 3], "a run may have fewer domains"


def test_another_teacher_of_a_domain_is_refused(tmp_path: Path) -> None:
    """Parts of one cache can be of several teachers, as many as there are domains."""
    place = LocalPlace(tmp_path / "cache")
    make_cache(place, CONDITIONS)

    def by(**teachers: str) -> TeacherCache:
        return TeacherCache(place, CONDITIONS, SHAS, VOCAB, teachers)

    for domain, teacher in (("web", "general"), ("code", "coder")):
        cache = by(**{domain: teacher})
        cache.add(domain, 1, said(1))
        cache.publish()
    found = by(web="general", code="coder")
    assert equal(found.read("web", 1), said(1)) and equal(found.read("code", 1), said(1))
    assert by(web="general").known("code").tolist() == [1], "a run may have fewer domains"
    with pytest.raises(ConfigError, match=r"the teacher of domain 'code' is coder, the run's is general "):
        by(web="general", code="general")
    with pytest.raises(ConfigError, match=r"the teacher of domain 'web' is general, the run's is coder "):
        by(web="coder")


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"has no teacher\.json, so it is no teacher's cache"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def cut(part: Path) -> None:
    shard = part / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-100])


def exchange(part: Path) -> None:
    samples = unsealed((part / SAMPLES_FILE).read_bytes(), "")
    samples["domains"]["web"]["numbers"] = samples["domains"]["web"]["numbers"][::-1]
    (part / SAMPLES_FILE).write_text(json.dumps(sealed(samples)))


def forget(part: Path) -> None:
    samples = unsealed((part / SAMPLES_FILE).read_bytes(), "")
    samples["domains"]["web"]["numbers"].pop()
    (part / SAMPLES_FILE).write_text(json.dumps(sealed(samples)))


def lose(part: Path) -> None:
    samples = unsealed((part / SAMPLES_FILE).read_bytes(), "")
    samples["domains"]["web"]["losses"].pop()
    (part / SAMPLES_FILE).write_text(json.dumps(sealed(samples)))


def half(part: Path) -> None:
    text = (part / SAMPLES_FILE).read_text()
    (part / SAMPLES_FILE).write_text(text[: len(text) // 2])


def read_all(path: Path) -> list[Record]:
    cache = opened(path)
    read = [cache.read(domain, number) for domain, number in (("web", 1), ("web", 3), ("code", 0))]
    return [one for one in read if one is not None]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        exchange,
        forget,
        lose,
        half,
        *(
            pytest.param(lambda part, name=name: (part / name).unlink(), id=name)  # type: ignore[misc]
            for name in ("index.json", SAMPLES_FILE, "shard.00000.mds")
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any) -> None:
    part = filled(tmp_path / "cache")
    damage(part)
    with pytest.raises(DataError, match=f"part {part.name} is damaged or incomplete .*delete {part}: ") as error:
        read_all(tmp_path / "cache")
    assert "prepare the data" not in str(error.value)


@pytest.mark.parametrize("name", ["index.json", SAMPLES_FILE])
def test_a_flipped_bit_of_what_a_part_says_of_itself(tmp_path: Path, name: str) -> None:
    part = filled(tmp_path / "cache")
    content = (part / name).read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (part / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"part {part.name} is damaged or incomplete") as error:
            read_all(tmp_path / "cache")
        assert name == SAMPLES_FILE or f"xxh64 is {xxhash.xxh64_hexdigest(damaged)}, " in str(error.value)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of a damaged offset, in streaming's reader
def test_a_flipped_bit_of_a_sample_is_never_a_number(tmp_path: Path) -> None:
    part = filled(tmp_path / "cache")
    whole, shard = read_all(tmp_path / "cache"), part / "shard.00000.mds"
    content, found = shard.read_bytes(), 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        shard.write_bytes(damaged)
        try:
            read = read_all(tmp_path / "cache")
        except DataError as error:
            assert f"part {part.name} is damaged or incomplete" in str(error)
            found += 1
        else:  # a bit that no reader looks at
            assert read == whole, position
    assert found > 0.9 * sum(map(len, whole))


def test_flipped_conditions_are_no_other_conditions(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    file = tmp_path / "cache" / CONDITIONS_FILE
    text = file.read_text()
    for damaged in (text.replace("abc", "abd"), text.replace('"draws": 12', '"draws": 13'), text[:-9], "", "[]"):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match=f"its {CONDITIONS_FILE} is damaged"):
            opened(tmp_path / "cache")


def test_a_cache_without_parts_is_empty_and_parts_without_a_cache_are_refused(tmp_path: Path) -> None:
    assert len(opened(tmp_path / "empty").known("web")) == 0
    filled(tmp_path / "cache")
    (tmp_path / "cache" / CONDITIONS_FILE).unlink()
    with pytest.raises(ConfigError, match=r"has no teacher\.json, so it is no teacher's cache"):
        opened(tmp_path / "cache")


def test_parts_of_another_cache_are_refused(tmp_path: Path) -> None:
    part = filled(tmp_path / "cache")
    opened(tmp_path / "other", conditions={**CONDITIONS, "teacher": "def"})
    copytree(part, tmp_path / "other" / PARTS / part.name)
    with pytest.raises(ConfigError, match=f"its part {part.name} was computed with other conditions"):
        opened(tmp_path / "other", conditions={**CONDITIONS, "teacher": "def"})
