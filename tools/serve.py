"""A policy server for robots and simulators: openpi's WebSocket protocol, msgpack and numpy arrays.

    python -m tools.serve --policy runs/vla --port 8000        # Ctrl-C stops it

A client receives the metadata as it connects; then each observation is answered by actions:

    {"image": uint8 (H, W, 3), further cameras, "state": (S,), "prompt": str, perhaps "reset": True}
    -> {"actions": float32 (n, A) in dataset units, "clipped": numbers that were, "server_timing"}

openpi-client drives it unchanged. "reset" begins an episode, as a new prompt does. What does not fit
is answered by one line of text. The message seeds the noise: the same one gets the same answer.
"""

import argparse
import collections
import contextlib
import re
import threading
import time
import zlib

import numpy as np
import torch

import model
import vla
from tools.protocol import network, pack, unpack


class Server:
    """One policy (vla.Policy) for any number of clients; at most `batch` share a forward. execute,
    ensemble: see vla.ChunkExecutor. keys: {input: what clients call it}, for the state several joined by "+"."""

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
            "action_horizon": vla.ChunkExecutor(*self.plan).execute,
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
        plan = vla.ChunkExecutor(*self.plan)
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


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.serve", description="Serve a policy.")
    add = parser.add_argument
    add("--policy", required=True, help="checkpoint of vla.py")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all, for anyone")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--keys", nargs="*", default=[], help="what clients call inputs: state=joints+grip")
    add("--execute", type=int, default=0, help="steps of a chunk that are carried out; 0: all")
    add("--ensemble", type=float, default=0, help="decay of temporal ensembling; 0: none")
    add("--batch", type=int, default=64, help="clients a forward")
    add("--seed", type=int, default=0, help="seed of the policy's noise")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    policy = vla.Policy.load(args.policy, device=args.device, seed=args.seed)
    keys = dict(pair.partition("=")[::2] for pair in args.keys)
    execute = args.execute or policy.horizon
    server = Server(policy, execute, args.ensemble, keys, args.batch)
    with contextlib.suppress(KeyboardInterrupt), server.listen(args.host, args.port):
        print(f"ws://{args.host}:{args.port}: {server.metadata}", flush=True)
        threading.Event().wait()
    print(server)


if __name__ == "__main__":
    model.run_main(main, "--batch")
