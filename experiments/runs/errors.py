"""Which errors a user can fix, and what the command says about them."""

import errno
import sys
import traceback

from experiments.config.user_code import line_at_fault

FULL = {errno.ENOSPC, errno.EDQUOT}
# An OSError with one of these is about a user's file or disk; others, such as a lost connection, are not.
FILES = FULL | {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO),
}


def explanation(error: BaseException) -> str | None:
    """What the user should read about an error that the user can fix; None for any other, which is a bug of ours.

    The user's errors are those whose class has `exit_code = 2`, those of files and disks, and those of a module that
    the recipe names. An error that Ray brings from another process is judged by what was raised there.
    """
    cause = origin(error)
    if getattr(cause, "exit_code", None) == 2:
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
