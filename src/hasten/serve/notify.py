"""What systemd is told of a service (sd_notify(3)): one datagram, to nobody where nobody listens."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Tell ``READY=1``, ``STOPPING=1`` or ``STATUS=…``."""
    if not (address := os.environ.get("NOTIFY_SOCKET", "")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
