"""A worker's events on their way to the run: sealed lines, so that nothing else on that descriptor passes for one.

A line is a seal, '+' or '.', and a part of the event as JSON; '.' stands before the last part. It is no longer than
what POSIX writes to a pipe at once, and begins with a line break of its own: whatever a mechanism writes between two
lines spoils neither. The seal is a digest of the line with a secret of this one cell.
"""

import hashlib
import hmac
import json
from collections.abc import Iterator
from typing import Any

CLOSED = 74
"""Exit code of a worker that finds this descriptor closed: EX_IOERR of sysexits.h."""
SEAL = 32
PART = 512 - SEAL - 3
"""Characters of an event on a line; 512 bytes are POSIX's least PIPE_BUF."""


def lines(event: dict[str, Any], secret: str) -> Iterator[bytes]:
    """The event as sealed lines, each to be written at once."""
    text = json.dumps(event, allow_nan=False).encode()
    for start in range(0, len(text), PART):
        said = (b"+" if start + PART < len(text) else b".") + text[start : start + PART]
        yield b"\n" + _seal(said, secret) + said + b"\n"


class Reader:
    """Takes lines as they come, and gives the events among them."""

    def __init__(self, secret: str) -> None:
        self.ignored = 0
        """Lines that were no part of an event."""
        self._secret, self._parts = secret, b""

    def read(self, line: bytes) -> dict[str, Any] | None:
        """The event that this line ends, if it ends one."""
        line = line.strip(b"\n")
        seal, said = line[:SEAL], line[SEAL:]
        if not line:
            return None
        if not said or not hmac.compare_digest(seal, _seal(said, self._secret)):
            self.ignored += 1
            return None
        self._parts += said[1:]
        if said[:1] == b"+":
            return None
        whole, self._parts = self._parts, b""
        event: dict[str, Any] = json.loads(whole)
        return event


def _seal(said: bytes, secret: str) -> bytes:
    return hmac.digest(secret.encode(), said, hashlib.sha256).hex()[:SEAL].encode()
