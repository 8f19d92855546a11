"""Signals become wishes, once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from scumble.training.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as wish:
        assert not wish.asked
        os.kill(os.getpid(), number)
        assert wish.asked
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_acts_as_ever() -> None:
    # a test run in the background was started with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _second_ctrl_c()
    finally:
        signal.signal(signal.SIGINT, before)


def _second_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt() as wish:
        os.kill(os.getpid(), signal.SIGINT)
        assert wish.asked
        os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_after_ctrl_c_still_lets_the_run_save() -> None:
    """A launcher forwards Ctrl-C as SIGTERM: a worker gets both."""
    with Interrupt() as wish:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wish.asked


def test_outside_the_main_thread_it_is_a_plain_flag() -> None:
    found: list[bool] = []

    def work() -> None:
        with Interrupt() as wish:
            found.append(wish.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]
