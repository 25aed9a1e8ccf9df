"""A run folder at a URI: the run works in a local folder, which is copied there as it grows, and fetched to resume."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow import fs

from datasets_partition.sources.location import first_line, is_local, located, node_cache
from engine.messages.errors import RunError
from engine.system.atomic import write_file
from experiments.runs.resuming import FINISHED, facts_of, locked

# The seals, which make other files count: a checkpoint's facts, a run's recipe, that a run has finished. They are
# copied after all others, in this order, and removed before all others, so that the copy can always be resumed.
FACTS, RECIPE = "facts.json", "recipe.toml"
SEALS = (FACTS, RECIPE, FINISHED)
CHECKPOINTS, MODEL, ACCOUNT = "checkpoints", "model", "privacy.json"
# The most rounds whose noise may have been drawn since the account was copied: while the command copies the files of a
# round, the driver may finish the next one and begin the one after it.
AHEAD = 2


def working_folder(out: Path | str | None, resume: bool) -> tuple[Path | None, Callable[[], None]]:
    """The local folder that a run works in, and a function that copies it to `out` if that is a URI."""
    if not isinstance(out, str) or is_local(out):
        return None if out is None else Path(out), lambda: None
    mirror = Mirror(out, resume)
    return mirror.folder, mirror.update


class Mirror:
    """Keeps the folder at a URI a copy of `folder`, which at first is empty or has all files of the run to resume."""

    def __init__(self, location: str, resume: bool) -> None:
        """Raises RunError if the URI cannot be read, holds a run that must stay, or has none to resume."""
        self.location = location
        self.system, self.path = located(location)
        home = node_cache() / "runs" / f"{PurePosixPath(self.path).name}-{sha256(location.encode()).hexdigest()[:12]}"
        self.folder = home / "run"
        home.mkdir(parents=True, exist_ok=True)
        self.lock = locked(home, location)  # first, since another command may be working in the folder
        try:
            listed = self._listed("")
            # The files at the URI, with the stamps that they had here; neither hidden files nor paths that lead up.
            names = [name for name in listed if not name.startswith(".") and "/." not in name]
            self.copied: dict[str, tuple[int, int] | None] = dict.fromkeys(names)
            if resume and RECIPE not in self.copied:
                hint = "leave --resume out to start one there"
                raise RunError(f"{location} holds no run to resume (no {RECIPE}): {hint}")
            if listed and not resume:
                what = "already holds a run" if RECIPE in self.copied else "is not empty"
                raise RunError(f"{location} {what}: choose another --out, or continue that run with --resume")
            shutil.rmtree(self.folder, ignore_errors=True)
            if resume:
                self._fetch()
        except OSError as error:
            raise RunError(f"{location} cannot be read: {first_line(error)}") from error

    def update(self) -> None:
        """Copies the files that are new or have changed and removes those that are gone; RunError if it cannot."""
        # Checkpoints are listed first: the files that they depend on were there before them, and are listed too.
        here = _stamps(self.folder, CHECKPOINTS) | _stamps(self.folder, "", but=CHECKPOINTS)
        if RECIPE in self.copied and RECIPE not in here:
            remedy = "set TMPDIR to a folder that lasts as long as the run, and run again with --resume"
            what = f"{self.folder}, the local folder of the run, has been deleted: {remedy}"
            raise RunError(f"{what}; what was copied to {self.location} is complete")
        changed = {name for name, stamp in here.items() if self.copied.get(name) != stamp}
        try:
            for seal in {_seal(name) for name in changed} & self.copied.keys() - {RECIPE}:
                self._remove(seal)  # until the files that it seals are complete again
                changed |= {seal} & here.keys()
            with TemporaryDirectory(prefix=".", dir=self.folder.parent) as scratch:
                links = _linked(self.folder, changed, Path(scratch))
                broken = {_seal(name) for name in changed - links.keys()}
                self._copy({name: file for name, file in links.items() if name not in broken}, here)
            if not broken:
                self._forget(self.copied.keys() - here.keys())
        except OSError as error:
            what = f"{self.location} cannot be written: {first_line(error)}; what was copied there before is complete"
            raise RunError(f"{what}: free space or allow writing, and run again with --resume") from error

    def _copy(self, files: dict[str, Path], stamps: dict[str, tuple[int, int]]) -> None:
        for folder in sorted({PurePosixPath(self.path, name).parent for name in files}):
            self.system.create_dir(str(folder), recursive=True)
        for name in sorted(files, key=_turn):
            fs.copy_files(str(files[name]), f"{self.path}/{name}", fs.LocalFileSystem(), self.system)
            self.copied[name] = stamps[name]

    def _forget(self, gone: set[str]) -> None:
        for name in sorted(gone, key=_turn, reverse=True):
            self._remove(name)
        for folder in {PurePosixPath(name).parent for name in gone}:
            if not (self.folder / folder).exists() and not self._listed(folder.as_posix()):
                with suppress(FileNotFoundError):  # object stores have no folders
                    self.system.delete_dir(f"{self.path}/{folder}")

    def _remove(self, name: str) -> None:
        self.system.delete_file(f"{self.path}/{name}")
        del self.copied[name]

    def _listed(self, below: str) -> list[str]:
        """The files at the URI below a folder, also those that others have put there."""
        selector = fs.FileSelector(f"{self.path}/{below}".rstrip("/"), allow_not_found=True, recursive=True)
        files = [info.path for info in self.system.get_file_info(selector) if info.type == fs.FileType.File]
        return [PurePosixPath(file).relative_to(PurePosixPath(self.path)).as_posix() for file in files]

    def _fetch(self) -> None:
        for name in self.copied:
            if _seal(name) in self.copied:
                file = self.folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(f"{self.path}/{name}", str(file), self.system, fs.LocalFileSystem())
        self.copied |= _stamps(self.folder, "")
        _charge_uncopied(self.folder)


def _charge_uncopied(folder: Path) -> None:
    """Adds to a run's privacy account the rounds that it may lack, if resuming would draw fresh noise for them."""
    account, charged = folder / ACCOUNT, dict[str, Any](rounds=0, statement="")
    try:
        keys = facts_of(folder / RECIPE)
        if keys.get("privacy.secagg.mode") != "full" or keys.get("privacy.dp.kind", "none") == "none":
            return
        if account.exists():
            charged = json.loads(account.read_text(encoding="utf-8"))
        charged["uncopied"] = charged.get("uncopied", 0) + AHEAD
    except (ValueError, TypeError, AttributeError, RecursionError):
        return  # damaged files, which resuming refuses with an explanation
    write_file(account, json.dumps(charged, indent=1).encode())


def _seal(name: str) -> str:
    """The seal without which a file does not count."""
    path = PurePosixPath(name)
    if path.parts[0] == CHECKPOINTS and len(path.parts) > 2 and path.parts[1].isdigit():
        return f"{CHECKPOINTS}/{path.parts[1]}/{FACTS}"
    return FINISHED if path.parts[0] == MODEL else RECIPE


def _turn(name: str) -> int:
    last = PurePosixPath(name).name
    return 1 + SEALS.index(last) if last in SEALS else 0


def _stamps(root: Path, below: str, but: str | None = None) -> dict[str, tuple[int, int]]:
    """The complete files below a folder of `root`, each with a stamp that changes when the file is replaced."""
    stamps = {}
    for folder, folders, names in os.walk(root / below):
        folders[:] = [name for name in folders if not name.startswith(".") and name != but]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            with suppress(FileNotFoundError):
                facts = path.stat()
                stamps[path.relative_to(root).as_posix()] = facts.st_ino, facts.st_mtime_ns
    return stamps


def _linked(root: Path, names: set[str], scratch: Path) -> dict[str, Path]:
    """Hard links to those of the named files that exist, which survive while the run removes or replaces the files."""
    links = {}
    for number, name in enumerate(names):
        with suppress(FileNotFoundError):
            os.link(root / name, scratch / str(number))
            links[name] = scratch / str(number)
    return links
