"""The policy server on loopback against openpi's own client, and the action chunks it shares with
simulation against hand-worked numbers."""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import threading
import time

import numpy as np
import pytest

import vla
from tools import protocol, serve

network = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("websockets", "msgpack"))),
    reason="pip install -r requirements-extras.txt",
)


class Fake:
    """vla.Policy's interface: chunk step k of a row is its state plus k, 3 actions, range +-5."""

    horizon, action_dim, cameras = 4, 3, ("image", "image_wrist")

    def __init__(self):
        self.spec = {
            "stats": {
                "state": {"q01": [0, 0], "q99": [1, 1]},
                "action": {"q01": [-5] * 3, "q99": [5] * 3},
            }
        }
        self.memo, self.sizes, self.keys, self.gate = {}, [], [], threading.Event()
        self.waiting = 0  # forwards that the closed gate holds
        self.gate.set()

    def act_batch(self, images, instructions, states, keys=None):
        self.waiting += 1
        self.gate.wait(20)
        self.waiting -= 1
        self.sizes.append(len(images))
        self.keys += map(tuple, keys)
        if "explode" in instructions:
            raise RuntimeError("boom")
        k = np.arange(self.horizon)[:, None]
        chunks = np.stack([k + np.full(3, state[0]) for state in states]).astype(np.float32)
        return np.where(np.array(instructions)[:, None, None] == "nan", np.nan, chunks)


def seen(**changes):
    view = np.zeros((8, 8, 3), np.uint8)
    return {
        "image": view,
        "image_wrist": view,
        "state": np.array([0.5, 0.0]),
        "prompt": "go",
        **changes,
    }


def test_chunks_by_hand():
    """Executed two at a time. At step 2 the old chunk says 2 and 3, the new one 10 and 11; with
    weights 1 and exp(-ln 3) = 1/3 the mean is (2 + 10/3) / (4/3) = 4, then (3 + 11/3) / (4/3) = 5."""
    old, new = np.arange(4.0)[:, None], np.arange(10.0, 14)[:, None]
    plan = vla.ChunkExecutor(4, 2, np.log(3))
    assert plan(old, "a").ravel().tolist() == [0, 1]
    assert plan(new, "a").ravel() == pytest.approx([4, 5])
    assert plan(old, "b").ravel().tolist() == [0, 1], "another instruction forgets the past"
    plan.reset()
    assert plan(new, "b").ravel().tolist() == [10, 11]
    plan = vla.ChunkExecutor(4, 3)
    assert plan(old, "a").ravel().tolist() == [0, 1, 2]
    assert plan(new, "a").ravel().tolist() == [10, 11, 12]
    assert vla.ChunkExecutor(5).execute == 2 and vla.ChunkExecutor(1).execute == 1
    for bad in ((4, 5), (4, -1), (4, 4, 0.1), (4, 2, -1)):
        with pytest.raises(ValueError, match="--e"):
            vla.ChunkExecutor(*bad)


@network
def test_messages_are_those_of_openpi():
    theirs = pytest.importorskip(
        "openpi_client.msgpack_numpy", reason="pip install --no-deps openpi-client==0.1.2 dm-tree"
    )
    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [1, "x"], "c": {"d": 0.5}}
    for there, back in ((serve.pack, theirs.unpackb), (theirs.packb, serve.unpack)):
        got = back(there(value))
        assert (got["a"] == value["a"]).all() and got["a"].dtype == np.float32
        assert got["b"] == [1, "x"] and got["c"] == {"d": 0.5}
    assert serve.unpack(theirs.packb(np.float64(3))) == 3


@network
def test_openpi_client_end_to_end():
    """Metadata, inference by chunk and step by step, clipping, reset, wrong input: openpi's own
    WebsocketClientPolicy and ActionChunkBroker, unchanged."""
    client = pytest.importorskip(
        "openpi_client.websocket_client_policy",
        reason="pip install --no-deps openpi-client==0.1.2 dm-tree",
    )
    broker = pytest.importorskip("openpi_client.action_chunk_broker", reason="dm-tree")
    server = serve.Server(policy := Fake(), execute=4)
    with server.listen() as port:
        robot = client.WebsocketClientPolicy("127.0.0.1", port)
        about = robot.get_server_metadata()
        assert about["action_horizon"] == 4 and about["cameras"] == ["image", "image_wrist"]
        assert [x.tolist() for x in about["action_range"]] == [[-5] * 3, [5] * 3]
        out = robot.infer(seen(state=np.array([3.0, 0])))
        assert out["actions"][:, 0].tolist() == [3, 4, 5, 5] and out["clipped"] == 3
        assert out["server_timing"]["infer_ms"] > 0
        view = np.zeros((8, 8, 3), np.uint8)
        out = robot.infer(
            {
                "observation/image": view,
                "observation/wrist_image": view,
                "observation/state": [1.0, 0.0],
                "prompt": "go",
            }
        )
        assert out["actions"][0, 0] == 1, "openpi's own names"
        stepwise = broker.ActionChunkBroker(robot, 4)
        assert [stepwise.infer(seen())["actions"][0] for _ in range(5)] == [0.5, 1.5, 2.5, 3.5, 0.5]
        wrong = [
            (seen(state=np.array([np.nan, 0])), "state is .nan.*send 2 finite"),
            (seen(state=np.zeros(3)), r"state is .0. 0. 0.*send 2 finite"),
            (seen(state="left"), "could not convert"),
            (seen(state=None), "state"),
            (seen(image=np.zeros((8, 8, 3), np.float32)), "image is float32.*uint8"),
            (seen(image_wrist=np.zeros((3, 8, 8), np.uint8)), r"image_wrist is uint8 \(3, 8, 8\)"),
            (seen(prompt=""), "prompt must be text"),
            (seen(prompt="x" * 2001), "prompt"),
            ({"state": np.zeros(2), "prompt": "go"}, "KeyError.'image'.*reads prompt, state"),
            ([1, 2], "not a packed dict"),
            (seen(prompt="nan"), "stop the robot: .*nan"),
            (seen(prompt="explode"), "boom"),
        ]
        for obs, words in wrong:
            with pytest.raises(RuntimeError, match=words):
                robot.infer(obs)
        assert robot.infer(seen())["actions"].shape == (4, 3), "the same connection goes on"
        assert server.count["refused"] == len(wrong) and server.count["clipped"] == 3
        robot.infer(seen())
        assert policy.keys[-1] == policy.keys[-2], "the noise is drawn by the message"
        robot.infer(seen(state=np.zeros(2)))
        assert policy.keys[-1] != policy.keys[-2]


@network
def test_a_reset_forgets_the_chunks_of_the_ensemble():
    """Chunk steps are state + 0 .. 3; at step 2 the ensemble of weights 1 and 1/3 says (2 + 10/3) /
    (4/3) = 4 for states 0 and 10. After a reset the newest chunk stands alone."""
    policy = Fake()
    policy.spec["stats"]["action"] = {"q01": [-50] * 3, "q99": [50] * 3}
    with serve.Server(policy, 2, np.log(3)).listen() as port, protocol.client(port) as (infer, _):
        for reset, expected in ((False, 4), (True, 10)):
            infer(seen(state=np.zeros(2), reset=True))
            out = infer(seen(state=np.array([10.0, 0]), reset=reset))
            assert out["actions"][0, 0] == pytest.approx(expected)


def raw(port, message):
    """The server's reply to raw bytes or text, or its close code."""
    from websockets import ConnectionClosed
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}", max_size=None, compression=None) as ws:
        ws.recv()
        try:
            ws.send(message)
            return ws.recv(timeout=20)
        except ConnectionClosed as e:
            return e.rcvd.code


@network
def test_malformed_messages_leave_the_server_alive():
    import msgpack

    array = {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [1]}
    bad = [
        b"",
        b"\xc1",
        b"not msgpack",
        b"\x81" * 5000,
        msgpack.packb({"a": 1})[:-1],
        msgpack.packb({**array, b"shape": [10**9, 10**9]}),
        msgpack.packb({**array, b"dtype": "O"}),
        msgpack.packb({**array, b"dtype": "<f4,<f4"}),
        msgpack.packb({**array, b"shape": "x"}),
        msgpack.packb({b"__ndarray__": True}),
        msgpack.packb({1: 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb({"prompt": {"a": 1}}),
    ]
    server = serve.Server(Fake())
    with server.listen() as port:
        for message in bad:
            reply = raw(port, message)
            assert isinstance(reply, str) and reply.startswith("error: "), message
            assert "\n" not in reply and len(reply) < 300
        assert "not a packed dict" in raw(port, "hello")
        assert raw(port, b"x" * (1 << 24) + b"x") == 1009, "over the limit: closed as too big"
        with protocol.client(port) as (infer, _):
            assert infer(seen())["actions"].shape == (2, 3)


@network
def test_eight_clients_share_a_forward():
    """While the first forward is held, eight more clients ask: one forward answers them all, each
    with its own state. One that the policy cannot take fails alone."""
    server = serve.Server(policy := Fake(), execute=1)
    with (
        server.listen() as port,
        contextlib.ExitStack() as stack,
        concurrent.futures.ThreadPoolExecutor(9) as pool,
    ):
        ask = [stack.enter_context(protocol.client(port))[0] for _ in range(9)]

        def together(observations):
            policy.gate.clear()
            first = pool.submit(ask[8], seen())
            while policy.waiting == 0:
                time.sleep(0.001)
            jobs = [pool.submit(infer, obs) for infer, obs in zip(ask, observations)]
            while len(server.waiting) < 8:
                time.sleep(0.001)
            policy.gate.set()
            first.result(20)
            return jobs

        jobs = together([seen(state=np.array([i / 2, 0])) for i in range(8)])
        assert [job.result(20)["actions"][0, 0] for job in jobs] == [i / 2 for i in range(8)]
        assert policy.sizes == [1, 8]
        jobs = together([seen(prompt="explode" if i == 3 else "go") for i in range(8)])
        failed = [job.exception(20) for job in jobs]
        assert [i for i, e in enumerate(failed) if e] == [3] and "boom" in str(failed[3])
    assert "17 requests" in str(server) and "1 refused" in str(server) and "p95" in str(server)


@network
def test_other_names_and_refused_settings(monkeypatch):
    server = serve.Server(Fake(), keys={"state": "joints+gripper", "image": "cam/0"})
    view = np.zeros((8, 8, 3), np.uint8)
    obs = {
        "joints": np.zeros(1),
        "gripper": 0.5,
        "cam/0": view + 1,
        "prompt": "go",
        "observation/wrist_image": view,
    }
    images, prompt, state = server.check(obs)
    assert images[0].max() == 1 and images[1].max() == 0
    assert prompt == "go" and state.tolist() == [0, 0.5]
    with server.listen() as port:
        args = argparse.Namespace(
            keys=["image=cam"], execute=0, ensemble=0, batch=1, host="127.0.0.1", port=port
        )
        with pytest.raises(OSError, match="in use"):
            serve.main(Fake(), args)
    monkeypatch.setitem(__import__("sys").modules, "msgpack", None)
    with pytest.raises(ValueError, match="package msgpack: pip install websockets"):
        serve.Server(Fake())
