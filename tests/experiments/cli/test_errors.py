"""Who can fix an error decides how a command ends: the user (exit code 2) or we (1)."""

import errno
import importlib
import sys

import pytest
import ray
import ray.cloudpickle

from experiments.cli.commands import guarded
from experiments.config.user_code import imported
from experiments.runs.driving import RunStopped, explanation
from strategies.core.errors import StrategyError

MODULE = """
from dataclasses import dataclass

from strategies.core.errors import StrategyError


@dataclass(frozen=True)
class Rule:
    def apply(self, number):
        if number < 0:
            raise StrategyError("the number is negative")
        return helped(number)


def helped(number):
    return {}[number]
"""


class Planted(ValueError):
    """A user's error of a package that does not exist yet."""

    exit_code = 2


def ended(error, capsys, **options):
    """The exit code and the text of a command that raises the error."""

    @guarded
    def command(debug=False):
        raise error

    with pytest.raises(SystemExit) as exit_:
        command(**options)
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Planted("lower the rate"), "error: lower the rate\n"),
        (StrategyError("lower the rate"), "error: lower the rate\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/a"),
            "error: [Errno 28] No space left on device: 'run/a'; free some space and try again (with --resume if a run "
            "had begun)\n",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), "error: [Errno 2] No such file: 'a'\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "error: [Errno 13] Permission denied: 'a'\n"),
    ],
)
def test_what_a_user_can_fix_is_one_sentence_and_exit_code_2(error, text, capsys):
    assert ended(error, capsys) == (2, text)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (ValueError("planted"), "ValueError: planted"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "planted"), "UnicodeDecodeError: 'utf-8'"),
        (KeyError("planted"), "KeyError: 'planted'"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "planted"), "ConnectionRefusedError: [Errno 111] planted"),
        (OSError("planted"), "OSError: planted"),
        (AssertionError("planted"), "AssertionError: planted"),
    ],
)
def test_anything_else_is_our_bug_and_says_where_to_report_it(error, name, capsys):
    code, text = ended(error, capsys)
    assert code == 1 and text.startswith(f"error: {name}")
    assert "This is a bug in fedpost. Please report it in the issue tracker" in text and "Traceback" not in text
    assert "in command\n    raise error" in ended(error, capsys, debug=True)[1]


def test_a_stopped_run_and_an_interrupt_end_with_130(capsys):
    assert ended(RunStopped("stopped after round 1"), capsys) == (130, "stopped after round 1\n")
    assert ended(KeyboardInterrupt(), capsys)[0] == 130


@pytest.fixture
def rule(tmp_path, monkeypatch):
    (tmp_path / "somebodys_rule.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield imported("strategy.kind", "somebodys_rule:Rule", "apply")()
    del sys.modules["somebodys_rule"]


def test_an_error_of_somebodys_module_names_it_and_its_line(rule, tmp_path, capsys):
    with pytest.raises(KeyError) as caught:
        rule.apply(3)
    expected = f"KeyError: 3 (in your module somebodys_rule: helped, line 16 of {tmp_path / 'somebodys_rule.py'})"
    assert ended(caught.value, capsys) == (2, f"error: {expected}; --debug shows the traceback\n")


def test_an_error_from_an_actor_keeps_its_class_and_its_module(ray_session, rule):
    ray.cloudpickle.register_pickle_by_value(sys.modules["somebodys_rule"])

    class Inner:
        def play(self, number):
            if number is None:
                raise ValueError("planted")
            return rule.apply(number)

    class Outer:
        def play(self, number):
            return ray.get(ray.remote(Inner).options(num_cpus=0).remote().play.remote(number))

    def explained(number):
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            ray.get(actor.play.remote(number))
        return explanation(caught.value)

    actor = ray.remote(Outer).options(num_cpus=0).remote()
    assert explained(-1) == "the number is negative"
    assert explained(3).startswith("KeyError: 3 (in your module somebodys_rule: helped, line 16 of")
    assert explained(None) is None
    ray.kill(actor)
    ray.cloudpickle.unregister_pickle_by_value(sys.modules["somebodys_rule"])


def test_a_reader_that_has_gone_is_no_bug_of_ours():
    assert explanation(BrokenPipeError(32, "Broken pipe")) == "nothing reads the output of this command any more"
