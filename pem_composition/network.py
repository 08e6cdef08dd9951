"""The hub when there is one, a quick refusal when there is none.

Without a network the Hugging Face libraries retry for 20 seconds per file before they look into
their cache. One look at the name service decides at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlparse

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@cache
def reachable() -> bool:
    """True if the hub's host name resolves, or a proxy would resolve it for us."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def session() -> Iterator[None]:
    """Within, the Hugging Face libraries use only their cache if the hub cannot be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
