"""Bases of the hub, of which a server on loopback answers as it does: downloaded, gated, cached, offline."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
SAID = "Access to model org/gated is restricted. You must have access to it and be authenticated to access it."
PROGRAM = """
import sys
from huggingface_hub import constants
from engine.config.sections import Model
from engine.models.base_model import read_base
from engine.models.tokenizer import load_tokenizer
from experiments.runs.digests import base_digest

def show(base, revision=None):
    model = Model(base=base, revision=revision)
    try:
        packed, _ = read_base(model)
        print(packed.config.tie_word_embeddings, len(load_tokenizer(model)), base_digest(model))
    except ValueError as error:
        print(error)

show("org/gated")
show("org/base")
show("org/base", "v1")
show("org/base", "v2")
show(sys.argv[1] + "/hub/models--org--base/snapshots/" + "b" * 40)
constants.HF_HUB_OFFLINE = True  # as the variable of that name sets it
show("org/base", "v1")
show("org/other")
"""


class Hub(BaseHTTPRequestHandler):
    """Answers for two repositories, one of them gated; `folders` are the other one's files by commit."""

    folders: dict[str, Path]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        name, *rest = parts[3:] if is_api else parts[1:]
        revision = rest[1] if len(rest) > 1 else "main"
        commit = COMMITS.get(revision, revision)
        if name == "gated":
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message=SAID)
        elif name != "base":
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password.")
        elif commit not in self.folders:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        elif is_api and rest[:1] != ["tree"]:
            files = [{"rfilename": path.name} for path in self.folders[commit].iterdir()]
            body = json.dumps({"id": "org/base", "sha": commit, "siblings": files}).encode()
            self.answer(200, body, Content_Type="application/json")
        elif is_api or not (file := self.folders[commit] / "/".join(rest[2:])).is_file():
            self.answer(404, b'{"error": "no such entry"}', X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            content = file.read_bytes()
            self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{sha1(content).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(bases: dict[str, Path]) -> Iterator[str]:
    """The address of the server, which has the tied base as its main branch and the untied as v1."""
    folders = {COMMITS["main"]: bases["tied"], COMMITS["v1"]: bases["untied"]}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfBases", (Hub,), {"folders": folders}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_bases_of_the_hub(hub: str, tmp_path: Path) -> None:
    home = tmp_path / "a cache"
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home)],
        env={name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    gated, main, tagged, unknown, as_folder, offline, absent = ended.stdout.splitlines()
    assert SAID.rstrip(".") in gated and gated.endswith("; ask for access on its page, and set HF_TOKEN")
    assert main == f"True 282 commit {COMMITS['main']}" and tagged == f"False 282 commit {COMMITS['v1']}"
    assert "v2 is not a valid git identifier" in unknown
    snapshot = home / "hub" / "models--org--base" / "snapshots" / COMMITS["v1"]
    assert (snapshot / "model.safetensors").is_symlink(), "the hub's cache keeps files under other names"
    assert as_folder.startswith("False 282 ") and len(as_folder.split()[-1]) == 64
    assert offline == tagged
    assert absent.endswith("HF_HUB_OFFLINE is set, and it is not among the files that have been downloaded")
