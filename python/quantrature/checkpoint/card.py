"""The model card of a quantized folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from .contents import Contents


def model_card(contents: Contents, source: str, opened_by: str, more: str, auto_map: bool) -> str:
    """Write README.md: sizes, and how to load the folder.

    Args:
        contents: what the folder holds.
        source: name of the original model.
        opened_by: the class of transformers whose ``from_pretrained`` opens the folder.
        more: further arguments of ``from_pretrained``, as code.
        auto_map: whether the folder has Python code that imports quantrature.
    """
    trusting = """
Where quantrature is installed, `from_pretrained("PATH", trust_remote_code=True)` needs no import.
"""
    about = ModelCardData(
        library_name="transformers",
        base_model=source if source and not Path(source).exists() else None,
        tags=["quantized", "quantrature"],
    )
    return f"""---
{about.to_yaml()}
---
# {Path(source).name or "Model"}, {contents.bits_per_weight:.2f} bits per weight

Quantized by [quantrature](https://pypi.org/project/quantrature). {len(contents.modules)} matrices take
{contents.bytes:,} bytes, {contents.bits_per_weight:.3f} bits per weight, scales, zeros and outliers included.

```python
import quantrature  # registers the format with transformers
from transformers import {opened_by}

model = {opened_by}.from_pretrained("PATH"{more})
```
{trusting if auto_map else ""}"""
