"""Export plans to the options of other quantization tools."""

from .plans import FORMATS, export_plan, to_text

__all__ = ["FORMATS", "export_plan", "to_text"]
