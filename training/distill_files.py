"""Where a distillation puts what it makes: the folder of the run, the predictor, and the card that names it."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from voxelsigma.formats.atomic import unwritable, whole_file, write_whole
from voxelsigma.models.cards import ModelCard, load_card
from voxelsigma.models.predictor_file import model_identity
from voxelsigma.training.card import record_predictor


def destination(card: ModelCard, out: Path | None) -> Path:
    """The card that will name the predictor, in a folder that can be written."""
    folder = card.path.parent if out is None else out
    # the folder itself is made when there is something to be put into it
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        if out is None:
            raise OSError(
                f"{folder}: cannot be written, and the predictor lies beside its card; name a folder with --out"
            )
        reason = "may not be written to" if there.is_dir() else "is not a folder"
        raise OSError(f"{folder}: cannot be written ({there} {reason}); name another folder with --out")
    target = folder / card.path.name
    if target.exists() and model_identity(load_card(str(target))) != model_identity(card):
        raise ValueError(f"{target}: is the card of another network than {card.path}; choose another folder")
    copied = None if card.weights is None else folder / card.weights.name
    if copied is not None and copied.exists() and hashlib.sha256(copied.read_bytes()).hexdigest() != card.sha256:
        raise ValueError(f"{copied}: are other weights than those of {card.path}; choose another folder")
    return target


def check_start(start: ModelCard, file: Path) -> None:
    """Refuse to begin from the predictor that the run will replace: started again, it would begin from another one.

    Raises
    ------
    ValueError
        The card's predictor is the file that will be written.
    """
    if start.predictor is not None and start.predictor.resolve() == file.resolve():
        raise ValueError(
            f"{start.path}: its predictor {start.predictor.name}, to begin from, is the very file that will be "
            "written; name another folder with --out"
        )


def claim(folder: Path, described: dict[str, Any]) -> None:
    """Make the folder of a run, or see that it is of this one."""
    note = folder / "run.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    if not note.exists():
        write_whole(note, json.dumps(described, indent=1).encode())
        return
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        differing = [key for key in described if found.get(key) != described[key]]
    except (ValueError, AttributeError):
        raise ValueError(f"{note}: not the note of a run; delete the folder {folder}") from None
    if differing:
        raise ValueError(
            f"{folder}: holds another run (differing in {', '.join(differing)}); delete it, or choose another folder "
            "with --out"
        )


def record(card: ModelCard, target: Path, name: str, digest: str) -> None:
    """Name the predictor on the card, or on its copy, whose weights go with it."""
    if card.weights is not None and not (copied := target.parent / card.weights.name).exists():
        with whole_file(copied) as partial:
            shutil.copyfile(card.weights, partial)
    record_predictor(target if target.exists() else card.path, name, digest, into=target)
