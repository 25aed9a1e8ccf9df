"""`fedpost strategies --check`: what it prints, its exit code, and what it refuses."""

import importlib
import sys

import pytest

from engine.messages.errors import RunError
from experiments.cli.contract import show_check

OWN = '''
from dataclasses import dataclass, replace
from strategies.averaging.fedavg import FedAvg

@dataclass(frozen=True)
class Halved(FedAvg):
    """theta += half the mean change. Reads the sum."""
    def apply(self, state, aggregate):
        return replace(super().apply(state, aggregate), params=state.params + aggregate.total / aggregate.weight / 2)

@dataclass(frozen=True)
class Drifts(FedAvg):
    """Moves by itself."""
    def apply(self, state, aggregate):
        return replace(super().apply(state, aggregate), params=state.params + 1)

@dataclass(frozen=True)
class Breaks(FedAvg):
    """Takes what it does not see."""
    def apply(self, state, aggregate):
        return replace(state, params=aggregate.each[0].delta)

@dataclass(frozen=True)
class Bare:
    """Has one method of many."""
    def apply(self, state, aggregate): ...

@dataclass(frozen=True, kw_only=True)
class Asks(FedAvg):
    """Cannot be made without being told something."""
    strength: float

class Plain: ...
'''


@pytest.fixture
def check(command, tmp_path):
    (tmp_path / "own_checked.py").write_text(OWN)
    return lambda named: command("strategies", "--check", named, cwd=tmp_path, COLUMNS="100")


def test_a_rule_that_keeps_the_contract(check):
    ended = check("own_checked:Halved")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert "ok      the order of clients is irrelevant" in lines
    assert lines[-1].endswith("the contract is kept")
    assert not [line for line in lines if line.startswith("failed")]
    assert "(does not apply: mixed_ranks is False)" in ended.stdout


def test_a_rule_that_breaks_it_is_told_how(check):
    ended = check("own_checked:Drifts")
    assert ended.returncode == 1
    assert "failed  no change leaves the model alone" in ended.stdout
    assert "apply moves the vector although no client changed it" in ended.stdout
    assert "promises are broken" in ended.stdout.splitlines()[-1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The same module, for checks in this process."""
    (tmp_path / "own_checked.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("own_checked", None)


def test_what_its_own_code_raises_is_a_finding_with_its_line(here, capsys):
    assert not show_check("own_checked:Breaks")
    assert "TypeError: 'NoneType' object is not subscriptable (own_checked.py, line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("own_checked", "--check takes MODULE:CLASS"),
        ("no_such_module:Rule", "importing 'no_such_module' fails"),
        ("own_checked:Plain", "no dataclass with a method 'apply'"),
        ("own_checked:Bare", "is not a strategy, it lacks reads"),
        ("own_checked:Asks", "these keys have none: strength"),
    ],
)
def test_what_is_no_strategy_is_refused(here, named, said):
    with pytest.raises(RunError, match=said):
        show_check(named)
