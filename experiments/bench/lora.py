"""`fedpost bench lora`: tokens per second of whole rounds over those of a bare PyTorch loop, in the same run.

The bare loop is a good one: two single-threaded processes, the plain PEFT model, fused AdamW, the same rows, batches
and average. No figure is printed unless both have the same vector after the first round.
"""

import json
import multiprocessing
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import experiments
from datasets_partition.store import Store
from datasets_partition.tokens import Tokens
from engine.batches import batches
from engine.checkpoint import load_checkpoint
from engine.model import lora_config
from engine.objectives.sft import Sft
from experiments.api import build_store
from experiments.bench.results import Figure
from experiments.config import SHIPPED, Recipe, parse_recipe
from strategies.seeds import rng, torch_seed
from strategies.types import ServerState

WIDTH, LAYERS, CLIENTS, ROWS, LENGTH, PROCESSES = 256, 4, 40, 24, 128, 2
TOLERANCE = 2e-5  # of the vector after a round: one flat tensor and many round differently, and AdamW amplifies it
_bare: dict[str, Any] = {}


def recipe(folder: Path, rounds: int) -> Recipe:
    """LoRA on a small random Llama: 4 steps of 4 rows of 128 tokens, cohort 10; writes base and rows to `folder`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED["tiny"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    words = rng(0, 0, -1, "sample")
    with (folder / "rows.jsonl").open("w") as file:
        for client in range(CLIENTS):
            for _ in range(ROWS):
                text = tokenizer.decode(words.integers(300, 4000, 3 * LENGTH))
                file.write(json.dumps({"client": f"{client:03d}", "text": text}) + "\n")
    return parse_recipe(f"""
        name = "bench-lora"
        seed = 1
        rounds = {rounds}
        model = {{ base = "{folder / "base"}" }}
        clients = {{ slots = {PROCESSES} }}
        cohort = {{ size = 10 }}
        train = {{ steps = 4, batch = 4, max_length = {LENGTH}, optimizer = {{ kind = "adamw", eps = 1e-6 }} }}
        evaluate = {{ every = 0, rows = 1 }}
        checkpoint = {{ keep = 1000 }}
        [data]
        source = {{ kind = "jsonl", path = "{folder / "rows.jsonl"}" }}
        cache = "{folder / "stores"}"
    """)


def measure(small: bool) -> dict[str, Figure]:
    """The engine's and the bare loop's median tokens per second, and their ratio; ValueError when they disagree."""
    rounds = 2 if small else 6
    with TemporaryDirectory() as name:
        work = recipe(Path(name), rounds)
        run = experiments.run(work, out=Path(name) / "run")
        speeds = [row["value"] for row in run.metrics.to_pylist() if row["name"] == "tokens_per_s"]
        first = load_checkpoint(run.folder / "checkpoints", 1)
        bare_speeds, vector = _bare_loop(work, build_store(work), rounds)
        assert first is not None and isinstance(first.state, ServerState)
        apart = float((first.state.params - torch.from_numpy(vector)).abs().max())
    if not apart <= TOLERANCE:
        raise ValueError(f"after the first round the engine's and the bare loop's vectors are {apart:.2g} apart")
    engine, bare = statistics.median(speeds[1:]), statistics.median(bare_speeds[1:])
    return {
        "efficiency": Figure(engine / bare, "ratio"),
        "tokens_per_s": Figure(engine, "tokens/s"),
        "bare_tokens_per_s": Figure(bare, "tokens/s"),
        "apart": Figure(apart, "largest difference"),
    }


def _bare_loop(work: Recipe, store: Path, rounds: int) -> tuple[list[float], np.ndarray]:
    """Tokens per second of each round, and the vector after the first."""
    (tokens,) = store.glob("tokens-*")
    clients = Store.open(store).num_training
    context = multiprocessing.get_context("spawn")
    speeds: list[float] = []
    after_first = np.zeros(0)
    with context.Pool(PROCESSES, _start, (work, tokens)) as pool:
        vector: np.ndarray = pool.apply(_initial)
        for round_ in range(rounds):
            began = time.perf_counter()
            cohort = work.cohort.sample(clients, work.seed, round_).tolist()
            jobs = [(vector, round_, cohort[part::PROCESSES]) for part in range(PROCESSES)]
            totals, weights, counts = zip(*pool.map(_train, jobs, chunksize=1), strict=True)
            vector = vector + (np.sum(totals, 0) / sum(weights)).astype(np.float32)
            speeds.append(sum(counts) / (time.perf_counter() - began))
            after_first = vector if round_ == 0 else after_first
    return speeds, after_first


def _start(work: Recipe, tokens: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(work.model.base).requires_grad_(False)
    torch.manual_seed(torch_seed(work.seed, 0, -1, "initial"))
    network = get_peft_model(base, lora_config(work.model))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    _bare.update(work=work, tokens=Tokens.open(tokens), network=network.train(), trained=trained)


def _initial() -> np.ndarray:
    vector: np.ndarray = torch.cat([parameter.detach().reshape(-1) for parameter in _bare["trained"]]).numpy()
    return vector


def _train(job: tuple[np.ndarray, int, list[int]]) -> tuple[np.ndarray, float, int]:
    """Trains some clients of a round: the sum of weight * delta, of weights, and how many tokens were trained on."""
    vector, round_, clients = job
    work, network, trained = _bare["work"], _bare["network"], _bare["trained"]
    train, objective = work.train, Sft(work.train.max_length)
    largest = int(_bare["tokens"].counts("train").max())
    total, weights, count = np.zeros(len(vector)), 0.0, 0
    for client in clients:
        rows = _bare["tokens"].rows(client, "train")
        torch.nn.utils.vector_to_parameters(torch.from_numpy(vector.copy()), trained)  # they become views of it
        settings = train.optimizer
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, eps=settings.eps, weight_decay=0.0, fused=True)
        for picked in batches(rows.num_rows, train, rng(work.seed, round_, client, "batches")):
            batch = objective.collate(rows.take(picked), 0)
            nll, learnt = objective.loss(network, batch)
            (nll / learnt).backward()
            torch.nn.utils.clip_grad_norm_(trained, train.clip)
            optimizer.step()
            optimizer.zero_grad()
            count += int(batch.attention_BT.sum())
        weight = rows.num_rows / largest
        delta = torch.nn.utils.parameters_to_vector(trained).detach().numpy() - vector
        total, weights = total + weight * delta.astype(np.float64), weights + weight
    return total, weights, count
