"""The policy server on loopback against openpi's own client, and the action chunks it shares with
simulation against hand-worked numbers."""

import collections
import concurrent.futures
import contextlib
import functools
import importlib.util
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

import evaluate
import vla
from tools import protocol, serve

network = pytest.mark.skipif(
    not (importlib.util.find_spec("websockets") and importlib.util.find_spec("msgpack")),
    reason="pip install -r requirements-extras.txt",
)


class FakePolicy:
    """vla.Policy's interface: chunk step k of a row is its state plus k, 3 actions, range +-5.

    While the gate is closed its forwards wait. The prompts "explode" and "trip" fail, "nan" answers
    NaN."""

    horizon = 4
    action_dim = 3
    cameras = ("image", "image_wrist")
    hold = None
    thoughts = None

    def __init__(self):
        self.count = collections.Counter()
        self.spec = {
            "stats": {
                "state": {"q01": [0, 0], "q99": [1, 1]},
                "action": {"q01": [-5] * 3, "q99": [5] * 3},
            }
        }
        self.batch_sizes = []  # of each forward
        self.noise_keys = []  # of each row
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = 0  # forwards that the closed gate holds

    def act_batch(self, images, instructions, states, keys=None):
        self.waiting += 1
        self.gate.wait(20)
        self.waiting -= 1
        self.batch_sizes.append(len(images))
        self.noise_keys += [tuple(key) for key in keys]
        if "explode" in instructions:
            raise RuntimeError("boom")
        if "trip" in instructions:
            raise TypeError("boom")
        steps = np.arange(self.horizon)[:, None]  # (K, 1)
        chunks = np.stack([steps + np.full(3, state[0]) for state in states])  # (B, K, A)
        is_nan = np.array(instructions) == "nan"
        return np.where(is_nan[:, None, None], np.nan, chunks.astype(np.float32))


VIEW = np.zeros((8, 8, 3), np.uint8)


def seen(**changes):
    """An observation."""
    state = np.array([0.5, 0.0])
    return {"image": VIEW, "image_wrist": VIEW, "state": state, "prompt": "go", **changes}


def test_chunks_by_hand():
    """Executed two at a time. At step 2 the old chunk says 2 and 3, the new one 10 and 11; with
    weights 1 and exp(-ln 3) = 1/3 the mean is (2 + 10/3) / (4/3) = 4, then (3 + 11/3) / (4/3) = 5.
    """
    old = np.arange(4.0)[:, None]  # (K, A)
    new = np.arange(10.0, 14)[:, None]
    executor = vla.ChunkExecutor(4, 2, np.log(3))
    assert executor(old, "a").ravel().tolist() == [0, 1]
    assert executor(new, "a").ravel() == pytest.approx([4, 5])
    assert executor(old, "b").ravel().tolist() == [0, 1], "another instruction forgets the past"
    executor.reset()
    assert executor(new, "b").ravel().tolist() == [10, 11]
    executor = vla.ChunkExecutor(4, 3)
    assert executor(old, "a").ravel().tolist() == [0, 1, 2]
    assert executor(new, "a").ravel().tolist() == [10, 11, 12]
    assert vla.ChunkExecutor(5).execute == 2 and vla.ChunkExecutor(1).execute == 1
    for bad in ((4, 5), (4, -1), (4, 4, 0.1), (4, 2, -1), (1, 1, 0.1)):
        with pytest.raises(ValueError, match="--e"):
            vla.ChunkExecutor(*bad)


@network
def test_messages_are_those_of_openpi():
    theirs = pytest.importorskip(
        "openpi_client.msgpack_numpy", reason="pip install --no-deps openpi-client==0.1.2 dm-tree"
    )
    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [1, "x"], "c": {"d": 0.5}}
    for write, read in ((serve.pack, theirs.unpackb), (theirs.packb, serve.unpack)):
        got = read(write(value))
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
    policy = FakePolicy()
    server = serve.Server(policy, execute=4)
    with server.listen() as port:
        robot = client.WebsocketClientPolicy("127.0.0.1", port)
        metadata = robot.get_server_metadata()
        assert metadata["action_horizon"] == 4 and metadata["cameras"] == ["image", "image_wrist"]
        assert [bound.tolist() for bound in metadata["action_range"]] == [[-5] * 3, [5] * 3]
        out = robot.infer(seen(state=np.array([3.0, 0])))
        assert out["actions"][:, 0].tolist() == [3, 4, 5, 5] and out["clipped"] == 3
        assert out["server_timing"]["infer_ms"] > 0
        out = robot.infer(
            {
                "observation/image": VIEW,
                "observation/wrist_image": VIEW,
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
            (seen(prompt=" \n"), "prompt must be text.*not blank"),
            (seen(prompt="\u200b\ufeff"), "prompt must be text.*not blank"),  # nothing is seen
            ({"reset": False}, "KeyError.'prompt'"),
            ({"reset": True, "state": np.zeros(2)}, "KeyError.'prompt'"),
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
        assert policy.noise_keys[-1] == policy.noise_keys[-2], "the noise is drawn by the message"
        robot.infer(seen(state=np.zeros(2)))
        assert policy.noise_keys[-1] != policy.noise_keys[-2]


@network
def test_a_noise_key_seeds_the_noise_in_place_of_the_message():
    """What two policies see differs from their second answer on, so that by the message they could
    not be compared in the same trial under the same noise."""
    policy = FakePolicy()
    with serve.Server(policy).listen() as port, protocol.client(port) as robot:
        robot.infer(seen(noise_key=["shelf", 3, 8]))
        robot.infer(seen(state=np.zeros(2), noise_key=["shelf", 3, 8]))
        assert policy.noise_keys == [("shelf", 3, 8)] * 2
        for key in (8, "shelf", [-1], [True], [0.5], [[1]], [1] * 17):
            with pytest.raises(RuntimeError, match="noise_key is .*send a list of at most 16"):
                robot.infer(seen(noise_key=key))
        assert policy.noise_keys == [("shelf", 3, 8)] * 2


@network
def test_a_reset_forgets_the_chunks_of_the_ensemble():
    """Chunk steps are state + 0 .. 3; at step 2 the ensemble of weights 1 and 1/3 says (2 + 10/3) /
    (4/3) = 4 for states 0 and 10. After a reset the newest chunk stands alone. A message that held
    nothing but the reset was once an episode's beginning, then an error."""
    policy = FakePolicy()
    policy.spec["stats"]["action"] = {"q01": [-50] * 3, "q99": [50] * 3}
    server = serve.Server(policy, execute=2, ensemble=np.log(3))
    with server.listen() as port, protocol.client(port) as robot:
        for reset, expected in ((False, 4), (True, 10)):
            robot.infer(seen(state=np.zeros(2), reset=True))
            out = robot.infer(seen(state=np.array([10.0, 0]), reset=reset))
            assert out["actions"][0, 0] == pytest.approx(expected)
        robot.infer(seen(state=np.zeros(2), reset=True))
        assert robot.infer({"reset": True}) == {"reset": True}
        out = robot.infer(seen(state=np.array([10.0, 0])))
        assert out["actions"][0, 0] == pytest.approx(10)
        assert server.count["requests"] == 6 and server.count["refused"] == 0


@network
def test_an_episode_begins_also_with_an_observation_that_is_refused():
    """The first frame of an episode held NaN. It was refused and its reset with it: the next frame,
    10, was averaged with the last chunk of the episode before, to (2 + 10/3) / (4/3) = 4."""
    policy = FakePolicy()
    policy.spec["stats"]["action"] = {"q01": [-50] * 3, "q99": [50] * 3}
    server = serve.Server(policy, execute=2, ensemble=np.log(3))
    with server.listen() as port, protocol.client(port) as robot:
        for broken in (seen(state=np.full(2, np.nan), reset=True), {"reset": True, "prompt": "go"}):
            robot.infer(seen(state=np.zeros(2), reset=True))
            with pytest.raises(protocol.Refused):
                robot.infer(broken)
            out = robot.infer(seen(state=np.array([10.0, 0])))
            assert out["actions"][:, 0].tolist() == [10, 11]


@network
def test_a_reset_is_true_or_false():
    """Any text was true, "false" too: an ensemble that began anew with each message. numpy's own
    true was none where it came alone."""
    policy = FakePolicy()
    policy.spec["stats"]["action"] = {"q01": [-50] * 3, "q99": [50] * 3}
    server = serve.Server(policy, execute=2, ensemble=np.log(3))
    values = ((True, 10), (np.True_, 10), (1, 10), (False, 4), (np.False_, 4), (0, 4), (None, 4))
    with server.listen() as port, protocol.client(port) as robot:
        for value, expected in values:
            robot.infer(seen(state=np.zeros(2), reset=True))
            out = robot.infer(seen(state=np.array([10.0, 0]), reset=value))
            assert out["actions"][0, 0] == pytest.approx(expected), value
        for value in ("false", "no", [0], 2, np.zeros(2), {}):
            with pytest.raises(protocol.Refused, match="reset is .*; send true or false"):
                robot.infer(seen(reset=value))
        for lone in ({"reset": np.True_}, {"reset": 1}, {"observation/reset": True}):
            robot.infer(seen(state=np.zeros(2), reset=True))
            assert robot.infer(lone) == {"reset": True}
            out = robot.infer(seen(state=np.array([10.0, 0])))
            assert out["actions"][0, 0] == pytest.approx(10)


@network
def test_a_prompt_that_stands_for_an_image_is_refused_as_it_comes_in():
    """It failed the forward that it shares with other clients, who went alone, and was told '2
    "<image>" but 1 images; write one tag for each image'."""
    policy = FakePolicy()
    with serve.Server(policy).listen() as port, protocol.client(port) as robot:
        for tag in ("<image>", "<|image_pad|>"):
            with pytest.raises(protocol.Refused, match="in the prompt stands for an image; leave"):
                robot.infer(seen(prompt=f"look at {tag}"))
    assert not policy.batch_sizes


@network
def test_each_camera_has_an_image_of_its_own():
    """Where two cameras had one key the policy was shown one image twice, without a word. Of an
    image by our name and one by openpi's, the later in the message was taken."""
    for keys in (
        {"image": "cam", "image_wrist": "cam"},
        {"image": "image_wrist"},
        {"image": "observation/wrist_image"},
    ):
        with pytest.raises(ValueError, match="--keys: image and image_wrist would both be "):
            serve.Server(FakePolicy(), keys=keys)
    swapped = serve.Server(FakePolicy(), keys={"image": "image_wrist", "image_wrist": "image"})
    images = swapped.check(seen(image_wrist=VIEW + 1)).images
    assert [image.max() for image in images] == [1, 0]
    server = serve.Server(FakePolicy())
    for message in ({"observation/image": VIEW + 9, **seen()}, {**seen(), "observation/image": 0}):
        assert server.check(message).images[0].max() == 0


@network
def test_an_answer_tells_how_long_the_one_before_it_took():
    """All of it, from the wait for the message until the answer was sent: the client below waits 50
    ms before its second message, and the third answer tells of that."""
    with serve.Server(FakePolicy()).listen() as port, protocol.client(port) as robot:
        assert "prev_total_ms" not in robot.infer(seen())["server_timing"]
        time.sleep(0.05)
        second = robot.infer(seen())["server_timing"]
        assert second["prev_total_ms"] > 0
        third = robot.infer(seen())["server_timing"]
        assert third["prev_total_ms"] > 50 + second["infer_ms"] > third["infer_ms"] > 0


def http_status(port, path, **headers):
    """A request that asks for no connection -> its status and its text."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


@network
@pytest.mark.parametrize("api_key", [None, "sesame-42"])
def test_a_health_check_needs_no_key_and_is_no_client(api_key):
    server = serve.Server(FakePolicy(), api_key=api_key)
    with server.listen() as port:
        assert http_status(port, "/healthz") == (200, "OK\n")
        assert http_status(port, "/other")[0] == (426 if api_key is None else 401)
    assert server.count["requests"] == 0


@network
def test_without_the_key_no_message_is_read():
    """As openpi's client sends it. Who does not know it gets neither metadata nor an answer."""
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    policy = FakePolicy()
    server = serve.Server(policy, api_key="sesame-42")

    def ask(port, *headers):
        pairs = [("Authorization", text) for text in headers]
        url = f"ws://127.0.0.1:{port}"
        with connect(url, additional_headers=pairs, max_size=None, compression=None) as socket:
            socket.recv()  # metadata
            socket.send(protocol.pack(seen()))
            return protocol.unpack(socket.recv(timeout=20))

    right = "Api-Key sesame-42"
    with server.listen() as port:
        wrong = [(), ("sesame-42",), ("Api-Key sesame-43",), ("Api-Key ",), ("Bearer sesame-42",)]
        wrong += [("Api-Key s\u00e9same",), (right + " x",), (right, right)]
        for headers in wrong:
            with pytest.raises(InvalidStatus, match="401"):
                ask(port, *headers)
        assert server.count["refused"] == len(wrong) and not policy.batch_sizes
        assert ask(port, right)["actions"].shape == (2, 3)
        openpi = pytest.importorskip("openpi_client.websocket_client_policy", reason="dm-tree")
        robot = openpi.WebsocketClientPolicy("127.0.0.1", port, api_key="sesame-42")
        assert robot.infer(seen())["actions"].shape == (2, 3)


@network
def test_who_listens_beyond_this_machine_without_a_key_is_told(capsys):
    for host, api_key, warned in (
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("0.0.0.0", "sesame-42", False),
    ):
        with serve.Server(FakePolicy(), api_key=api_key).listen(host) as port:
            said = capsys.readouterr().err
        words = f"warning: whoever reaches 0.0.0.0:{port} gets answers; ask for a key"
        assert (words in said) == warned and bool(said) == warned


@network
def test_who_holds_still_does_not_move():
    """All training actions moved the first dimension forward, by 1 at least: the 0 of holding still
    was clipped to that, and the robot went on as long as nothing decoded."""
    policy = FakePolicy()
    policy.spec["stats"]["action"] = {"q01": [1, -5, -5], "q99": [5, 5, 5]}
    policy.hold = vla.Hold(np.array([False, False, True]), np.array([np.nan, np.nan, 9.0]))
    with serve.Server(policy).listen() as port, protocol.client(port) as robot:
        assert robot.infer(seen(prompt="nan"))["actions"].tolist() == [[0, 0, 5]] * 2
        robot.infer(seen(state=np.array([2.0, 0])))  # its second step is told to all three: 3
        assert robot.infer(seen(prompt="nan"))["actions"].tolist() == [[0, 0, 3]] * 2
        out = robot.infer(seen(state=np.zeros(2)))
        assert out["actions"].tolist() == [[1, 0, 0], [1, 1, 1]] and out["clipped"] == 1


def raw_reply(port, message):
    """The server's reply to raw bytes or text, or its close code."""
    from websockets import ConnectionClosed
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{port}", max_size=None, compression=None) as socket:
        socket.recv()  # metadata
        try:
            socket.send(message)
            return socket.recv(timeout=20)
        except ConnectionClosed as e:
            return e.rcvd.code


@network
def test_malformed_messages_leave_the_server_alive():
    """An array without its bytes was made of as many as its shape asks for: 80 TB ended the
    connection with a traceback, less was taken from the machine's memory."""
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
        msgpack.packb({**array, b"data": None, b"shape": [10**13]}),
        msgpack.packb({1: 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb({"prompt": {"a": 1}}),
    ]
    server = serve.Server(FakePolicy())
    with server.listen() as port:
        for message in bad:
            reply = raw_reply(port, message)
            assert isinstance(reply, str) and reply.startswith("error: "), message
            assert "\n" not in reply and len(reply) < 300
        assert "not a packed dict" in raw_reply(port, "hello")
        assert raw_reply(port, b"x" * (1 << 24) + b"x") == 1009, "over the limit: closed as too big"
        with protocol.client(port) as robot:
            assert robot.infer(seen())["actions"].shape == (2, 3)


@network
@pytest.mark.parametrize("shape", [[], [1], [0], [2, 1]])
def test_an_array_has_the_bytes_of_its_shape(shape):
    """What was sent beyond them was cut off without a word: half a state drove the robot."""
    import msgpack

    def message(size):
        array = {b"__ndarray__": True, b"data": bytes(size), b"dtype": "<f4", b"shape": shape}
        return msgpack.packb(array)

    size = 4 * int(np.prod(shape))
    assert protocol.unpack(message(size)).shape == tuple(shape)
    with pytest.raises(ValueError, match=f"{size + 4} bytes for an array .* of float32"):
        protocol.unpack(message(size + 4))


def wait_until(is_true):
    """What never comes is a failure, not a test that hangs."""
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


@network
def test_eight_clients_share_a_forward():
    """While the first forward is held, eight more clients ask: one forward answers them all, each
    with its own state. One that the policy cannot take fails alone, whatever the error: a TypeError
    left the seven others waiting for ever, and with the lock all who came later."""
    policy = FakePolicy()
    server = serve.Server(policy, execute=1)
    with (
        server.listen() as port,
        contextlib.ExitStack() as stack,
        concurrent.futures.ThreadPoolExecutor(9) as pool,
    ):
        *robots, first_robot = [stack.enter_context(protocol.client(port)) for _ in range(9)]

        def together(observations):
            """Eight observations, sent while a forward is held -> their answers, as futures."""
            policy.gate.clear()
            try:
                first = pool.submit(first_robot.infer, seen())
                wait_until(lambda: policy.waiting)
                answers = []
                for robot, observation in zip(robots, observations, strict=True):
                    answers.append(pool.submit(robot.infer, observation))
                wait_until(lambda: len(server.waiting) == 8)
            finally:
                policy.gate.set()
            first.result(20)
            return answers

        answers = together([seen(state=np.array([i / 2, 0])) for i in range(8)])
        assert [a.result(20)["actions"][0, 0] for a in answers] == [i / 2 for i in range(8)]
        assert policy.batch_sizes == [1, 8]
        for prompt in ("explode", "trip"):
            answers = together([seen(prompt=prompt if i == 3 else "go") for i in range(8)])
            errors = [a.exception(20) for a in answers]
            assert [i for i, e in enumerate(errors) if e] == [3] and "boom" in str(errors[3])
    assert "25 requests" in str(server) and "2 refused" in str(server) and "p95" in str(server)


@network
def test_other_names_and_refused_settings(monkeypatch):
    server = serve.Server(FakePolicy(), keys={"state": "joints+gripper", "image": "cam/0"})
    observation = server.check(
        {
            "joints": np.zeros(1),
            "gripper": 0.5,
            "cam/0": VIEW + 1,
            "prompt": "go",
            "observation/wrist_image": VIEW,
        }
    )
    assert observation.images[0].max() == 1 and observation.images[1].max() == 0
    assert observation.prompt == "go" and observation.state.tolist() == [0, 0.5]
    monkeypatch.setattr(vla, "load_policy", lambda *args: FakePolicy())
    with server.listen() as port, pytest.raises(OSError, match="in use"):
        serve.main(["--policy", "any", "--keys", "image=cam", "--port", str(port)])
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(ValueError, match="package msgpack: pip install websockets"):
        serve.Server(FakePolicy())


def run_command(monkeypatch, *words):
    """`python -m tools.serve`, stopped as by Ctrl-C when it listens -> its Server."""
    servers = []

    def stop(event):
        raise KeyboardInterrupt

    class Kept(serve.Server):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            servers.append(self)

    monkeypatch.setattr(vla, "load_policy", lambda *args: FakePolicy())
    monkeypatch.setattr(serve, "Server", Kept)
    monkeypatch.setattr(serve.threading.Event, "wait", stop)
    serve.main(["--policy", "any", "--port", "0", *words])
    return servers[0]


@network
def test_execute_and_ensemble_mean_the_same_here_and_in_evaluation(monkeypatch):
    """--ensemble alone ended in "execute 1 to 3 of the 4 actions": the server carried out all of a
    chunk by default, which leaves nothing to average, while evaluate.py carries out half."""
    server = run_command(monkeypatch, "--ensemble", "0.1")
    assert server.metadata["action_horizon"] == server.executor().execute == 2
    assert server.executor().ensemble == 0.1
    assert run_command(monkeypatch).metadata["action_horizon"] == 2
    assert run_command(monkeypatch, "--execute", "4").metadata["action_horizon"] == 4
    defaults = vars(evaluate.make_parser("metaworld").parse_args(["metaworld", "--policy", "any"]))
    assert (defaults["execute"], defaults["ensemble"]) == (0, 0)


@network
def test_flags_out_of_range_end_the_command(monkeypatch, capsys):
    """--port 70000 was an OverflowError and a traceback, --batch 0 waited for ever at the first
    client, an unknown or empty name in --keys was passed over."""
    for words, text in (
        (["--port", "70000"], "ports end at 65535"),
        (["--batch", "0"], "at least 1"),
        (["--execute", "-1"], "at least 0"),
        (["--ensemble", "-0.5"], "at least 0"),
        (["--seed", "-1"], "at least 0"),
    ):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, *words)
        assert text in capsys.readouterr().err
    for key in ("", "two words", "k\u00e9y"):
        with pytest.raises(ValueError, match="--api-key: give one or more printable ASCII"):
            run_command(monkeypatch, "--api-key", key)
    assert run_command(monkeypatch, "--api-key", "sesame-42").api_key == "sesame-42"
    for pair in ("img=cam", "image", "image=", "state=joints+"):
        with pytest.raises(ValueError, match="--keys .*ours one of prompt, state, image, image_w"):
            run_command(monkeypatch, "--keys", pair)
    with pytest.raises(ValueError, match="--keys state=grip: state is named twice; join .* by +"):
        run_command(monkeypatch, "--keys", "state=joints", "state=grip")


@network
def test_a_policy_without_state_says_what_it_reads():
    """--keys state=... did nothing, and clients were told to send a state."""
    policy = FakePolicy()
    del policy.spec["stats"]["state"]
    with pytest.raises(ValueError, match="ours one of prompt, image, image_wrist"):
        serve.Server(policy, keys={"state": "joints"})
    with serve.Server(policy).listen() as port, protocol.client(port) as robot:
        assert robot.metadata["state_dim"] == 0
        with pytest.raises(RuntimeError, match="the policy reads prompt, image, image_wrist$"):
            robot.infer({"image": VIEW})


@network
def test_a_client_asks_this_machine_and_no_proxy(monkeypatch):
    """Where HTTP_PROXY is set, as in many a laboratory, no simulator reached the policy."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    with serve.Server(FakePolicy()).listen() as port, protocol.client(port) as robot:
        assert robot.infer(seen())["actions"].shape == (2, 3)


@network
def test_a_fault_of_the_server_leaves_no_client_waiting():
    """An error that no message should cause (a failed assert) ended the thread that ran the forward
    for all, and the other clients of it waited for ever."""
    policy = FakePolicy()

    def fail(*args, **kwargs):
        raise AssertionError("a fault of ours")

    policy.act_batch = fail
    server = serve.Server(policy)
    observation = serve.Observation([], "go", np.zeros(2), noise_key=[])
    other = serve.Job(observation, [1])
    server.waiting.append(other)
    with pytest.raises(AssertionError):
        server.predict(serve.Job(observation, [2]))
    assert str(other.result) == "the forward stopped"


@network
def test_a_head_that_reads_recorded_thoughts_serves_nobody():
    """Said as the server starts: no client could cure what it would be told at each request."""
    policy = FakePolicy()
    policy.spec["thoughts"] = "recorded"
    with pytest.raises(ValueError, match="recorded thoughts, which no client sends; train one"):
        serve.Server(policy)
    policy.spec["thoughts"] = "own"
    policy.thoughts = ["left of the cup"]
    with serve.Server(policy).listen() as port, protocol.client(port) as robot:
        assert robot.infer(seen())["thought"] == "left of the cup"


@network
def test_images_of_another_size(monkeypatch):
    """The policy resizes one of the same aspect. Another aspect is refused as it comes in: in the
    policy it would fail the forward that it shares with other clients, who would go alone."""
    policy = FakePolicy()
    policy.spec["image_sizes"] = {"image": [8, 8]}
    server = serve.Server(policy)
    with server.listen() as port, protocol.client(port) as robot:
        assert robot.metadata["image_sizes"] == {"image": [8, 8]}
        assert robot.infer(seen(image=np.zeros((24, 24, 3), np.uint8)))["actions"].shape == (2, 3)
        with pytest.raises(RuntimeError, match="image is 8 x 9 .*trained at 8 x 8"):
            robot.infer(seen(image=np.zeros((8, 9, 3), np.uint8)))
    assert policy.batch_sizes == [1]


@network
def test_a_server_does_not_grow_with_what_it_is_asked():
    """As Policy.memo did, which kept each new prompt (test_vla has the policy's own test)."""

    def lengths():
        return {name: len(v) for name, v in vars(server).items() if hasattr(v, "__len__")}

    server = serve.Server(FakePolicy())
    server.latencies.extend([1.0] * server.latencies.maxlen)
    with server.listen() as port, protocol.client(port) as robot:
        robot.infer(seen(prompt="warm up"))
        before = lengths()
        for i in range(20):
            robot.infer(seen(prompt=f"prompt {i}"))
        assert lengths() == before and "latencies" in before


@network
def test_a_client_that_answers_no_ping_stays_connected(monkeypatch):
    """Building a LIBERO simulator on a busy machine took longer than the 40 s after which the
    server gave up a client that answered no ping ("keepalive ping timeout"): the run ended."""
    websockets = protocol.network()
    listen = functools.partial(websockets.server.serve, ping_interval=0.02)
    monkeypatch.setattr(websockets.server, "serve", listen)
    with serve.Server(FakePolicy()).listen() as port:
        with socket.create_connection(("127.0.0.1", port)) as deaf:  # reads, and answers nothing
            deaf.sendall(
                b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
                b"Connection: Upgrade\r\n"
                b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            deaf.settimeout(0.5)
            received = b""
            with contextlib.suppress(TimeoutError):
                while received.count(b"\x89\x04") < 5:  # pings of four bytes
                    received += deaf.recv(4096)
            assert received.count(b"\x89\x04") >= 5
            assert b"keepalive" not in received  # the reason of the frame that closes
