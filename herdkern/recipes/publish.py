"""Outputs of stages under the names that a run folder promises: RUN/tokenizer, RUN/tokens, RUN/hf."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from herdkern.engine.shards import TMP_SUFFIX, files_below, remove_folder, replace_folder, sync_folder


def publish(source: Path | Mapping[str, Path], target: Path) -> None:
    """Make `target` hold what `source` holds: hard links, or copies where the file system has none. Never half of it.

    source: a file, a folder, or folders by their path below `target`.
    """
    if isinstance(source, Path) and source.is_file():
        if target.exists() and os.path.samefile(source, target):
            return  # renaming one link of a file onto another does nothing
        tmp = target.with_name(target.name + TMP_SUFFIX)
        tmp.unlink(missing_ok=True)
        _link(source, tmp)
        os.replace(tmp, target)
        sync_folder(target.parent)
        return
    parts = {"": source} if isinstance(source, Path) else source
    if target.is_dir() and _same(parts, target):
        return
    tmp = target.with_name(target.name + TMP_SUFFIX)
    remove_folder(tmp)
    for name, folder in parts.items():
        for file in files_below(folder):
            place = tmp / name / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(file, place)
    replace_folder(tmp, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _same(parts: Mapping[str, Path], target: Path) -> bool:
    """Whether `target` holds links to exactly these files."""
    wanted = {
        target / name / file.relative_to(folder): file for name, folder in parts.items() for file in files_below(folder)
    }
    found = files_below(target)
    return set(found) == set(wanted) and all(os.path.samefile(path, wanted[path]) for path in found)
