"""A signal within a library that raises something else for it is a stop; an error long after one is an error."""

from __future__ import annotations

import signal

import pytest

from baichuan.cli import common, failures


@pytest.mark.parametrize("number, why", [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), OSError("no reason")])
def test_an_exception_that_stands_for_a_signal(number, why, error, capsys):
    def body(args, comm):
        try:
            signal.raise_signal(number)
        except BaseException:  # as PyTorch's C++ does
            raise error from None

    assert common.run_script(common.Parser("x"), [], body) == common.USER_ERROR
    assert f"error: stopped by {why}; nothing unfinished was kept" in capsys.readouterr().err


def test_an_error_after_an_interrupted_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(failures, "SIGNAL_S", -1)

    def body(args, comm):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("a bug") from None

    with pytest.raises(ValueError, match="a bug"):
        common.run_script(common.Parser("x"), [], body)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
