"""The model card (README.md) of a quantized folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from .contents import Contents


def model_card(contents: Contents, source: str, opened_by: str, more: str, auto_map: bool) -> str:
    """Return the text of README.md: sizes, and how to load the folder.

    Args:
        contents: description of the folder.
        source: name of the original model.
        opened_by: name of the transformers class whose ``from_pretrained`` loads the folder.
        more: further arguments of ``from_pretrained``, as code.
        auto_map: whether the folder includes Python code that imports quantrature.
    """
    trusting = """
With `from_pretrained("PATH", trust_remote_code=True)` you need not import quantrature, but it must be installed.
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
{contents.bytes:,} bytes, {contents.bits_per_weight:.3f} bits per weight, scales, zero points and outliers included.

```python
import quantrature  # registers the format with transformers
from transformers import {opened_by}

model = {opened_by}.from_pretrained("PATH"{more})
```
{trusting if auto_map else ""}"""
