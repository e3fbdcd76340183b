"""Plans in the words of other tools."""

from .plans import FORMATS, export, to_text

__all__ = ["FORMATS", "export", "to_text"]
