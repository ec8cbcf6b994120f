"""Patience with what time may mend, such as an object store that answers 503: attempts for a time, not for a number."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ddk_ds.errors import TemporaryError

PATIENCE_S = 900.0
"""Seconds for which a store's failure is borne, where no configuration says otherwise."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_QUIET_S, _SAY_EVERY_S = 10.0, 60.0
_LOOK_EVERY_S = 0.5
# An error's codes that time may mend although they are the client's: a time-out, too early, too many requests.
_CLIENT_MENDABLE = (408, 425, 429)
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Unavailable(Exception):
    """A failure that time may mend; its text says what happened."""


def never() -> bool:
    """Return False: nothing ends the patience before its time."""
    return False


def patiently(
    attempt: Callable[[], _Result],
    what: str,
    patience_s: float,
    *,
    since: float | None = None,
    done: str = "fetched",
    give_up: Callable[[], bool] = never,
) -> _Result:
    """Call `attempt` until it raises no `Unavailable` any more, with growing pauses, and return its result.

    A failure that lasts is said once a minute.

    Args:
        what: the beginning of the messages, for example the file's address.
        patience_s: seconds after which it is not called again; it is called once in any case.
        since: the time (time.monotonic) from which they are counted; None: from now on.
        done: the messages' participle for what is attempted.
        give_up: looked at in the pauses; True ends them at once.

    Raises TemporaryError, with the last failure, when the patience is at its end.
    """
    began = time.monotonic() if since is None else since
    pause, say_at = _FIRST_WAIT_S, began + _QUIET_S
    while True:
        try:
            return attempt()
        except Unavailable as error:
            failure = str(error)
        now = time.monotonic()
        if now - began >= patience_s or give_up():
            raise TemporaryError(
                f"{what} cannot be {done}, tried for {now - began:.0f} s: {failure}; check the address and the store, "
                f"then start again: what was {done} is kept"
            )
        if now + pause >= say_at:
            say_at = now + _SAY_EVERY_S
            words = "%s cannot be %s for %.0f s: %s; trying for %g s"
            _log.warning(words, what, done, now - began, failure, patience_s)
        _pause(min(pause, max(0.0, began + patience_s - now)), give_up)
        pause = min(_LONGEST_WAIT_S, 2 * pause)


def _pause(seconds: float, give_up: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not give_up():
        time.sleep(min(left, _LOOK_EVERY_S))


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that a store's client puts into its error; None if there is none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # requests and httpx; azure; urllib and Google's client
        found = getattr(response, "status_code", None) or getattr(error, "status_code", None)
        found = found or getattr(error, "code", None)
    return int(found) if isinstance(found, int) else None


def refused(error: BaseException) -> bool:
    """Return True if a store has answered that the request itself is wrong, which time does not mend."""
    status = http_status(error)
    return status is not None and 400 <= status < 500 and status not in _CLIENT_MENDABLE
