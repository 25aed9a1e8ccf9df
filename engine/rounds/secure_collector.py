"""A round's local work under secure aggregation: which sums the server may learn, and what it learns of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine.aggregation.ring_encoding import Plan, live_lengths, ring_sums, rounding
from engine.aggregation.secure_clients import Authority
from engine.config.availability import DIED_WITH_SLOT, LEFT_OUT, Leaving, Trace
from engine.config.federation import Federation
from engine.config.sections import Lora
from engine.messages.errors import RunError
from engine.messages.events import Fault
from engine.messages.reports import DOWN, FLOAT_BYTES, Report
from engine.messages.tasks import Work
from engine.records.journal import Journal, SumRefused
from engine.rounds.collectors import Collected, reasons
from engine.rounds.secure_round import Message, Relay
from engine.rounds.server import Shards
from engine.scheduling.pool import Pool
from strategies.core.errors import StrategyError
from strategies.core.layout import Layout
from strategies.secagg.protocol import Session
from strategies.secagg.ring import Sums

Shortfall = Callable[[Sequence[Report], int, int], str | None]  # see Quorum

MOST_CLIPPED = 0.01  # a share of coordinates: more is warned about


@dataclass(frozen=True)
class SecureCollector:
    """The server learns sums and nothing else. `most_tokens` bound what one client trains on in a round.

    `journal` knows the sums that the run has unmasked. `shortfall` judges a round's reports before their sum is known,
    since a round that does not count leaves the model as it was.
    """

    federation: Federation
    relay: Relay
    shards: Shards
    layout: Layout
    most_tokens: int
    journal: Journal
    shortfall: Shortfall
    trace: Trace | None = None

    def collect(self, work: Work, broadcast: Any) -> Collected:
        """Plays one secured round; it is aborted if the cohort, or what is left of it, is too small."""
        secagg, cohort = self.federation.privacy.secagg, work.clients
        assert secagg.mode != "off"
        if not len(cohort):
            return Collected(by_client=False)
        plan, round_ = broadcast.dp, broadcast.round + 1
        least = max(secagg.min_contributors, plan.least if plan is not None and plan.adds_to == "ring" else 0)
        too_few: str | None = None

        def refuse(clients: Sequence[int], reports: Sequence[Report]) -> None:
            nonlocal too_few
            self._refuse_thin(clients, least)
            too_few = self.shortfall(reports, len(cohort), round_)
            if too_few is not None:
                raise SumRefused(too_few)

        def admit(clients: Sequence[int]) -> None:
            try:
                self.journal.admit(round_, clients, lambda apart: self._refuse_thin(apart, secagg.min_contributors))
            except SumRefused as error:
                self.relay.pool.faults.append(Fault("round", str(round_), str(error)))
                raise

        try:
            self._refuse_thin(cohort.tolist(), least)
            parameters = secagg.parameters(len(cohort))
        except (SumRefused, StrategyError) as error:
            return Collected(by_client=False, aborted=str(error))
        sums = self.sums(plan, broadcast.clip, len(cohort), broadcast.round)
        gone = self._gone(work, broadcast.round)
        session = Session(broadcast.round, 0, parameters, sums, secagg.mode)
        leaving = {client: leaves.before for client, leaves in gone.items()}
        relayed = self.relay.play(session, work, broadcast, broadcast.lanes, leaving, refuse, admit)

        reports, totals, aborted = relayed.reports, relayed.totals, relayed.aborted
        if totals is not None and totals.weight == 0:
            totals, aborted = None, "all weights are less than the ring's steps: raise privacy.secagg.bits"
        unmasked, figures = ([], {}) if totals is None else self.shards.unmasked(totals, plan, broadcast.round)
        clipped = None if totals is None else self._clipped(figures, totals.count, broadcast.round)
        down = round(sum(report.metrics[DOWN] for report in reports))
        sessions_bytes = relayed.sessions * self.relay.pool.size * FLOAT_BYTES * sums.length
        return Collected(
            reports,
            unmasked,
            figures,
            messages=[Message("client", "sum", len(reports) if down else 0, down), *relayed.messages],
            gone=reasons(gone, reports) | dict.fromkeys(relayed.lost, DIED_WITH_SLOT),
            by_client=False,
            aborted=aborted,
            sessions=relayed.sessions,
            store_bytes=FLOAT_BYTES * self.layout.size + sessions_bytes,
            busy=relayed.busy,
            too_few=too_few if relayed.totals is None else None,
            clipped=clipped,
        )

    def client_clip(self, plan: Plan, clip: float, clients: int, round_: int) -> float:
        """Returns the norm to which clients clip: less than the server counts on, by what a ring's rounding may add."""
        sums = self.sums(plan, clip, max(1, clients), round_)
        if plan is None or plan.adds_to != "sum":
            return clip
        room = clip - rounding(sums)
        if room < clip / 2:
            raise RunError(
                f"a ring of {sums.bits} bits rounds away more than half of privacy.dp.clip = {clip:g} with "
                f"{clients} clients: raise privacy.secagg.bits, or lower cohort.size"
            )
        return room

    def sums(self, plan: Plan, clip: float, clients: int, round_: int) -> Sums:
        """Returns what a round's session with `clients` clients adds up; StrategyError if the ring is too small."""
        return ring_sums(self.federation, self.layout, plan, clip, clients, self.most_tokens, round_)

    def _clipped(self, figures: dict[str, float], clients: int, round_: int) -> float:
        """Returns the share of the clients' coordinates that bounds have cut, and warns of a large one."""
        lengths = live_lengths(self.federation, self.layout, round_)
        share = max(0.0, figures["clipped"]) / (clients * max(1, sum(lengths.values())))
        if share > MOST_CLIPPED:
            bounds = "privacy.secagg.bound" + (" or bounds" if len(lengths) > 1 else "")
            why = f"{share:.1%} of the coordinates that clients sent are beyond what the ring takes, and were cut"
            self.relay.pool.faults.append(Fault("round", str(round_ + 1), f"{why}: raise {bounds}"))
        return share

    def _gone(self, work: Work, round_: int) -> dict[int, Leaving]:
        """Who drops out; of a round whose sum was asked for before, everybody who was not in it."""
        federation, before = self.federation, self.journal.clients(round_ + 1)
        gone = federation.clients.availability.gone(work.clients, federation.seed, round_, self.trace)
        if before is None:
            return gone
        others = [client for client in work.clients.tolist() if client not in before]
        return {client: Leaving("masked input", LEFT_OUT) for client in others} | gone

    def _refuse_thin(self, clients: Sequence[int], least: int) -> None:
        """Raises SumRefused if a sum would be of so few that it tells of one of them, or has too little noise."""
        if len(clients) < least:
            raise SumRefused(f"{len(clients)} clients are there, and it takes {least}")
        peft, rule = self.federation.model.peft, self.federation.strategy
        if not isinstance(peft, Lora) or not peft.ranks or rule.sends_products:
            return
        ranks = [peft.rank_of(int(client), self.federation.seed) or peft.r for client in clients]
        contributors = self.federation.privacy.secagg.min_contributors
        for rank in sorted(set(ranks)):
            count = sum(other >= rank for other in ranks)
            if count < contributors:
                raise SumRefused(
                    f"{count} clients have rank {rank} or more, and privacy.secagg.min_contributors asks "
                    f"for {contributors} for each coordinate"
                )


def start_relay(pool: Pool, on_slot_death: str) -> Relay:
    """Returns a relay with an authority of its own.

    The authority runs beside the driver: elsewhere the end of its node would look like the death of each slot that
    asks it.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    authority = ray.remote(Authority).options(num_cpus=0, scheduling_strategy=here).remote()
    return Relay(pool, authority, on_slot_death)
