"""Makes the shipped base model "tiny" from public Python code: data, tokenizer, weights and model card.

    python -m experiments.pretrain_tiny --out experiments/models/tiny

The packages of the corpus are not those of the source `python_docs`, and a file that shares a function with its rows is
left out. Two cores with AVX512-BF16 take about an hour. Legend: B windows a step, T tokens a window.
"""

import argparse
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from datasets_partition.sources.python_docs import PythonDocs, documented

CORPUS = {  # wheel: its sha256; every package's metadata declare a BSD, MIT or Apache license
    "bokeh==3.9.2": "448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765",
    "celery==5.7.0": "18310a9c919f9029e4735367484d93e6a25cdfd30afdc474622cc263d9b35f6e",
    "cirq-core==1.7.0": "9d2e9610b06e2b2b2195184f44c0df4e94f31485831f8e1c6a96c858b7897bce",
    "dask==2026.8.0": "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c",
    "distributed==2026.8.0": "3bd8882861a2cf497453f28c6b61135fa8ef2bb1d6885ad3b9f27e887e9c0e01",
    "django==5.2.19": "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    "flax==0.12.8": "807931d369cbc716fc447801ab39cd6c3c2614d573387a2319a028675dd34fe5",
    "jax==0.10.2": "724d73c4678d8b06f6a6ab4db1b8a2fea8cd4f1e2c2564f99601634ec7b8d1c6",
    "keras==3.15.1": "836460e480930acbd19bb7a17e62f9ecad40e8a9af9a651fc8d0586a96d27e20",
    "lightning==2.6.6": "2bcbd6ee840071cd076c7dc9953d7ac1040df92f1c5fa76583aae644f037ab85",
    "mne==1.13.2": "36bbdd9fdc68431309a75e9dc6331b9de085cb6836688ac50b7b89f141a83cc3",
    "networkx==3.6.1": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "nibabel==5.4.2": "553482c5f1e1034fc312edf6fb7f32236c0056439845d1c29293b7e8c98d4854",
    "nilearn==0.14.1": "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
    "nltk==3.10.4": "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
    "optuna==5.0.0": "5fff892ae6baf4948c810c5b8635ec67e08efb0709b41cb73b14e30391d44720",
    "pennylane==0.45.1": "b8cc7f590c43281b6e35b3a35707e9583c6b7babeb31dcf6f1cbde32a754ab93",
    "pymc==5.28.5": "29f44aa3edd727b29eb0a555eec0d9def4775a5d5c849eee31239384a5feaec2",
    "scrapy==2.19.0": "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013",
    "sphinx==9.0.4": "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb",
    "sqlglot==30.30.0": "06c4c212a7868c7dcff0fd0fda348dd3c5cbad40137b3083a70ecdfe22921cf9",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "textual==8.2.8": "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a",
    "torchmetrics==1.9.0": "bfdcbff3dd1d96b3374bb2496eb39f23c4b28b8a845b6a18c313688e0d2d9ca1",
    "trio==0.35.0": "9a062a029487c1bdbcc1b2543b729a0bde857ce478b1512c84f391f628e0c5c9",
    "twisted==26.10.0": "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
    "wagtail==8.0.1": "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
    "xarray==2026.9.0": "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c",
    "zarr==3.1.6": "b5a82c5079d1c3d4ee8f06746fa3b9a98a7d804300fa3f4be154362a33e1207e",
}
SEED, TOKENS = 20261122, 14_000_000
T, B = 256, 16
MUON_LR, ADAM_LR, WARMUP = 4e-3, 3e-3, 100
END, PAD = "<|endoftext|>", "<|pad|>"


def download(folder: Path) -> list[Path]:
    """The wheels of CORPUS, checked against their hashes by pip."""
    requirements = folder / "corpus.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in CORPUS.items()))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    subprocess.run([*pip, "-d", str(folder), "-r", str(requirements)], check=True)
    return sorted(folder.glob("*.whl"))


def documents(wheels: list[Path], folder: Path) -> Iterator[str]:
    """The wheels' Python files without tests, huge tables, and files that share a function with the clients' rows."""
    source = PythonDocs()
    clients = set(source.load().table["prompt"].to_pylist())
    probe = folder / "probe.py"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith(".py") or "/test" in name or archive.getinfo(name).file_size > 100_000:
                    continue
                text = archive.read(name).decode("utf-8", errors="ignore")
                probe.write_text(text, encoding="utf-8")
                if len(text) > 200 and clients.isdisjoint(p for p, _ in documented(probe, source.prompt_chars)):
                    yield text


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 entries; nothing is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    signs: dict[str, Any] = {"special_tokens": [END, PAD], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4096, show_progress=False, **signs))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=512)


def windows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts with an end token after each, as one stream cut into int64 windows [N, T]."""
    end = tokenizer.convert_tokens_to_ids(END)
    encodings = tokenizer.backend_tokenizer.encode_batch(texts)
    stream = np.concatenate([np.array([*encoding.ids, end], np.int64) for encoding in encodings])
    return stream[: len(stream) // T * T].reshape(-1, T)


def train(model: LlamaForCausalLM, data_NT: np.ndarray, out: Path) -> dict[str, float]:
    """Muon for the matrices, AdamW for the rest, one pass; prints the loss, saves at the end, returns the figures."""
    held, data_NT = data_NT[:64], data_NT[64:]
    steps = min(TOKENS // (B * T), len(data_NT) // B)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    schedules = [LambdaLR(each, lambda s: min((s + 1) / WARMUP, 1 - s / steps)) for each in (muon, adam)]
    compiled: Any = torch.compile(model)

    def loss_of(window_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(input_ids=window_BT, labels=window_BT, use_cache=False).loss  # type: ignore[no-any-return]

    started = time.monotonic()
    for step in range(steps):
        loss = loss_of(torch.from_numpy(data_NT[step * B : (step + 1) * B]))
        loss.backward()
        for optimizer, schedule in zip((muon, adam), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:6.0f} s", flush=True)
        if step % 500 == 499:
            save(model, out)  # what an interrupted night leaves behind is a model too
    with torch.no_grad():
        held_loss = sum(loss_of(torch.from_numpy(held[i : i + B])).item() for i in range(0, 64, B)) / (64 / B)
    minutes = round((time.monotonic() - started) / 60, 1)
    return {"tokens": steps * B * T, "held_out_loss": round(held_loss, 3), "minutes": minutes}


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Writes a bfloat16 copy of the model."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)


def card(figures: dict[str, float]) -> str:
    """The model card: what it is, what it was trained on, what it is not for."""
    corpus = "\n".join(f"- {name}" for name in CORPUS)
    return f"""---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
---
# tiny: the base model of fedpost's demo

A Llama-architecture causal language model of 3.4 million parameters (width 192, 6 layers, 6 heads, tied embeddings,
512 positions) with a byte-level BPE of 4,096 entries, both trained from nothing by
`python -m experiments.pretrain_tiny` (seed {SEED}). Data, code and weights are open.

- Trained on {figures["tokens"]:,} tokens of Python source in windows of {T}.
- Took {figures["minutes"]} minutes on 2 CPU cores, shared with other work.
- Held-out loss: {figures["held_out_loss"]} nats a token.
- Licence of the weights: Apache-2.0.
- The corpus is the `.py` files, without tests, of the packages below from the Python Package Index (BSD, MIT or
  Apache-2.0 licenses, as their metadata declare; single files in them may carry others, such as Python's own), at these
  versions and at the hashes in `experiments/pretrain_tiny.py`. Files that share a function with the standard library or
  the demo's client packages were left out.

{corpus}

It knows the look of Python and little else. It is for demos, tests and benchmarks of federated post-training, not for
writing code.
"""


def main() -> None:
    """Runs the whole recipe of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    with TemporaryDirectory() as name:
        texts = list(documents(download(Path(name)), Path(name)))
    texts = [texts[i] for i in np.random.Generator(np.random.Philox(SEED)).permutation(len(texts))]
    print(f"{len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
    tokenizer = train_tokenizer(texts[::8])
    data_NT = windows(texts, tokenizer)
    print(f"{data_NT.size / 1e6:.1f} million tokens", flush=True)
    sizes: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": 512}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    ids["pad_token_id"] = tokenizer.pad_token_id
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes, **ids))
    out.mkdir(parents=True, exist_ok=True)
    figures = train(model, data_NT, out)
    save(model, out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card(figures), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
