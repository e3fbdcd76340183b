"""The directive every-header: the public C and C++ headers, each under its name, in the order of quantrature.hpp."""

import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

HEADERS = Path(__file__).resolve().parents[1] / "cpp" / "include" / "quantrature"


def in_reading_order() -> list[Path]:
    """The headers that users include: quantrature.hpp, c_api.h, then those that the first one names."""
    names = re.findall(r'#include "quantrature/([^"]+)"', (HEADERS / "quantrature.hpp").read_text())
    ordered = [HEADERS / "quantrature.hpp", HEADERS / "c_api.h", *(HEADERS / name for name in names)]
    missing = {path.name for path in HEADERS.iterdir()} - {path.name for path in ordered}
    if missing - {"export.h"}:
        raise RuntimeError(f"quantrature.hpp does not include {', '.join(sorted(missing))}")
    return ordered


class EveryHeader(Directive):
    """The text of each header as a section."""

    def run(self) -> list[nodes.Node]:
        """Sections in reading order."""
        environment = self.state.document.settings.env
        sections = []
        for path in in_reading_order():
            environment.note_dependency(str(path))
            section = nodes.section(ids=[nodes.make_id(path.name)], names=[path.name])
            code = nodes.literal_block(text=path.read_text())
            code["language"] = "c" if path.suffix == ".h" else "cpp"
            section += [nodes.title(text=path.name), code]
            sections.append(section)
        return sections


def setup(app):  # noqa: D103
    app.add_directive("every-header", EveryHeader)
    return {"parallel_read_safe": True}
