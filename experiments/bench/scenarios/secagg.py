"""`fedpost bench secagg`: what secure aggregation costs clients, the server and a round.

No figure is printed unless mode "full" gives the bits of "ideal" with drop-outs in every phase, each measured session
the sum of what its clients encoded, and the secured demo the losses of the plain one.

A session plays all parties in one process. Keys, shares, boxes, messages, checks and the server's sums are real for all
clients. Clients may encode and mask a sample of their coordinates alone; these seconds are scaled to the whole, and
their units say "extrapolated". Seconds of clients and server are one core's processor time, on which other work on the
machine has little effect; those of rounds are wall time. Legend: L ring coordinates, S of them sampled.
"""

import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from engine.records.metrics import read_log
from experiments.bench.harness import DEMO, SMALL_DEMO, Bench, largest_difference, metric, seconds_of
from experiments.config.recipe import parse_recipe
from experiments.preflight.processes import in_fresh_process, memory
from experiments.runs.api import Run
from strategies.core.seeds import rng
from strategies.secagg.client import Client
from strategies.secagg.masks import Masks, wrap
from strategies.secagg.messages import Keys, MaskedSum, Shares, Unmasking
from strategies.secagg.parameters import Parameters, choose
from strategies.secagg.primitives import Mode
from strategies.secagg.protocol import Phase, Session
from strategies.secagg.ring import Sum, Sums
from strategies.secagg.server import SecAggServer

SEED = 1
SCALED = ("encode", "mask")  # a client's steps whose work grows with its vector
Answer = TypeVar("Answer", Keys, Shares, MaskedSum, Unmasking)
COORDINATES, KEYS, TRIES = 5_000_000, 31, 7  # of the mask loop: a client's vector, and its masks with 30 neighbors
# Cohort, coordinates, bits. Complete graphs, and a ring; vectors that end within a piece of the mask loop.
GATES = ((16, 70_001, 32), (32, 5_000, 20), (100, 1_000, 32))
DROPPED = 0.05  # of each cohort, which is what k and t are chosen for
LOST: dict[int, Phase] = {0: "keys", 2: "shares", 5: "masked input", 7: "unmask"}  # clients of a gate's session
LOSSES = 1e-3  # nats per token between the plain and the secured run: both round differently
DemoMode = Literal["off", "full"]
NAMES = {20_000: "20k", 100_000: "100k", 1_000_000: "1m", 5_000_000: "5m"}


class Size(NamedTuple):
    """How large a run is."""

    cohorts: tuple[int, ...]  # of the sessions
    coordinates: tuple[int, ...]
    sampled: int  # coordinates that clients mask
    modes: tuple[DemoMode, ...]  # of the demo's runs in their order
    changes: tuple[str, ...]


class Rounds(NamedTuple):
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
FULL = Size((32, 100, 1000), (10**5, 10**6, COORDINATES), 2**18, ("off", "full", "full", "off"), (*CHANGES, "rounds=4"))
SMALL = Size((8, 32), (20_000,), 2**14, ("off", "full"), (*CHANGES, "rounds=2", *SMALL_DEMO))


class Clock(defaultdict[str, float]):
    """Seconds of this thread's processor time by step."""

    def __call__(self, step: str, work: Callable[..., Any], *arguments: object) -> Any:
        """Returns what `work` returns, and adds its time to the step's."""
        (seconds,), result = seconds_of(lambda: work(*arguments), clock=time.thread_time)
        self[step] += seconds
        return result


class Played(NamedTuple):
    """A session's sum over the sampled coordinates, what it should be, and what it cost."""

    parameters: Parameters
    total_S: np.ndarray
    expected_S: np.ndarray
    scale: float  # 1 if all coordinates were masked
    client_s: dict[str, float]  # of a mean client, scaled to its whole vector
    server_s: dict[str, float]
    up: int  # bytes that all clients sent
    down: int

    @property
    def core_s(self) -> float:
        """Seconds of all clients and the server."""
        return self.parameters.clients * sum(self.client_s.values()) + sum(self.server_s.values())

    @property
    def extrapolated(self) -> float:
        """The share of `core_s` that was not spent, but scaled up from what was."""
        scaled = sum(self.client_s[step] for step in SCALED) * (1 - 1 / self.scale)
        return self.parameters.clients * scaled / self.core_s


def session_of(clients: int, coordinates: int, mode: Mode = "full", bits: int = 32) -> Session:
    """A session for weighted vectors of `coordinates`, with the k and t that `choose` gives for the cohort."""
    return Session(0, 0, choose(clients), Sums((Sum("delta", coordinates, 1.0, "weighted"),), clients, bits), mode)


def play(session: Session, sampled: int, gone: Mapping[int, Phase]) -> Played:
    """Plays a session with seeded updates. A client that is `gone` in a phase did its work and the work is lost."""
    sums, everybody = session.sums, range(session.parameters.clients)
    sampled = min(sampled, sums.length)
    updates = rng(SEED, 0, -1, "sample").uniform(-1.1, 1.1, sampled + len(everybody)).astype(np.float32)
    client, server, traffic = Clock(float), Clock(float), Counter[str]()
    members = {u: Client(session, u) for u in everybody}
    party = SecAggServer(session, everybody)
    expected_S = np.zeros(sampled, np.uint32)
    vector_L = np.arange(sums.length, dtype=np.uint32)  # written to: pages of zeros would all be one, in the cache

    def answers(phase: Phase, asked: Iterable[int], ask: Callable[[int], Answer]) -> Iterator[Answer]:
        for u in asked:
            answer = ask(u)
            traffic["up"] += answer.nbytes
            if gone.get(u) != phase:
                yield answer

    def encode(u: int) -> np.ndarray:
        """The sampled part of a client's ring vector; each client's update is another window of the same numbers."""
        weight = (1 + u % 7) / 7
        head = sums.encode_head(weight)
        piece = sums.encode_piece("delta", updates[u : u + sampled - len(head)], weight, rng(SEED, 0, u, "rounding"))
        return np.concatenate([head, piece])

    def masked(u: int) -> MaskedSum:
        encoded_S = client("encode", encode, u)
        if gone.get(u) != "masked input":
            np.add(expected_S, encoded_S, out=expected_S)
        masks = client("open", members[u].masks, inboxes[u])
        client("mask", masks.apply, encoded_S)
        vector_L[:sampled] = encoded_S
        return MaskedSum((u,), vector_L, sums.nbytes)

    keys = list(answers("keys", everybody, lambda u: client("keys", members[u].keys)))
    listed = server("key_list", party.key_list, keys)
    traffic["down"] += len(keys) * listed.nbytes
    present = [key.client for key in keys]
    shares = list(answers("shares", present, lambda u: client("shares", members[u].shares, listed)))
    inboxes = server("inboxes", party.inboxes, shares)
    traffic["down"] += sum(inbox.nbytes for inbox in inboxes.values())
    for masked_sum in answers("masked input", sorted(inboxes), masked):
        server("add", party.add, masked_sum)
    server("recover", party.survivors)
    requests = server("recover", party.requests)
    traffic["down"] += sum(request.nbytes for request in requests.values())
    given = list(answers("unmask", requests, lambda u: client("unmask", members[u].unmask, requests[u])))
    server("recover", party.unmask, given)
    total_S = server("unmask", party.total)[:sampled]
    wrap(expected_S, sums.bits)
    scale = sums.length / sampled
    steps = {step: s / len(everybody) * (scale if step in SCALED else 1) for step, s in client.items()}
    return Played(session.parameters, total_S, expected_S, scale, steps, dict(server), traffic["up"], traffic["down"])


def secagg(bench: Bench) -> None:
    """Measures masks, sessions and the demo's rounds; ValueError where secure aggregation gives other sums."""
    size = SMALL if bench.small else FULL
    bench.say("the same bits with masks and without, with drop-outs in every phase")
    refuse_other_bits()
    bench.add("full_equals_ideal", 1.0, "1: bit for bit")
    rounds: dict[DemoMode, list[Rounds]] = {"off": [], "full": []}
    for turn, mode in enumerate(size.modes, 1):
        bench.say(f"the demo with secure aggregation {mode!r}, run {turn} of {len(size.modes)}")
        recipe = parse_recipe(DEMO, [*size.changes, f'privacy.secagg.mode="{mode}"'])
        rounds[mode].append(Rounds.of(bench.run(recipe, str(turn))[0]))
    add_rounds(bench, rounds["off"], rounds["full"])
    bench.say(f"the mask loop: {KEYS} keys, {COORDINATES:,} coordinates")
    keys = tuple(os.urandom(32) for _ in range(KEYS))
    masks, values_L = Masks(32, keys[::2], keys[1::2]), np.ones(COORDINATES, np.uint32)
    seconds, _ = seconds_of(lambda: masks.apply(values_L), TRIES, time.thread_time)
    speed = KEYS * values_L.nbytes / statistics.median(seconds) / 1e9
    bench.add("mask_gb_per_s", speed, "GB/s of one core")
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
            what = f"secure aggregation of {clients} clients gives other bits than the sum of their vectors"
            raise ValueError(f"{what}: its times say nothing")


def add_rounds(bench: Bench, plain: list[Rounds], secured: list[Rounds]) -> None:
    """Adds the times and messages of both kinds of runs; ValueError if their losses differ."""
    plain_losses, secured_losses = zip(*((p.losses, s.losses) for p in plain for s in secured), strict=True)
    what = "the losses of the plain and the secured run, in nats per token,"
    apart = largest_difference(what, plain_losses, secured_losses, LOSSES)
    before, after = (statistics.median(s for run in runs for s in run.seconds) for runs in (plain, secured))
    bench.add("round_ratio_n32", after / before, "ratio")
    noise = statistics.median(plain[-1].seconds) / statistics.median(plain[0].seconds) if len(plain) > 1 else None
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
    gone: dict[int, Phase] = dict.fromkeys(range(max(1, int(DROPPED * clients))), "masked input")
    played = play(session_of(clients, coordinates), sampled, gone)
    if not np.array_equal(played.total_S, played.expected_S):
        raise ValueError(f"the session of {clients} clients gives another sum than that of their vectors")
    return played, None if before is None else memory()["VmHWM"] - before


def _add_session(bench: Bench, played: Played, growth: float | None, cell: str) -> None:
    """Adds all figures of a session, each with the cell at its name's end."""
    clients, label = played.parameters.clients, "extrapolated" if played.scale > 1 else "measured"
    steps = played.client_s.items()
    for name, value, unit in (
        ("neighbors", played.parameters.degree, "k"),
        *((f"client_{step}_s", s, f"s, {label if step in SCALED else 'measured'}") for step, s in steps),
        ("client_s", sum(played.client_s.values()), f"s, {label}"),
        ("client_sent_bytes", played.up / clients, "bytes, measured"),
        ("client_received_bytes", played.down / clients, "bytes, measured"),
        *((f"server_{step}_s", s, "s, measured") for step, s in played.server_s.items()),
        ("server_s", sum(played.server_s.values()), "s, measured"),
        ("server_received_mb", played.up / 1e6, "MB, measured"),
        ("server_sent_mb", played.down / 1e6, "MB, measured"),
        ("server_growth_mb", growth, "MB, with all clients"),
        ("core_s", played.core_s, f"core-s, {label}"),
        ("core_s_extrapolated", played.extrapolated, "share of it"),
    ):
        bench.add(f"{name}_{cell}", value, unit)
