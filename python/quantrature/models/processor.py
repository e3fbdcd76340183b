"""Find the processor files of a model, which convert images and sound to inputs, and its chat templates."""

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
        name_or_path: a local folder, or the id of a model on the Hugging Face Hub; its files are downloaded.

    Returns:
        The :data:`PROCESSOR_FILES` that the model has, and further chat templates. A text-only model often has none.
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
