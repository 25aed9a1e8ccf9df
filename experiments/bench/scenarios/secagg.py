"""`fedpost bench secagg`: what secure aggregation costs clients, the server and a round.

No figure is printed unless mode "full" gives the bits of "ideal" with drop-outs in every phase, each measured session
the sum of what its clients encoded, and the secured demo the losses of the plain one. Units say "extrapolated" where
clients masked some of their coordinates and the time was scaled (see secagg_session.py). Seconds of clients and server
are of one core's processor time; those of rounds are of the wall.
"""

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

import experiments
from engine.records.metrics import read_log
from experiments.bench.results import Figure, Steps
from experiments.bench.secagg_session import SCALED, Played, play, session_of
from experiments.config.recipe import RECIPES, parse_recipe
from experiments.preflight.processes import in_fresh_process, memory
from experiments.runs.api import Run, ray_session
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Phase

COORDINATES, KEYS, TRIES = 5_000_000, 31, 7  # of the mask loop: a client's vector, and its masks with 30 neighbours
# Cohort, coordinates, bits. Complete graphs, and a ring; vectors that end within a piece of the mask loop.
GATES = ((16, 70_001, 32), (32, 5_000, 20), (100, 1_000, 32))
DROPPED = 0.05  # of each cohort, which is what k and t are chosen for
LOST: dict[int, Phase] = {0: "keys", 2: "shares", 5: "masked input", 7: "unmask"}  # clients of a gate's session
LOSSES = 1e-3  # nats per token between the plain and the secured run: both round differently
Mode = Literal["off", "full"]
NAMES = {20_000: "20k", 100_000: "100k", 1_000_000: "1m", 5_000_000: "5m"}


@dataclass(frozen=True)
class Size:
    """How large a run is: cohorts and coordinates of the sessions, and how many coordinates their clients mask.

    `modes` are the demo's runs in their order; each runs with `changes`.
    """

    cohorts: tuple[int, ...]
    coordinates: tuple[int, ...]
    sampled: int
    modes: tuple[Mode, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Rounds:
    """A run's training losses, the seconds of its rounds after the first, and the messages of a mean round."""

    losses: list[float]
    seconds: list[float]
    sessions: float
    mb_up: float
    mb_down: float


DEMO = ('name="bench-secagg"', "cohort.size=32", "evaluate.every=0", "evaluate.rows=1")
SMALL_DATA = 'data.source={kind="python_docs", packages=[], prompt_chars=60}'
# There and back, so that a machine that becomes slower or faster favours neither.
FULL = Size(
    (32, 100, 1000), (100_000, 1_000_000, COORDINATES), 2**18, ("off", "full", "full", "off"), (*DEMO, "rounds=4")
)
SMALL = Size(
    (8, 32), (20_000,), 2**14, ("off", "full"), (*DEMO, "rounds=2", "train.steps=1", "train.max_length=64", SMALL_DATA)
)


def measure(small: bool) -> dict[str, Figure]:
    """All figures; ValueError where secure aggregation does not give what it should."""
    size, steps = SMALL if small else FULL, Steps()
    steps.say("the same bits with masks and without, with drop-outs in every phase")
    refuse_other_bits()
    figures = {"full_equals_ideal": Figure(1.0, "1: bit for bit")}
    demo = demo_rounds(size, steps)
    figures |= round_figures(demo["off"], demo["full"])
    steps.say(f"the mask loop: {KEYS} keys, {COORDINATES:,} coordinates")
    figures["mask_gb_per_s"] = Figure(mask_speed(), "GB/s of one core")
    figures["core_s_1000x5m"] = Figure(None, "core-s")  # in the small size there is no such session
    for clients in size.cohorts:
        for coordinates in size.coordinates:
            steps.say(f"a session of {clients:,} clients with {coordinates:,} coordinates")
            played, growth = in_fresh_process(_cell, clients, coordinates, size.sampled)
            figures |= _figures(played, growth, f"{clients}x{NAMES[coordinates]}")
    return figures


def refuse_other_bits() -> None:
    """Raises ValueError unless both modes give the survivors' sum, bit for bit."""
    for clients, coordinates, bits in GATES:
        full = play(session_of(clients, coordinates, "full", bits), coordinates + 2, LOST)
        ideal = play(session_of(clients, coordinates, "ideal", bits), coordinates + 2, LOST)
        if not (np.array_equal(full.total_S, ideal.total_S) and np.array_equal(full.total_S, full.expected_S)):
            raise ValueError(
                f"secure aggregation of {clients} clients gives other bits than the sum of their vectors: its times "
                f"say nothing"
            )


def mask_speed() -> float:
    """GB of keystream that one core adds to a vector in a second, the median of some tries."""
    keys = tuple(os.urandom(32) for _ in range(KEYS))
    masks, values_L = Masks(32, keys[::2], keys[1::2]), np.ones(COORDINATES, np.uint32)
    seconds = []
    for _ in range(TRIES):
        began = time.thread_time()
        masks.apply(values_L)
        seconds.append(time.thread_time() - began)
    return KEYS * values_L.nbytes / statistics.median(seconds) / 1e9


def demo_rounds(size: Size, steps: Steps) -> dict[Mode, list[Rounds]]:
    """Runs the demo without and with secure aggregation."""
    text = (RECIPES / "demo.toml").read_text(encoding="utf-8")
    found: dict[Mode, list[Rounds]] = {"off": [], "full": []}
    with TemporaryDirectory(prefix="fedpost-bench-") as name, ray_session(None):
        for turn, mode in enumerate(size.modes, 1):
            steps.say(f"the demo with secure aggregation {mode!r}, run {turn} of {len(size.modes)}")
            recipe = parse_recipe(text, [*size.changes, f'privacy.secagg.mode="{mode}"'])
            found[mode].append(read_rounds(experiments.run(recipe, out=Path(name) / str(turn))))
    return found


def read_rounds(run: Run) -> Rounds:
    """What a run's metrics and ledger say of its rounds."""
    rows = [row for row in run.metrics.to_pylist() if row["round"] > 0 and row["client"] is None]

    def of(split: str, name: str) -> list[float]:
        return [row["value"] for row in rows if (row["split"], row["name"]) == (split, name)]

    losses, seconds = of("train", "loss"), of("engine", "round_s")
    received = [(row["party"], row["kind"]) for row in read_log(run.folder / "ledger").to_pylist()]
    sessions = received.count(("server", "key")) / len(losses)  # each begins with its clients' keys
    up, down = (statistics.mean(of("engine", f"protocol_bytes_{way}")) / 1e6 for way in ("up", "down"))
    return Rounds(losses, seconds[1:], sessions, up, down)


def round_figures(plain: list[Rounds], secured: list[Rounds]) -> dict[str, Figure]:
    """The times and messages of both kinds of runs; ValueError if their losses differ."""
    apart = max(float(np.abs(np.subtract(p.losses, s.losses)).max()) for p in plain for s in secured)
    if not apart <= LOSSES:
        raise ValueError(f"the losses of the plain and the secured run are {apart:.2g} nats per token apart")
    before, after = (statistics.median(s for run in runs for s in run.seconds) for runs in (plain, secured))
    first, last = (statistics.median(run.seconds) for run in (plain[0], plain[-1]))
    return {
        "round_ratio_n32": Figure(after / before, "ratio"),
        "plain_ratio_n32": Figure(last / first if len(plain) > 1 else None, "ratio of two plain runs: noise"),
        "plain_round_s_n32": Figure(before, "s of wall time"),
        "secured_round_s_n32": Figure(after, "s of wall time"),
        "plain_round_mb_up_n32": Figure(plain[0].mb_up, "MB"),
        "plain_round_mb_down_n32": Figure(plain[0].mb_down, "MB"),
        "secured_round_mb_up_n32": Figure(secured[0].mb_up, "MB"),
        "secured_round_mb_down_n32": Figure(secured[0].mb_down, "MB"),
        "secured_round_sessions_n32": Figure(secured[0].sessions, "sessions"),
        "losses_apart_n32": Figure(apart, "nats per token"),
    }


def _cell(clients: int, coordinates: int, sampled: int) -> tuple[Played, float | None]:
    """A session, and by how many MB this process, the server's and all clients', has grown at the most."""
    play(session_of(4, 10), sampled, {})  # what loads at first use is no part of a session
    before = memory().get("VmRSS")
    # In the phase where it costs most: the clients have masked, and the server must find their masks by itself.
    gone: Mapping[int, Phase] = {u: "masked input" for u in range(max(1, int(DROPPED * clients)))}
    played = play(session_of(clients, coordinates), sampled, gone)
    if not np.array_equal(played.total_S, played.expected_S):
        raise ValueError(f"the session of {clients} clients gives another sum than that of their vectors")
    return played, None if before is None else memory()["VmHWM"] - before


def _figures(played: Played, growth: float | None, cell: str) -> dict[str, Figure]:
    """All of a session's figures, each with the cell at its name's end."""
    clients, scaled = played.parameters.clients, played.scale > 1
    label = "extrapolated" if scaled else "measured"
    found = {"neighbours": Figure(played.parameters.degree, "k")}
    for step, seconds in played.client_s.items():
        found[f"client_{step}_s"] = Figure(seconds, f"s, {label if step in SCALED else 'measured'}")
    found["client_s"] = Figure(sum(played.client_s.values()), f"s, {label}")
    found["client_sent_bytes"] = Figure(played.up / clients, "bytes, measured")
    found["client_received_bytes"] = Figure(played.down / clients, "bytes, measured")
    for step, seconds in played.server_s.items():
        found[f"server_{step}_s"] = Figure(seconds, "s, measured")
    found["server_s"] = Figure(sum(played.server_s.values()), "s, measured")
    found["server_received_mb"] = Figure(played.up / 1e6, "MB, measured")
    found["server_sent_mb"] = Figure(played.down / 1e6, "MB, measured")
    found["server_growth_mb"] = Figure(growth, "MB, with all clients")
    found["core_s"] = Figure(played.core_s, f"core-s, {label}")
    found["core_s_extrapolated"] = Figure(played.extrapolated, "share of it")
    return {f"{name}_{cell}": figure for name, figure in found.items()}
