"""A run as a Python call. Heavy imports are inside functions, since `fedpost --help` imports this module."""

from __future__ import annotations

import json
import os
import platform
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config.quantize import not_installed
from engine.messages.errors import RunError

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.messages.events import Event, Sample
    from experiments.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its losses (column such as "end" -> split -> mean), and samples.

    `figures` has such a table of each figure that the objective shows beside its loss, such as "accuracy", and `units`
    what "loss" and each figure are counted in, such as "nats per token".
    """

    folder: Path
    losses: dict[str, dict[str, float]]
    samples: list[Sample]
    figures: dict[str, dict[str, dict[str, float]]]
    units: dict[str, str]

    @property
    def metrics(self) -> pa.Table:
        """All metrics in long format: round, split, client (null = all), name, value, wall_s; `.to_pandas()` works."""
        from engine.records.metrics import read_log

        return read_log(self.folder / "metrics")

    @property
    def model(self) -> Path:
        """The trained model: a PEFT adapter folder, or a Hugging Face model folder."""
        return self.folder / "model"

    @property
    def report(self) -> Path:
        """One self-contained page about the run."""
        return self.folder / "report.html"


def run(
    recipe: Recipe | Path | str,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    baselines: bool = False,
    address: str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    accept_changes: bool = False,
) -> Run:
    """Runs a recipe (or a recipe file) to its end and returns the results; RunError for what the caller can fix.

    `out` is the run folder, by default `runs/NAME-TIME`; if it is a URI, the run works in a local copy. `resume`
    continues the run in `out`, by default the newest run of that name; with `accept_changes` also with other versions,
    base or code than the run was begun with, which the manifest then lists. `baselines` adds local-only and centralized
    training. `address` joins a Ray cluster; by default Ray is started here and ends with the run. Once another thread
    sets `stop`, the current round is finished and RunStopped is raised.
    """
    from datasets_partition.sources.location import is_local
    from datasets_partition.store.store import Store
    from engine.messages.events import Preparing, RunDone, Started, Stopped
    from engine.system.atomic import write_file
    from experiments.config.recipe import load_recipe, located, to_toml
    from experiments.openness.gate import FILE as OPENNESS
    from experiments.openness.gate import judged, notice
    from experiments.report.page import write_report
    from experiments.report.run_folder import leaves
    from experiments.runs import resuming
    from experiments.runs.digests import digests
    from experiments.runs.driving import RunStopped, drive
    from experiments.runs.mirror import working_folder
    from experiments.runs.start import started

    if isinstance(recipe, Path | str):
        recipe = load_recipe(Path(recipe))
    if baselines and recipe.clients.zero is not None:
        raise RunError("--baselines trains in one process, but clients.zero asks for gangs: leave one of them out")
    if baselines and (recipe.strategy.searches or not recipe.model.access.home):
        raise RunError(
            "--baselines trains the model itself, and this recipe searches a prompt, or leaves the base with its "
            "owner: leave --baselines out"
        )
    place, copy = working_folder(out, resume)
    folder, recipe = resuming.run_folder(recipe, place, resume)
    with resuming.alone_in(folder, new=place is None and not resume), started(recipe) as (beginning, start_digest):
        on_event(Preparing("reading the data and assigning rows to clients"))
        store = build_store(recipe)
        verdict = judged(recipe, Store.open(store))
        if verdict.refused:
            store = build_store(recipe, without=tuple(sorted(verdict.refused)))
        manifest = _manifest(recipe, store)
        manifest["digests"] |= start_digest
        if resume:
            manifest = resuming.continued(folder, resuming.earlier_manifest(folder), manifest, accept_changes)
        files = {"recipe.toml": to_toml(recipe).encode(), "manifest.json": json.dumps(manifest, indent=1).encode()}
        files[OPENNESS] = json.dumps(verdict.facts(), indent=1).encode()
        finished: RunDone | None = None
        begun = resume
        with ray_session(address), ExitStack() as at_end:
            from engine.rounds.driver import RunOptions  # imports ray, whose environment is only now complete

            at_end.callback(copy)
            shared = shared_store(recipe, store)
            elsewhere = out if isinstance(out, str) and not is_local(out) else None
            notes = resuming.second_sums(folder, recipe, manifest) + without_losses(recipe, store) + verdict.notes()
            notes += recipe.model.access.notes()
            if recipe.model.start is not None and recipe.privacy.dp.kind != "none":
                notes += ("epsilon is that of this run: what model.start has learned from the same people adds to it",)
            if accepted := manifest.get("accepted_changes"):
                notes += (f"this run continues in spite of changes since it was begun: {', '.join(accepted)}",)
            before = () if resume else verdict.faults
            options = RunOptions(store, folder.resolve(), files, shared, resume, baselines, before, elsewhere, notes)
            options = replace(options, notice=notice(verdict.card))
            for event in drive(located(beginning), options, stop):
                if isinstance(event, RunDone):
                    finished = replace(event, folder=folder)
                    continue
                if isinstance(event, Started):
                    # The base may have been downloaded by now, or changed; a driver may replace another days later.
                    now = manifest | {"digests": manifest["digests"] | digests(recipe)}
                    manifest = resuming.continued(folder, leaves(manifest), now, accept_changes) if begun else now
                    begun = True
                    write_file(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
                    if recipe.clients.lanes == "auto":
                        settled = replace(recipe, clients=replace(recipe.clients, lanes=event.lanes))
                        write_file(folder / "recipe.toml", to_toml(settled).encode())
                on_event(event)
                copy()
                if isinstance(event, Stopped):
                    reached = f"stopped after round {event.round} of {recipe.rounds}"
                    raise RunStopped(f"{reached}; --resume continues from there")
        assert finished is not None
        write_report([folder], folder / "report.html")
        resuming.mark_finished(folder, recipe.rounds)  # from here on --resume has nothing to do
        copy()
        on_event(finished)
        return Run(folder, finished.losses, finished.samples, finished.figures, finished.units)


def build_store(
    recipe: Recipe, on_step: Callable[[str], None] = lambda step: None, without: tuple[str, ...] = ()
) -> Path:
    """The client store of a recipe's data section, from the cache or built now, perhaps `without` clients by name.

    `on_step` receives each step.
    """
    from datasets_partition.sources.location import is_local
    from datasets_partition.store.build import build

    data = recipe.data
    cache = str(Path(data.cache).expanduser().resolve()) if is_local(data.cache) else data.cache
    reads = recipe.train.objective.reads
    return build(data.source, data.partition, data.splits, recipe.seed, cache, on_step, data.label, reads, without)


def without_losses(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """A note if no training client has a held-out row."""
    from datasets_partition.store.store import Store

    store, share, unit = Store.open(folder), recipe.data.splits.heldout, recipe.data.splits.by
    if store.counts("heldout")[: store.num_training].any():
        return ()
    rest = "" if store.counts("heldout").any() else ", so that there are no losses to show"
    if not share:
        return (f"nothing is held out{rest}: see data.splits",) if rest else ()
    small = f"data.splits.heldout = {share:g} of a client's rows is less than half a {unit}"
    why = f"{small}: raise it, or data.splits.unseen"
    return (f"no training client has a held-out row{rest}; {why}",)


def shared_store(recipe: Recipe, store: Path) -> str | None:
    """The URI of a recipe's store; None if its cache is a local folder."""
    from datasets_partition.sources.location import is_local, within

    return None if is_local(recipe.data.cache) else within(recipe.data.cache, store.name)


def settle_ray(address: str | None) -> None:
    """Sets what Ray reads from the environment when it is imported; without `address`, it keeps Ray on loopback."""
    # Unused objects leave the store at once and not once a second: a round may be shorter than that.
    names = ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_free_objects_period_milliseconds")
    settings = dict.fromkeys(names, "0")
    if not (address or os.environ.get("RAY_ADDRESS")) and "ray" not in sys.modules:
        # The first keeps Ray on loopback, despite its name. The token is known to this process alone; Ray would leave
        # one in the home folder.
        settings |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
        settings |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(address: str | None, **resources: Any) -> Iterator[None]:
    """Joins the Ray at `address` or of this Ray job, or starts one with `resources` on loopback, and ends it again."""
    address = address or os.environ.get("RAY_ADDRESS")
    settle_ray(address)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address is None:
            require_short_path()
            ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet, **resources)
        else:
            _require_answer(address)
            ray.init(address, runtime_env=shipped_code(), **quiet)
    except (ConnectionError, RuntimeError) as error:
        where = f"at {address}" if address else "on this machine"
        raise RunError(f"Ray does not start or answer {where}: {str(error).strip().splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


def require_short_path() -> None:
    """Raises RunError if Ray's sockets would have longer paths than the system allows."""
    from ray._common.utils import get_default_ray_temp_dir

    folder, longest = get_default_ray_temp_dir(), 103 if sys.platform == "darwin" else 107
    socket = f"{folder}/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    if (excess := len(os.fsencode(socket)) - longest) > 0:
        what = f"the folder for temporary files, {folder}, has a path that is {excess} bytes too long for Ray's sockets"
        raise RunError(f"{what}: set RAY_TMPDIR to a shorter one, such as RAY_TMPDIR=/tmp")


def _require_answer(address: str) -> None:
    """Raises RunError if nothing listens at an address, which Ray itself would try for a minute."""
    import socket

    if address.startswith("ray://"):
        remedy = "give HOST:PORT of the head (the port is 6379 by default), or submit the run as a Ray job"
        raise RunError(f"{address} is the address of a Ray client server, which streams no results: {remedy}")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like: Ray knows where to look
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        remedy = "start one with `ray start --head`, or leave --address out to run on this machine alone"
        raise RunError(f"there is no Ray at {address} ({error}): {remedy}") from error


def shipped_code() -> dict[str, Any]:
    """The runtime environment that brings this code to a cluster's nodes; empty in a Ray job, which has brought it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return {}
    return {"py_modules": [str(ROOT / name) for name in ("engine", "strategies", "datasets_partition", "experiments")]}


def fedpost_version() -> str:
    """The installed version, or that there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fedpost")
    except PackageNotFoundError:
        return "not installed: run from its folder"


def _manifest(recipe: Recipe, store: Path) -> dict[str, Any]:
    """Versions, seed, data, base, start and digests: what a run with the same bits needs."""
    from importlib.metadata import PackageNotFoundError, version

    from experiments.runs.digests import digests

    model = recipe.model
    base = {"name": model.base, "revision": model.revision, "trust_remote_code": model.trust_remote_code}
    template = {"chat_template": model.chat_template, "template_date": model.template_date}
    versions = {name: version(name) for name in PACKAGES} | {"fedpost": fedpost_version()}
    if model.quantize is not None:
        try:
            versions[model.quantize.kind] = version(model.quantize.kind)
        except PackageNotFoundError:
            raise not_installed(model.quantize.kind) from None
    return {
        "seed": recipe.seed,
        "base": base | {key: value for key, value in template.items() if value is not None},
        **({} if model.start is None else {"start": model.start}),
        "digests": digests(recipe),
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "data": json.loads((store / "manifest.json").read_text(encoding="utf-8")),
    }
