import sys
import time

from quantrature.progress import progress


def test_nothing_is_shown_where_nobody_watches(capfd):
    with progress("work", 3) as bar:
        bar.advance()
        bar.advance(2, note="model.layers.0")
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_on_stderr(capfd, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("quantizing", 3) as bar:
        bar.advance(3, note="model.layers.0")
        with progress("inside", 1) as inner:
            inner.advance()
    out, err = capfd.readouterr()
    assert out == ""
    assert "quantizing" in err
    assert "3/3" in err
    assert "model.layers.0" in err
    assert "inside" not in err


def test_the_bar_can_be_asked_for_and_declined(capfd, monkeypatch):
    with progress("shown", 1, show=True):
        pass
    assert "shown" in capfd.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("hidden", 1, show=False):
        pass
    assert capfd.readouterr() == ("", "")


def test_long_work_prints_a_line_now_and_then_where_there_is_no_terminal(capfd, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress("quantizing", 200) as bar:
        for second in range(100):
            now = 1000.0 + second
            bar.advance(2, note=f"block {second}")
            with progress("inside", 1) as inner:
                inner.advance()
        now = 1100.0
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "quantizing: 11 % after 10 s, about 1 min 21 s left, block 10",
        "quantizing: 41 % after 40 s, about 58 s left, block 40",
        "quantizing: 71 % after 1 min 10 s, about 29 s left, block 70",
        "quantizing: done in 1 min 40 s",
    ]


def test_work_that_fails_is_not_done(capfd, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    try:
        with progress("quantizing", 2) as bar:
            now = 20.0
            bar.advance(1)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert capfd.readouterr().err == "quantizing: 50 % after 20 s, about 20 s left\n"
    with progress("again", 1):
        pass
