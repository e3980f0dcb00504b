"""A policy as a model server of vla-eval, whose harness runs LIBERO, CALVIN, SimplerEnv and more.

    python -m tools.vla_eval --policy runs/vla --cameras image=agentview,image_wrist=wrist

and in the harness's configuration `server: {url: "ws://127.0.0.1:8000"}`. The package's own server
speaks the protocol; what a policy reads, decides and carries out of a chunk is that of
tools/serve.py, for each episode of each simulator by itself. Simulators that ask at the same time
share a forward.
"""

import argparse
import contextlib
import socket
import weakref
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

import model
import vla
from tools.extras import require
from tools.protocol import pack
from tools.serve import (
    ANSWERABLE,
    Observation,
    Server,
    check_one_each,
    load_server,
    server_flags,
    warn_if_open,
)

INSTALL = "vla-eval==0.8.0"


@dataclass
class Episode:
    """What is kept of an episode that runs."""

    executor: vla.ChunkExecutor
    actions: deque[np.ndarray] = field(default_factory=deque)  # to carry out before the next chunk
    told: np.ndarray | None = None  # (A,), the last action that was sent

    def interrupt(self) -> None:
        """What is left of the chunk is not carried out."""
        self.actions.clear()
        self.executor.interrupt(self.told)


def read_message(server: Server, cameras: dict[str, str], message: dict) -> Observation:
    """An observation of vla-eval, {"images": {name: (H, W, 3) uint8}, "task_description": str,
    "states" or "state": (S,)} -> what the policy reads. cameras: ours -> theirs; a camera that it
    lacks is the next of the other images. ValueError or KeyError naming what does not fit."""
    images = message["images"]
    others = [image for name, image in images.items() if name not in cameras.values()]
    ours = {"prompt": message["task_description"]}
    for camera in server.policy.cameras:
        if camera in cameras:
            ours[camera] = images[cameras[camera]]
        elif others:
            ours[camera] = others.pop(0)
        else:
            raise ValueError(f"{len(images)} images, the policy reads {server.policy.cameras}")
    if "states" in message or "state" in message:
        ours["state"] = message.get("states", message.get("state"))
    return server.check(ours)


def model_server(server: Server, cameras: dict[str, str]):
    """-> the same policy as a vla_eval.model_servers.base.ModelServer, for vla-eval's serve().
    cameras: see read_message(). ValueError naming the pip install when a package is missing, the
    policy's cameras when one is none of them, or two that are named the same image."""
    anyio, base, specs = require(INSTALL, "anyio", "vla_eval.model_servers.base", "vla_eval.specs")
    (threads,) = require(INSTALL, "anyio.to_thread")
    unknown = set(cameras) - set(server.policy.cameras)
    if unknown:
        raise ValueError(
            f"--cameras {', '.join(unknown)}: the policy has {', '.join(server.policy.cameras)}"
        )
    check_one_each("--cameras", cameras)
    forwards = anyio.CapacityLimiter(server.batch)  # threads; a forward serves all that wait

    class PolicyServer(base.ModelServer):
        def __init__(self):
            # the context is another one for each episode, and gone when its connection is
            self.episodes = weakref.WeakKeyDictionary()

        async def on_observation(self, obs, ctx):
            episode = self.episodes.setdefault(ctx, Episode(server.executor()))
            try:
                await self.decide(obs, episode)
            except ANSWERABLE:  # which the package tells the simulator
                with server.counting:
                    server.count["refused"] += 1
                raise
            episode.told = episode.actions.popleft()
            await ctx.send_action({"actions": episode.told})

        async def decide(self, obs, episode):
            """Until the episode has an action to carry out."""
            carried_out = episode.executor.instruction
            is_new = obs.get("task_description", carried_out) != carried_out
            if is_new or obs.get("episode_restart"):
                episode.interrupt()
            if not episode.actions:
                observation = read_message(server, cameras, obs)
                content = [observation.images, observation.prompt, observation.state]
                noise_key = [zlib.crc32(pack(content))]
                answer = await threads.run_sync(
                    server.act, observation, noise_key, episode.executor, limiter=forwards
                )
                episode.actions.extend(answer.actions)

        def get_action_spec(self):
            return {"actions": specs.RAW}

        def get_observation_spec(self):
            spec = {"image": specs.IMAGE_RGB, "language": specs.LANGUAGE}
            if server.metadata["state_dim"]:
                spec["state"] = specs.RAW
            return spec

        def get_observation_params(self):
            """What the harness asks of a simulator."""
            return {
                "send_wrist_image": len(server.policy.cameras) > 1,
                "send_state": server.metadata["state_dim"] > 0,
            }

    return PolicyServer()


# ---- Command line -------------------------------------------------------------------------------


def camera_names(text: str) -> dict[str, str]:
    """ "image=agentview,image_wrist=wrist" -> {ours: theirs}."""
    names = {}
    for pair in text.split(","):
        ours, _, theirs = pair.partition("=")
        if not ours or not theirs:
            raise argparse.ArgumentTypeError(f"{pair!r}: write OURS=THEIRS, as image=agentview")
        if ours in names:
            raise argparse.ArgumentTypeError(f"{pair!r}: {ours} is named twice; name it once")
        names[ours] = theirs
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.vla_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    server_flags(parser.add_argument)
    parser.add_argument(
        "--cameras",
        type=camera_names,
        default={},
        help="image=agentview,image_wrist=wrist: what the harness calls ours; (in their order)",
    )
    args = parser.parse_args(argv)

    (package,) = require(INSTALL, "vla_eval.model_servers.serve")
    server = load_server(args)
    served = model_server(server, args.cameras)
    with socket.create_server((args.host, args.port)) as probe:  # OSError: it is in use
        address, port, *_ = probe.getsockname()
    warn_if_open(address, port, "listen on 127.0.0.1")
    print(f"ws://{args.host}:{port}: {server.metadata}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        package.serve(served, args.host, port)
    print(server)


if __name__ == "__main__":
    model.run_main(main, "--batch")
