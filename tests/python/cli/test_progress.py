import sys

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
