"""One line out of a TVM error, which is often a page with the program in it."""

from __future__ import annotations

_MARK = "Error message: "


def reason_of(error: BaseException) -> str:
    """Return what went wrong, without the program, the stack and the file names of TVM.

    Parameters
    ----------
    error : BaseException
        Any error; TVM's schedule errors say it after "Error message:", others on the first line.

    Returns
    -------
    str
        One line, never empty.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    marked = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    said = next((line for line in (*marked, *lines) if line), "")
    return said or type(error).__name__
