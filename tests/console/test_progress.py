"""Progress: plain lines when asked for, a spinner on a terminal, else nothing."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from autopar.console.progress import hushed, telling


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def tell(verbose: bool) -> None:
    with telling(verbose) as progress:
        progress.doing("importing [torch]")
        progress.found("mesh 4: 1.2 ms")


def test_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tell(verbose=False)
    assert capsys.readouterr() == ("", "")


def test_lines_with_seconds_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    tell(verbose=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r" +\d+\.\d s  importing \[torch\]\n +\d+\.\d s  mesh 4: 1\.2 ms\n", err)


def test_spinner_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    tell(verbose=False)
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "importing [torch]" in written and "mesh 4: 1.2 ms" in written and "\x1b[" in written


def noise() -> None:
    print("printed")
    print("also printed", file=sys.stderr)
    logging.getLogger("somebody").error("logged")


def test_noise_is_lost_and_logging_comes_back(capfd: pytest.CaptureFixture[str],
                                              caplog: pytest.LogCaptureFixture) -> None:
    with hushed(verbose=False):
        noise()
    assert capfd.readouterr() == ("", "") and not caplog.records
    logging.getLogger("somebody").error("logged later")
    assert [record.message for record in caplog.records] == ["logged later"]


def test_noise_is_heard_when_verbose(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with hushed(verbose=True):
        noise()
    assert capfd.readouterr() == ("printed\n", "also printed\n")
    assert [record.message for record in caplog.records] == ["logged"]
