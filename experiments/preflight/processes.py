"""Fresh processes, and what a process holds of memory."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives in a process of its own, whose memory and caches are nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def memory(process: int | str = "self") -> dict[str, float]:
    """Megabytes of a process by their names in /proc: all that is resident, its own, the most there was.

    Nothing where there is no such process, or no /proc.
    """
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0][:-1]: int(line[1]) / 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "VmHWM:")}
