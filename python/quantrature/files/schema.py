"""Check JSON content and arguments against the types of dataclasses, with one-line errors that name the field."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from .._C import InvalidArgumentError

T = TypeVar("T")

Boolean = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Integer = Annotated[int, Field(strict=True)]
Natural = Annotated[int, Field(strict=True, ge=1, lt=2**48)]
"""A positive integer that can be a size."""
Number = Annotated[float, Field(strict=True)]
"""A float, or an integer, which becomes a float."""
FiniteNumber = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Must:
    """Annotation of a field: the rule that its errors state, in words.

    Args:
        rule: what the value must be, such as "1 to 8".
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        """Replace all errors of the annotated type by one that has the rule."""
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="must", custom_error_message=self.rule
        )


class OneOf:
    """Annotation of a text field: the values that it may have.

    Args:
        names: the values. A value that is added to them later, such as a new method, is taken, too.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.names:
            return value
        *others, last = self.names
        raise PydanticCustomError("must", "{rule}", {"rule": " or ".join(filter(None, (", ".join(others), last)))})

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        """Replace the annotated type by the values."""
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """Return the JSON schema: an enumeration."""
        return {"enum": [*self.names], "type": "string"}


Bits = Annotated[int, Field(strict=True, ge=1, le=8), Must("1 to 8")]
GroupSize = Annotated[Natural | Annotated[int, Field(strict=True, ge=-1, le=-1)], Must("-1 or at least 1")]

OBJECT, PLAIN = "\0object", "\0plain"
"""Tags of the two types of a field that may have an object or a plain value."""
OBJECT_OR_PLAIN = Discriminator(lambda value: OBJECT if isinstance(value, Mapping) else PLAIN)

_SENTENCES = {
    "missing": "is missing",
    "dataclass_type": "must be an object: got {}",
    "dict_type": "must be an object: got {}",
    "list_type": "must be a list: got {}",
    "too_short": "must not be empty",
    "recursion_depth_exceeded": "is nested too deeply",
    "recursion_loop": "is nested too deeply",
}
"""Error types of pydantic to the words that follow the name of the field."""


def one_line(
    error: ValidationError,
    *,
    op: str = "",
    origin: str = "",
    what: str = "",
    items: Mapping[str, str] | None = None,
    unknown: Callable[[str], str] = "unknown field {!r}".format,
) -> InvalidArgumentError:
    """Return an error of one line: the first that pydantic found, an unknown field before others.

    Args:
        error: the errors of pydantic.
        op: name of the public function.
        origin: name of the source, such as a file.
        what: name of the whole object, such as "a grid".
        items: names of fields that are objects or lists of objects, and how an error names one of these objects.
        unknown: function from the name of an unknown field to the sentence about it.
    """
    found = min(error.errors(include_url=False), key=lambda each: each["type"] != "unexpected_keyword_argument")
    kind, got = found["type"], reprlib.repr(found["input"])
    path = [str(part) for part in found["loc"] if part not in (OBJECT, PLAIN)]
    if len(path) > 1 and items and path[0] in items:
        origin, path = f"{origin}, {items[path[0]]} {path[1]!r}", path[2:]
    lead = (f"[{op}] " if op else "") + (f"{origin}: " if origin else "")
    if kind == "unexpected_keyword_argument":
        return InvalidArgumentError(lead + unknown(str(found["loc"][-1])))
    if kind == "value_error":  # a rule about several fields, which the dataclass checks itself
        text = str(found["ctx"]["error"])
        return InvalidArgumentError(text if text.startswith("[") else lead + text)
    field = ".".join(path) if len(path) < 4 else f"{path[0]}.{path[1]}...{path[-1]}"
    subject = " of ".join(filter(None, (field, what)))
    rule = f"must be {found['msg']}" if kind == "must" else found["msg"].replace("Input should be", "must be")
    sentence = _SENTENCES.get(kind, rule + ": got {}").format(got)
    return InvalidArgumentError(lead + f"{subject} {sentence}".lstrip())


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's reader of a dataclass."""
    return TypeAdapter(kind)


def read(kind: type[T], data: Any, **names: Any) -> T:
    """Make a dataclass, and those in its fields, from a JSON object; the input need not be trusted.

    Args:
        kind: the dataclass.
        data: the object.
        names: arguments of :func:`one_line`.

    Raises:
        InvalidArgumentError: for a field that is missing or invalid; the message names it.
    """
    try:
        found: T = adapter(kind).validate_python(data)  # type: ignore[arg-type]  # for mypy, classes need not be hashable
    except ValidationError as e:
        raise one_line(e, **names) from None
    return found


def one_line_errors(**names: Any) -> Callable[[type[T]], type[T]]:
    """Return a decorator for pydantic's dataclasses: errors of the constructor become one line.

    Args:
        names: arguments of :func:`one_line`.
    """

    def decorate(kind: type[T]) -> type[T]:
        check: Any = kind.__init__
        signature = inspect.signature(kind)

        @functools.wraps(check)
        def init(self: T, *args: Any, **given: Any) -> None:
            with suppress(ValidationError):
                check(self, *args, **given)
                return
            by_name = signature.bind(*args, **given).arguments  # errors about args have positions and no names
            try:
                check(self, **by_name)
            except ValidationError as e:
                raise one_line(e, **names) from None

        setattr(kind, "__init__", init)  # noqa: B010 (mypy takes no assignment to a method)
        return kind

    return decorate
