"""What a job is sent: every file of fedpost's packages, and nothing of earlier runs."""

from pathlib import Path

import pytest
from ray._private.thirdparty.pathspec import PathSpec

from experiments.runs.api import ROOT
from experiments.runs.submit import environment_of


@pytest.fixture
def excluded(tmp_path):
    """Whether Ray leaves a file out, by its path below the folder or the package that is sent."""
    patterns = environment_of(tmp_path, None)["excludes"]
    return lambda path: PathSpec.from_lines("gitwildmatch", patterns).match_file(str(path))


def test_no_file_of_a_package_is_left_out(excluded, tmp_path):
    packages = [Path(package) for package in environment_of(tmp_path, None)["py_modules"]]
    assert {package.name for package in packages} == {"engine", "strategies", "datasets_partition", "experiments"}
    for package in packages:
        assert not [path for path in package.rglob("*.py") if excluded(path.relative_to(package))]
    assert not excluded(Path(__file__).relative_to(ROOT))


@pytest.mark.parametrize("path", ["runs/demo-1/model/adapter.safetensors", "runs/stores/a/rows.parquet"])
def test_earlier_runs_and_their_stores_are_left_out(excluded, path):
    assert excluded(path) and not excluded(f"kept/{path}")
