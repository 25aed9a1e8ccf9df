"""The command's view of the driver: it is started, replaced when it dies, and asked to stop; errors are explained."""

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.messages.errors import RunError
from experiments.config.user_code import code_of, line_at_fault, user_objects

if TYPE_CHECKING:
    from engine.messages.events import Event
    from engine.rounds.driver import RunOptions
    from experiments.config.recipe import Recipe

FUTILE = 3  # drivers in a row that may die without finishing a new round; a further one ends the run
FULL = {errno.ENOSPC, errno.EDQUOT}
# An OSError with one of these is about a user's file or disk; others, such as a lost connection, are not.
FILES = FULL | {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM}
FILES |= {errno.EROFS, errno.EFBIG, errno.EIO}


class RunStopped(Exception):
    """The run was asked to stop and has ended before its last round."""


def drive(recipe: "Recipe", options: "RunOptions", stop: threading.Event | None) -> Iterator["Event"]:
    """Yields a driver's events until `stop` is set and the round ends; a driver that dies is replaced and resumes."""
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from engine.messages.events import DriverLost, Fault, RoundDone, Started
    from engine.rounds.driver import Driver
    from engine.system.failures import LOST, cause_of, last_line

    for user_object in user_objects(recipe).values():
        # The code itself travels, so that no other process needs the file.
        ray.cloudpickle.register_pickle_by_value(sys.modules[code_of(user_object).__module__])
    # On this node, since it reads and writes this machine's folders; the second thread takes the request to stop.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Driver).options(num_cpus=0, max_concurrency=2, scheduling_strategy=here)
    futile = furthest = 0
    while True:
        driver: Any = actor.remote(recipe, options)
        over = threading.Event()
        if stop is not None:
            threading.Thread(target=_pass_on, args=(stop, over, driver), daemon=True).start()
        try:
            # At most one round ahead, so that what is copied after an event is recent.
            for reference in driver.run.options(_generator_backpressure_num_objects=1).remote():
                event = ray.get(reference)
                if isinstance(event, Started):  # it has recorded the faults of `lost`
                    options = replace(options, lost=())
                # Repeating a round is no progress: the fault may come after the round and before its checkpoint.
                if isinstance(event, RoundDone) and event.round > furthest:
                    futile, furthest = 0, event.round
                yield event
            return
        except (RayTaskError, *LOST) as error:
            cause = cause_of(error)
            if not isinstance(cause, LOST):
                if text := explanation(error):
                    raise RunError(text) from error
                raise
            # It is dead, or lost a slot while it started, or lost with a node what only its last checkpoint has.
            futile, why = futile + 1, last_line(cause)
            if futile > FUTILE:
                what = f"the driver ended {futile} times without getting further ({why})"
                remedy = "if memory ran out, lower clients.slots or take a smaller model or cohort"
                raise RunError(f"{what}: {remedy}; then continue from the last checkpoint with --resume") from error
            resume = options.resume or any((options.folder / "checkpoints").glob("[0-9]*"))
            options = replace(options, resume=resume, lost=(*options.lost, Fault("driver", "the driver", why)))
            yield DriverLost(why)
        finally:
            over.set()
            ray.kill(driver)


def _pass_on(stop: threading.Event, over: threading.Event, driver: Any) -> None:
    """Asks the driver to stop once `stop` is set: in a thread, since a signal's handler may interrupt a call of Ray."""
    while not over.wait(0.2):
        if stop.is_set():
            driver.stop.remote()
            return


@contextmanager
def stopped_by_interrupt(say: Callable[[str], None], begun: Callable[[], bool]) -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets once rounds have `begun`; before that, and again, it interrupts."""
    stop = threading.Event()

    def interrupted(*_: object) -> None:
        if not begun() or stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("finishing the round, then the run stops and can be resumed; Ctrl-C again stops it now")

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def explanation(error: BaseException) -> str | None:
    """What to tell the user about an error that the user can fix; None for any other, which is a bug of ours."""
    if isinstance(error, BrokenPipeError):  # raised in the command itself
        return "nothing reads the output of this command any more"
    cause = origin(error)
    if getattr(cause, "exit_code", None) == 2:  # of a class for the user's errors
        return str(cause)
    if line := line_at_fault("".join(traceback.format_exception(error))):
        return f"{type(cause).__name__}: {cause} (in {line}); --debug shows the traceback"
    if isinstance(cause, OSError) and cause.errno in FILES:
        hint = "; free some space and try again (with --resume if a run had begun)" if cause.errno in FULL else ""
        return f"{cause}{hint}"
    return None


def origin(error: BaseException) -> BaseException:
    """The error as it was raised, without what Ray wraps around it."""
    if "ray" not in sys.modules:
        return error
    from engine.system.failures import cause_of

    return cause_of(error)
