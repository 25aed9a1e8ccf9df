"""Runs as Ray jobs: sent to a cluster with the code that they need, followed to their end, looked at, stopped."""

import logging
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from datasets_partition.sources.location import is_local, refuse_password
from datasets_partition.sources.source_files import first_line
from engine.messages.errors import RunError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("working_dir", "py_modules")
TOKENS, TOKEN_FILE = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}, Path("~/.ray/auth_token")
TAIL = 10  # lines
PATIENCE_S = 60
# Ray asks a job to end, and kills it so many seconds later.
STOP_WAIT_S = 60
Answer = TypeVar("Answer")


def submit(
    recipe: Path,
    changes: list[str],
    address: str,
    out: str | None = None,
    runtime_env: Path | None = None,
    *,
    resume: bool = False,
    detach: bool = False,
) -> int:
    """Submits a run of the recipe to the job server at `address` and follows it: the run's exit code, or 0 if detached.

    Without `detach` the job ends when this process does. Raises RunError for what the caller can mend.
    """
    from experiments.config.recipe import load_recipe

    loaded, here = load_recipe(recipe, changes), Path.cwd().resolve()
    out = _lasting(out, loaded.name, resume)
    options = [part for change in changes for part in ("--set", change)] + ["--out", out] + ["--resume"] * resume
    command = run_command(recipe, here) + options
    environment = environment_of(here, runtime_env)
    client = job_client(address)
    job = f"fedpost-{secrets.token_hex(6)}"
    print(f"job {job} at {address}, run folder {out}", flush=True)
    if detach:
        _send(client, job, command, environment)
        print(f"to look at it:  fedpost status {job} --address {address}")
        print(f"to stop it:     fedpost stop {job} --address {address}")
        return 0
    with _stopped_with_us(job, address):
        _send(client, job, command, environment)
        return _follow(client, job)


def show_status(job: str, address: str) -> None:
    """Prints how far a job is, and the end of its log; RunError if there is none of that name."""
    client = job_client(address)
    with _answers(job, address):
        info, log = client.get_job_info(job), client.get_job_logs(job)
    print(f"{job}: {_said(info)}")
    for line in log.splitlines()[-TAIL:]:
        print(f"  {line}")


def stop(job: str, address: str) -> None:
    """Ends a job and waits until it has ended; RunError if there is none of that name, or it does not end."""
    client = job_client(address)
    last = time.monotonic() + STOP_WAIT_S + PATIENCE_S
    with _answers(job, address):
        while not (info := client.get_job_info(job)).status.is_terminal():
            if time.monotonic() > last:
                raise RunError(
                    f"job {job} was asked to end, and has not: see `fedpost status {job} --address {address}`"
                )
            client.stop_job(job)
            time.sleep(0.5)
    print(f"{job}: {_said(info)}")


def job_client(address: str) -> "JobSubmissionClient":
    """A client of the job server at `address`; RunError, within seconds, unless one answers there."""
    if not address.startswith(("http://", "https://")):
        raise RunError(
            f"{address} is no address of a job server, which is that of Ray's dashboard, such as "
            f"http://127.0.0.1:8265 (`fedpost run --address` takes the head's own HOST:PORT)"
        )
    # As `ray start` and `ray.init` do, and Ray's job client does not: a token that is there is used.
    if TOKENS & os.environ.keys() or TOKEN_FILE.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import aiohttp  # noqa: F401  # what Ray's client would miss later
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise RunError(f'jobs need Ray\'s job client ({error}): pip install "ray[default]"') from error
    address = address.rstrip("/")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray would put RAY_ADDRESS before what it is given
    try:
        requests.get(f"{address}/api/version", timeout=5)  # Ray's own first request waits for ever
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise RunError(
            f"the job server at {address} asks for a token, and this is none of its own: set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as they are set where it runs"
        ) from error
    except requests.JSONDecodeError as error:
        raise RunError(f"what answers at {address} is no job server of Ray") from error
    except (requests.RequestException, ConnectionError) as error:
        raise RunError(
            f"no job server answers at {address}: `ray start --head` starts one where ray[default] is installed; of a "
            f"cluster elsewhere forward the port of its dashboard"
        ) from error
    except (RuntimeError, KeyError) as error:
        raise RunError(f"what answers at {address} is no job server of Ray") from error


def run_command(recipe: Path, here: Path) -> list[str]:
    """The command that runs a recipe of the uploaded folder `here`; RunError if it is not in what is uploaded."""
    from experiments.runs.resuming import RUNS

    path = recipe.resolve()
    if not path.is_relative_to(here) or path.is_relative_to(here / RUNS):
        raise RunError(
            f"the recipe {recipe} is not in what the cluster is sent, the present folder without its {RUNS}/: copy it "
            f"into {here}, or submit from the folder that holds it"
        )
    # -P: packages of the same names in the uploaded folder do not come before fedpost's.
    return ["python", "-P", "-m", "experiments", "run", path.relative_to(here).as_posix()]


def environment_of(here: Path, given: Path | None) -> dict[str, Any]:
    """Ray's runtime environment: the folder `here`, fedpost's packages if they lie elsewhere, what `given` asks for."""
    from experiments.runs.api import shipped_code
    from experiments.runs.resuming import RUNS

    asked = _read_environment(given) if given else {}
    packages = {} if here == ROOT else shipped_code()
    return {
        **asked,
        **packages,
        "working_dir": str(here),
        "excludes": [f"/{RUNS}/", "__pycache__/", *asked.get("excludes", [])],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **asked.get("env_vars", {})},
    }


def _read_environment(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"the runtime environment {file} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict) or any(key in found for key in OURS):
        raise RunError(
            f"{file} should hold keys of Ray's runtime environments in YAML, such as pip or env_vars, and neither "
            f"{' nor '.join(OURS)}, which submitting sets"
        )
    return found


def _lasting(out: str | None, name: str, resume: bool) -> str:
    """A run folder that outlives the job: its own working folder is Ray's, and is removed with it."""
    from experiments.runs.resuming import RUNS

    if out is None and resume:
        raise RunError("--resume needs the --out of the run that it goes on with")
    out = out or str(RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    refuse_password(out)
    return str(Path(out).absolute()) if is_local(out) else out


def _send(client: "JobSubmissionClient", job: str, command: list[str], environment: dict[str, Any]) -> None:
    import requests

    for talkative in ("ray._private.runtime_env", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(talkative).setLevel("ERROR")  # a line for each ignore file and package
    try:
        client.submit_job(entrypoint=shlex.join(command), submission_id=job, runtime_env=environment)
    except (RuntimeError, TypeError, requests.RequestException) as error:
        if "exceed" in str(error):
            raise RunError(
                f"{environment['working_dir']} is more than Ray uploads (100 MiB): name in a .rayignore there, written "
                f"like a .gitignore, what the run does not need, and keep data and base models at a URI"
            ) from error
        raise RunError(f"the job was not taken: {str(error).strip().splitlines()[-1]}") from error


def _follow(client: "JobSubmissionClient", job: str) -> int:
    """Prints the job's log as it grows; the exit code of its run."""
    shown = 0
    while True:
        # In this order: once the job has ended, its log is whole.
        info, log = _patiently(client.get_job_info, job), _patiently(client.get_job_logs, job)
        print(log[shown:], end="", flush=True)
        shown = len(log)
        if info.status.is_terminal():
            break
        time.sleep(1)
    code = info.driver_exit_code
    if code is None:
        print(f"{job}: {_said(info)}", file=sys.stderr)
        return 143 if info.status == "STOPPED" else 1
    return code if code >= 0 else 128 - code


def _patiently(ask: Callable[[str], Answer], job: str) -> Answer:
    """What the job server says; it, or what lies between, may be away for a while."""
    import requests

    last = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask(job)
        except (RuntimeError, requests.RequestException) as error:
            if time.monotonic() > last:
                raise RunError(
                    f"the job server has not answered for {PATIENCE_S} s; job {job} may go on: see `fedpost status`"
                ) from error
            time.sleep(1)


@contextmanager
def _answers(job: str, address: str) -> Iterator[None]:
    import requests

    try:
        yield
    except (RuntimeError, requests.RequestException) as error:
        if "does not exist" in str(error):
            raise RunError(f"there is no job {job} at {address}") from error
        raise RunError(f"the job server at {address} gives no answer: {str(error).strip().splitlines()[-1]}") from error


def _said(info: "JobDetails") -> str:
    """The job's state and why it is in it: of a run that has ended by itself the exit code, since its log says more."""
    why = info.message if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    return f"{info.status}" if info.status == "SUCCEEDED" else f"{info.status}: {why}"


@contextmanager
def _stopped_with_us(job: str, address: str) -> Iterator[None]:
    """Stops the job if this process is ended before the block is, also by SIGKILL or by a terminal that is closed.

    A process of its own waits for a line from here. If this process dies, its input ends without one.
    """
    ending = [sys.executable, "-m", "experiments", "stop", job, "--address", address]
    guard = subprocess.Popen(
        ["sh", "-c", 'read _ || exec "$@"', "sh", *ending], stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True
    )
    assert guard.stdin is not None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, BrokenPipeError):  # the last: nobody reads the log any more
        guard.stdin.close()
        guard.wait()
        raise
    finally:
        if not guard.stdin.closed:
            guard.communicate(b"\n")
