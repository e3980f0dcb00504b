"""A policy server for robots and simulators: openpi's WebSocket protocol, msgpack and numpy arrays.

    python evaluate.py serve --policy runs/vla --port 8000        # Ctrl-C stops it

A client receives the metadata as it connects; then each observation is answered by actions:

    {"image": uint8 (H, W, 3), further cameras, "state": (S,), "prompt": str, perhaps "reset": True}
    -> {"actions": float32 (n, A) in dataset units, "clipped": numbers that were, "server_timing"}

openpi-client drives it unchanged. "reset" begins an episode, as a new prompt does. What does not fit
is answered by one line of text. The message seeds the noise: the same one gets the same answer.
"""

import collections
import contextlib
import importlib
import re
import threading
import time
import zlib

import numpy as np


def need(install, *modules):
    """Optional modules, imported now. ValueError naming the pip install when one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as e:
        raise ValueError(f"this needs the package {e.name}: pip install {install}") from e


def network():
    """msgpack, websockets' server and client, its error."""
    return need(
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


class Chunks:
    """What one robot carries out of the chunks predicted for it; in simulation and in the server.

    execute: actions of a chunk before the next forward; 0: half of the horizon. ensemble: 0, the
    newest chunk alone; m > 0, the mean of all chunks that reach a step, the oldest weighing 1, the
    next exp(-m), and so on: temporal ensembling, as in ACT (arXiv 2304.13705, section IV-A).
    """

    def __init__(self, horizon, execute=0, ensemble=0.0):
        self.execute, self.ensemble = execute or max(1, horizon // 2), ensemble
        most = horizon - 1 if ensemble else horizon  # chunks must overlap for an ensemble
        if not 0 < self.execute <= most or ensemble < 0:
            raise ValueError(
                f"--execute {execute} --ensemble {ensemble}: execute 1 to {most} of the "
                f"{horizon} actions in a chunk; an ensemble is 0 or more"
            )
        self.reset()

    def reset(self):
        self.past, self.task = [], None

    def __call__(self, chunk, task):
        """Chunk (K, A) predicted now -> the actions to carry out (execute, A). Chunks that were
        predicted for another instruction are forgotten."""
        past = self.past if self.ensemble and task == self.task else []  # oldest first
        past = [c[self.execute :] for c in past if len(c) > self.execute]
        self.past, self.task = [*past, chunk], task
        said = [[c[i] for c in self.past if i < len(c)] for i in range(self.execute)]
        return np.stack(
            [np.average(x, 0, np.exp(-self.ensemble * np.arange(len(x)))) for x in said]
        ).astype(chunk.dtype)


class Server:
    """One policy (vla.Policy) for any number of clients; at most `batch` share a forward. execute,
    ensemble: see Chunks. keys: {input: what clients call it}, for the state several joined by "+"."""

    def __init__(self, policy, execute=0, ensemble=0.0, keys=None, batch=64):
        network()
        self.policy, self.keys, self.batch = policy, keys or {}, batch
        self.plan, self.waiting = (policy.horizon, execute, ensemble), []
        self.busy, self.counting = threading.Lock(), threading.Lock()
        self.count, self.took = collections.Counter(), collections.deque(maxlen=1000)  # took: ms
        stats = policy.spec["stats"]  # q01 .. q99: what the policy knows as -1 .. 1
        self.range = [np.float32(stats["action"][k]) for k in ("q01", "q99")]
        self.metadata = {
            "cameras": list(policy.cameras),
            "state_dim": len(stats["state"]["q01"]),
            "action_horizon": Chunks(*self.plan).execute,
            "action_range": self.range,
        }

    def check(self, obs):
        """An observation -> (images, prompt, state (S,)). ValueError naming what does not fit."""
        obs |= {
            re.sub("^observation/", "", k).replace("wrist_image", "image_wrist"): v
            for k, v in obs.items()
        }  # openpi's names
        prompt, *images = (obs[self.keys.get(n, n)] for n in ("prompt", *self.policy.cameras))
        state = np.hstack([obs[key] for key in self.keys.get("state", "state").split("+")])
        if not isinstance(prompt, str) or not 0 < len(prompt) <= 2000:
            raise ValueError("prompt must be text of 1 to 2000 characters")
        for camera, image in zip(self.policy.cameras, map(np.asarray, images)):
            if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
                raise ValueError(f"{camera} is {image.dtype} {image.shape}; send uint8 (H, W, 3)")
        state, size = state.astype(np.float32), self.metadata["state_dim"]
        if state.shape != (size,) or not np.isfinite(state).all():
            raise ValueError(f"state is {state}; send {size} finite numbers")
        return images, prompt, state

    def forward(self, rows):
        """act_batch's arguments in rows -> a chunk each; an error for a row that makes it fail."""
        try:
            return list(self.policy.act_batch(*zip(*rows)))
        except (ValueError, RuntimeError) as e:
            return [e] if len(rows) == 1 else [self.forward([row])[0] for row in rows]

    def chunk(self, row):
        """One client's row -> its chunk (or error), in one forward with all that wait by then."""
        self.waiting.append(job := [row, None])  # None becomes its chunk
        with self.busy:
            while job[1] is None:
                time.sleep(0.002)  # clients answered together ask again together
                jobs = self.waiting[: self.batch]
                del self.waiting[: len(jobs)]
                for one, chunk in zip(jobs, self.forward([row for row, _ in jobs])):
                    one[1] = chunk
                self.count["forwards"] += 1
        return job[1]

    def answer(self, message, plan):
        """One message of a client -> the reply."""
        start = time.perf_counter()
        if not isinstance(message, bytes) or not isinstance(obs := unpack(message), dict):
            raise TypeError("not a packed dict")
        images, prompt, state = self.check(obs)
        if obs.get("reset", False):
            plan.reset()
        chunk = self.chunk((images, prompt, state, [zlib.crc32(message)]))
        if isinstance(chunk, Exception) or not np.isfinite(chunk).all():
            raise ValueError(f"stop the robot: the policy answers {chunk}")
        made = plan(chunk, prompt)
        actions = np.clip(made, *self.range)
        clipped, took = int((actions != made).sum()), 1000 * (time.perf_counter() - start)
        with self.counting:
            self.count.update(requests=1, numbers=actions.size, clipped=clipped)
            self.took.append(took)
            if self.count["requests"] % 1000 == 0:
                print(self, flush=True)
        return {"actions": actions, "clipped": clipped, "server_timing": {"infer_ms": took}}

    def __str__(self):
        n, (p50, p95) = self.count, np.percentile(self.took or [0], [50, 95])
        return (
            f"{n['requests']} requests, {n['forwards']} forwards  p50 {p50:.1f} p95 {p95:.1f} ms"
            f"  {n['refused']} refused  {n['clipped']} of {n['numbers']} numbers clipped"
        )

    def client(self, connection):
        plan = Chunks(*self.plan)
        with contextlib.suppress(network()[3].ConnectionClosed):  # 1009: a message over the limit
            connection.send(pack(self.metadata))
            for message in connection:
                try:
                    connection.send(pack(self.answer(message, plan)))
                except (ValueError, TypeError, KeyError, OverflowError, RuntimeError) as e:
                    self.count["refused"] += 1
                    cameras = ", ".join(self.policy.cameras)
                    connection.send(f"error: {e!r}; the policy reads prompt, state, {cameras}")

    @contextlib.contextmanager
    def listen(self, host="127.0.0.1", port=0):
        """Inside the block the server runs in threads, at the port that it yields."""
        limit = 1 << 24  # bytes a message
        with network()[1].serve(
            self.client, host, port, max_size=limit, compression=None
        ) as server:
            threading.Thread(target=server.serve_forever).start()
            yield server.socket.getsockname()[1]


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


def arguments(add):
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, for anyone")
    add("--port", type=int, default=8000, help="port to listen on")
    add(
        "--keys",
        nargs="*",
        default=[],
        help="what clients call inputs: state=joints+grip image=cam",
    )


def main(policy, args):
    """`evaluate.py serve`."""
    server = Server(
        policy,
        args.execute or policy.horizon,
        args.ensemble,
        dict(pair.partition("=")[::2] for pair in args.keys),
        args.batch,
    )
    with contextlib.suppress(KeyboardInterrupt), server.listen(args.host, args.port):
        print(f"ws://{args.host}:{args.port}: {server.metadata}", flush=True)
        threading.Event().wait()
    print(server)
