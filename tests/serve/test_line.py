"""The engine's end of the socket to its server."""

import fcntl
import resource
import socket

from hasten.serve.engine_process import Line
from hasten.serve.messages import Abort, frame


def test_a_descriptor_of_any_number():
    """A server with more than a thousand connections hands its engine a socket that is numbered behind them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours, theirs = socket.socketpair()
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    try:
        descriptor = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 1500)
        theirs.close()
        line = Line(descriptor)
        ours.sendall(frame(Abort(3)))
        assert list(line.orders(wait=True)) == [Abort(3)]
        ours.close()
        assert list(line.orders(wait=True)) == []
        assert line.ended
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
