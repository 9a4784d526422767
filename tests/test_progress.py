"""What a stage says of its speed."""

import pytest

from flows.progress import LineDisplay, format_rate


@pytest.mark.parametrize(
    ("rate", "shown"), [(1234.5, "1,234"), (10, "10"), (9.96, "10"), (3.14, "3.1"), (0.0667, "0.067")]
)
def test_slow_work_has_a_rate_too(rate: float, shown: str) -> None:
    assert format_rate(rate) == shown


def test_lines_of_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay()
    display.start("write", 40, "references")
    display.update(10)
    display.finish(40)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["write"] * len(lines)
    assert "done" in lines[-1]
