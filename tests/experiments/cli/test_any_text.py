"""Any text from outside, through all that prints: it does not fail, shows the text as it is, and commands nothing.

Names that look like markup, escape sequences, marks that turn the direction of writing, lone surrogates.
"""

import ast
import errno
import io
import os
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import escape

from engine.messages.errors import RunError
from engine.messages.events import DriverLost, Fault, Preparing, RoundDone, RunDone, Sample, Started
from experiments.bench import results as bench_results
from experiments.bench.harness import Figure
from experiments.bench.results import Cell, render
from experiments.cli import commands, contract, partition
from experiments.cli.commands import guarded
from experiments.cli.screen import Screen
from experiments.preflight import dry
from experiments.report import page, terminal
from experiments.report.pictures import _short_each
from experiments.report.run_folder import OF_CLIENTS, Run
from experiments.report.terminal import console, inert, inert_lines, plain, say
from experiments.runs import submit
from experiments.runs.driving import RunStopped
from strategies.contract.case import DoesNotApply

ROOT = Path(__file__).resolve().parents[3]
PIECES = (
    *("team[/infra]", "dependabot[bot]", "[bold]", "[/]", ":smile:", "[link=x]", "%s{0}", "$\\frac$", "<b>&amp;"),
    *("\x1b]52;c;eA==\x07", "\x1b[2J", "\x9b2J", "\x00", "\r", "\t", "\n", "\x85", "\u2028", "\u202e", "\u2066"),
    *("\u200b", "\ud800", "\U000e0041", "\uffff", "é", "e\u0301", "名前", "👩\u200d💻", "\xa0", "\u3000"),
)
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.lists(st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=())), max_size=6).map("".join),
)

UNTIMED = settings(deadline=None)


def missing_file(name):
    return OSError(errno.ENOENT, "no such file", name)


@pytest.fixture(autouse=True, scope="module")
def wide():
    """A terminal on which nothing is wrapped."""
    with mock.patch.dict(os.environ, {"COLUMNS": "5000"}):
        yield


def printed(call, *arguments, **options):
    """What a call prints on stdout and stderr, if it stays within what a terminal only shows."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        try:
            call(*arguments, **options)
        except SystemExit as end:
            assert end.code in (1, 2, 130)
    return harmless(output.getvalue())


def harmless(shown):
    for character in set(shown) - {"\n"}:
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}, ascii(character)
    return shown


def without_spaces(text):
    return "".join(text.split())


def assert_shows(shown, *texts):
    for text in texts:
        assert without_spaces(text) in without_spaces(shown), ascii((text, shown))


@given(TEXT)
@example("team[/infra]")
@UNTIMED
def test_printable_text_stays_as_it_is_and_all_else_is_an_escape(text):
    shown = harmless(inert(text))
    assert "\n" not in shown and inert(shown) == shown
    assert inert_lines(text).split("\n") == [inert(line) for line in text.split("\n")]
    if text.isprintable():
        assert shown == text


def test_escapes_are_those_of_python():
    assert inert("a\x1b]52;c;eA==\x07\n\u202e\ud800 [b]é\xa0名") == "a\\x1b]52;c;eA==\\x07\\n\\u202e\\ud800 [b]é\xa0名"
    assert plain("dependabot[bot] :smile:").plain == "dependabot[bot] :smile:"


@given(TEXT, TEXT)
@UNTIMED
def test_a_runs_events(name, why):
    def show(*events):
        with Screen(3) as screen:
            for event in events:
                screen.show(event)

    assert_shows(printed(show, Preparing(why)), inert(why))
    assert_shows(printed(show, DriverLost(why)), inert(why))
    started = Started(1, 1, 5, 1, 0, 10, 10, 0, None, 1, (name, why))
    assert_shows(printed(show, started), inert(name), inert(why))
    faults = (Fault(name, name, why), Fault("client", name + "x", why))
    played = RoundDone(3, 1.0, 1.0, 1.0, 1, {name: why}, {name: why}, why, why, faults)
    shown = printed(show, played)
    assert_shows(shown, inert(f"  {name} {name}: {why}"), inert(f"  client {name!r} was left out: {why}"))
    assert_shows(shown, inert(f"  1 client {why.partition(':')[0]}: {name!r}"), inert(f"privacy: {why}"))
    sample = Sample(f"def {name}", f"a {name}", why, f"a {name}{why}")
    losses = {"round 0": {"heldout": 2.0}, "end": {"heldout": 1.0}, why: {"heldout": 1.0}}
    shown = printed(show, RunDone(Path("runs") / name, losses, [sample]))
    assert_shows(shown, inert(" ".join(name.split())), inert(" ".join(f"a {name}{why}".split())), inert(why))
    assert_shows(shown, inert(f"def {name}".splitlines()[0]), inert(Path("runs") / name / "report.html"))


@given(TEXT)
@UNTIMED
def test_a_runs_progress(text):
    def show():
        screen = Screen(3)
        screen.show(Preparing("slots"))
        screen.progress.update(screen.task, description=inert(f"step {text}"))
        screen.console.print(screen.progress.make_tasks_table(screen.progress.tasks))

    assert_shows(printed(show), inert(f"step {text}"))
    screen = Screen(3)
    printed(screen.show, Preparing(text))
    assert screen.progress.tasks[0].description == inert(text)


@given(TEXT, st.sampled_from([RunError, RunStopped, ValueError, KeyboardInterrupt, missing_file]))
@UNTIMED
def test_the_errors_of_a_command(text, kind):
    @guarded
    def command(debug):
        raise kind(text)

    shown = printed(command, debug=False)
    if kind in (RunError, RunStopped, ValueError):
        assert_shows(shown, *map(inert, text.split("\n")))
    assert printed(command, debug=True).endswith(shown)


@given(TEXT, st.sampled_from([AssertionError, DoesNotApply, ValueError]))
@settings(max_examples=30, deadline=None)
def test_the_contract_of_a_rule(text, kind):
    def broken(case):
        raise kind(text)

    with mock.patch.object(contract, "CHECKS", [broken]):
        assert_shows(printed(contract.show_check, "strategies.averaging.fedavg:FedAvg"), *map(inert, text.split("\n")))


@given(TEXT)
@UNTIMED
def test_the_table_and_steps_of_a_partition(text):
    def show():
        screen = console(soft_wrap=False)
        with partition._steps(screen) as step:
            step(f"reading {text}")
        screen.print(partition._table({text: text}))

    assert_shows(printed(show), inert(f"reading {text} ..."))
    name = inert(text)[: partition.NAME_WIDTH]
    assert_shows(printed(console().print, plain(text)), inert(text), name)


@given(TEXT)
@UNTIMED
def test_a_dry_run(text):
    result = dry.Dry({text: (text, text)}, [dry.Proof(text, False, text)], [text])

    def dry_run(recipe, on_step):
        on_step(text)
        return result

    with mock.patch.object(dry, "dry_run", dry_run):
        assert_shows(printed(dry.show_dry, None), inert(text))


@given(TEXT)
@UNTIMED
def test_a_jobs_state_and_log(text):
    info = SimpleNamespace(message=text, driver_exit_code=None, status=SimpleNamespace(is_terminal=lambda: True))
    client = SimpleNamespace(get_job_info=lambda job: info, get_job_logs=lambda job: text)
    with mock.patch.object(submit, "job_client", lambda address: client):
        assert_shows(printed(submit.show_status, text, ""), inert_lines(f"{text}: "), *map(inert, text.splitlines()))
        assert_shows(printed(submit.stop, text, ""), inert_lines(text))
    assert_shows(printed(submit._follow, client, "job"), inert_lines(text))


@given(TEXT)
@UNTIMED
def test_the_paths_of_pages_and_figures(text):
    with mock.patch.object(page, "write_report", lambda folders, out: out):
        assert_shows(printed(commands.report, [Path("none")], Path("x") / text), inert_lines(Path("x") / text))
    with mock.patch.object(bench_results, "write_results", lambda *_: Path("x") / text):
        shown = printed(bench_results.show_results, "tiny", {text: Figure(1.0, text)}, True)
        assert_shows(shown, inert_lines(text), inert_lines(Path("x") / text))


@given(TEXT)
@settings(max_examples=30, deadline=None)
def test_the_page_about_a_run(text):
    curves = {("heldout", "loss"): {0: 2.0, 1: 1.0}}
    name = text.encode("utf-8", "replace").decode()  # as Parquet has it
    losses = [(round_, pa.table([[name], [1.0 + round_]], schema=OF_CLIENTS)) for round_ in (0, 1)]
    run = Run(text, {"model.base": text}, text, {text: text}, text, curves, losses)
    run.ledger, run.faults = {(text, text): (1, 1)}, [{"round": 1, "kind": text, "who": text, "why": text}]
    assert_shows(harmless(page.render([run])), str(escape(inert_lines(text))))


@given(st.lists(TEXT, max_size=4))
@UNTIMED
def test_the_labels_of_pictures(names):
    assert all(harmless(label) == inert(label) for label in _short_each(names))


@given(TEXT)
@settings(max_examples=30, deadline=None)
def test_the_page_about_benchmarks(text):
    page = render({text: [[Cell(text)], [Cell(text, 1.0, text)]]}, [(text, text)]).decode()
    assert_shows(harmless(page), str(escape(inert_lines(text))))


def test_say_prints_lines_on_stdout_or_stderr(capsys):
    say("a[b]\n\x1b[2J", end="")
    say("c\u202e", error=True)
    assert capsys.readouterr() == ("a[b]\n\\x1b[2J", "c\\u202e\n")


def test_nothing_else_prints():
    """A new command cannot pass it by: only one module calls `print` and makes rich's console."""
    others = [path for path in (ROOT / "experiments").glob("*/**/*.py") if path != Path(terminal.__file__)]
    assert len(others) > 40
    for path in others:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called, place = ast.unparse(node.func), (path, node.lineno)
                assert called not in ("print", "Console", "traceback.print_exc", "sys.stdout.write"), place
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("rich.markup", "rich"), (path, node.lineno)
