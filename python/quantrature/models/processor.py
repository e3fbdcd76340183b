"""The files of a model's processor: what turns images and sound into its inputs, and conversations into text."""

from __future__ import annotations

import os
from pathlib import Path

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def processor_files(name_or_path: str | os.PathLike[str]) -> list[Path]:
    """Find the files of a model's processor.

    Args:
        name_or_path: a local folder, or the id of a model on the Hugging Face Hub, from which they are downloaded.

    Returns:
        Those of :data:`PROCESSOR_FILES` that the model has, and further chat templates; of a model that reads text
        alone often none.
    """
    folder = Path(os.fspath(name_or_path)).expanduser()
    if folder.is_dir():
        found = [folder / name for name in PROCESSOR_FILES] + sorted(folder.glob("additional_chat_templates/*.jinja"))
        return [file for file in found if file.is_file()]
    from transformers.utils.hub import cached_file

    cached = (
        cached_file(
            str(name_or_path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        for name in PROCESSOR_FILES
    )
    return [Path(file) for file in cached if file is not None]
