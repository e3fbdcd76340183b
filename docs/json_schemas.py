"""Write the JSON schemas of plan.json and sensitivity.json: python docs/json_schemas.py."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from quantrature.analysis.sensitivity import SensitivityFile
from quantrature.files.schema import adapter
from quantrature.plan.plan import PlanFile

REFERENCE = Path(__file__).parent / "reference"
FILES = {"plan": PlanFile, "sensitivity": SensitivityFile}
"""Name of the file to the dataclass that it is read into."""


def told(kind: type) -> tuple[str, dict[str, str]]:
    """Return the first line of a docstring, and what its attributes are, without Sphinx's markup."""
    text = re.sub(r":\w+:`([^`]+)`", r"\1", inspect.getdoc(kind) or "").replace("``", "").replace("None", "null")
    first, _, attributes = text.partition("Attributes:\n")
    found = {}
    for names, meaning in re.findall(r"^    (\w[\w, ]*): (.*(?:\n        .*)*)", attributes, re.M):
        found |= {name: " ".join(meaning.split()) for name in names.split(", ")}
    return first.partition("\n")[0], found


class Schema(GenerateJsonSchema):
    """JSON schemas with the texts of docstrings, which editors show, and without generated titles."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Describe a dataclass and its fields."""
        about, attributes = told(schema["cls"])
        made = super().dataclass_schema(schema)
        made.pop("title", None)
        for f in fields(schema["cls"]):
            made["properties"][f.name] |= {"description": attributes[f.name]}
            made["properties"][f.name].pop("title", None)
        return made | {"description": about}

    def int_schema(self, schema: Any) -> dict[str, Any]:
        """Describe an integer; one with a single value as a constant."""
        made = super().int_schema(schema)
        return {"const": made["minimum"]} if made.get("minimum", made) == made.get("maximum") else made


def schema_of(kind: type) -> str:
    """Return the JSON schema of a file, as text."""
    made = adapter(kind).json_schema(schema_generator=Schema)
    return json.dumps({"$schema": Schema.schema_dialect, **made}, indent=2) + "\n"


if __name__ == "__main__":
    for name, kind in FILES.items():
        (REFERENCE / f"{name}.schema.json").write_text(schema_of(kind))
