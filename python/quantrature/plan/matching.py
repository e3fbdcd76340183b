"""Patterns that select matrices by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .._C import InvalidArgumentError


def matching(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """Return the names that a pattern selects.

    Args:
        pattern: a name, which selects itself and every module inside it; or ``re:`` and a regular expression, which
            must match from the beginning of a name, as in compressed-tensors.
        names: the names to choose from.
        where: beginning of error messages: the function and the argument, ``[find_linears] an entry of ignore``.

    Raises:
        InvalidArgumentError: if no name matches, or the pattern is not a regular expression.
    """
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise InvalidArgumentError(
                f"{where} must be the name of a matrix or module, or re: and a regular expression: got {pattern} "
                f"({error})"
            ) from None
        found = [name for name in names if compiled.match(name)]
    else:
        found = [name for name in names if name == pattern or name.startswith(pattern + ".")]
    if not found:
        raise InvalidArgumentError(
            f"{where} must match at least one matrix or module: got {pattern}, which matches none"
        )
    return found
