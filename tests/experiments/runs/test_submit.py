"""Runs as Ray jobs, on a real head with its job server: followed, detached, stopped, and ended with their command."""

import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

pytest.importorskip("aiohttp_cors", reason="needs the extra `cluster`, which makes every Ray start slower")

from experiments.config.recipe import to_toml
from experiments.runs.submit import environment_of, job_client, run_command, show_status, stop, submit

ROOT = Path(__file__).resolve().parents[3]
DEMO = "experiments/recipes/demo.toml"
# In a folder with a package `experiments`, the command is that of the installation.
OWN_FOLDER = {"PYTHONSAFEPATH": "1"}


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


@pytest.fixture(scope="module")
def head():
    """The address of the job server of a Ray head that is started for these tests, all of it on loopback."""
    port, server, agent, grpc, metrics, client = free_ports(6)
    folder = Path(tempfile.mkdtemp(prefix="fedpost-"))  # short: a socket's name may have 107 characters
    command = [
        *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
        *(f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={server}", "--include-dashboard=true"),
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"),
        *(f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
        *("--num-cpus=3", "--object-store-memory=200000000"),
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{server}"
    try:
        wait_until(lambda: answers(f"{address}/api/version"), 60)
        yield address
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(30)
        for left in psutil.wait_procs(started, 10)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def wait_until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not (holder := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return holder


@pytest.fixture
def work(small_recipe, rows_file, tmp_path):
    """A folder of somebody who has installed fedpost: a recipe, rows, packages of fedpost's names, something large."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "recipe.toml").write_text(
        to_toml(small_recipe("rounds=1", "evaluate.every=0", "data.source.path=rows.jsonl"))
    )
    shutil.copy(rows_file, folder / "rows.jsonl")
    for name in ("experiments", "strategies"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('not this one')")
    with (folder / "large.bin").open("wb") as large:
        large.truncate(101 * 2**20)
    (folder / ".rayignore").write_text("large.bin\n")
    return folder


@pytest.fixture
def inside(work, monkeypatch):
    """Calls from that folder."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # as it was afterwards: calls change it


def ended(job, head):
    info = job_client(head).get_job_info(job)
    return info.status.is_terminal() and str(info.status)


def job_in(text):
    return re.search(r"^job (\S+) at http://", text, re.MULTILINE)[1]


def test_a_detached_run_goes_on_and_leaves_its_folder(head, work, inside, capsys):
    assert submit(Path("recipe.toml"), [], head, "../run", detach=True) == 0
    said = capsys.readouterr().out
    job = job_in(said)
    assert f"fedpost status {job} --address {head}" in said and f"fedpost stop {job} --address {head}" in said
    assert wait_until(lambda: ended(job, head), 120) == "SUCCEEDED", job_client(head).get_job_logs(job)
    show_status(job, head)
    said = capsys.readouterr().out
    assert said.startswith(f"{job}: SUCCEEDED\n") and "the trained model" in said
    folder = work.parent / "run"
    assert (folder / "model" / "adapter_model.safetensors").exists() and (folder / "report.html").exists()
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    assert not any(token in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert token.decode() not in job_client(head).get_job_logs(job)
    stop(job, head)
    assert capsys.readouterr().out == f"{job}: SUCCEEDED\n"


@pytest.mark.slow
def test_a_job_is_stopped_in_its_rounds_and_gone_on_with(head, work, inside, command, capsys, full):
    rounds, folder = "rounds=60" if full else "rounds=1000", work.parent / "run"
    submit(Path("recipe.toml"), [rounds], head, "../run", detach=True)
    job = job_in(capsys.readouterr().out)
    wait_until(lambda: any((folder / "checkpoints").glob("[0-9]*")), 120)
    if full:  # somebody does not see that it goes on
        run = ("run", work / "recipe.toml", "--set", rounds, "--out")
        answer = command(*run, folder, "--resume", cwd=work, **OWN_FOLDER)
        assert answer.returncode == 2 and "another command on this machine is working on" in answer.stderr
    stop(job, head)
    assert capsys.readouterr().out.startswith(f"{job}: STOPPED") and not (folder / "model").exists()
    if full:
        assert submit(Path("recipe.toml"), [rounds], head, "../run", flags=["--resume"]) == 0
        assert "continuing from the checkpoint of round" in capsys.readouterr().out
        rows = f"data.source.path={work / 'rows.jsonl'}"
        answer = command(*run, work.parent / "whole", "--set", rows, cwd=work.parent)
        assert answer.returncode == 0, answer.stderr
        name = "model/adapter_model.safetensors"
        assert (folder / name).read_bytes() == (work.parent / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_followed_run_shows_its_log_and_ends_with_its_exit_code(head, work, inside, command, capsys, full):
    missing = "data.source={kind='jsonl', path='/nowhere/rows.jsonl'}"
    answer = command("submit", DEMO, "--address", head, "--set", missing, "--out", work.parent / "none")
    assert answer.returncode == 2, answer.stderr
    assert "error: " in answer.stdout and "/nowhere/rows.jsonl" in answer.stdout
    assert not (work.parent / "none").exists()
    if full:
        assert submit(Path("recipe.toml"), ["seed=6"], head) == 0
        [folder] = (work / "runs").iterdir()
        said = capsys.readouterr().out
        assert f"run folder {folder}" in said and "round   1/1" in said
        assert submit(Path("recipe.toml"), [], head, str(folder), flags=["--resume"]) == 2
        assert "has finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, None], ids=["interrupted", "killed", "unread"])
def test_a_run_that_is_followed_ends_with_the_command(head, work, how, full):
    if how != signal.SIGKILL and not full:
        pytest.skip("SIGKILL is tried unless all are asked for")
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "submit", "recipe.toml", "--address", head, "--set", "rounds=1000"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), **OWN_FOLDER, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        job = job_in(process.stdout.readline())
        while "Running entrypoint" not in process.stdout.readline():
            assert process.poll() is None
        if how is None:
            process.stdout.close()
        else:
            process.send_signal(how)
        assert process.wait(60) in {signal.SIGINT: (130,), signal.SIGKILL: (-signal.SIGKILL,), None: (2, 120)}[how]
        assert wait_until(lambda: ended(job, head), 60) == "STOPPED"
    finally:
        process.kill()
        process.stdout.close()


def test_all_that_the_head_listens_on_is_loopback(head):
    port = int(head.rpartition(":")[2])
    listening = [
        connection
        for connection in psutil.net_connections("tcp")
        if connection.status == "LISTEN" and connection.pid is not None
    ]
    [dashboard] = {connection.pid for connection in listening if connection.laddr.port == port}
    family = {process.pid for process in psutil.Process(os.getpgid(dashboard)).children(recursive=True)}
    addresses = {connection.laddr.ip for connection in listening if connection.pid in family}
    assert addresses and all(is_loopback(ip) for ip in addresses), addresses


def is_loopback(ip):
    address = ipaddress.ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"address": "127.0.0.1:6379"}, "is not the address of a job server"),
        ({"address": "http://127.0.0.1:1"}, "no job server answers at http://127.0.0.1:1"),
        ({"recipe": Path("../recipe.toml")}, "is not in what is sent to the cluster"),
        ({"changes": ["rounds=0"]}, "rounds"),
        ({"flags": ["--resume"]}, "--resume needs the --out"),
        ({"out": "s3://me:secret@bucket/run"}, "holds a password"),
        ({"runtime_env": Path("recipe.toml")}, "should hold keys of Ray's runtime environments"),
        ({"runtime_env": Path("none.yaml")}, "cannot be read"),
        ({"runtime_env": Path("odd.yaml")}, "the job was not accepted: .*pip"),
    ],
)
def test_what_is_wrong_is_one_sentence(head, work, inside, given, said):
    shutil.copy(work / "recipe.toml", work.parent)
    (work / "odd.yaml").write_text("pip: 3")
    began = time.monotonic()
    with pytest.raises(ValueError, match=said) as error:
        submit(**{"recipe": Path("recipe.toml"), "changes": [], "address": head, "detach": True, **given})
    assert "secret" not in str(error.value) and time.monotonic() - began < 10


def test_a_folder_that_is_too_large_is_said(head, work, inside):
    (work / ".rayignore").unlink()
    with pytest.raises(ValueError, match=r"work is more than Ray uploads \(100 MiB\): list .* in a \.rayignore"):
        submit(Path("recipe.toml"), [], head, detach=True)


def test_the_command_says_what_is_wrong_and_ends_with_2(head, command):
    for name in ("status", "stop"):
        answer = command(name, "nobody", "--address", head)
        assert (answer.returncode, answer.stderr) == (2, "error: there is no job nobody on the job server\n")
    answer = command("status", "nobody", "--address", head, RAY_AUTH_TOKEN="0" * 64)
    assert answer.returncode == 2 and f"error: the job server at {head} asks for another token" in answer.stderr


def test_what_is_sent_is_the_folder_and_fedpost_if_it_lies_elsewhere(tmp_path):
    given = tmp_path / "env.yaml"
    given.write_text("pip: [einops]\nexcludes: ['*.bin']\nenv_vars: {A: b}\n")
    sent = environment_of(tmp_path, given)
    assert sent["working_dir"] == str(tmp_path) and sent["pip"] == ["einops"]
    assert {Path(module).name for module in sent["py_modules"]} >= {"engine", "experiments"}
    assert {"/runs/*/", "*.bin"} <= set(sent["excludes"]) and sent["env_vars"]["A"] == "b"
    assert "py_modules" not in environment_of(ROOT, None)
    assert run_command(ROOT / DEMO, ROOT)[-2:] == ["run", DEMO]
    given.write_text("working_dir: .")
    with pytest.raises(ValueError, match="neither working_dir nor py_modules"):
        environment_of(tmp_path, given)
