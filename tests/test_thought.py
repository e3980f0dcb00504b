"""What follows another thought: thoughts replaced and edited, and two models by script, one that
does what its thought says and one that does not care."""

import json
import types

import numpy as np
import pytest
import torch
import untrained
from ranks import on_ranks

import evaluate
import model
import sft
from benchmarks import tabletop_data, thought
from benchmarks.tabletop import SUITES
from benchmarks.thought import EDITS, REPLACEMENTS, Known, Scene
from fast_tokenizer import FastTokenizer, read_episodes, write_episodes

TEXT = "The red cube is at f2. The gripper is at e5, high, open. Now reach: right 9, back 13, open."
SCENE = Scene(
    np.array([0.0, 0.03, 0.1]),
    {
        "red cube": np.array([0.09, -0.10, 0.02]),
        "plate": np.array([0.10, -0.12, 0.0]),  # in the same direction
        "blue ball": np.array([-0.12, 0.10, 0.02]),
        "button": np.array([0.005, 0.03, 0.0]),  # under the hand: no direction
    },
)


def test_each_thought_stands_for_another_once():
    thoughts = [str(i) for i in range(9)]
    swapped = thought.others(thoughts, np.random.default_rng(0))
    assert sorted(swapped) == thoughts
    assert all(a != b for a, b in zip(thoughts, swapped, strict=True))
    assert thought.others([], np.random.default_rng(0)) == []


def test_replacements():
    backbone = model.load(untrained.folder("tiny-vlm"))
    known = Known(TEXT, "another", "the true one")
    given = {}
    for name, replace in REPLACEMENTS.items():
        given[name] = replace(known, np.random.default_rng(0), backbone)
    assert (given["kept"], given["removed"]) == (TEXT, "")
    assert (given["swapped"], given["true"]) == ("another", "the true one")

    def length_of(text):
        return len(backbone.tokenizer.encode(text, add_special_tokens=False))

    length = length_of(TEXT)
    assert set(given["blank"]) <= {".", " "} and length == length_of(given["blank"])
    assert TEXT.startswith(given["half"])
    assert length_of(given["half"]) == length // 2
    assert sorted(given["shuffled"].split()) == sorted(TEXT.split())
    assert given["shuffled"] != TEXT


def edited(name):
    own = tabletop_data.parse_thought(TEXT)
    edit = EDITS[name](own, SCENE, np.random.default_rng(0))
    return edit and (thought.in_words(edit.thought), edit.turn.round(2).tolist())


def test_edits_by_hand():
    """The blue ball is 12 cm to the left and 7 to the front of the hand, of length 13.9; the way to
    the red cube is (9, -13), of length 15.8. The turn is the difference of the two unit vectors."""
    assert thought.in_words(tabletop_data.parse_thought(TEXT)) == TEXT
    assert edited("left-right") == (TEXT.replace("right 9", "left 9"), [-1, 0, 0, 0, 0, 0, 0])
    assert edited("back-front") == (TEXT.replace("back 13", "front 13"), [0, 1, 0, 0, 0, 0, 0])
    assert edited("down-up") is None, "it says nothing of up and down"
    assert edited("fingers") == (TEXT.replace("13, open", "13, close"), [0, 0, 0, 0, 0, 0, 1])
    turn = [-1.43, 1.33, 0, 0, 0, 0, 0]
    assert edited("object") == (TEXT.replace("red cube", "blue ball"), turn)
    assert edited("cell") == (TEXT.replace("f2", "b7"), turn)
    both = TEXT.replace("red cube is at f2", "blue ball is at b7")
    assert edited("object+cell") == (both, turn)
    whole = both.replace("right 9, back 13", "left 12, front 7")
    assert edited("object+cell+move") == (whole, turn)


def test_an_edit_that_says_nothing_is_none():
    own = tabletop_data.parse_thought(TEXT)
    rng = np.random.default_rng(0)
    near = own._replace(move=(2, -2, 0))
    assert EDITS["left-right"](near, SCENE, rng) is None
    assert EDITS["object"](own._replace(phase="grasp"), SCENE, rng) is None
    assert EDITS["object"](own._replace(target="green cube"), SCENE, rng) is None
    told_so = own._replace(target_cell="b7")  # wrongly, of the cell where the other one is
    assert EDITS["cell"](own, SCENE, rng) and EDITS["cell"](told_so, SCENE, rng) is None
    alone = Scene(SCENE.hand, {name: SCENE.places[name] for name in ("red cube", "plate")})
    assert EDITS["cell"](own, alone, rng) is None


def test_an_edit_leaves_the_rest_as_it_was():
    """3 cm have a side. What is carried goes elsewhere too, and the height stays: another object in
    the plane says nothing of it."""
    own = tabletop_data.parse_thought(TEXT)
    rng = np.random.default_rng(0)
    assert EDITS["left-right"](own._replace(move=(3, 0, 0)), SCENE, rng).thought.move == (-3, 0, 0)
    carried = own._replace(phase="carry", move=(9, -13, -8))
    edit = EDITS["object+cell+move"](carried, SCENE, rng)
    assert edit.thought == carried._replace(target="blue ball", target_cell="b7", move=(-12, 7, -8))


def test_all_edits_of_a_prompt_go_for_the_same_object():
    """Drawn by the number of the prompt, of eight around the hand: "cell" and "object" of a prompt
    differ in their words alone, and of another prompt about the same scene may be others."""
    angles = np.arange(0, 360, 45)
    names = ["red cube", *[f"{angle} degrees" for angle in angles[1:]]]
    ways = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles)), 0 * angles], 1)
    episode = types.SimpleNamespace(
        objects=names, object_position=0.1 * ways[None], state=np.zeros((1, 7))
    )
    keys = list(range(40))
    prompts = evaluate.Prompts(keys, [], [], np.empty(0), [(episode, 0)] * 40)
    edits = thought.edits_of(prompts, [TEXT] * 40, seed=0)
    for name in ("cell", "object+cell", "object+cell+move"):
        for edit, of_object in zip(edits[name], edits["object"], strict=True):
            np.testing.assert_array_equal(edit.turn, of_object.turn)
    chosen = [edit.thought.target for edit in edits["object"]]
    assert set(chosen) == set(names[2:7]), "those that are 60 degrees apart, each now and then"
    backwards = prompts._replace(keys=keys[::-1])
    assert [
        edit.thought.target for edit in thought.edits_of(backwards, [TEXT] * 40, 0)["object"]
    ] == (chosen[::-1]), "by the number of the prompt, not by its place on a rank"


def test_a_motion_follows_where_its_sum_points():
    """It goes left after a first step to the right; of what stands still, or does not decode, no
    direction is known. Distances are in normalised units: 0.2 of 4, and 1 of 20, are 0.1 of 2."""
    turn = np.eye(7)[0]
    chunk = np.zeros((3, 7))
    chunk[:, 0] = [0.5, -0.4, -0.4]

    def follows(chunk, turn):
        return thought.follows(thought.After((), chunk, 0.0, 0.0), thought.Edit(None, turn))

    assert follows(chunk, -turn) and not follows(chunk, turn)
    still = 0 * chunk
    assert (
        not follows(still, turn) and not follows(still, -turn) and not follows(np.nan * chunk, turn)
    )

    stats = {"q01": [-1.0, 0.0], "q99": [3.0, 20.0]}
    a = thought.After((), np.array([[0.0, 5.0], [1.0, 5.0]]), 0.0, 0.0)
    b = a._replace(chunk=np.add(a.chunk, [0.2, 1.0]))
    assert thought.distance(a, b, stats) == pytest.approx(0.1)
    assert thought.distance(a, b, None) == pytest.approx(0.6), "normalised already"
    assert np.isnan(thought.distance(a, b._replace(chunk=np.nan * b.chunk), stats))


def test_metrics_of_replacements_by_hand():
    """After another thought: the same action, one to the other side that is as far from what was
    demonstrated, and one that does not decode, which has no distance and counts in no mean."""

    def after(ids, x, l1, r_a):
        return thought.After(ids, np.full((2, 7), x), r_a, l1)

    kept = [after((1, 2), 0.1, 0.1, 1.0), after((3,), 0.2, 0.2, 0.5), after((4,), 0.0, 0.3, 0.0)]
    removed = [kept[0], after((5,), -0.2, 0.2, 0.25), after((), np.nan, np.nan, 0.0)]
    metrics, paired = thought.replacement_metrics({"kept": kept, "removed": removed}, None)
    of_removed = {
        name.removeprefix("given removed "): (value["mean"], value["n"])
        for name, value in metrics.items()
        if name.startswith("given removed")
    }
    assert of_removed == {
        "r_a": (pytest.approx(1.25 / 3), 3),
        "l1": (pytest.approx(0.15), 2),
        "moved": (pytest.approx(0.2), 2),
        "changed": (pytest.approx(2 / 3), 3),
        "decodes": (pytest.approx(2 / 3), 3),
    }
    assert metrics["given kept changed"]["mean"] == metrics["given kept moved"]["mean"] == 0
    assert paired["given removed l1"] == [0.1, 0.2, None] and "given removed moved" not in paired
    assert thought.edit_metrics({"cell": (1, 3, 4), "object": (0, 0, 0)}) == {
        "edited cell before": evaluate.wilson(1, 4),
        "edited cell follows": evaluate.wilson(3, 4),
    }


def test_some_of_the_prompts_keep_what_belongs_to_each():
    chunks = np.arange(3 * 2 * 7).reshape(3, 2, 7)
    prompts = evaluate.Prompts([4, 6, 8], list("abc"), [[1], [2], [3]], chunks, list("xyz"))
    some = thought.subset(prompts, [2, 0])
    assert some[:3] == ([8, 4], ["c", "a"], [[3], [1]]) and some.steps == ["z", "x"]
    np.testing.assert_array_equal(some.chunks, chunks[[2, 0]])


# ---- The whole, with models by script ------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thought")
    recordings = [tabletop_data.demonstration(suite, 0, 3, 0.0) for suite in SUITES]
    write_episodes(folder / "episodes", recordings)
    return folder / "episodes"


def measured(monkeypatch, data, out, obeys, world=1):
    """The metrics of a model that thinks the truth and then moves as its thought says, or, if it
    does not obey, always to the right."""
    backbone = model.load(untrained.folder("tiny-vlm"))
    rng = np.random.default_rng(0)
    chunks = rng.uniform(-1, 1, (300, 5, 7)).astype(np.float32)
    unit = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mean": [0.0] * 7, "std": [1.0] * 7}
    backbone.action_tokenizer = FastTokenizer.fit(chunks, 128, scale=4, stats=unit)
    sft.grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    monkeypatch.setattr(model, "load", lambda *args, **kwargs: backbone)

    def action(text):
        parsed = tabletop_data.parse_thought(text)
        if not obeys or parsed is tabletop_data.UNREADABLE:
            return [1, 0, 0, 0, 0, 0, 1]
        move = np.array(parsed.move) / max(np.abs(parsed.move).max(), 1)
        return [*move, 0, 0, 0, 1 if parsed.fingers == "close" else -1]

    def generate(backbone, rows, n=1, *args, keys, **kwargs):
        texts = []
        for row, key in zip(rows, keys, strict=True):
            prompt = backbone.tokenizer.decode(row["ids"])
            own = "" if "<think>" in prompt.split("assistant")[-1] else TRUE[key]
            words = own or prompt.rpartition("<think>")[2].partition("</think>")[0]
            chunk = np.tile(action(words), (1, 5, 1)).astype(np.float32)
            answer = model.action_answer(backbone.action_tokenizer.encode(chunk)[0])
            text = (f"<think>{own}</think>" if own else "") + answer + "<|im_end|>"
            texts += [text] * n
        ids = [backbone.tokenizer.encode(text) for text in texts]
        longest = max(map(len, ids), default=0)
        padded = [row + [backbone.vocab.pad] * (longest - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        return {"ids": torch.tensor(padded), "mask": torch.tensor(mask)}

    draw = evaluate.draw_prompts
    TRUE = {}

    def draw_prompts(*args):
        prompts = draw(*args)
        for key, (episode, step) in zip(prompts.keys, prompts.steps, strict=True):
            TRUE[key] = episode.thoughts[step]
        return prompts

    monkeypatch.setattr(evaluate, "draw_prompts", draw_prompts)
    monkeypatch.setattr(model, "generate", generate)
    argv = ["thought", "--policy", "x", "--data", str(data), "--prompts", "40", "--out", str(out)]
    argv += ["--max-new-tokens", "64"]
    if world == 1:
        evaluate.main(argv)
    else:
        on_ranks(evaluate.main, argv, world)
    return json.loads(out.read_text())["arms"]["policy"]


def test_a_model_that_obeys_its_thought(monkeypatch, data, tmp_path):
    variant = measured(monkeypatch, data, tmp_path / "r.json", obeys=True)
    metrics = variant["metrics"]
    for name in EDITS:
        said = metrics[f"edited {name} follows"]
        moves = name in ("left-right", "back-front", "down-up", "fingers", "object+cell+move")
        assert said["mean"] == (1 if moves else 0) and said["n"] > 2, name
        assert metrics[f"edited {name} before"]["mean"] == 0
    assert metrics["given kept changed"]["mean"] == metrics["given true changed"]["mean"] == 0
    assert metrics["given kept moved"]["mean"] == 0
    for name in ("removed", "blank", "half", "shuffled"):
        assert metrics[f"given {name} changed"]["mean"] > 0.5, name
        assert metrics[f"given {name} l1"]["mean"] > metrics["given kept l1"]["mean"]
    assert len(variant["paired"]["given swapped r_a"]) == 40
    # it thinks the truth alone: its own, sampled and true thoughts are worth the same
    for name in ("true", "sampled", "best"):
        own = variant["paired"]["worth own"]
        np.testing.assert_allclose(variant["paired"][f"worth {name}"], own, atol=2e-5)
    assert metrics["worth own"]["mean"] > 0
    assert metrics["worth spread"]["mean"] < 1e-5 and metrics["worth drawn spread"]["mean"] == 0


def test_ranks_equal_one(monkeypatch, data, tmp_path):
    """Each shuffles, swaps and edits the thoughts of its own prompts."""
    one, two = (
        measured(monkeypatch, data, tmp_path / f"{world}.json", True, world) for world in (1, 2)
    )
    assert two["items"] == one["items"]
    worth = [name for name in one["metrics"] if name.startswith("worth ")]
    assert len(worth) == 6
    for name in worth:  # of forwards that are padded otherwise on two ranks
        expected = one["paired"].pop(name)
        np.testing.assert_allclose(two["paired"].pop(name), expected, atol=2e-5)
        assert two["metrics"].pop(name) == pytest.approx(one["metrics"].pop(name), abs=2e-5)
    assert two["paired"] == one["paired"]
    assert two["metrics"] == one["metrics"]


def test_a_model_that_does_not_care(monkeypatch, data, tmp_path):
    metrics = measured(monkeypatch, data, tmp_path / "r.json", obeys=False)["metrics"]
    for name in REPLACEMENTS:
        assert metrics[f"given {name} changed"]["mean"] == 0
        assert metrics[f"given {name} decodes"]["mean"] == 1
    for name in EDITS:
        before = metrics[f"edited {name} before"]
        assert metrics[f"edited {name} follows"] == before


def test_other_worlds_keep_the_replacements(monkeypatch, data, tmp_path, capsys):
    """Their thoughts cannot be taken apart, and without recorded ones none is true."""
    recordings = []
    for seed in range(2):
        arrays, header = tabletop_data.demonstration("goal", 1, seed, 0.0)
        recordings.append((arrays, {**header, "source": "elsewhere"}))
    write_episodes(tmp_path / "episodes", recordings)
    metrics = measured(monkeypatch, tmp_path / "episodes", tmp_path / "r.json", True)["metrics"]
    assert "edits: left out" in capsys.readouterr().out
    assert "worth true" in metrics
    assert "given true r_a" in metrics and not any(name.startswith("edited") for name in metrics)


def test_a_folder_of_two_worlds_is_not_edited(tmp_path):
    """Each rank once looked at its own prompts: one with Tabletop's alone then waited for ever for
    the other to sum what its edits had done."""
    arrays, header = tabletop_data.demonstration("goal", 1, 0, 0.0)
    write_episodes(tmp_path / "e", [(arrays, header), (arrays, {**header, "source": "elsewhere"})])
    episodes = read_episodes(tmp_path / "e")
    assert thought.can_be_edited(episodes[:1]) and not thought.can_be_edited(episodes)
    episodes[0].object_position = None
    assert not thought.can_be_edited(episodes[:1]), "nobody knows where the objects are"


def test_the_answer_after_its_own_thought_is_its_own():
    """A real tiny model goes on from what it wrote, given back to it, as it did at once."""
    backbone = model.load(untrained.folder("tiny-vlm"))
    image = np.full((64, 64, 3), 90, np.uint8)
    row = model.encode(backbone, model.action_prompt("go", True), [image], prompt_only=True)
    whole = model.generate(backbone, [row], 1, 24, greedy=True)["ids"][0]
    given = model.with_thought(row, whole[:10].numpy())
    rest = model.generate(backbone, [given], 1, 14, greedy=True)["ids"][0]
    assert len(whole) == 24 and torch.equal(rest, whole[10:])


def acting_backbone():
    """An untrained model that knows action tokens, and a prompt to it."""
    backbone = model.load(untrained.folder("tiny-vlm"))
    chunks = np.random.default_rng(0).uniform(-1, 1, (300, 5, 7)).astype(np.float32)
    backbone.action_tokenizer = FastTokenizer.fit(chunks, 128, scale=4)
    sft.grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    image = np.full((64, 64, 3), 90, np.uint8)
    row = model.encode(backbone, model.action_prompt("go", True), [image], prompt_only=True)
    return backbone, row


def test_what_a_thought_is_worth_by_its_definition():
    """(p(t_1) + p(t_1) p(t_2) + ...) / m behind the thought, by one forward of each whole row; a
    completion without its thought is worth 0. The untrained model's p are about 1 / V."""
    backbone, row = acting_backbone()
    args = types.SimpleNamespace(batch=2, device="cpu")
    prompts = evaluate.Prompts([0, 1], [row, row], [[3, 5], [7]], np.zeros((2, 5, 7)), [])
    completions = []
    for text in ("<think>left</think>", "", "<think>right</think>", "<think>left</think>"):
        answer = f"{text}{model.action_answer([9])}<|im_end|>"
        completions.append(backbone.tokenizer.encode(answer, add_special_tokens=False))
    worth = thought.expected_r_a(backbone, prompts, completions, 2, args)
    assert worth.shape == (2, 2) and worth[0, 1] == 0
    nothing = evaluate.Prompts([], [], [], np.zeros((0, 5, 7)), [])  # of a rank
    assert thought.expected_r_a(backbone, nothing, [], 2, args).shape == (0, 2)

    def by_hand(text, target):
        ids = backbone.tokenizer.encode(f"{text}<answer>{model.ACTION_START}")
        tokens = [*(backbone.vocab.fast[i] for i in target), backbone.vocab.action_end]
        whole = model.with_thought(row, np.array([*ids, *tokens]))
        batch = model.collate([whole], backbone.vocab.pad)
        with torch.no_grad():
            hidden = model.hidden_states(backbone.net, batch)[0, -len(tokens) - 1 : -1]
            logits = backbone.net.lm_head(hidden).float()
        logits[:, list(backbone.vocab.banned)] = -torch.inf
        p = logits.softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        return float(p.cumprod(0).mean())

    wanted = [by_hand("<think>left</think>", [3, 5])]
    wanted += [by_hand(f"<think>{word}</think>", [7]) for word in ("right", "left")]
    np.testing.assert_allclose([worth[0, 0], *worth[1]], wanted, rtol=1e-4)
    assert wanted[1] != wanted[2]


def test_worths_of_prompts_by_hand():
    """Nothing is told of true thoughts where no episode holds one."""
    values = [
        thought.Worth(0.5, np.nan, np.array([0.1, 0.3]), np.array([0.0, 1.0])),
        thought.Worth(0.7, np.nan, np.array([0.4, 0.4]), np.array([0.5, 0.5])),
    ]
    metrics, paired = thought.worth_metrics(values)
    means = {name: round(value["mean"], 4) for name, value in metrics.items()}
    assert means == {
        "worth own": 0.6,
        "worth sampled": 0.3,
        "worth best": 0.35,
        "worth spread": 0.05,
        "worth drawn spread": 0.25,
    }
    assert paired["worth best"] == [0.3, 0.4]


def test_one_prompt_has_no_other_thought(data, tmp_path):
    """Its own was given as another's."""
    flags = ["--policy", "x", "--data", str(data), "--out", str(tmp_path / "r.json")]
    with pytest.raises(ValueError, match="--prompts 1: there is no other thought"):
        evaluate.main(["thought", *flags, "--prompts", "1"])


def test_a_model_without_actions(data, tmp_path):
    args = ["thought", "--policy", untrained.folder("tiny-vlm"), "--data", str(data)]
    with pytest.raises(ValueError, match="no action tokenizer; give a checkpoint of sft or grpo"):
        evaluate.main([*args, "--out", str(tmp_path / "r.json")])


def test_a_recorded_thought_is_worth_what_it_is_as_the_models_own(monkeypatch):
    """Encoded as the rows of SFT are. Where no thought was recorded, or an empty one, it is NaN."""
    backbone, row = acting_backbone()
    prompts = evaluate.Prompts(
        [0, 1, 2], [row] * 3, [[3, 5], [7], [1]], np.zeros((3, 5, 7)), [None] * 3
    )
    written = f"<think>left</think>{model.action_answer([9])}<|im_end|>"
    own = [backbone.tokenizer.encode(written, add_special_tokens=False)] * 3
    monkeypatch.setattr(evaluate, "complete", lambda *args: [ids for ids in own for _ in range(2)])
    args = types.SimpleNamespace(batch=4, device="cpu", samples=2)
    values = thought.worths(backbone, prompts, own, ["left", None, ""], args)
    assert values[0].true == pytest.approx(values[0].own, rel=1e-5)
    assert np.isnan(values[1].true) and np.isnan(values[2].true)
    for value in values:
        np.testing.assert_allclose(value.sampled, value.own, rtol=1e-4)
