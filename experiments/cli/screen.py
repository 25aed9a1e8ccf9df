"""The terminal's view of a run: its progress and its final table."""

import textwrap
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from datasets_partition.sources.location import is_local, within
from engine.messages.events import DriverLost, Evaluated, Event, Preparing, RoundDone, RunDone, Sample, Started
from engine.records.metrics import with_unit
from experiments.report.terminal import console, inert, plain

SPLITS = {"heldout": "held-out rows", "unseen": "unseen clients", "server": "the server's rows"}


class Screen:
    """Shows each event of a run in a line, and below them a progress bar if the output is a terminal."""

    def __init__(self, rounds: int, out: str | None = None) -> None:
        self.elsewhere = None if out is None or is_local(out) else out
        self.console = console()
        self.rounds, self.started = rounds, False
        step, hidden = TextColumn("{task.description}", markup=False), not self.console.is_terminal
        columns = (SpinnerColumn(), step, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, disable=hidden)
        self.task = self.progress.add_task("preparing", total=rounds)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case DriverLost(why):
                self.say(f"the driver ended ({why}); a new one continues")
            case Preparing(step):
                self.progress.update(self.task, description=inert(step))
                self._line(f"{step} ...", "dim")
            case Started():
                self._started(event)
            case RoundDone():
                self._round(event)
            case Evaluated() if not event.losses:
                pass  # nothing is held out
            case Evaluated(round_, baseline=None):
                self.console.print(plain(f"round {round_:>3}/{self.rounds} "), plain(_means(event), "bold"))
            case Evaluated(baseline=baseline):
                self._line(f"{str(baseline).replace('_', ' '):>13}  {_means(event)}")
            case RunDone():
                self._finished(event)

    def say(self, what: str) -> None:
        """Shows a sentence that stands out."""
        self._line(what, "yellow")

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(plain(text, style))

    def _started(self, event: Started) -> None:
        self.started = True
        slots = f"{event.slots} slots" if event.slots > 1 else "1 slot"
        fewer = f" ({event.asked} were asked for, no more fit)" if event.asked not in ("auto", event.slots) else ""
        model = f"{event.parameters:,} trained parameters on a shared base of {event.base_bytes / 1e6:.1f} MB"
        self._line(f"{event.training} training clients and {event.unseen} unseen ones on {slots}{fewer}; {model}")
        if event.lanes > 1:
            self._line(f"clients train in {event.lanes} lanes of each slot")
        if event.dropped_rows:
            self._line(f"{event.dropped_rows:,} rows dropped: nothing to learn is left of them within train.max_length")
        if event.without_gpu:
            missing = f"torch sees no GPU in {event.without_gpu} of {slots}, although clients.num_gpus asks for one"
            self.say(f"{missing}: they run on the CPU")
        for note in event.notes:
            self.say(note)
        if event.resumed is not None:
            self._line(f"continuing from the checkpoint of round {event.resumed}")
        self.progress.update(self.task, description="round", completed=event.resumed or 0)

    def _round(self, event: RoundDone) -> None:
        self.progress.update(self.task, description="round", completed=event.round)
        loss = f"train loss {event.loss:.3f}" if event.clients else "nobody trained  "
        dropped = f" ({len(event.gone)} dropped out)" if event.gone else ""
        speed = f"{event.seconds:5.1f} s  {event.tokens_per_s:,.0f} tokens/s"
        self._line(f"round {event.round:>3}/{self.rounds}  {loss}  {event.clients} clients{dropped}  {speed}")
        if event.aborted is not None:
            self.say(f"  no sum, the model stays as it was: {event.aborted}")
        for fault in event.faults:
            if fault.kind != "client" or fault.who not in event.failed:
                self.say(f"  {fault.kind} {fault.who}: {fault.why}")
        for client, why in event.failed.items():
            self.say(f"  client {client!r} was left out: {why}")
        reasons: dict[str, list[str]] = {}  # without their details
        for client, why in event.gone.items():
            reasons.setdefault(why.partition(":")[0], []).append(client)
        for why, clients in reasons.items():
            few = ", ".join(map(repr, clients[:5])) + ", ..." * (len(clients) > 5)
            self._line(f"  {len(clients):,} client{'s' * (len(clients) > 1)} {why}: {few}", "dim")
        if event.round == self.rounds:
            if event.epsilon is not None:
                self._line(f"privacy: {event.epsilon}")
            self.progress.update(self.task, description="evaluating, exporting")

    def _finished(self, event: RunDone) -> None:
        self.progress.stop()
        for number, sample in enumerate(event.samples, 1):
            self.console.print(_sample(number, sample))
        for name, columns in {"loss": event.losses, **event.figures}.items():
            table = _table(with_unit(name, event.units.get(name, "")), columns, percent=name == "loss")
            if table.row_count:
                self.console.print(table)
        clear, private = (event.losses.get(column, {}).get("heldout") for column in ("not private", "end"))
        if clear is not None and private is not None:
            cost = f"{private - clear:+.3f} {event.units.get('loss', '')} on held-out rows"
            self._line(f"the cost of privacy: {cost}, {private:.3f} instead of {clear:.3f}")
        for name, what in (("model", "the trained model"), ("report.html", "the report"), ("metrics", "all figures")):
            self._line(f"{what:>17}: {within(self.elsewhere or str(event.folder), name)}")


def _means(event: Evaluated) -> str:
    """Each split's loss, and the figures beside it."""
    texts = {split: f"{SPLITS[split]} {loss:.3f}" for split, loss in event.losses.items()}
    for name, means in event.figures.items():
        texts = {split: f"{text}, {name} {means[split]:.3f}" for split, text in texts.items()}
    return "  ".join(texts.values())


def _table(title: str, columns: dict[str, dict[str, float]], *, percent: bool) -> Table:
    """A row for each split, with the change from the start to the end, in percent of the start or as a difference."""
    headers = [Column(plain(name), justify="right") for name in (*columns, "change")]
    table = Table("rows of", *headers, title=plain(title), title_justify="left")
    for split, rows in SPLITS.items():
        values = {column: means.get(split) for column, means in columns.items()}
        first, last = values.get("round 0"), values.get("end")
        if first is not None and last is not None:
            cells = ["" if value is None else f"{value:.3f}" for value in values.values()]
            share = f"{100 * (last - first) / abs(first):+.1f}%" if first else ""
            table.add_row(rows, *cells, share if percent else f"{last - first:+.3f}")
    return table


def _sample(number: int, sample: Sample) -> Table:
    """A prompt's signature, and below it what the author and the model wrote."""
    signature = next((line for line in sample.prompt.splitlines() if line.startswith(("def ", "class ", "async "))), "")
    table = Table(title=plain(f"sample {number}: {signature[:90]}"), title_justify="left", show_header=False, box=None)
    for name, text in (("author", sample.reference), ("before", sample.before), ("after", sample.after)):
        table.add_row(plain(name, "dim"), plain(textwrap.shorten(text, 200, placeholder=" ...")))
    return table
