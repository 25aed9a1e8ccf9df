"""The base of worker processes: placement, token columns, and the clients' part of secure aggregation."""

import logging
from pathlib import Path
from typing import Any

import ray
import torch

from engine.aggregation.secure_clients import Opening, SecureClients
from engine.config.federation import Federation
from engine.messages.tasks import Place
from engine.models.base_model import always_the_same_bits
from engine.records.client_state import refuse_unseen
from engine.system.allocator import use_large_pages
from engine.workers import token_columns as columns
from strategies.secagg.messages import Agreement, KeyList, Keys, Shares, Survivors, Unmasking, UnmaskRequest


class WorkerProcess:
    """A process that Ray has placed; `folder` is where client state lies. Of a group of ranks each is one."""

    def __init__(self, federation: Federation, folder: Path) -> None:
        from transformers.utils import logging as transformers_logging

        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        use_large_pages()
        torch.set_num_threads(federation.clients.threads)
        always_the_same_bits()
        self.federation, self.folder = federation, folder
        self.secure = SecureClients()
        self.device = torch.device("cuda" if federation.clients.num_gpus > 0 and torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(min(federation.clients.num_gpus, 1.0))

    def place(self) -> Place:
        """Returns where Ray put this process."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Place(context.get_node_id(), gpus[0] if self.device.type == "cuda" else None)

    def refuse_lost_memory(self) -> None:
        """Raises RunError if clients keep state, and this process's node does not see its folder."""
        if self.federation.keeps_state:
            refuse_unseen(self.folder)

    def tokenize(self, store: Path, shared: str | None) -> Path:
        """Makes or finds the store's token columns, in `shared` too; returns their folder."""
        return columns.token_columns(store, self.federation, shared)

    def find_tokens(self, tokens: Path) -> Path | None:
        """Returns where this process's node sees the token columns, if it does."""
        return columns.find_tokens(tokens)

    def receive_tokens(self, tokens: Path, parts: columns.Parts) -> Path:
        """Keeps a copy of the token columns on this process's node; returns its folder."""
        return columns.receive_tokens(tokens, parts)

    def open(self, opening: Opening, authority: Any) -> list[Keys]:
        """First trip of secure aggregation."""
        return self.secure.open(opening, authority)

    def shares(self, listed: KeyList) -> list[Shares]:
        """Second trip."""
        return self.secure.shares(listed)

    def agree(self, survivors: Survivors) -> list[Agreement]:
        """The trip of the active profile after the third."""
        return self.secure.agree(survivors)

    def unmask(self, requests: dict[int, UnmaskRequest]) -> list[Unmasking]:
        """Last trip."""
        return self.secure.unmask(requests)

    def roster(self, cohort: tuple[int, ...], authority: Any) -> dict[int, bytes]:
        """Returns the cohort's public identity keys, for the server."""
        return self.secure.roster(cohort, authority)
