"""Fresh processes, their environment, and their memory."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = ("VmRSS", "RssAnon", "RssFile", "VmHWM")  # in /proc: resident, private, of mapped files, the peak


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a process of its own, which shares no memory and no caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory(process: int | str = "self") -> dict[str, float]:
    """MB of a process by these KINDS; empty if there is no such process, or no /proc."""
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0][:-1] in KINDS}


def hidden_gpus(gpus: int) -> dict[str, str]:
    """An environment in which Ray counts `gpus` GPUs and no process sees one; Ray wants as many names."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(["-1"] * gpus), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Sets variables (None: deletes them) for this process and those that it starts, and restores them at the end."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        os.environ |= {} if value is None else {name: value}
