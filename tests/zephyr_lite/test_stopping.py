"""Signals: the first one waits for a safe point, the second one does not, none is lost."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from zephyr_lite.errors import Stopped
from zephyr_lite.report.progress import AttentiveProgress, QuietProgress
from zephyr_lite.stopping import Interrupted, Stop


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_a_loop_a_signal_stops_at_once(number, code):
    with Stop().installed(), pytest.raises(Interrupted) as caught:
        _send(number)
    assert not isinstance(caught.value, Exception), "libraries swallow those"
    assert caught.value.stopped.exit_code == code
    assert "same command again" in caught.value.stopped.hint


def test_inside_a_loop_the_first_waits_and_the_second_does_not(capfd):
    stop = Stop()
    with stop.installed(), stop.deferred():
        _send(signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(Interrupted):
            _send(signal.SIGINT)


def test_check_stops_with_what_was_saved():
    stop = Stop()
    stop.check("nothing was asked")
    with stop.installed(), stop.deferred():
        _send(signal.SIGTERM)
        with pytest.raises(Stopped, match="saved after step 7") as caught:
            stop.check("saved after step 7")
    assert caught.value.exit_code == 143


def test_a_signal_lost_in_a_library_stops_at_the_next_check():
    stop = Stop()
    with stop.installed():
        with suppress(BaseException):  # as a C extension does that clears errors
            _send(signal.SIGINT)
        with stop.deferred(), pytest.raises(Stopped):
            stop.check("after one step")


def test_a_signal_lost_in_a_library_stops_before_the_next_step():
    stop = Stop()
    listener = AttentiveProgress(QuietProgress(), stop.safe_point)
    with stop.installed():
        with suppress(BaseException):
            _send(signal.SIGTERM)
        with stop.deferred():
            listener.step({})
        for call in (lambda: listener.start("", 1, 0), lambda: listener.step({})):
            with pytest.raises(Interrupted) as caught:
                call()
            assert caught.value.stopped.exit_code == 143


def test_a_signal_lost_before_counts_in_the_inner_handler():
    outer, inner = Stop(), Stop()
    with outer.installed():
        with suppress(BaseException):
            _send(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught, inner.installed():
            pass
        assert caught.value.stopped.exit_code == 143
        assert signal.getsignal(signal.SIGTERM) == outer._handle


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inner"), Stop().installed():
        assert signal.getsignal(signal.SIGINT) != before
        raise ValueError("inner")
    assert signal.getsignal(signal.SIGINT) == before
