"""Export plans to the options of other quantization tools."""

from .plans import FORMATS, export, to_text

__all__ = ["FORMATS", "export", "to_text"]
