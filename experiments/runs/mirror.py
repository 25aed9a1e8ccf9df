"""A run folder at a URI: the run works in a folder here, which is copied there as it grows, and fetched to go on."""

import json
import os
import shutil
import tomllib
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow import fs

from datasets_partition.sources.location import is_local, located, node_cache
from datasets_partition.sources.source_files import first_line
from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.runs.locks import locked
from experiments.runs.resuming import leaves

# What makes other files count: a checkpoint's facts, a run's recipe, a finished run's report. They are copied after
# all others, in this order, and removed before all others, so that what is there can always be gone on with.
FACTS, RECIPE, REPORT = SEALS = ("facts.json", "recipe.toml", "report.html")
CHECKPOINTS, MODEL, ACCOUNT = "checkpoints", "model", "privacy.json"
# How many rounds' noise may have been drawn since the account was copied: while the command copies what there is after
# one round, the driver may finish the next, and begin the one after it once the command has heard of that.
AHEAD = 2


def working_folder(out: Path | str | None, resume: bool) -> tuple[Path | None, Callable[[], None]]:
    """The folder on this machine that a run works in, and what brings it to `out` where that is a URI.

    Raises RunError where the URI cannot be had, holds a run that must not be touched, or none to be resumed.
    """
    if not isinstance(out, str) or is_local(out):
        return None if out is None else Path(out), lambda: None
    mirror = Mirror(out)
    mirror.open(resume)
    return mirror.folder, mirror.update


class Mirror:
    """Makes the folder at a URI like `folder`, whatever of it has been written so far."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.system, self.path = located(location)
        name = f"{PurePosixPath(self.path).name}-{sha256(location.encode()).hexdigest()[:12]}"
        self.home = node_cache() / "runs" / name
        self.folder = self.home / "run"
        # What lies at the location, with the stamp that it had here.
        self.there: dict[str, tuple[int, int] | None] = {}

    def open(self, resume: bool) -> None:
        """Begins with an empty folder, or with what of a run to be resumed is whole; RunError if that cannot be.

        Until then nothing is touched that another command may be at work on.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self.lock = locked(self.home, self.location)
        try:
            self.there = dict.fromkeys(self._listed())
            if resume and RECIPE not in self.there:
                raise RunError(
                    f"{self.location} holds no run to resume (no {RECIPE}): leave --resume out to start one there"
                )
            if self.there and not resume:
                what = "already holds a run" if RECIPE in self.there else "is not empty"
                raise RunError(f"{self.location} {what}: choose another --out, or go on with that run by --resume")
            shutil.rmtree(self.folder, ignore_errors=True)
            if resume:
                self._fetch()
        except OSError as error:
            raise RunError(f"{self.location} cannot be read: {first_line(error)}") from error

    def update(self) -> None:
        """Copies what is new or has changed since the last time, and removes what is gone; RunError if it cannot."""
        # Checkpoints are listed first: whatever they rest on was there before them, and is listed too.
        here = _stamps(self.folder, CHECKPOINTS) | _stamps(self.folder, "", but=CHECKPOINTS)
        if RECIPE in self.there and RECIPE not in here:
            raise RunError(
                f"{self.folder}, in which the run works, has been cleaned away: let TMPDIR name a folder that lasts as "
                f"long as the run, and run again with --resume; what was copied to {self.location} is whole"
            )
        changed = {name for name, stamp in here.items() if self.there.get(name) != stamp}
        try:
            for seal in {_seal(name) for name in changed} & self.there.keys() - {RECIPE}:
                self._remove(seal)  # until what it stands for is whole again
                changed |= {seal} & here.keys()
            with TemporaryDirectory(prefix=".", dir=self.folder.parent) as scratch:
                held = _linked(self.folder, changed, Path(scratch))
                lost = {_seal(name) for name in changed - held.keys()}
                self._copy({name: file for name, file in held.items() if name not in lost}, here)
            if not lost:
                self._forget(self.there.keys() - here.keys())
        except OSError as error:
            raise RunError(
                f"{self.location} cannot be written: {first_line(error)}; what was copied there before is whole: "
                f"make room or give leave, and run again with --resume"
            ) from error

    def _copy(self, files: dict[str, Path], stamps: dict[str, tuple[int, int]]) -> None:
        for folder in sorted({PurePosixPath(self.path, name).parent for name in files}):
            self.system.create_dir(str(folder), recursive=True)
        for name in sorted(files, key=_turn):
            fs.copy_files(str(files[name]), f"{self.path}/{name}", fs.LocalFileSystem(), self.system)
            self.there[name] = stamps[name]

    def _forget(self, gone: set[str]) -> None:
        for name in sorted(gone, key=_turn, reverse=True):
            self._remove(name)
        for folder in {PurePosixPath(name).parent for name in gone}:
            if not (self.folder / folder).exists():
                with suppress(FileNotFoundError):  # object stores have no folders
                    self.system.delete_dir(f"{self.path}/{folder}")

    def _remove(self, name: str) -> None:
        self.system.delete_file(f"{self.path}/{name}")
        del self.there[name]

    def _listed(self) -> list[str]:
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        found = [info for info in self.system.get_file_info(selector) if info.type == fs.FileType.File]
        return [PurePosixPath(info.path).relative_to(PurePosixPath(self.path)).as_posix() for info in found]

    def _fetch(self) -> None:
        for name in self.there:
            if _seal(name) in self.there and ".." not in PurePosixPath(name).parts:
                file = self.folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(f"{self.path}/{name}", str(file), self.system, fs.LocalFileSystem())
        self.there |= _stamps(self.folder, "")
        _charge_uncopied(self.folder)


def _charge_uncopied(folder: Path) -> None:
    """Notes in a run's account of privacy the rounds that may be missing in it, where each draw of noise is another."""
    account = folder / ACCOUNT
    try:
        keys = leaves(tomllib.loads((folder / RECIPE).read_text(encoding="utf-8")))
        if keys.get("privacy.secagg.mode") != "full" or keys.get("privacy.dp.kind", "none") == "none":
            return
        nothing = {"rounds": 0, "statement": ""}
        found: dict[str, Any] = json.loads(account.read_text(encoding="utf-8")) if account.exists() else nothing
        found["uncopied"] = found.get("uncopied", 0) + AHEAD
    except (ValueError, TypeError, AttributeError, RecursionError):
        return  # who goes on with the run refuses such files by a sentence
    write_file(account, json.dumps(found, indent=1).encode())


def _seal(name: str) -> str:
    """The file without which that of this name does not count."""
    path = PurePosixPath(name)
    if path.parts[0] == CHECKPOINTS:
        return f"{path.parent}/{FACTS}"
    return REPORT if path.parts[0] == MODEL else RECIPE


def _turn(name: str) -> int:
    last = PurePosixPath(name).name
    return 1 + SEALS.index(last) if last in SEALS else 0


def _stamps(root: Path, below: str, but: str | None = None) -> dict[str, tuple[int, int]]:
    """The files below a folder of `root` that are whole, each with what changes when it is written anew."""
    found = {}
    for folder, folders, names in os.walk(root / below):
        folders[:] = [name for name in folders if not name.startswith(".") and name != but]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):
                facts = path.stat()
                found[path.relative_to(root).as_posix()] = facts.st_ino, facts.st_mtime_ns
    return found


def _linked(root: Path, names: set[str], scratch: Path) -> dict[str, Path]:
    """Second names of files below `root`, which keep them while the run goes on and removes its own; of those there."""
    found = {}
    for number, name in enumerate(names):
        with suppress(FileNotFoundError):
            os.link(root / name, scratch / str(number))
            found[name] = scratch / str(number)
    return found
