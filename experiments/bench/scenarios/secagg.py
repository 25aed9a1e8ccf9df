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
from typing import Literal

import numpy as np

from engine.records.metrics import read_log
from experiments.bench.harness import DEMO, SMALL_DEMO, Bench, largest_difference, metric, seconds_of
from experiments.bench.secagg_session import SCALED, Played, play, session_of
from experiments.config.recipe import parse_recipe
from experiments.preflight.processes import in_fresh_process, memory
from experiments.runs.api import Run
from strategies.secagg.masks import Masks
from strategies.secagg.protocol import Phase

COORDINATES, KEYS, TRIES = 5_000_000, 31, 7  # of the mask loop: a client's vector, and its masks with 30 neighbors
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

    @classmethod
    def of(cls, run: Run) -> "Rounds":
        """Reads a run's metrics and ledger."""
        losses = metric(run, "loss", "train")
        received = [(row["party"], row["kind"]) for row in read_log(run.folder / "ledger").to_pylist()]
        sessions = received.count(("server", "key")) / len(losses)  # each begins with its clients' keys
        up, down = (statistics.mean(metric(run, f"protocol_bytes_{way}")) / 1e6 for way in ("up", "down"))
        return cls(losses, metric(run, "round_s")[1:], sessions, up, down)


CHANGES = ('name="bench-secagg"', "cohort.size=32", "evaluate.every=0", "evaluate.rows=1")
# There and back, so that a machine that becomes slower or faster favors neither mode.
FULL = Size(
    *((32, 100, 1000), (100_000, 1_000_000, COORDINATES), 2**18),
    *(("off", "full", "full", "off"), (*CHANGES, "rounds=4")),
)
SMALL = Size((8, 32), (20_000,), 2**14, ("off", "full"), (*CHANGES, "rounds=2", *SMALL_DEMO))


def secagg(bench: Bench) -> None:
    """Measures masks, sessions and the demo's rounds; ValueError where secure aggregation gives other sums."""
    size = SMALL if bench.small else FULL
    bench.say("the same bits with masks and without, with drop-outs in every phase")
    refuse_other_bits()
    bench.add("full_equals_ideal", 1.0, "1: bit for bit")
    rounds: dict[Mode, list[Rounds]] = {"off": [], "full": []}
    for turn, mode in enumerate(size.modes, 1):
        bench.say(f"the demo with secure aggregation {mode!r}, run {turn} of {len(size.modes)}")
        recipe = parse_recipe(DEMO, [*size.changes, f'privacy.secagg.mode="{mode}"'])
        rounds[mode].append(Rounds.of(bench.run(recipe, str(turn))[0]))
    add_rounds(bench, rounds["off"], rounds["full"])
    bench.say(f"the mask loop: {KEYS} keys, {COORDINATES:,} coordinates")
    bench.add("mask_gb_per_s", mask_speed(), "GB/s of one core")
    bench.add("core_s_1000x5m", None, "core-s")  # in the small size there is no such session
    for clients in size.cohorts:
        for coordinates in size.coordinates:
            bench.say(f"a session of {clients:,} clients with {coordinates:,} coordinates")
            played, growth = in_fresh_process(play_session, clients, coordinates, size.sampled)
            _add_session(bench, played, growth, f"{clients}x{NAMES[coordinates]}")


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
    seconds, _ = seconds_of(lambda: masks.apply(values_L), TRIES, time.thread_time)
    return KEYS * values_L.nbytes / statistics.median(seconds) / 1e9


def add_rounds(bench: Bench, plain: list[Rounds], secured: list[Rounds]) -> None:
    """Adds the times and messages of both kinds of runs; ValueError if their losses differ."""
    plain_losses, secured_losses = zip(*((p.losses, s.losses) for p in plain for s in secured), strict=True)
    what = "the losses of the plain and the secured run, in nats per token,"
    apart = largest_difference(what, plain_losses, secured_losses, LOSSES)
    before, after = (statistics.median(s for run in runs for s in run.seconds) for runs in (plain, secured))
    first, last = (statistics.median(run.seconds) for run in (plain[0], plain[-1]))
    bench.add("round_ratio_n32", after / before, "ratio")
    noise = last / first if len(plain) > 1 else None
    bench.add("plain_ratio_n32", noise, "ratio of two plain runs: noise")
    bench.add("plain_round_s_n32", before, "s of wall time")
    bench.add("secured_round_s_n32", after, "s of wall time")
    for name, runs in (("plain", plain), ("secured", secured)):
        bench.add(f"{name}_round_mb_up_n32", runs[0].mb_up, "MB")
        bench.add(f"{name}_round_mb_down_n32", runs[0].mb_down, "MB")
    bench.add("secured_round_sessions_n32", secured[0].sessions, "sessions")
    bench.add("losses_apart_n32", apart, "nats per token")


def play_session(clients: int, coordinates: int, sampled: int) -> tuple[Played, float | None]:
    """A session, and the most MB that this process, which is the server and all clients, has grown by."""
    play(session_of(4, 10), sampled, {})  # loads what the session needs, which is not measured
    before = memory().get("VmRSS")
    # The phase where a drop-out costs most: the clients have masked, and the server must compute their masks itself.
    gone: Mapping[int, Phase] = {u: "masked input" for u in range(max(1, int(DROPPED * clients)))}
    played = play(session_of(clients, coordinates), sampled, gone)
    if not np.array_equal(played.total_S, played.expected_S):
        raise ValueError(f"the session of {clients} clients gives another sum than that of their vectors")
    return played, None if before is None else memory()["VmHWM"] - before


def _add_session(bench: Bench, played: Played, growth: float | None, cell: str) -> None:
    """Adds all figures of a session, each with the cell at its name's end."""
    clients, label = played.parameters.clients, "extrapolated" if played.scale > 1 else "measured"
    figures: dict[str, tuple[float | None, str]] = {"neighbors": (played.parameters.degree, "k")}
    for step, seconds in played.client_s.items():
        figures[f"client_{step}_s"] = (seconds, f"s, {label if step in SCALED else 'measured'}")
    figures["client_s"] = (sum(played.client_s.values()), f"s, {label}")
    figures["client_sent_bytes"] = (played.up / clients, "bytes, measured")
    figures["client_received_bytes"] = (played.down / clients, "bytes, measured")
    figures |= {f"server_{step}_s": (seconds, "s, measured") for step, seconds in played.server_s.items()}
    figures["server_s"] = (sum(played.server_s.values()), "s, measured")
    figures["server_received_mb"] = (played.up / 1e6, "MB, measured")
    figures["server_sent_mb"] = (played.down / 1e6, "MB, measured")
    figures["server_growth_mb"] = (growth, "MB, with all clients")
    figures["core_s"] = (played.core_s, f"core-s, {label}")
    figures["core_s_extrapolated"] = (played.extrapolated, "share of it")
    for name, (value, unit) in figures.items():
        bench.add(f"{name}_{cell}", value, unit)
