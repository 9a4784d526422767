"""What the curves' table says of a run, against the arithmetic done by hand."""

import pytest

from benchmarks.bench_curves import FROM_START, IN_MIDDLE, NO_MEMORY, TWICE, WARMED_UP, CurvePoint, show_curves


def test_the_shares_of_doubling(capsys: pytest.CaptureFixture[str]) -> None:
    early = CurvePoint(tokens=10, none=9.0, retrieved=9.5, random=9.5)
    curves = {
        NO_MEMORY: [early, CurvePoint(tokens=20, none=4.0)],
        TWICE: [early, CurvePoint(tokens=20, none=3.8)],
        FROM_START: [early, CurvePoint(tokens=20, none=4.5, retrieved=4.4, random=4.6)],
        WARMED_UP: [early, CurvePoint(tokens=20, none=4.1, retrieved=3.95, random=4.12)],
        IN_MIDDLE: [early, CurvePoint(tokens=20, none=4.1, retrieved=4.05, random=4.1)],
    }
    show_curves(curves)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{FROM_START} 20 4.5000 4.4000 4.6000 -0.4000" in shown
    assert f"{TWICE} 20 3.8000 +0.2000" in shown
    assert "twice the parameters lower the loss by 0.2000" in shown
    assert "memory lowers it by 0.1500 within its own run, random memories by -0.0200" in shown
    assert "against plain text, by 0.0500" in shown
    assert "75% within its own run, 25% against plain text" in shown


def test_a_model_is_scored_as_it_is_meant_to_be_used() -> None:
    assert CurvePoint(tokens=1, none=4.0).best == 4.0
    assert CurvePoint(tokens=1, none=4.0, retrieved=4.2, random=3.0).best == 4.2
