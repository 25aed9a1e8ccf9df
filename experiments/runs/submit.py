"""Runs as Ray jobs: submitted with their code, followed to their end, looked at, stopped."""

import logging
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from datasets_partition.sources.location import first_line, is_local, refuse_password
from engine.messages.errors import RunError
from experiments.config.recipe import load_recipe
from experiments.report.terminal import say
from experiments.runs.api import ROOT, shipped_code
from experiments.runs.resuming import RUNS

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RESERVED = ("working_dir", "py_modules")  # the keys of a runtime environment that submitting sets
TOKENS, TOKEN_FILE = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}, Path("~/.ray/auth_token")
PATIENCE_S = 60
STOP_WAIT_S = 60  # after which Ray kills a job that it has asked to end
Answer = TypeVar("Answer")


def submit(
    recipe: Path,
    changes: list[str],
    address: str,
    out: str | None = None,
    runtime_env: Path | None = None,
    flags: Sequence[str] = (),
    *,
    detach: bool = False,
) -> int:
    """Submits a run of the recipe to the job server at `address` and follows it; its exit code, or 0 with `detach`.

    `flags` are options of `fedpost run`, such as "--resume". Without `detach` the job ends when this process does.
    """
    loaded, here = load_recipe(recipe, changes), Path.cwd().resolve()
    if out is None and "--resume" in flags:
        raise RunError("--resume needs the --out of the run to continue")
    # Ray removes the job's working folder, which the run folder must outlive.
    token = secrets.token_hex(6)  # two jobs may be submitted in the same second
    out = out or str(RUNS / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}-{token}")
    refuse_password(out)
    out = str(Path(out).absolute()) if is_local(out) else out
    options = [word for change in changes for word in ("--set", change)] + ["--out", out, *flags]
    command = run_command(recipe, here) + options
    environment = environment_of(here, runtime_env)
    client, job = job_client(address), f"fedpost-{token}"
    say(f"job {job} at {address}, run folder {out}")
    with nullcontext() if detach else _stopped_with_us(job, address):
        _send(client, job, command, environment)
        if not detach:
            return _follow(client, job)
    say(f"to see its progress:  fedpost status {job} --address {address}")
    say(f"to stop it:           fedpost stop {job} --address {address}")
    return 0


def show_status(job: str, address: str) -> None:
    """Prints a job's state and the end of its log; RunError if there is no such job."""
    client = job_client(address)
    lines = _ask(client.get_job_logs, job).splitlines()[-10:]
    say("\n  ".join([f"{job}: {_state(_ask(client.get_job_info, job))}", *lines]))


def stop(job: str, address: str) -> None:
    """Stops a job and waits for its end; RunError if there is no such job, or it does not end."""
    client = job_client(address)
    last = time.monotonic() + STOP_WAIT_S + PATIENCE_S
    while not (info := _ask(client.get_job_info, job)).status.is_terminal():
        if time.monotonic() > last:
            raise RunError(f"job {job} has not ended: see `fedpost status {job} --address {address}`")
        _ask(client.stop_job, job)
        time.sleep(0.5)
    say(f"{job}: {_state(info)}")


def job_client(address: str) -> "JobSubmissionClient":
    """A client of the job server at `address`; RunError within seconds if none answers there."""
    if not address.startswith(("http://", "https://")):
        hint = "such as http://127.0.0.1:8265 (only `fedpost run --address` takes HOST:PORT of the head)"
        raise RunError(f"{address} is not the address of a job server: give that of Ray's dashboard, {hint}")
    # `ray start` and `ray.init` use a token that exists; Ray's job client does so only in this mode.
    if TOKENS & os.environ.keys() or TOKEN_FILE.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import aiohttp  # noqa: F401  # Ray's client imports it later
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise RunError(f'jobs need Ray\'s job client ({error}): pip install "ray[default]"') from error
    address = address.rstrip("/")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise Ray prefers RAY_ADDRESS
    try:
        requests.get(f"{address}/api/version", timeout=5)  # the client's first request has no timeout
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as they are set where it runs"
        raise RunError(f"the job server at {address} asks for another token: {remedy}") from error
    except (requests.JSONDecodeError, RuntimeError, KeyError) as error:
        raise RunError(f"what answers at {address} is not a job server of Ray") from error
    except (requests.RequestException, ConnectionError) as error:
        remedy = "`ray start --head` starts one where ray[default] is installed"
        hint = "for a remote cluster forward the port of its dashboard"
        raise RunError(f"no job server answers at {address}: {remedy}; {hint}") from error


def run_command(recipe: Path, here: Path) -> list[str]:
    """The command that runs a recipe of the uploaded folder `here`; RunError if the recipe is not uploaded with it."""
    path = recipe.resolve()
    if not path.is_relative_to(here) or path.is_relative_to(here / RUNS):
        what = f"the recipe {recipe} is not in what is sent to the cluster, the current folder without {RUNS}/"
        raise RunError(f"{what}: copy it into {here}, or submit from the folder that holds it")
    # -P: packages of the same names in the uploaded folder must not hide fedpost's.
    return ["python", "-P", "-m", "experiments", "run", path.relative_to(here).as_posix()]


def environment_of(here: Path, given: Path | None) -> dict[str, Any]:
    """Ray's runtime environment: the folder `here`, fedpost's packages if they are elsewhere, the keys of `given`."""
    keys = _read_environment(given) if given else {}
    return {
        **keys,
        **({} if here == ROOT else shipped_code()),
        "working_dir": str(here),
        # Ray applies these to each package too, and experiments has a room `runs`, which holds files but no folders.
        "excludes": [f"/{RUNS}/*/", "__pycache__/", *keys.get("excludes", [])],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **keys.get("env_vars", {})},
    }


def _read_environment(file: Path) -> dict[str, Any]:
    import yaml

    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"the runtime environment {file} cannot be read: {first_line(error)}") from error
    if not isinstance(keys, dict) or any(key in keys for key in RESERVED):
        what = f"{file} should hold keys of Ray's runtime environments in YAML, such as pip or env_vars"
        raise RunError(f"{what}, and neither {' nor '.join(RESERVED)}, which submitting sets")
    return keys


def _send(client: "JobSubmissionClient", job: str, command: list[str], environment: dict[str, Any]) -> None:
    import requests

    for verbose in ("ray._private.runtime_env", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(verbose).setLevel("ERROR")  # they log a line for each ignore file and package
    try:
        client.submit_job(entrypoint=shlex.join(command), submission_id=job, runtime_env=environment)
    except (RuntimeError, TypeError, requests.RequestException) as error:
        if "exceed" in str(error):
            raise RunError(
                f"{environment['working_dir']} is more than Ray uploads (100 MiB): list what the run does not need in "
                f"a .rayignore there, written like a .gitignore, and keep data and base models at a URI"
            ) from error
        raise RunError(f"the job was not accepted: {_last_line(error)}") from error


def _follow(client: "JobSubmissionClient", job: str) -> int:
    """Prints the job's log as it grows; the exit code of its run."""
    shown = 0
    while True:
        # In this order: once the job has ended, its log is complete.
        info, log = _ask(client.get_job_info, job, PATIENCE_S), _ask(client.get_job_logs, job, PATIENCE_S)
        say(log[shown:], end="")
        shown = len(log)
        if info.status.is_terminal():
            break
        time.sleep(1)
    if (code := info.driver_exit_code) is None:
        say(f"{job}: {_state(info)}", error=True)
        return 143 if info.status == "STOPPED" else 1
    return code if code >= 0 else 128 - code


def _ask(ask: Callable[[str], Answer], job: str, patience_s: float = 0.0) -> Answer:
    """The job server's answer; RunError if there is no such job, or no answer for `patience_s` seconds."""
    import requests

    last = time.monotonic() + patience_s
    while True:
        try:
            return ask(job)
        except (RuntimeError, requests.RequestException) as error:
            if "does not exist" in str(error):
                raise RunError(f"there is no job {job} on the job server") from error
            if time.monotonic() > last:
                what = f"the job server does not answer ({_last_line(error)})"
                raise RunError(f"{what}; job {job} may go on: see `fedpost status`") from error
            time.sleep(1)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _state(info: "JobDetails") -> str:
    """The job's state and its reason; for a run that ended by itself the exit code, since its log says more."""
    why = info.message if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    return f"{info.status}" if info.status == "SUCCEEDED" else f"{info.status}: {why}"


@contextmanager
def _stopped_with_us(job: str, address: str) -> Iterator[None]:
    """Stops the job if this process dies in the block, even by SIGKILL: a guard waits for a line or the input's end."""
    ending = [sys.executable, "-m", "experiments", "stop", job, "--address", address]
    waiting = ["sh", "-c", 'read _ || exec "$@"', "sh", *ending]
    guard = subprocess.Popen(waiting, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    assert guard.stdin is not None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):  # BrokenPipeError: nobody reads the log any more
        guard.stdin.close()
        guard.wait()
        raise
    finally:
        if not guard.stdin.closed:
            guard.communicate(b"\n")
