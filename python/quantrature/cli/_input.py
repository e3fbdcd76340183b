"""Parsing of option values that several commands have: sizes and fractions."""

from __future__ import annotations

import re

from .._C import InvalidArgumentError

_UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}IB": 1024**k for k, p in enumerate("KMGT", 1)}


def size_in_bytes(verb: str, text: str, option: str = "--target-size") -> int:
    """Parse a size such as ``4.2GiB`` or ``900MB`` into bytes. A number without a unit is bytes.

    Raises:
        InvalidArgumentError: if ``text`` is not a number with an optional unit.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    try:
        if found is None or unit is None:
            raise ValueError
        return int(float(found[1]) * unit)
    except ValueError:
        raise InvalidArgumentError(f"[{verb}] {option} must be a size such as 4.2GiB or 900MB: got {text!r}") from None


def check_fraction(verb: str, option: str, value: float | None) -> None:
    """Check that a value is a fraction from 0 to 1, and not a percentage.

    Raises:
        InvalidArgumentError: for a value below 0 or above 1; the message names the option.
    """
    if value is not None and not 0 <= value <= 1:
        raise InvalidArgumentError(
            f"[{verb}] {option} must be a fraction between 0 and 1 (0.005 is half a percent): got {value:g}"
        )
