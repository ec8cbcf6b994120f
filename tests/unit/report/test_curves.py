"""Long series are made short without losing a spike; no two styles are the same."""

from __future__ import annotations

import numpy as np

from ddk_ds.drawing import BINS, bar_style, count_unit, envelope, line_style, time_unit


def test_no_spike_is_lost() -> None:
    x = np.arange(1.0, 10_001)
    y = np.ones(10_000)
    y[[17, 5_000, 9_999]] = (50.0, -40.0, np.nan)
    found = envelope(x, y)
    assert len(found.x) <= BINS and found.per_bin == 34
    assert found.high.max() == 50.0 and found.low.min() == -40.0
    assert found.x[0] == 34 and found.x[-1] == 10_000
    np.testing.assert_allclose(found.mean[0], 1 + 49 / 34)
    assert np.isfinite(found.mean[-1])


def test_a_bin_without_a_number_is_a_gap() -> None:
    y = np.ones(6_000)
    y[:20] = np.nan
    found = envelope(np.arange(6_000.0), y)
    assert found.per_bin == 20 and np.isnan(found.mean[0]) and found.mean[1] == 1


def test_a_short_series_stays_as_it_is() -> None:
    x = np.arange(2.0 * BINS)
    found = envelope(x, x)
    assert found.per_bin == 1 and found.mean is x


def test_styles_differ() -> None:
    lines = {(style["color"], str(style["linestyle"])) for style in map(line_style, range(64))}
    bars = {(style["color"], style["hatch"]) for style in map(bar_style, range(64))}
    assert len(lines) == len(bars) == 64


def test_units() -> None:
    assert count_unit(3e9) == (1e9, "billion ") and count_unit(100) == (1.0, "")
    assert time_unit(90) == (1.0, "seconds") and time_unit(90_000) == (3600.0, "hours")
