"""A policy server for robots and simulators: openpi's WebSocket protocol, msgpack and numpy arrays.

    python -m tools.serve --policy runs/vla --port 8000        # Ctrl-C stops it

A client receives the metadata as it connects; then each observation is answered by actions:

    {"image": uint8 (H, W, 3), further cameras, "state": (S,), "prompt": str, perhaps "reset": True}
    -> {"actions": float32 (n, A) in dataset units, "clipped": numbers that were, "server_timing"}

A checkpoint of sft or grpo, which drives by the tokens that it writes (vla.TokenPolicy), reads no
state; its thoughts, if it thinks (--mode), are in the answer as "thought", and so are those that a
head reads (vla.py --condition).
openpi-client drives it unchanged. "reset" begins an episode, as a new prompt does, also where the
rest is refused; a message of it alone is answered {"reset": True}. What does not fit is answered by
one line of text. The message seeds the noise: the same one gets the same answer; who compares
policies sends "noise_key", numbers and words, as ["shelf", trial, step], and these alone then seed
it. GET /healthz answers 200 as soon as it serves.

Each client has a thread, which reads its messages in turn; forwards are shared by all that wait.
"""

import argparse
import contextlib
import hmac
import http
import ipaddress
import re
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

import model
import vla
from fast_tokenizer import count, natural, non_negative, value_range
from tools.lerobot import is_blank
from tools.protocol import network, pack, unpack

LARGEST_MESSAGE = 1 << 24  # bytes; a larger one closes its connection
LARGEST_PORT = 65535
LONGEST_PROMPT = 2000  # characters
IMAGE_TAGS = ("<image>", "<|image_pad|>")  # what model.encode() makes images of, or refuses
LONGEST_KEY = 16  # numbers and words of a noise key
GATHERING_TIME = 0.002  # seconds: clients that were answered together ask again together
ANSWERS_A_REPORT = 1000  # requests between two lines of statistics

# What a message from anyone can cause, down to a policy that fails; the connection goes on.
ANSWERABLE = (ValueError, TypeError, KeyError, OverflowError, RuntimeError)


# ---- Observations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """What a client sees, checked: the arguments of one row of vla.Policy.act_batch."""

    images: list[np.ndarray]  # uint8 (H, W, 3), one for each camera of the policy, in its order
    prompt: str
    state: np.ndarray  # (S,) float32, dataset units; (0,) for a policy that reads none
    noise_key: list[int | str]  # what its noise is drawn by; empty: the message


class Decision(NamedTuple):
    chunk: np.ndarray  # (K, A)
    thought: str | None  # None: the policy writes none


class Answer(NamedTuple):
    """What one client is told."""

    actions: np.ndarray  # (n, A) float32, dataset units, within the training range, or still
    clipped: int  # numbers of them that were beyond it
    thought: str | None


@dataclass
class Job:
    """An observation that waits for a forward, and what comes of it."""

    observation: Observation
    noise_key: list[int | str]
    result: Decision | Exception | None = None  # an exception: why there is none


def milliseconds_since(start: float) -> float:
    """start: of time.perf_counter()."""
    return 1000 * (time.perf_counter() - start)


def our_name(key: str) -> str:
    """openpi's name of an input -> ours: "observation/wrist_image" -> "image_wrist"."""
    return re.sub("^observation/", "", key).replace("wrist_image", "image_wrist")


def with_our_names(message: dict) -> dict:
    """Adds to openpi's names of inputs ours. What a client itself sends by our name stays."""
    return {**{our_name(key): value for key, value in message.items()}, **message}


def asks_for_reset(message: dict) -> bool:
    """Whether a message begins an episode. ValueError unless it says that by true or false."""
    value = message.get("reset", False)
    if isinstance(value, np.ndarray):  # as numpy's own true and false arrive
        value = value.item() if value.size == 1 else value.tolist()
    if value not in (None, False, True):
        raise ValueError(f"reset is {repr(value)[:80]}; send true or false")
    return bool(value)


def is_noise_key(value: Any) -> bool:
    """Whether model.rng() takes it."""
    if not isinstance(value, list) or len(value) > LONGEST_KEY:
        return False
    for part in value:
        is_number = type(part) is int and part >= 0  # True is no number
        if not is_number and not isinstance(part, str):
            return False
    return True


def check_one_each(flag: str, sources: dict[str, str]) -> None:
    """ValueError when two cameras of the policy would be shown the same image. sources: camera ->
    what a client calls it."""
    camera_of = {}
    for camera, source in sources.items():
        if source in camera_of:
            raise ValueError(
                f"{flag}: {camera_of[source]} and {camera} would both be {source}; name an image "
                "of its own for each"
            )
        camera_of[source] = camera


# ---- Server -------------------------------------------------------------------------------------


class Server:
    """One policy for any number of clients.

    policy: of vla.load_policy(). execute, ensemble: what a client carries out of a chunk, as in
    vla.ChunkExecutor. keys: {our name of an input: what clients call it}; the state may be several
    of theirs, joined by "+". batch: clients that share a forward at most. api_key: what a client
    must know, as in openpi; None: anyone may ask.
    ValueError when websockets or msgpack is missing, execute or keys do not fit the policy, two
    cameras have the same key, its head reads recorded thoughts, or api_key cannot stand in a
    header."""

    def __init__(
        self,
        policy: vla.Policy | vla.TokenPolicy,
        execute: int = 0,
        ensemble: float = 0.0,
        keys: dict[str, str] | None = None,
        batch: int = 64,
        api_key: str | None = None,
    ):
        network()  # a missing package shows now, not at the first client
        if policy.spec.get("thoughts") == "recorded":
            raise ValueError(
                "the head reads recorded thoughts, which no client sends; train one with "
                "--thoughts own"
            )
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            raise ValueError("--api-key: give one or more printable ASCII characters, no spaces")
        self.policy = policy
        self.api_key = api_key
        self.execute = execute
        self.ensemble = ensemble
        self.keys = keys or {}
        self.batch = batch
        stats = policy.spec["stats"]
        state_dim = len(stats["state"]["q01"]) if "state" in stats else 0
        self.inputs = ["prompt", *(["state"] if state_dim else []), *policy.cameras]
        for ours, theirs in self.keys.items():
            if ours not in self.inputs or not all(theirs.split("+")):
                raise ValueError(
                    f"--keys {ours}={theirs}: write OURS=THEIRS, ours one of "
                    f"{', '.join(self.inputs)}"
                )
        sources = {camera: our_name(self.keys.get(camera, camera)) for camera in policy.cameras}
        check_one_each("--keys", sources)

        self.waiting: list[Job] = []  # in order of arrival
        self.forwarding = threading.Lock()  # held by the one thread that runs the policy
        self.counting = threading.Lock()
        self.count = Counter()  # requests, forwards, refused, numbers (sent), clipped (of these)
        self.latencies = deque(maxlen=1000)  # of the last answers, ms

        self.image_sizes = policy.spec.get("image_sizes", {})  # camera -> [H, W]; others: any size
        # what the policy knows as -1 .. 1, and what a robot is sent at most, (A,) each
        lowest, highest = value_range(stats["action"])
        self.lowest = lowest.astype(np.float32)
        self.highest = highest.astype(np.float32)
        self.metadata = {
            "cameras": list(policy.cameras),
            "state_dim": state_dim,
            "action_horizon": self.executor().execute,
            "action_range": [self.lowest, self.highest],
            "image_sizes": self.image_sizes,
        }

    def executor(self) -> vla.ChunkExecutor:
        """A fresh one, for one client."""
        return vla.ChunkExecutor(self.policy.horizon, self.execute, self.ensemble, self.policy.hold)

    def check(self, message: dict) -> Observation:
        """A message -> what the policy reads. ValueError or KeyError naming what does not fit."""
        message = with_our_names(message)
        prompt = message[self.keys.get("prompt", "prompt")]
        cameras = self.policy.cameras
        images = [np.asarray(message[self.keys.get(camera, camera)]) for camera in cameras]
        state_dim = self.metadata["state_dim"]
        state = np.zeros(0)
        if state_dim:
            state_keys = self.keys.get("state", "state").split("+")
            state = np.hstack([message[key] for key in state_keys])

        if not isinstance(prompt, str) or is_blank(prompt) or len(prompt) > LONGEST_PROMPT:
            raise ValueError(f"prompt must be text of 1 to {LONGEST_PROMPT} characters, not blank")
        for tag in IMAGE_TAGS:
            if tag in prompt:
                raise ValueError(f"{tag} in the prompt stands for an image; leave it out")
        for camera, image in zip(cameras, images, strict=True):
            vla.check_view(camera, image, self.image_sizes.get(camera))
        state = state.astype(np.float32)
        if state.shape != (state_dim,) or not np.isfinite(state).all():
            raise ValueError(f"state is {state}; send {state_dim} finite numbers")
        noise_key = message.get("noise_key", [])
        if not is_noise_key(noise_key):
            raise ValueError(
                f"noise_key is {str(noise_key)[:80]}; send a list of at most {LONGEST_KEY} numbers "
                "0, 1, ... and words"
            )
        return Observation(images, prompt, state, noise_key)

    def forward(self, jobs: list[Job]) -> list[Decision | Exception]:
        """One forward of the policy -> a decision a job. When it fails each job goes alone, so that
        the error meets only the one that makes it fail."""
        observations = [job.observation for job in jobs]
        try:
            chunks = self.policy.act_batch(
                [observation.images for observation in observations],
                [observation.prompt for observation in observations],
                [observation.state for observation in observations],
                keys=[job.noise_key for job in jobs],
            )  # (B, K, A)
        except ANSWERABLE as e:
            if len(jobs) == 1:
                return [e]
            return [self.forward([job])[0] for job in jobs]
        thoughts = self.policy.thoughts or [None] * len(jobs)
        return [Decision(*pair) for pair in zip(chunks, thoughts, strict=True)]

    def predict(self, job: Job) -> Decision:
        """A client's job -> what the policy decides, in one forward with all that wait by then.

        Whoever holds the lock forwards for all; the others find their results when it is theirs.
        ValueError when the policy fails."""
        self.waiting.append(job)
        with self.forwarding:
            while job.result is None:
                time.sleep(GATHERING_TIME)
                batch = self.waiting[: self.batch]
                del self.waiting[: len(batch)]
                results = [RuntimeError("the forward stopped")] * len(batch)
                try:
                    results = self.forward(batch)
                finally:  # whatever ends it: who waits for it is told
                    for other, result in zip(batch, results, strict=True):
                        other.result = result
                self.count["forwards"] += 1
        if isinstance(job.result, Exception):
            raise ValueError(f"stop the robot: the policy answers {job.result}")
        return job.result

    def act(
        self, observation: Observation, noise_key: list[int | str], executor: vla.ChunkExecutor
    ) -> Answer:
        """What a client, whose chunks `executor` holds, does next; counted. ValueError when the
        policy fails."""
        start = time.perf_counter()
        decision = self.predict(Job(observation, noise_key))
        predicted = executor(decision.chunk, observation.prompt)  # (n, A)
        actions = np.clip(predicted, self.lowest, self.highest)
        if not np.isfinite(decision.chunk).all():  # held still: 0 may be outside of the range
            actions = np.where(self.policy.hold.keeps, actions, predicted)
        clipped = int((actions != predicted).sum())
        with self.counting:
            self.count.update(requests=1, numbers=actions.size, clipped=clipped)
            self.latencies.append(milliseconds_since(start))
            if self.count["requests"] % ANSWERS_A_REPORT == 0:
                print(self, flush=True)
        return Answer(actions, clipped, decision.thought)

    def answer(self, message: Any, executor: vla.ChunkExecutor) -> dict:
        """One message of a client, whose chunks `executor` holds -> the reply. An error of
        ANSWERABLE says what does not fit."""
        start = time.perf_counter()
        if not isinstance(message, bytes):
            raise TypeError("not a packed dict")
        content = unpack(message)
        if not isinstance(content, dict):
            raise TypeError("not a packed dict")
        if asks_for_reset(with_our_names(content)):
            executor.reset()  # also where the rest is refused: the episode before is over
            if len(content) == 1:
                return {"reset": True}
        observation = self.check(content)
        noise_key = observation.noise_key or [zlib.crc32(message)]
        answer = self.act(observation, noise_key, executor)
        reply = {
            "actions": answer.actions,
            "clipped": answer.clipped,
            "server_timing": {"infer_ms": milliseconds_since(start)},
        }
        if answer.thought is not None:
            reply["thought"] = answer.thought
        return reply

    def __str__(self):
        count = self.count
        p50, p95 = np.percentile(self.latencies or [0], [50, 95])
        line = (
            f"{count['requests']} requests, {count['forwards']} forwards"
            f"  p50 {p50:.1f} p95 {p95:.1f} ms  {count['refused']} refused"
            f"  {count['clipped']} of {count['numbers']} numbers clipped"
        )
        of_policy = self.policy.count
        if of_policy["retried"]:
            line += f"  {of_policy['retried']} chunks tried again, {of_policy['held']} held still"
        return line

    def client(self, connection) -> None:
        """Answers one client until it leaves; runs in a thread of websockets' server."""
        executor = self.executor()
        closed = network().exceptions.ConnectionClosed  # also after a message over the limit
        with contextlib.suppress(closed):
            connection.send(pack(self.metadata))
            start = time.perf_counter()
            timing_before = {}
            for message in connection:
                try:
                    answer = self.answer(message, executor)
                    if "server_timing" in answer:
                        answer["server_timing"] |= timing_before
                    reply = pack(answer)
                except ANSWERABLE as e:
                    with self.counting:
                        self.count["refused"] += 1
                    reply = f"error: {e!r}; the policy reads {', '.join(self.inputs)}"
                connection.send(reply)
                # as openpi has it: from the wait for a message until its answer was sent, which
                # only the next answer can tell
                timing_before = {"prev_total_ms": milliseconds_since(start)}
                start = time.perf_counter()

    def before_handshake(self, connection, request):
        """-> the HTTP response to a request that is to become no connection, else None: a health
        check, and whoever does not know the key, before any message of theirs is read."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self.api_key is None:
            return None
        given = request.headers.get_all("Authorization")
        wanted = f"Api-Key {self.api_key}".encode()
        # in a time that does not tell how many characters are right
        if len(given) == 1 and hmac.compare_digest(given[0].encode(), wanted):
            return None
        with self.counting:
            self.count["refused"] += 1
        return connection.respond(
            http.HTTPStatus.UNAUTHORIZED, "error: send the header Authorization: Api-Key KEY\n"
        )

    @contextlib.contextmanager
    def listen(self, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
        """Inside the block the server runs in threads, at the port that it yields: `port`, or for
        0 a free one. Prints a warning when others than this machine can ask it, without a key."""
        serve = network().server.serve
        with serve(
            self.client,
            host,
            port,
            process_request=self.before_handshake,
            max_size=LARGEST_MESSAGE,
            compression=None,
            ping_timeout=None,  # a simulator that is being built answers no ping for minutes
        ) as server:
            address, bound_port, *_ = server.socket.getsockname()
            if self.api_key is None:
                warn_if_open(
                    address, bound_port, "ask for a key with --api-key, or listen on 127.0.0.1"
                )
            threading.Thread(target=server.serve_forever).start()
            yield bound_port


# ---- Command line -------------------------------------------------------------------------------


def warn_if_open(address: str, port: int, cure: str) -> None:
    """A line of warning unless only this machine reaches the address, an IP."""
    if not ipaddress.ip_address(address).is_loopback:
        line = f"warning: whoever reaches {address}:{port} gets answers; {cure}"
        print(line, file=sys.stderr)


def port_number(text: str) -> int:
    """natural() up to LARGEST_PORT."""
    port = natural(text)
    if port > LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"{port}: ports end at {LARGEST_PORT}")
    return port


def server_flags(add: Callable) -> None:
    """Flags of what serves a policy; add is a parser's add_argument."""
    add("--policy", required=True, help="checkpoint of vla.py, sft.py or grpo.py")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0: all, for whoever reaches it",
    )
    add("--port", type=port_number, default=8000, help="port to listen on; 0: a free one")
    add("--execute", type=natural, default=0, help="steps of a chunk that are carried out; 0: half")
    add("--ensemble", type=non_negative, default=0, help="decay of temporal ensembling; 0: none")
    add("--batch", type=count, default=256, help="clients a forward")
    add("--seed", type=natural, default=0, help="seed of the policy's noise")
    has_gpu = torch.cuda.is_available()
    add("--device", type=model.device_name, default="cuda" if has_gpu else "cpu")
    vla.policy_flags(add)


def load_server(
    args: argparse.Namespace, keys: dict[str, str] | None = None, api_key: str | None = None
) -> Server:
    """args: those of server_flags(). The rest as of Server."""
    model.quiet_libraries()
    policy = vla.policy_of_flags(args)
    return Server(policy, args.execute, args.ensemble, keys, args.batch, api_key)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.serve", description="Serve a policy.")
    server_flags(parser.add_argument)
    add = parser.add_argument
    add("--api-key", help="clients must send the header Authorization: Api-Key THIS")
    add("--keys", nargs="*", default=[], help="what clients call inputs: state=joints+grip")
    args = parser.parse_args(argv)

    keys = {}
    for pair in args.keys:
        ours, _, theirs = pair.partition("=")
        if ours in keys:
            raise ValueError(f"--keys {pair}: {ours} is named twice; join what it is made of by +")
        keys[ours] = theirs
    server = load_server(args, keys, args.api_key)
    with contextlib.suppress(KeyboardInterrupt), server.listen(args.host, args.port) as port:
        print(f"ws://{args.host}:{port}: {server.metadata}", flush=True)
        threading.Event().wait()  # until Ctrl-C
    print(server)


if __name__ == "__main__":
    model.run_main(main, "--batch")
