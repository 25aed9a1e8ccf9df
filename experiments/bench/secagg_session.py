"""One session of secure aggregation, all parties in this process, timed by party and step.

Keys, shares, boxes, messages, checks and the server's sums are real for all clients. Only what a client does to each of
its coordinates, encoding and masking, may be done to some of them ("sampled"), and its seconds be scaled to the whole.
All seconds are of the processor, so that other work on the machine counts little.

Legend: L ring coordinates, S of them sampled.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from experiments.bench.harness import seconds_of
from strategies.core.seeds import rng
from strategies.secagg.client import Client
from strategies.secagg.masks import wrap
from strategies.secagg.messages import Keys, MaskedSum, Shares, Unmasking
from strategies.secagg.parameters import Parameters, choose
from strategies.secagg.primitives import Mode
from strategies.secagg.protocol import Phase, Session
from strategies.secagg.ring import Sum, Sums
from strategies.secagg.server import Server

SEED = 1
SCALED = ("encode", "mask")  # a client's steps whose work grows with its vector
T = TypeVar("T")
Answer = TypeVar("Answer", Keys, Shares, MaskedSum, Unmasking)


class Clock:
    """Seconds of this thread's processor time by step."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __call__(self, step: str, work: Callable[..., T], *arguments: object) -> T:
        """Returns what `work` returns, and adds its time to the step's."""
        (seconds,), result = seconds_of(lambda: work(*arguments), clock=time.thread_time)
        self.seconds[step] += seconds
        return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Played:
    """A session's sum over the sampled coordinates, what it should be, and what it cost.

    `client_s` is of a mean client, scaled to its whole vector: `scale` is 1 where all of it was masked. `up` and `down`
    are the bytes that all clients sent and received.
    """

    parameters: Parameters
    total_S: np.ndarray
    expected_S: np.ndarray
    scale: float
    client_s: dict[str, float]
    server_s: dict[str, float]
    up: int
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
    sums = Sums((Sum("delta", coordinates, 1.0, "weighted"),), clients, bits)
    return Session(0, 0, choose(clients), sums, mode)


def play(session: Session, sampled: int, gone: Mapping[int, Phase]) -> Played:
    """Plays a session with seeded updates. A client that is `gone` in a phase did its work and the work is lost."""
    sums, everybody = session.sums, range(session.parameters.clients)
    sampled = min(sampled, sums.length)
    updates = rng(SEED, 0, -1, "sample").uniform(-1.1, 1.1, sampled + len(everybody)).astype(np.float32)
    client, server, traffic = Clock(), Clock(), Counter[str]()
    members = {u: Client(session, u) for u in everybody}
    party = Server(session, everybody)
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
        part = sums.encode_part("delta", updates[u : u + sampled - len(head)], weight, rng(SEED, 0, u, "rounding"))
        return np.concatenate([head, part])

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
    present = sorted(key.client for key in keys)
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
    steps = {step: s / len(everybody) * (scale if step in SCALED else 1) for step, s in client.seconds.items()}
    up, down = traffic["up"], traffic["down"]
    return Played(session.parameters, total_S, expected_S, scale, steps, dict(server.seconds), up, down)
