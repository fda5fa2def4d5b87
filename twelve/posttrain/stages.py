"""What a run of several stages remembers in its folder, so that the same command goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twelve import tasks
from twelve.convert import check_place
from twelve.errors import InputError
from twelve.files import read_json, write_json


def require_no_foreign_files(folder: Path) -> None:
    """InputError for files in the way of a run that begins: those of others, and a report."""
    check_place(folder)
    if (folder / "report.html").exists():
        raise InputError(f"{folder} holds a report.html that is no run's of ours: name another folder with --out")


class Progress:
    """A JSON file of {"options": what was asked for, "stages": a dict for each that has begun}.

    Whoever changes `stages` calls `save`. InputError where the file is that of a run with other options, but for those
    that are `free` to change.
    """

    def __init__(self, path: str | Path, options: dict[str, Any], free: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.options = json.loads(json.dumps(options))  # as a file gives them back
        self.stages: list[dict[str, Any]] = []
        if not self.path.exists():
            return
        earlier = read_json(self.path)
        tasks.require_unchanged(earlier["options"].get("task_sha256", {}))
        for key, value in self.options.items():
            before = earlier["options"].get(key)
            if before != value and key not in free:
                raise InputError(
                    f"{self.path.parent} holds a run with {key}={before!r}, not {value!r}: ask for the same to go on, "
                    "or use another folder"
                )
        self.stages = earlier["stages"]

    def stage(self, name: str) -> dict[str, Any] | None:
        """What is known of a stage, None before it has begun."""
        return next((stage for stage in self.stages if stage["name"] == name), None)

    def save(self) -> None:
        write_json(self.path, {"options": self.options, "stages": self.stages})
