"""The ties between ranks: connections by which each learns that another one's process or host is gone.

Each rank is connected to rank 0, and neither says anything. When a process ends, however it ends, its kernel closes the
connection. While a host is up, its kernel answers the probes of the other end's kernel (TCP's keepalive), also for a
process that is stopped, or that waits for a disk and holds the interpreter's lock: there a thread's heartbeats would
stop. Probes that nobody answers say that a host or the network to it is gone.
"""

from __future__ import annotations

import errno
import secrets
import selectors
import socket
import sys
from collections.abc import Callable
from threading import Thread

Lost = Callable[[int, str, bool], None]
"""Is called in a thread with the rank at the other end, its host, and True if the host does not answer, False if its
process has ended."""

_CONNECT_S = 30.0
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


def accept_ties(address: str, silence_s: float, lost: Lost) -> str:
    """Accept the ties of the other ranks in a thread, and return what they need for `tie_to_rank_0`.

    Args:
        address: name or address under which the other ranks reach this one; says if IPv6 is used.
        silence_s: seconds without an answer after which a host counts as gone; 0: for ever.
        lost: called for each rank whose tie breaks.
    """
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
    token = secrets.token_hex(16)
    Thread(target=_accept, args=(listener, token, silence_s, lost), name="ties", daemon=True).start()
    return f"{listener.getsockname()[1]} {token} {socket.gethostname()}"


def tie_to_rank_0(address: str, accepted: str, rank: int, silence_s: float, lost: Lost) -> None:
    """Tie this rank to rank 0 at `address`, which has returned `accepted`. Raises OSError if it cannot be reached."""
    port, token, host = accepted.split()
    tie = socket.create_connection((address, int(port)), timeout=_CONNECT_S)
    tie.settimeout(None)
    _probe(tie, silence_s)
    tie.sendall(f"{token} {rank} {socket.gethostname()}".encode())

    def hold() -> None:
        while True:
            said, silent = _receive(tie)
            if not said:
                break
        lost(0, host, silent)

    Thread(target=hold, name="tie", daemon=True).start()


def _accept(listener: socket.socket, token: str, silence_s: float, lost: Lost) -> None:
    others: dict[socket.socket, tuple[int, str]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                tie = key.fileobj
                assert isinstance(tie, socket.socket), "nothing else is registered"
                if tie is listener:
                    tie = listener.accept()[0]
                    _probe(tie, silence_s)
                    selector.register(tie, selectors.EVENT_READ)
                    continue
                said, silent = _receive(tie)
                words = said.decode(errors="replace").split()
                if tie not in others and len(words) == 3 and words[0] == token:
                    others[tie] = int(words[1]), words[2]
                    continue
                selector.unregister(tie)  # it has ended, or it is none of the ranks
                tie.close()
                if tie in others:
                    lost(*others.pop(tie), silent)


def _receive(tie: socket.socket) -> tuple[bytes, bool]:
    """Return what the other end says, or nothing, and True if it does not answer, when the tie is broken."""
    try:
        return tie.recv(1024), False
    except OSError as error:
        return b"", error.errno in _SILENT


def _probe(tie: socket.socket, silence_s: float) -> None:
    """Let the kernel break the tie when the other end's kernel has not answered for `silence_s`. Linux only."""
    if silence_s and sys.platform == "linux":
        every_s = max(1, round(silence_s / 9))
        tie.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tie.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3 * every_s)
        tie.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
        tie.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * silence_s))
