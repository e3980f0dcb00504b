"""openpi's WebSocket protocol: messages of msgpack with numpy arrays, and a client.

Free of torch, since simulators live in a Python of their own: tools/serve.py is the server.
"""

import contextlib
import re

import numpy as np

from tools.extras import require


def network():
    """msgpack, websockets' server and client, its error."""
    return require(
        "websockets==17.4 msgpack==1.2.4",
        "msgpack",
        "websockets.sync.server",
        "websockets.sync.client",
        "websockets.exceptions",
    )


def pack(value):
    """A message of dicts, lists, numbers, text and numpy arrays -> bytes."""
    return network()[0].packb(
        value,
        default=lambda x: {
            b"__ndarray__": True,
            b"data": x.tobytes(),
            b"dtype": x.dtype.str,
            b"shape": x.shape,
        },
    )


def unpack(message):
    """The inverse of pack. Bytes from anyone: ValueError, TypeError, KeyError or OverflowError."""

    def arrays(x):
        if b"__ndarray__" not in x:
            return x.get(b"data", x)  # openpi-client's form of a numpy number
        if not re.fullmatch(r"[<>=|][biuf]\d", str(x[b"dtype"])):
            raise ValueError(f"an array of type {x[b'dtype']!r}, not of numbers")
        return np.ndarray(x[b"shape"], x[b"dtype"], x[b"data"])

    return network()[0].unpackb(message, object_hook=arrays)


@contextlib.contextmanager
def client(port):
    """-> (infer(observation) -> answer, metadata), on this machine. RuntimeError when refused."""
    with network()[2].connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as ws:

        def infer(obs):
            ws.send(pack(obs))
            if (answer := ws.recv())[:5] == "error":
                raise RuntimeError(answer)
            return unpack(answer)

        yield infer, unpack(ws.recv())
