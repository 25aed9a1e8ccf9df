"""What a run does on a machine: code of the base, secrets in the environment, ports, and nothing is ever unpickled."""

import ast
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from experiments.config.recipe import to_toml

ROOT = Path(__file__).resolve().parents[3]
PLANTED = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "OPENAI_API_KEY", "RAY_AUTH_TOKEN")
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({mark!r}, "w").close()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@dataclass
class Watched:
    """A run of the command: what it left, and what was seen of its processes meanwhile."""

    folder: Path
    temporary: Path
    status: int
    planted: dict[str, str]
    listening: set[tuple[str, str]] = field(default_factory=set)
    commands: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def watched(small_recipe, tiny_base, tmp_path_factory) -> Iterator[Watched]:
    """A run on a base with code of its own, of clients whose names are paths, in an environment full of secrets."""
    folder = tmp_path_factory.mktemp("watched")
    base = shutil.copytree(tiny_base, folder / "base")
    (base / "own.py").write_text(OWN_CODE.format(mark=str(folder / "code_was_run")))
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    custom = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": code}
    (base / "config.json").write_text(json.dumps(config | custom))
    rows = [(f"../../evil{n % 3}", n) if n % 2 else (f"{folder}/evil{n % 3}", n) for n in range(48)]
    lines = [json.dumps({"client": name, "prompt": f"{n} is ", "completion": f"{n + 1}"}) for name, n in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    recipe = small_recipe(
        f"model.base='{base}'",
        "model.trust_remote_code=true",
        f"data.source.path='{folder / 'rows.jsonl'}'",
        f"data.cache='{folder / 'stores'}'",
        "cohort.size=2",
        "rounds=1",
    )
    (folder / "recipe.toml").write_text(to_toml(recipe))
    # Ray's sockets need a path that is short.
    temporary = Path(tempfile.mkdtemp(prefix="fp-"))
    planted = {name: secrets.token_hex(32) for name in PLANTED}
    places = {"RAY_TMPDIR": temporary, "HF_MODULES_CACHE": temporary / "modules", "PYTHONPATH": ROOT}
    command = [sys.executable, "-m", "experiments", "run", str(folder / "recipe.toml"), "--out", str(folder / "run")]
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        environment = os.environ | planted | {name: str(path) for name, path in places.items()}
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=environment)
    seen = Watched(folder, temporary, -1, planted)
    deadline = time.monotonic() + 240
    try:
        while process.poll() is None and time.monotonic() < deadline:
            _look(psutil.Process(process.pid), seen)
            time.sleep(0.7)
        seen.status = process.wait(1)
        yield seen
    finally:
        process.kill()
        shutil.rmtree(temporary)


def _look(root: psutil.Process, seen: Watched) -> None:
    with suppress(psutil.Error):
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                seen.commands.add(" ".join(process.cmdline()))
                for socket_ in process.net_connections("inet"):
                    waits = socket_.status == psutil.CONN_LISTEN or (
                        socket_.type == socket.SOCK_DGRAM and not socket_.raddr
                    )
                    if waits and socket_.laddr:
                        seen.listening.add((process.name(), socket_.laddr.ip.removeprefix("::ffff:")))


def test_the_code_of_a_base_is_run_where_the_recipe_says_so_and_is_on_record(watched):
    assert watched.status == 0, (watched.folder / "stderr").read_text()
    assert (watched.folder / "code_was_run").exists()
    manifest = json.loads((watched.folder / "run" / "manifest.json").read_text())
    assert manifest["base"]["trust_remote_code"] is True
    assert (watched.folder / "run" / "model" / "adapter_model.safetensors").exists()


def test_all_that_listens_listens_on_loopback(watched):
    assert {name for name, _ in watched.listening} >= {"gcs_server", "raylet"}
    assert {(name, ip) for name, ip in watched.listening if not ip_address(ip).is_loopback} == set()


def test_no_secret_of_the_environment_reaches_a_file_or_a_command_line(watched):
    searched = []
    for folder in (watched.folder, watched.temporary):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            searched.append(path.name)
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content += str(pq.read_table(path).to_pydict()).encode()
            assert [name for name, value in watched.planted.items() if value.encode() in content] == [], path
    assert {"stdout", "stderr", "manifest.json", "report.html", "raylet.out", "rows.parquet"} <= set(searched)
    assert [line for line in watched.commands for value in watched.planted.values() if value in line] == []


def test_names_that_are_paths_stay_names(watched):
    left = {path.relative_to(watched.folder).parts[0] for path in watched.folder.rglob("*")}
    assert left == {"base", "code_was_run", "recipe.toml", "rows.jsonl", "run", "stores", "stdout", "stderr"}
    assert [
        path for path in watched.folder.parent.rglob("*") if path.name.startswith(("evil0", "evil1", "evil2"))
    ] == []
    assert "../../evil1" in (watched.folder / "run" / "report.html").read_text()


LOADERS = {"load", "loads", "Unpickler", "read_pickle", "from_pickle"}
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pandas", "pd"}


def unpickling(source: str) -> list[int]:
    """The lines that may unpickle what they did not pickle themselves."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[-1] in MODULES:
                lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(attr="loads"), args=[ast.Call(func=ast.Attribute(attr="dumps"))]):
                pass  # a copy of one's own
            case ast.Call(func=ast.Attribute(value=owner, attr=called), keywords=options):
                named = {option.arg: option.value for option in options}
                module = ast.unparse(owner).split(".")[-1]
                whole = module == "torch" and called == "load" and not _is(named.get("weights_only"), True)
                arrays = "allow_pickle" in named and not _is(named["allow_pickle"], False)
                if whole or arrays or (module in MODULES and called in LOADERS | {"open"}):
                    lines.append(node.lineno)
    return lines


def _is(value: ast.expr | None, wanted: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is wanted


def test_nothing_in_the_packages_unpickles():
    sources = [path for name in ("engine", "strategies", "datasets_partition", "experiments") for path in _python(name)]
    assert len(sources) > 150
    assert {str(path): lines for path in sources if (lines := unpickling(path.read_text()))} == {}


def _python(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("pickle.load(file)", True),
        ("ray.cloudpickle.loads(content)", True),
        ("from pickle import loads", True),
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=flag)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("torch.load(path, weights_only=True)", False),
        ("pickle.loads(pickle.dumps(x))", False),
        ("np.load(path)", False),
        ("json.loads(text)", False),
    ],
)
def test_what_would_unpickle_is_found(source, refused):
    assert bool(unpickling(source)) is refused
