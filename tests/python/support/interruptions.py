"""Interrupt a computation after a number of calls, to test resuming."""


def limited_to(calls, function, error):
    """Return a function that forwards ``calls`` calls to ``function``, and then raises ``error``."""
    count = 0

    def limited(*args, **named):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return function(*args, **named)

    return limited
