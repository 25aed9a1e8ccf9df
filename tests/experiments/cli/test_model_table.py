"""`fedpost models`: the families by name, and the table, which a page takes up."""

from importlib.util import find_spec

import pytest

from engine.messages.errors import RunError
from experiments.cli import model_table
from experiments.cli.model_table import HEAD, RULE, show_table, table_line


def test_the_command_lists_families_by_the_names_of_their_bases(command):
    ended = command("models")
    assert ended.returncode == 0 and ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert any(line.split() == ["gpt_neox", "pythia-|gpt-neox-20b"] for line in lines)
    assert any(line.split() == ["mamba", "model_type", "mamba"] for line in lines)
    assert "fedpost run RECIPE --dry" in lines[-1]


def test_a_page_goes_with_the_table(command):
    ended = command("models", "--write", "page.md")
    assert (ended.returncode, ended.stderr) == (2, "error: --write goes with --table\n")


def test_the_table_takes_the_place_of_the_old_one_in_a_page(tmp_path, monkeypatch, capsys):
    if find_spec("bitsandbytes") is None:
        with pytest.raises(RunError, match="needs the library bitsandbytes"):
            show_table(None)
        monkeypatch.setattr(model_table, "require_quantizer", lambda: None)  # one column then says so
    monkeypatch.setattr(model_table, "family_names", lambda: {"mixtral": "mixtral-8x"})
    page = tmp_path / "page.md"
    page.write_text(f"# Models\n\n{HEAD}\n| old | a | b | c | d |\n\nAfter it.\n")
    show_table(page)
    line = table_line("mixtral")
    assert page.read_text() == f"# Models\n\n{HEAD}\n{RULE}\n{line}\n\nAfter it.\n"
    assert line.startswith("| mixtral | yes | yes | attention alone: ")
    assert line in capsys.readouterr().out
    page.write_text("# Models\n")
    with pytest.raises(RunError, match="has no table to replace: write the line"):
        show_table(page)
