"""Calls that are interrupted."""


def limited_to(calls, function, error):
    """A function that raises the error when it is called once more than so often."""
    count = 0

    def limited(*args, **named):
        nonlocal count
        count += 1
        if count > calls:
            raise error
        return function(*args, **named)

    return limited
