"""Names of matrices, and patterns for them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .._C import InvalidArgumentError


def matching(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """Find the names that a pattern covers.

    Args:
        pattern: a name, which covers itself and everything below it; or ``re:`` and a regular expression, which is
            matched from the beginning of a name, as compressed-tensors does.
        names: to choose from.
        where: for messages, the function and what the pattern is: ``[find_linears] an entry of ignore``.

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
        raise InvalidArgumentError(f"{where} must match at least one matrix or module: got {pattern}")
    return found
