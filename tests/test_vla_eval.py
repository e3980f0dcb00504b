"""The model server for vla-eval's harness, driven by the package's own client and runner."""

import socket
import sys

import numpy as np
import pytest
from test_serve import VIEW, FakePolicy

import vla
from tools import serve, vla_eval

REASON = "pip install vla-eval==0.8.0: see requirements-extras.txt"
anyio = pytest.importorskip("anyio", reason=REASON)
connection = pytest.importorskip("vla_eval.connection", reason=REASON)
package = pytest.importorskip("vla_eval.model_servers.serve", reason=REASON)
pytest.importorskip("msgpack", reason=REASON)

THEIRS = {"image": "agentview", "image_wrist": "wrist"}


def seen(state=0.5, **changes):
    """An observation as vla-eval's LIBERO sends it; its cameras are not in our order."""
    observation = {
        "images": {"wrist": VIEW + 1, "agentview": VIEW},
        "task_description": "go",
        "states": np.array([state, 0.0]),
    }
    return {**observation, **changes}


def served(test):
    """A test `async def test(policy, server, url)` while the policy is served on loopback."""

    def run():
        policy = FakePolicy()
        server = serve.Server(policy, execute=2)
        model_server = vla_eval.model_server(server, THEIRS)

        async def main():
            async with anyio.create_task_group() as tasks:
                port = await tasks.start(package.serve_async, model_server, "127.0.0.1", 0)
                with anyio.fail_after(60):
                    await test(policy, server, f"ws://127.0.0.1:{port}")
                tasks.cancel_scope.cancel()

        anyio.run(main)

    return run


async def first_numbers(client, states):
    actions = [await client.act(seen(state)) for state in states]
    return [float(action["actions"][0]) for action in actions]


@served
async def test_chunks_are_carried_out_step_by_step(policy, server, url):
    """Chunk steps are state + 0 .. 3, of which two are carried out; then the next observation
    counts. Another episode, or another simulator, begins with its own first observation."""
    async with connection.Connection(url) as client, connection.Connection(url) as other:
        assert client.server_info["observation_params"] == {
            "send_wrist_image": True,
            "send_state": True,
        }
        await client.start_episode({"task": {"name": "go"}})
        assert await first_numbers(client, [0, 0.5, 3, 1, 2]) == [0, 1, 3, 4, 2]
        assert await first_numbers(other, [1]) == [1]
        await client.end_episode({})
        await client.start_episode({"task": {"name": "go"}})
        assert await first_numbers(client, [2, 2]) == [2, 3]
        action = (await client.act(seen(4.5)))["actions"]
        assert action.shape == (3,) and action.dtype == np.float32
        assert (await client.act(seen()))["actions"].tolist() == [5, 5, 5], "clipped to the range"
    assert server.count["requests"] == 6 and server.count["clipped"] == 3


@served
async def test_what_does_not_fit_is_told_and_the_episode_goes_on(policy, server, url):
    async with connection.Connection(url) as client:
        await client.start_episode({})
        wrong = [
            (seen(states=np.zeros(3)), "send 2 finite numbers"),
            (seen(states=[np.nan, 0]), "send 2 finite numbers"),
            (seen(task_description=" "), "prompt must be text"),
            (seen(images={"agentview": VIEW}), "KeyError: 'wrist'"),
            (seen(images={"agentview": VIEW[..., 0], "wrist": VIEW}), "image is uint8 .8, 8.;"),
            ({"images": {"agentview": VIEW, "wrist": VIEW}}, "KeyError: 'task_description'"),
            (seen(task_description="explode"), "stop the robot: .*boom"),
        ]
        for observation, words in wrong:
            with pytest.raises(RuntimeError, match=words):
                await client.act(observation)
        assert await first_numbers(client, [0.5]) == [0.5]
        await client.start_episode({})
        other_name = {**seen(), "state": np.array([2, 0])}  # as its other simulators have it
        del other_name["states"]
        assert float((await client.act(other_name))["actions"][0]) == 2


@served
async def test_a_new_instruction_ends_the_chunk_of_the_one_before(policy, server, url):
    """vla-eval's CALVIN asks for five subtasks in one episode: what was left of a chunk went on
    after the instruction had changed. Chunk steps are state + 0 .. 3, two of them carried out."""
    async with connection.Connection(url) as client:
        await client.start_episode({})

        async def act(state, words, **more):
            action = await client.act(seen(state, task_description=words, **more))
            return float(action["actions"][0])

        assert await act(0, "open the drawer") == 0
        assert await act(2, "lift the block") == 2
        with pytest.raises(RuntimeError, match="prompt must be text"):
            await act(3, " ")
        assert await act(4, "lift the block") == 4, "nothing is left after what was refused"
        assert await act(1, "lift the block", episode_restart=True) == 1
        assert await act(3, "lift the block") == 2, "of the chunk that began with the restart"
    assert server.count["requests"] == 4 and server.count["refused"] == 1


@served
async def test_after_a_restart_it_holds_still_by_what_was_sent(policy, server, url):
    """The chunk would have closed the gripper in its second step, which was not sent."""
    policy.hold = vla.Hold(np.array([False, False, True]), np.array([np.nan, np.nan, 5.0]))
    async with connection.Connection(url) as client:
        await client.start_episode({})
        assert (await client.act(seen(1)))["actions"].tolist() == [1, 1, 1]
        nothing = await client.act(seen(task_description="nan"))
        assert nothing["actions"].tolist() == [0, 0, 1]


def test_a_missing_package_names_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "vla_eval.specs", None)
    with pytest.raises(ValueError, match="pip install vla-eval==0.8.0"):
        vla_eval.model_server(serve.Server(FakePolicy()), THEIRS)


def test_cameras_by_name_or_in_their_order():
    """Where one was named, the image at the place of the other could be the same: two wrists."""
    server = serve.Server(FakePolicy())
    for names, pixels in ((THEIRS, [0, 1]), ({}, [1, 0]), ({"image_wrist": "wrist"}, [0, 1])):
        observation = vla_eval.read_message(server, names, seen())
        assert [image.max() for image in observation.images] == pixels
    with pytest.raises(ValueError, match="1 images, the policy reads .*image_wrist"):
        vla_eval.read_message(server, {}, seen(images={"agentview": VIEW}))
    with pytest.raises(ValueError, match="--cameras img: the policy has image, image_wrist"):
        vla_eval.model_server(server, {"img": "agentview"})
    with pytest.raises(ValueError, match="image and image_wrist would both be agentview"):
        vla_eval.model_server(server, {"image": "agentview", "image_wrist": "agentview"})


@served
async def test_simulators_that_wait_share_a_forward(policy, server, url):
    clients = [connection.Connection(url) for _ in range(5)]
    results = {}

    async def ask(number):
        (results[number],) = await first_numbers(clients[number], [number / 2])

    for client in clients:
        await client.connect()
    policy.gate.clear()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, 0)
        while policy.waiting == 0:
            await anyio.sleep(0.001)
        for number in range(1, 5):
            tasks.start_soon(ask, number)
        while len(server.waiting) < 4:
            await anyio.sleep(0.001)
        policy.gate.set()
    assert results == {number: number / 2 for number in range(5)}
    assert policy.batch_sizes == [1, 4]
    for client in clients:
        await client.close()


@served
async def test_the_runner_of_the_package_plays_an_episode(policy, server, url):
    """As in its 20 simulators: this world shows how often it was moved, and ends after 5 steps."""
    from vla_eval.benchmarks.base import StepBenchmark, StepResult
    from vla_eval.runners.sync_runner import SyncEpisodeRunner

    class World(StepBenchmark):
        def get_tasks(self):
            return [{"name": "count"}]

        def reset(self, task):
            self.moves = []

        def step(self, action):
            self.moves.append(float(action["actions"][0]))
            return StepResult(None, 0.0, len(self.moves) == 5, {})

        def make_obs(self, raw_obs, task):
            return seen(len(self.moves) / 2, task_description=task["name"])

        def check_done(self, step_result):
            return step_result.done

        def get_step_result(self, step_result):
            return {"success": step_result.done}

        def get_action_spec(self):
            return {}

        def get_observation_spec(self):
            return {}

        def get_metadata(self):
            return {}

    world = World()
    async with connection.Connection(url) as client:
        result = await SyncEpisodeRunner().run_episode(world, {"name": "count"}, client)
    assert result["metrics"] == {"success": True} and result["steps"] == 5
    assert world.moves == [0, 1, 1, 2, 2]


def test_the_command_says_where_it_listens(monkeypatch, capsys):
    monkeypatch.setattr(vla, "load_policy", lambda *args: FakePolicy())

    asked = []

    def stop(*args):
        asked.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "serve", stop)
    words = ["--policy", "any", "--port", "0"]
    vla_eval.main([*words, "--cameras", "image=agentview,image_wrist=wrist"])
    said = capsys.readouterr()
    ((_, host, port),) = asked
    assert (
        f"ws://{host}:{port}: " in said.out
        and host == "127.0.0.1"
        and "0 requests" in said.out
        and not said.err
    )
    vla_eval.main([*words, "--host", "0.0.0.0"])
    assert "warning: whoever reaches 0.0.0.0:" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="in use"):
            vla_eval.main(["--policy", "any", "--port", str(taken.getsockname()[1])])
    for text in ("image", "image=", "=agentview", ""):
        with pytest.raises(SystemExit):
            vla_eval.main([*words, "--cameras", text])
        assert "write OURS=THEIRS" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vla_eval.main([*words, "--cameras", "image=agentview,image=wrist"])
    assert "image is named twice" in capsys.readouterr().err
