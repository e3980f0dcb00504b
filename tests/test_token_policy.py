"""The model itself as the policy: scripted answers and a real tiny backbone, how a robot holds
still, which checkpoint drives how, and what the server tells of it."""

import importlib.util
import types

import numpy as np
import pytest
import torch
import untrained

import fast_tokenizer
import model
import sft
import vla
from benchmarks import simulate
from tools import protocol, serve

VIEW = np.zeros((64, 64, 3), np.uint8)
MOVES = [-1, -0.2, 0, 0.1, 0, 0.2, 0.1, 1]
GRIPPER = [1, 1, -1, 1, 1, 1, -1, 1]  # mostly 1
ACTIONS = np.array([MOVES * 3, GRIPPER * 3], np.float32).T  # (24, A)
CHUNKS = np.stack([ACTIONS[i : i + 4] for i in range(16)])  # (B, K, A)


def grown_backbone(chunks=CHUNKS, actions=ACTIONS, vocab_size=16):
    """An untrained model that knows action tokens."""
    backbone = model.load(untrained.folder("tiny-vlm"))
    stats = fast_tokenizer.statistics(actions)
    backbone.action_tokenizer = fast_tokenizer.FastTokenizer.fit(chunks, vocab_size, 2, stats)
    sft.grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return grown_backbone()


def script(monkeypatch, backbone, *calls):
    """Lets model.generate write the given texts, a list of them a call -> what it was asked."""
    asked = []

    def generate(backbone, rows, **flags):
        texts = calls[len(asked)]
        assert len(texts) == len(rows)
        prompts = [backbone.tokenizer.decode(row["ids"]) for row in rows]
        asked.append(types.SimpleNamespace(prompts=prompts, **flags))
        answers = [backbone.tokenizer.encode(text + "<|im_end|>") for text in texts]
        ids = torch.full((len(rows), max(map(len, answers))), backbone.vocab.pad)
        mask = torch.zeros_like(ids)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer)
            mask[row, : len(answer)] = 1
        return {"ids": ids, "mask": mask}

    monkeypatch.setattr(model, "generate", generate)
    return asked


def answer_of(backbone, number, thought=""):
    """The text of chunk `number` of CHUNKS, behind a thought -> it, and the chunk it decodes to."""
    ids = backbone.action_tokenizer.encode(CHUNKS[number : number + 1])
    chunks, ok = backbone.action_tokenizer.decode(ids)
    assert ok.all()
    return f"{thought}{model.action_answer(ids[0])}", chunks[0]


def test_tokens_become_the_chunk_they_mean_in_both_modes(monkeypatch, backbone):
    for mode, thought, words in (
        ("think", "<think> the cup is left </think>", model.THINK),
        ("direct", "", model.DIRECT),
    ):
        first, first_chunk = answer_of(backbone, 0, thought)
        second, second_chunk = answer_of(backbone, 1, thought)
        asked = script(monkeypatch, backbone, [first, second], [second])
        policy = vla.TokenPolicy(backbone, mode)
        states = np.zeros((2, 3))
        chunks = policy.act_batch([VIEW, [VIEW]], ["go left", "go right"], states, keys=[[1], [2]])
        assert np.array_equal(chunks, [first_chunk, second_chunk]) and chunks.dtype == np.float32
        assert np.abs(chunks - CHUNKS[:2]).max() < 0.4, "in dataset units"
        assert policy.thoughts == (["the cup is left"] * 2 if mode == "think" else None)
        assert "go left" in asked[0].prompts[0] and words in asked[0].prompts[0]
        assert asked[0].greedy and asked[0].max_new_tokens == 96
        assert np.array_equal(policy.act({"image": VIEW}, "go", np.zeros(3)), second_chunk)
        assert (policy.horizon, policy.action_dim, policy.cameras) == (4, 2, ("image",))
        assert (policy.count["chunks"], policy.count["forwards"]) == (3, 2)
        assert policy.count["seconds"] > 0 == policy.count["retried"]


def test_it_answers_after_a_thought_that_is_given(monkeypatch, backbone):
    """The prompt goes on with it, so that the model writes the answer alone; "" says nothing."""
    answer, chunk = answer_of(backbone, 3)
    asked = script(monkeypatch, backbone, [answer, answer], [answer])
    policy = vla.TokenPolicy(backbone, "think")
    told = ["the cup is right", ""]
    chunks = policy.act_batch([VIEW] * 2, ["go"] * 2, np.zeros((2, 0)), thoughts=told)
    assert np.array_equal(chunks, [chunk, chunk]) and policy.thoughts == told
    assert asked[0].prompts[0].endswith("<think>the cup is right</think>")
    assert asked[0].prompts[1].endswith("<think></think>")
    with pytest.raises(ValueError, match="1 thoughts for 2 observations; give one for each"):
        policy.act_batch([VIEW] * 2, ["go"] * 2, np.zeros((2, 0)), thoughts=["one"])


def test_without_thinking_it_is_given_no_thought(monkeypatch, backbone):
    """The thought stood behind the prompt that asks for none, a pair that no stage trains on."""
    answer, _ = answer_of(backbone, 3)
    script(monkeypatch, backbone, [answer])
    policy = vla.TokenPolicy(backbone, "direct")
    with pytest.raises(ValueError, match="reads none; .* of sft or grpo in the mode think"):
        policy.act_batch([VIEW], ["go"], np.zeros((1, 0)), thoughts=["the cup is right"])


def test_what_does_not_decode_is_tried_again_and_then_holds_still(monkeypatch, backbone):
    """Row 0 decodes at once, row 1 at the third answer, row 2 never: too few tokens, none, no end
    of its thought. Tags may be missing around tokens that decode."""
    good, good_chunk = answer_of(backbone, 2)
    short = model.action_answer([0])
    asked = script(
        monkeypatch,
        backbone,
        [f"<think>a</think>{good}", "<think>b</think>left", short],
        [f"<think>c</think>{short}", "<think>d</think>"],
        [good.replace("</answer>", ""), "<think>e and on"],
    )
    policy = vla.TokenPolicy(backbone, "think", tries=3, temperature=0.7)
    chunks = policy.act_batch([VIEW] * 3, ["go"] * 3, np.zeros((3, 0)), keys=[[0], [1], [2]])
    assert np.array_equal(chunks[:2], [good_chunk, good_chunk]) and np.isnan(chunks[2]).all()
    assert policy.thoughts[:2] == ["a", ""] and policy.thoughts[2].startswith("e and on")
    assert [call.greedy for call in asked] == [True, False, False]
    assert {call.temperature for call in asked} == {0.7}
    assert len({key for call in asked for key in call.keys}) == 7, "each answer has its own draw"
    assert policy.count == {**policy.count, "chunks": 3, "retried": 2, "held": 1}

    # --sampled: the first answer is drawn too, as RL draws it
    asked = script(monkeypatch, backbone, [short], [good])
    policy = vla.TokenPolicy(backbone, "think", temperature=0.7, sampled=True)
    assert np.array_equal(policy.act_batch([VIEW], ["go"], np.zeros((1, 0)))[0], good_chunk)
    assert [call.greedy for call in asked] == [False, False] and asked[0].keys != asked[1].keys
    assert policy.count["retried"] == 1

    # the robot: nothing was said yet, so the gripper stays as it mostly is; then as it was told
    executor = vla.ChunkExecutor(4, 2, hold=policy.hold)
    assert executor(chunks[2], "go").tolist() == [[0, 1]] * 2
    closing = np.float32([[0.5, 1], [0.5, -1], [0.5, 1], [0.5, 1]])
    assert executor(closing, "go").tolist() == [[0.5, 1], [0.5, -1]]
    assert executor(chunks[2], "go").tolist() == [[0, -1]] * 2
    executor.reset()
    assert executor(chunks[2], "go").tolist() == [[0, 1]] * 2


def test_how_to_hold_still_by_hand():
    """A movement, a gripper of -1 and 1, one of 0 and 1 that hardly closes, one that never moves, a
    joint angle in radians. Of the last nobody knows where it is before it was told."""
    rng = np.random.default_rng(0)
    move = rng.uniform(-1, 1, 400)
    sign = np.where(np.arange(400) % 3, -1.0, 1.0)
    rare = np.float64(np.arange(400) > 397)
    angle = rng.uniform(0.4, 0.9, 400)
    stats = fast_tokenizer.statistics(np.stack([move, sign, rare, 0 * move, angle], 1))
    hold = vla.how_to_hold_still(stats)
    assert hold.keeps.tolist() == [False, True, True, False, True]
    assert hold.first[1:4].tolist() == [-1, 0, 0] and np.isnan(hold.first[4])
    executor = vla.ChunkExecutor(2, 1, hold=hold)
    nothing = np.full((2, 5), np.nan, np.float32)
    with pytest.raises(ValueError, match="stop the robot: .*nan"):
        executor(nothing, "go")
    executor(np.full((2, 5), 0.5, np.float32), "go")
    assert executor(nothing, "go").tolist() == [[0, 0.5, 0.5, 0, 0.5]]

    # a joint angle on both sides of 0 was sent to 0; what the recordings say comes before a guess
    for deltas, keeps in ((0, [True] * 5), (3, [False, False, False, True, True])):
        hold = vla.how_to_hold_still(stats | {"deltas": deltas})
        assert hold.keeps.tolist() == keeps and np.isnan(hold.first[[0, 4]]).all()

    del stats["std"]
    assert vla.how_to_hold_still(stats) is None
    for unknown in (None, vla.how_to_hold_still(stats)):
        with pytest.raises(ValueError, match="stop the robot"):
            vla.ChunkExecutor(2, 1, hold=unknown)(nothing, "go")


def test_an_ensemble_goes_on_behind_what_held_still():
    """Chunk steps 0 .. 3, two carried out: 0 and 1, then it holds still for 2 and 3. At step 4 the
    first chunk is over: the new one stands alone."""
    hold = vla.Hold(keeps=np.array([False]), first=np.array([0.0]))
    executor = vla.ChunkExecutor(4, 2, 0.1, hold)
    assert executor(np.arange(4.0)[:, None], "a").ravel().tolist() == [0, 1]
    assert executor(np.full((4, 1), np.nan), "a").ravel().tolist() == [0, 0]
    assert executor(np.arange(4.0)[:, None] + 10, "a").ravel().tolist() == [10, 11]


def test_what_was_not_carried_out_is_forgotten():
    """Of 0 and 1, which were to be carried out, 0 alone was: it holds still by that, and the next
    chunk is no part of an ensemble with the first."""
    hold = vla.Hold(keeps=np.array([True]), first=np.array([5.0]))
    executor = vla.ChunkExecutor(4, 2, 0.1, hold)
    executor.interrupt(None)
    assert executor(np.full((4, 1), np.nan), "a").ravel().tolist() == [5, 5]
    assert executor(np.arange(4.0)[:, None], "a").ravel().tolist() == [0, 1]
    executor.interrupt(np.array([0.0]))
    assert executor(np.full((4, 1), np.nan), "a").ravel().tolist() == [0, 0]
    assert executor(np.arange(4.0)[:, None] + 10, "a").ravel().tolist() == [10, 11]


def test_a_row_gets_the_same_in_any_batch(monkeypatch):
    """A real backbone that may write FAST tokens alone, each a chunk of one number; tokens of odd
    index are taken for no chunk, so that about half of the rows are sampled again."""
    actions = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    backbone = grown_backbone(actions[:, None], actions, vocab_size=5)
    fast = backbone.vocab.fast
    rows = len(backbone.net.get_input_embeddings().weight)
    backbone.vocab.banned = sorted(set(range(rows)) - set(fast))
    tried = []

    def parse(backbone, ids):
        index = fast.index(ids[0])
        tried.append(index)
        return model.ParsedAnswer(True, False, [] if index % 2 else [index])

    monkeypatch.setattr(model, "parse_actions", parse)
    rng = np.random.default_rng(1)
    images = list(rng.integers(0, 256, (6, 64, 64, 3), np.uint8))
    texts = ["go", "push the red block to the left", "go on", "lift it", "open", "close the drawer"]
    keys = [[2, number] for number in range(6)]
    backbone.run = {"config": {"max_new_tokens": 1}}

    def answers(order, batch, seed=0):
        policy = vla.TokenPolicy(backbone, "direct", tries=2, temperature=3.0, seed=seed)
        chunks = np.zeros((6, 1, 1))
        for start in range(0, 6, batch):
            part = order[start : start + batch]
            chunks[part] = policy.act_batch(
                [images[i] for i in part],
                [texts[i] for i in part],
                np.zeros((len(part), 0)),
                keys=[keys[i] for i in part],
            )
        return chunks.ravel(), policy.count

    whole, count = answers([0, 1, 2, 3, 4, 5], 6)
    single, single_count = answers([4, 2, 0, 5, 3, 1], 1)
    np.testing.assert_array_equal(whole, single)
    assert count["retried"] == single_count["retried"] > 0
    assert count["held"] == single_count["held"] < count["retried"], "a retry is another draw"
    others = [answers([5, 4, 3, 2, 1, 0], 4, seed)[0] for seed in (1, 2, 3)]
    assert any(not np.array_equal(whole, other, equal_nan=True) for other in others)


@pytest.fixture(scope="module")
def checkpoints(backbone, tmp_path_factory):
    """A folder with runs of stages base, sft, grpo and vla, and an sft run without actions."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model.save(folder / "sft/final", backbone, {"stage": "sft", "config": {"max_new_tokens": 9}})
    model.save(folder / "grpo/final", backbone, {"stage": "grpo", "config": {}})
    model.save(folder / "vla/final", backbone, {"stage": "vla"})
    wordy = model.load(untrained.folder("tiny-vlm"))
    model.save(folder / "base/final", wordy, {"stage": "base"})
    model.save(folder / "wordy/final", wordy, {"stage": "sft"})
    return folder


def test_the_stage_decides_who_drives(checkpoints):
    thinking = vla.load_policy(checkpoints / "sft")
    assert isinstance(thinking, vla.TokenPolicy) and thinking.mode == "think"
    assert thinking.max_new_tokens == 9, "as in its own run"
    direct = vla.load_policy(checkpoints / "grpo", "direct", tries=5)
    assert (direct.mode, direct.max_new_tokens, direct.tries) == ("direct", 96, 5)
    assert not direct.sampled and vla.load_policy(checkpoints / "grpo", sampled=True).sampled
    assert direct.spec["action_range"] == {"low": [-1, -1], "high": [1, 1]}
    for name, flags, words in (
        ("base", {}, "stage 'base', expected sft or grpo"),
        ("wordy", {}, "no action tokenizer.*train it on episodes with sft.py"),
        ("vla", {"mode": "think"}, "--mode think: the head of .* no tokens; leave --mode out"),
        ("vla", {"tries": 3}, "--tries 3: the head of .* writes no tokens; leave --tries out"),
        ("vla", {"sampled": True}, "--sampled True: the head of .* tokens; leave --sampled out"),
        ("vla", {}, "no policy; train one"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            vla.load_policy(checkpoints / name, **flags)
        assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        vla.load_policy(checkpoints / "none")


def test_finished_trials_are_those_of_one_mode(checkpoints, tmp_path):
    """Of the same weights: those that were driven directly are none of the thinking policy's."""
    args = types.SimpleNamespace(
        seed=0, execute=0, ensemble=0, variant="a", out=str(tmp_path / "r.json")
    )
    paths = set()
    for mode in ("think", "direct", "think"):
        policy = vla.load_policy(checkpoints / "sft", mode)
        paths.add(simulate.FinishedTrials("toy", policy, args, []).path)
    assert len(paths) == 2
    simulate.check_policy(policy, ["image"], 8, ["x", "gripper"])  # reads no state: any width
    with pytest.raises(ValueError, match="actions of 2 numbers, the simulator takes 3"):
        simulate.check_policy(policy, ["image"], 8, ["x", "y", "gripper"])


@pytest.mark.skipif(
    not (importlib.util.find_spec("websockets") and importlib.util.find_spec("msgpack")),
    reason="pip install -r requirements-extras.txt",
)
def test_the_server_tells_the_thought(monkeypatch, backbone):
    """The reply carries the thought of a policy that thinks, and none of one that does not; what
    does not decode is answered by actions that hold still, and counted."""
    good, good_chunk = answer_of(backbone, 3, "<think>left of the cup</think>")
    bare, _ = answer_of(backbone, 3)
    script(monkeypatch, backbone, [good], ["<think>no idea</think>"], ["words"], [bare])
    observation = {"image": VIEW, "prompt": "go"}
    server = serve.Server(vla.TokenPolicy(backbone, "think", tries=2), execute=4)
    with server.listen() as port, protocol.client(port) as (infer, metadata):
        assert metadata["state_dim"] == 0
        reply = infer(observation)
        assert reply["thought"] == "left of the cup"
        np.testing.assert_allclose(reply["actions"], np.clip(good_chunk, -1, 1), atol=0.1)
        told = float(reply["actions"][-1, 1])
        reply = infer({**observation, "state": np.zeros(5), "reset": False})
        assert reply["actions"].tolist() == [[0, told]] * 4 and reply["thought"] == ""
    assert "1 chunks tried again, 1 held still" in str(server)
    server = serve.Server(vla.TokenPolicy(backbone, "direct"))
    with server.listen() as port, protocol.client(port) as (infer, _):
        assert "thought" not in infer(observation)
    assert "tried again" not in str(server)
