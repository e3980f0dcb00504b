"""openpi's WebSocket protocol: messages of msgpack with numpy arrays, and a client.

Free of torch, since simulators live in a Python of their own: tools/serve.py is the server.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from tools.extras import require

NUMBER_TYPE = r"[<>=|][biuf]\d"  # dtype strings of numbers: "<f4", "|u1"


class Network(NamedTuple):
    """The optional modules that carry messages."""

    msgpack: ModuleType
    server: ModuleType  # websockets.sync.server
    client: ModuleType  # websockets.sync.client
    exceptions: ModuleType  # websockets.exceptions


def network() -> Network:
    """Imports what messages need. ValueError naming the pip install when a package is missing."""
    modules = require(
        "websockets==17.4 msgpack==1.2.4",
        "msgpack",
        "websockets.sync.server",
        "websockets.sync.client",
        "websockets.exceptions",
    )
    return Network(*modules)


# ---- Messages -----------------------------------------------------------------------------------


def array_to_dict(array: np.ndarray) -> dict:
    """An array as openpi-client writes it; msgpack calls this for what it does not know."""
    return {
        b"__ndarray__": True,
        b"data": array.tobytes(),
        b"dtype": array.dtype.str,
        b"shape": array.shape,
    }


def dict_to_array(value: dict) -> Any:
    """The inverse of array_to_dict; other dicts stay as they are.

    The message may be anyone's, so only types of numbers are made ("O" would hold pointers), and
    only of as many bytes as were sent."""
    if b"__ndarray__" in value:
        if not re.fullmatch(NUMBER_TYPE, str(value[b"dtype"])):
            raise ValueError(f"an array of type {value[b'dtype']!r}, not of numbers")
        data = value[b"data"]
        if not isinstance(data, bytes):  # of None numpy would make as many as `shape` asks for
            raise TypeError(f"an array whose data is a {type(data).__name__}, not bytes")
        array = np.ndarray(value[b"shape"], value[b"dtype"], data)
        if array.nbytes != len(data):
            raise ValueError(f"{len(data)} bytes for an array {array.shape} of {array.dtype}")
        return array
    if b"data" in value:  # openpi-client's form of a single numpy number
        return value[b"data"]
    return value


def pack(value: Any) -> bytes:
    """A message of dicts, lists, numbers, text and numpy arrays -> bytes."""
    return network().msgpack.packb(value, default=array_to_dict)


def unpack(message: bytes) -> Any:
    """The inverse of pack. Bytes from anyone: ValueError, TypeError, KeyError or OverflowError."""
    return network().msgpack.unpackb(message, object_hook=dict_to_array)


# ---- Client -------------------------------------------------------------------------------------


class Refused(RuntimeError):
    """The server's line of text in place of an answer; it begins with "error"."""


class Connection(NamedTuple):
    """A client's end of a connection to tools/serve.py."""

    infer: Callable[[dict], dict]  # observation -> answer; Refused when there is none
    metadata: dict  # what the server tells of its policy


@contextlib.contextmanager
def client(port: int) -> Iterator[Connection]:
    """Inside the block, a connection to the server at this port of this machine."""
    url = f"ws://127.0.0.1:{port}"
    # Without ping_timeout=None a server whose forward takes long would be given up, without
    # proxy=None one that HTTP_PROXY names asked for this machine.
    settings = {"compression": None, "max_size": None, "ping_timeout": None, "proxy": None}
    with network().client.connect(url, **settings) as socket:

        def infer(observation: dict) -> dict:
            socket.send(pack(observation))
            answer = socket.recv()
            if answer[:5] == "error":  # text; an answer is bytes
                raise Refused(answer)
            return unpack(answer)

        yield Connection(infer, metadata=unpack(socket.recv()))
