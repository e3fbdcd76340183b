"""The public Python interface is the one that interface.txt lists, so that a review sees every change of it."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")  # the environments that test wheels have only what the ops need
pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[3]
LISTED = Path(__file__).with_name("interface.txt")


def documented_modules():
    """Return the modules that the documentation describes, the package itself first."""
    pages = "".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))
    return ["quantrature", *sorted(set(re.findall(r"^\.\. automodule:: (quantrature\.[\w.]+)$", pages, re.M)))]


def public_names(module):
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isroutine(value))
        and value.__module__ == module.__name__
    )


def is_function(value):
    return inspect.isroutine(value) or hasattr(value, "__nb_signature__")  # functions of the extension are no routines


def signature_of(function):
    """Return a function's parameters and defaults; mypy checks the types."""
    if hasattr(function, "__nb_signature__"):
        return function.__nb_signature__[0][0].removeprefix(f"def {function.__name__}")
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def members_of(cls):
    """Yield a class's constructor, methods, properties and fields, but for those that torch or transformers give it."""
    yield f"__init__{signature_of(cls)}"
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "quantrature"]
    names = {name for base in ours for name in (*vars(base), *inspect.get_annotations(base))}
    for name in sorted(name for name in names if not name.startswith("_")):
        member = getattr(cls, name, None)
        yield f"{name}{signature_of(member)}" if inspect.isroutine(member) and callable(member) else name


def interface():
    """Yield a line for each public function, class member, error and constant."""
    first_names = {}
    for module in map(importlib.import_module, documented_modules()):
        for name in public_names(module):
            full, value = f"{module.__name__}.{name}", getattr(module, name)
            if inspect.isclass(value) or is_function(value):
                first = first_names.setdefault(value, full)
                if first != full:
                    yield f"{full} is {first}"
                    continue
            if inspect.isclass(value) and not issubclass(value, BaseException):
                yield from (f"{full}.{member}" for member in members_of(value))
            else:
                yield f"{full}{signature_of(value)}" if is_function(value) else full


def test_names_and_signatures_are_the_listed_ones():
    now, before = list(interface()), LISTED.read_text().splitlines()
    assert now == before, (
        f"The public interface changed: {sorted(set(before) - set(now))} became {sorted(set(now) - set(before))}.\n"
        f"If you mean it, run this and commit the result:\n\n    python {Path(__file__).relative_to(ROOT)}"
    )


if __name__ == "__main__":
    LISTED.write_text("".join(f"{line}\n" for line in interface()))
