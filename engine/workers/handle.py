"""What a process has of a base that another party keeps: a handle by which it asks, and nothing of the base itself."""

import os
import sys
from typing import Any

import ray

from engine.system.failures import ENDED, last_line


class Handle:
    """Calls the methods of a provider's actor. If that dies, this process ends, and the pool starts both again."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):  # copying and pickling ask for methods that a handle need not have
            raise AttributeError(method)

        def ask(*arguments: Any) -> Any:
            try:
                return ray.get(getattr(self.actor, method).remote(*arguments))
            except ENDED as error:
                print(f"the provider has ended: {last_line(error)}", file=sys.stderr, flush=True)
                os._exit(1)

        return ask
