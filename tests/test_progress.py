"""Bars stand on a terminal alone, above them the lines that programs print."""

from __future__ import annotations

import io
import sys

import pytest

from pem_composition import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_is_shown_on_a_terminal_only_and_changes_no_item(stream, monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream())
    seen = []
    for item in progress.over(["a", "b", "c"], "reading", "rows"):
        progress.say(f"at {item}")
        seen.append(item)
    shown = sys.stderr.getvalue()
    assert seen == ["a", "b", "c"]
    assert capsys.readouterr().out == "at a\nat b\nat c\n"
    if stream is Terminal:
        assert "reading" in shown and "/3 [" in shown and "?" in shown  # with an estimate
    else:
        assert shown == ""


def test_a_short_step_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.over(iter(range(5)), "reading", total=5)) == list(range(5))
    assert "reading" not in sys.stderr.getvalue()
