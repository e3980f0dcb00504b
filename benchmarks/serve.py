"""A policy server for robots and simulators: openpi's WebSocket protocol, msgpack and numpy arrays.

    python evaluate.py serve --policy runs/vla --port 8000        # Ctrl-C stops it

A client connects and receives the metadata; then each observation is answered by actions:

    {"image": uint8 (H, W, 3), further cameras, "state": (S,), "prompt": str}
    -> {"actions": float32 (n, A) in dataset units, "clipped": numbers that were, "server_timing"}

The package openpi-client (WebsocketClientPolicy, ActionChunkBroker) drives it unchanged. Names may
also be openpi's ("observation/state", "observation/wrist_image" for image_wrist), or any by --keys.
"reset": True, alone or in an observation, begins an episode, as a new connection and a new prompt
do; "seed": [whole numbers] names the policy's noise. What does not fit is answered by a line of
text (openpi-client raises it as RuntimeError) and all goes on. Waiting clients share a forward.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import importlib
import itertools
import re
import signal
import threading
import time

import numpy as np

PROMPT = 2000  # characters at most


def need(install, *modules):
    """Optional modules, imported now. ValueError naming the pip install when one is missing."""
    try:
        return [importlib.import_module(name) for name in modules]
    except ModuleNotFoundError as e:
        raise ValueError(f"this needs the package {e.name}: pip install {install}") from e


def network():
    return need("websockets==17.4 msgpack==1.2.4", "msgpack", "websockets",
                "websockets.asyncio.server", "websockets.sync.client")


def pack(value):
    """A message of dicts, lists, numbers, text and numpy arrays -> bytes."""
    return network()[0].packb(value, default=lambda x: {
        b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape})


def unpack(message):
    """The inverse of pack, for bytes from anyone. ValueError when they are something else."""
    def arrays(x):
        if not {b"__ndarray__", b"__npgeneric__"} & x.keys():
            return x
        if not re.fullmatch(r"[<>=|][biuf]\d", str(x[b"dtype"])):
            raise ValueError(f"an array of type {x[b'dtype']!r}, not of numbers")
        if b"__npgeneric__" in x:
            return np.dtype(x[b"dtype"]).type(x[b"data"])
        return np.ndarray(x[b"shape"], x[b"dtype"], x[b"data"])
    try:
        return network()[0].unpackb(message, object_hook=arrays)
    except (ValueError, TypeError, KeyError, OverflowError) as e:
        raise ValueError(f"not msgpack with numpy arrays ({e!r}); pack as openpi-client does") from e


class Chunks:
    """What one robot carries out of the chunks predicted for it; in simulation and in the server.

    execute: actions of a chunk before the next forward; 0: half of the horizon. ensemble: 0, the
    newest chunk alone; m > 0, the mean of all chunks that reach a step, the oldest weighing 1, the
    next exp(-m), and so on: temporal ensembling, as in ACT (arXiv 2304.13705, section IV-A).
    """

    def __init__(self, horizon, execute=0, ensemble=0.0):
        self.execute, self.ensemble = execute or max(1, horizon // 2), ensemble
        if not 0 < self.execute <= horizon or ensemble < 0:
            raise ValueError(f"--execute {execute} --ensemble {ensemble}: execute 1 to {horizon} "
                             "actions (the chunk); an ensemble is 0 or more")
        if ensemble and self.execute == horizon:
            raise ValueError(f"--ensemble needs chunks that overlap: --execute below {horizon}")
        self.reset()

    def reset(self):
        self.past, self.task = [], None

    def __call__(self, chunk, task):
        """Chunk (K, A) predicted now -> the actions to carry out (execute, A). Chunks that were
        predicted for another instruction are forgotten."""
        past = [c[self.execute :] for c in self.past if task == self.task]
        self.past, self.task = [*(c for c in past if len(c)), chunk], task
        if not self.ensemble:
            return chunk[: self.execute]
        actions = []
        for i in range(self.execute):
            said = np.stack([c[i] for c in self.past if i < len(c)])  # (chunks, A), oldest first
            actions.append(np.average(said, 0, np.exp(-self.ensemble * np.arange(len(said)))))
        return np.stack(actions).astype(chunk.dtype)


class Server:
    """One policy (vla.Policy) for any number of clients. execute, ensemble: see Chunks. keys: {name:
    what clients call it, several joined by "+"}. batch: clients a forward at most. limit: bytes a
    message. every: requests between printed lines."""

    def __init__(self, policy, execute=0, ensemble=0.0, keys=None, batch=64, limit=1 << 24,
                 every=100):
        network()
        self.policy, self.keys, self.batch, self.pace = policy, keys or {}, batch, 0.05
        self.limit, self.every, self.numbers, self.clients = limit, every, itertools.count(), 0
        self.plan = lambda: Chunks(policy.horizon, execute, ensemble)
        self.answered = self.forwards = self.refused = self.clipped = self.written = 0
        self.took = collections.deque(maxlen=1000)  # ms of the last requests
        stats = policy.spec["stats"]  # q01 .. q99: what the policy knows as -1 .. 1
        self.low, self.high = (np.float32(stats["action"][k]) for k in ("q01", "q99"))
        if unknown := set(self.keys) - {"state", "prompt", *policy.cameras}:
            raise ValueError(f"--keys {min(unknown)}: no such input; the policy reads state, "
                             f"prompt, {', '.join(policy.cameras)}")
        self.metadata = {
            "cameras": list(policy.cameras), "state_dim": len(stats["state"]["q01"]),
            "action_dim": policy.action_dim, "horizon": policy.horizon, "keys": self.keys,
            "action_horizon": self.plan().execute, "action_low": self.low,
            "action_high": self.high}

    def find(self, obs, name):
        """The input `name` of an observation, in any of its spellings."""
        names = self.keys[name].split("+") if name in self.keys else [
            n for n in (name, f"observation/{name}", f"observation/{name[6:]}_image") if n in obs]
        if not names or not obs.keys() >= set(names):
            raise ValueError(f"no {self.keys.get(name, name)!r} in the observation, which has "
                             f"{', '.join(map(str, obs)) or 'nothing'}")
        many = [obs[n] for n in names]
        return many[0] if name not in self.keys or len(many) == 1 else np.concatenate(many, None)

    def check(self, obs):
        """An observation -> (images, prompt, state (S,)). ValueError naming what does not fit."""
        prompt, images = self.find(obs, "prompt"), []
        if not isinstance(prompt, str) or not 0 < len(prompt) <= PROMPT:
            raise ValueError(f"prompt must be text of 1 to {PROMPT} characters")
        for camera in self.policy.cameras:
            images.append(self.find(obs, camera))
            kind, shape = getattr(images[-1], "dtype", type(images[-1])), np.shape(images[-1])
            if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
                raise ValueError(f"{camera} is {kind} {shape}; send uint8 (H, W, 3)")
        state = np.asarray(self.find(obs, "state"), np.float64)
        if state.shape != (self.metadata["state_dim"],):
            raise ValueError(f"state has shape {state.shape}; the policy was trained with "
                             f"({self.metadata['state_dim']},)")
        if not (ok := np.abs(state) < 1e30).all():  # NaN is not below it either
            raise ValueError(f"state {ok.argmin()} is {state[ok.argmin()]}; repair the observation")
        return images, prompt, state.astype(np.float32)

    def forward(self, rows):
        """Rows (images, prompt, state, seed) -> a chunk each. Where the batch fails each row goes by
        itself, so that only the guilty one hears of it: an error in place of its chunk."""
        if len(self.policy.memo) > 1000:  # the token ids of prompts seen; a server lives long
            self.policy.memo.clear()
        try:
            images, prompts, states, seeds = zip(*rows)
            return list(self.policy.act_batch(images, prompts, np.stack(states), seeds))
        except (ValueError, RuntimeError) as e:
            return [e] if len(rows) == 1 else [self.forward([row])[0] for row in rows]

    async def batches(self):
        """Forever: all that waits in one forward, in a thread; messages are read meanwhile. Clients
        have a tenth of a forward's time to join one."""
        while True:
            rows, start = [await self.queue.get()], time.monotonic()
            while (self.queue.qsize() + 1 < self.clients
                   and time.monotonic() < start + self.pace / 10):
                await asyncio.sleep(0.0005)
            while len(rows) < self.batch and not self.queue.empty():
                rows.append(self.queue.get_nowait())
            start, self.forwards = time.monotonic(), self.forwards + 1
            chunks = await asyncio.to_thread(self.forward, [row for row, _ in rows])
            self.pace = time.monotonic() - start
            for (_, future), chunk in zip(rows, chunks):
                future.set_result(chunk)

    async def answer(self, message, plan, seed):
        """One message of a client -> the reply: bytes, or text when it was refused."""
        start = time.perf_counter()
        try:
            obs = unpack(message) if isinstance(message, bytes) else "text"
            if not isinstance(obs, dict):
                raise TypeError(f"{type(obs).__name__} instead of a packed dict with state, "
                                f"prompt, {', '.join(self.policy.cameras)}")
            if obs.pop("reset", False):
                plan.reset()
                if not obs:
                    return pack({"reset": True})
            seed = obs.pop("seed", seed)
            if not isinstance(seed, list) or not all(isinstance(n, int) and n >= 0 for n in seed):
                raise ValueError("seed must be a list of whole numbers from 0 on")
            row, future = (*self.check(obs), seed), asyncio.get_running_loop().create_future()
            self.queue.put_nowait((row, future))
            chunk = await future
            if isinstance(chunk, Exception):
                raise TypeError(f"the policy failed on it: {chunk}")
            if not np.isfinite(chunk).all():
                raise ValueError("the policy wrote a number that is not finite; stop the robot")
        except (ValueError, TypeError) as e:
            self.refused += 1
            return f"error: {e}"
        made = plan(chunk, row[1])
        actions = np.clip(made, self.low, self.high)
        clipped, took = int((actions != made).sum()), 1000 * (time.perf_counter() - start)
        self.clipped, self.written = self.clipped + clipped, self.written + actions.size
        self.took.append(took)
        self.answered += 1
        if self.answered % self.every == 0:
            print(self, flush=True)
        return pack({"actions": actions, "clipped": clipped, "server_timing": {"infer_ms": took}})

    def __str__(self):
        p50, p95 = np.percentile(self.took or [0], [50, 95])
        return (f"{self.answered} requests, {self.clients} clients now  p50 {p50:.1f} ms  p95 "
                f"{p95:.1f} ms  {self.answered / max(self.forwards, 1):.1f} a forward  "
                f"{self.refused} refused  {self.clipped} of {self.written} numbers clipped")

    async def client(self, connection):
        plan, number, self.clients = self.plan(), next(self.numbers), self.clients + 1
        try:
            await connection.send(pack(self.metadata))
            for turn in itertools.count():
                message = await connection.recv()
                await connection.send(await self.answer(message, plan, [number, turn]))
        except network()[1].ConnectionClosed:
            pass  # also by a message over the limit: the close code, 1009, tells the client
        finally:
            self.clients -= 1

    async def run(self, host, port, ready):
        """Serves until cancelled; ready(port) is called once clients can connect."""
        self.queue = asyncio.Queue()
        try:
            listen = await network()[2].serve(self.client, host, port, max_size=self.limit,
                                              compression=None)
        except OSError as e:
            raise ValueError(f"{host}:{port}: {e.strerror}; choose another --port") from e
        async with listen:
            ready(listen.sockets[0].getsockname()[1])
            await self.batches()


@contextlib.contextmanager
def background(server):
    """Inside the block the server runs in a thread, at the port of this machine that it yields."""
    loop, ready = asyncio.new_event_loop(), concurrent.futures.Future()
    task = loop.create_task(server.run("127.0.0.1", 0, ready.set_result))
    thread = threading.Thread(target=loop.run_until_complete, args=(asyncio.wait([task]),))
    thread.start()
    try:
        yield ready.result(60)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


@contextlib.contextmanager
def client(port):
    """-> (infer(observation) -> answer, metadata), on this machine. RuntimeError when refused."""
    with network()[3].connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as ws:
        def infer(obs):
            ws.send(pack(obs))
            if (answer := ws.recv())[:5] == "error":
                raise RuntimeError(answer)
            return unpack(answer)
        yield infer, unpack(ws.recv())


def arguments(add):
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, for anyone")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--keys", default="", help="what clients call the inputs: state=joints+gripper,image=cam0")
    add("--max-mb", type=float, default=16, help="a larger message closes its connection")
    add("--log-every", type=int, default=100, help="requests between lines of the log")


def main(policy, args):
    """`evaluate.py serve`."""
    if not re.fullmatch(r"(\w+=[^=,]+(,|$))*", args.keys):
        raise ValueError(f"--keys {args.keys}: not NAME=KEY,NAME=KEY")
    keys = dict(pair.split("=") for pair in args.keys.split(",") if pair)
    server = Server(policy, args.execute or policy.horizon, args.ensemble, keys,
                    batch=args.batch, limit=int(args.max_mb * 1e6), every=args.log_every)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.run(args.host, args.port, lambda port: print(
            f"ws://{args.host}:{port}: {server.metadata}", flush=True)))
    print(server)
