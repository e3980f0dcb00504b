"""Stage 2: reward, advantage and loss by hand, the shared prompt against full rows, ranks,
resume."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import on_ranks
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import grpo
import model
import sft
import vla
from benchmarks import tabletop_data
from fast_tokenizer import FastTokenizer, read_episodes, split_episodes, split_record
from tools import backbones

K, A = 4, 3
CLOCK = {"seconds", "rollout_s", "update_s", "tokens_per_s"}
SMALL = {
    "--prompts": 4,
    "--batch": 2,
    "--group": 4,
    "--max-new-tokens": 10,
    "--eval-prompts": 3,
    "--eval-every": 2,
    "--save-every": 0,
    "--show-every": 0,
    "--lr": 0.003,
}


def chunks(n, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, (n, K, A)).astype(np.float32)


def make_backbone(size="tiny-qwen3-vl"):
    backbone = backbones.random_backbone(size)
    unit = {"q01": [-1.0] * A, "q99": [1.0] * A, "mean": [0.0] * A, "std": [1.0] * A}
    backbone.action_tokenizer = FastTokenizer.fit(chunks(200), 48, scale=2, stats=unit)
    sft.grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("grpo"))


def write_world(root):
    """An SFT checkpoint, untied as those of 7B and 8B, and three episodes, the last held out."""
    with pytest.MonkeyPatch.context() as patch:
        size = dataclasses.replace(backbones.SIZES["tiny-qwen3-vl"], tied=False)
        patch.setitem(backbones.SIZES, "untied", size)
        backbone = make_backbone("untied")
    model.save(root / "sft", backbone, {"stage": "sft", "step": 1, "config": {}, "parent": ""})
    (root / "data").mkdir()
    for e in range(3):
        rng = np.random.default_rng(e)
        T = 6 + e
        save_file(
            {
                "image": rng.integers(0, 255, (T, 32, 32, 3), np.uint8),
                "state": np.zeros((T, 2), np.float32),
                "action": rng.normal(0, 0.5, (T, A)).astype(np.float32),
            },
            root / "data" / f"episode_{e:06d}.safetensors",
            {"task": f"put the red block {'far ' * e}to the left", "fps": "5"},
        )
    return root


def prompt_rows(backbone, lengths):
    """Prompts of unequal length, each with its own image."""
    rng = np.random.default_rng(0)
    return [
        model.encode(
            backbone,
            [{"role": "user", "content": "<image>" + "go left " * n}],
            [rng.integers(0, 255, (32, 32 + 16 * (n % 2), 3), np.uint8)],
            prompt_only=True,
        )
        for n in lengths
    ]


def test_advantage_by_hand():
    r = torch.tensor([[1.0, 0, 0, 0], [0.7, 0.7, 0.7, 0.7]])
    adv = grpo.advantage(r)  # mean .25, std sqrt((.75^2 + 3 x .25^2) / 3) = .5
    assert torch.allclose(adv[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5)
    assert adv[1].tolist() == [0, 0, 0, 0] and grpo.has_zero_std(r).tolist() == [False, True]
    assert grpo.advantage(r, "drgrpo")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert torch.isfinite(grpo.advantage(torch.ones(3, 1))).all()  # greedy evaluation: G = 1


def test_the_advantage_of_a_part_of_the_reward_by_hand():
    """Of a right, a wrong and a malformed answer; the std of r is 0.5, whatever is paid."""
    r = torch.tensor([[1.0, 0.5, 0.0]])
    half_r_f = torch.tensor([[0.5, 0.5, 0.0]])
    of_r_f = grpo.advantage(r, paid=half_r_f)
    of_r_a = grpo.advantage(r, paid=r - half_r_f)
    assert grpo.advantage(r)[0].tolist() == pytest.approx([1, 0, -1], abs=1e-5)
    assert of_r_f[0].tolist() == pytest.approx([1 / 3, 1 / 3, -2 / 3], abs=1e-5)
    assert of_r_a[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3], abs=1e-5)
    equal = torch.full((1, 3), 0.5)
    assert grpo.advantage(equal, paid=half_r_f).tolist() == [[0, 0, 0]], "r is equal"


def test_a_new_advantage_is_an_entry_of_the_dict(backbone, world, monkeypatch):
    """It had to go into check_config() and spread() too, which took the std for any kind that it
    did not know."""
    monkeypatch.setitem(grpo.ADVANTAGES, "halved", lambda r: torch.full_like(r[:, :1], 2.0))
    cfg = grpo.Config(advantage="halved", credit="expected")
    grpo.check_config(cfg)
    target, other = backbone.action_tokenizer.encode(chunks(2))
    texts = [f"<think>x</think>{model.action_answer(ids)}<|im_end|>" for ids in (target, other)]
    samples = sampled_as(backbone, texts)
    monkeypatch.setattr(model, "generate", lambda *args, **flags: samples)
    rows = prompt_rows(backbone, [2])
    (group,), _, _ = grpo.rollout(backbone, cfg, rows, [target], [0], 0, 2)
    assert group.target_weight.max() == 0.5 / 2
    cfg = dataclasses.replace(cfg, credit="all")
    (group,), _, _ = grpo.rollout(backbone, cfg, rows, [target], [0], 0, 2)
    r, _ = grpo.reward(backbone, [ids_of(backbone, text) for text in texts], [target] * 2)
    assert group.advantages[:, 0].tolist() == pytest.approx(list((r - r.mean()) / 2))


def test_each_token_has_the_advantage_of_its_completion():
    """The table in with_sampled_reward(): rewards 0.7 and 0.5, completions of 3 and 2 tokens."""
    ids = torch.tensor([[4, 5, 6], [7, 8, 0]])
    samples = {"ids": ids, "mask": (ids > 0).long(), "logp": torch.full((2, 3), -1.0)}
    rewards = torch.tensor([[0.7, 0.5]])
    learned = grpo.with_sampled_reward(
        None, grpo.Config(), samples, [[4, 5, 6], [7, 8]], [[1], [1]], rewards, np.ones(2)
    )
    want = torch.tensor([[0.7071, 0.7071, 0.7071], [-0.7071, -0.7071, 0]])
    assert torch.allclose(learned.advantages, want, atol=1e-4)
    assert torch.equal(learned.old_logp, samples["logp"]) and not learned.target_weight.any()


@pytest.mark.parametrize(
    ("ratio", "adv", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: the plain policy gradient
        (1.5, 1.0, -1.3, 0.0),  # good and already likelier: clipped at 1 + .3
        (0.5, 1.0, -0.5, -0.5),  # good but less likely: not clipped
        (0.5, -1.0, 0.8, 0.0),  # bad and already less likely: clipped at 1 - .2
        (1.5, -1.0, 1.5, 1.5),  # bad but likelier: not clipped
        (5.0, -1.0, 3.0, 0.0),  # dual clip
        (5.0, -0.5, 1.5, 0.0),  # dual clip is in units of the advantage
    ],
)
def test_clip_by_hand(ratio, adv, loss, slope):
    logp = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    old = torch.full((1, 1), -1.0)
    one = torch.ones(1, 1)
    value, sums = grpo.policy_loss(logp, old, adv * one, one)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-5)
    assert logp.grad.item() == pytest.approx(slope, abs=1e-5)
    assert sums["clipped"].item() == (slope == 0)


def test_dual_clip_off():
    logp = torch.tensor([[math.log(5.0)]])
    one = torch.ones(1, 1)
    assert grpo.policy_loss(logp, 0 * one, -one, one, dual_clip=0)[0].item() == pytest.approx(5)


def test_kl_sign_and_estimate():
    one = torch.ones(1, 1)
    logp = torch.tensor([[-1.0]], requires_grad=True)
    loss, info = grpo.policy_loss(logp, logp.detach(), 0 * one, one, -2 * one, kl_coef=1.0)
    loss.backward()
    assert info["kl"].item() == pytest.approx(math.exp(-1), abs=1e-6)  # e^-1 - (-1) - 1
    assert logp.grad.item() == pytest.approx(1 - math.exp(-1))  # descent makes it less likely again
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    _, info = grpo.policy_loss(p.log(), p.log(), 0 * p, torch.ones(3), q.log())
    each = [
        grpo.policy_loss(a[None], a[None], a[None] * 0, one[0], b[None])[1]["kl"].item()
        for a, b in zip(p.log(), q.log(), strict=True)
    ]
    assert min(each) >= 0
    assert np.dot(p.numpy(), each) == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-6)


def test_mask_counts():
    logp = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    old = torch.where(mask.bool(), 0.0, torch.nan)  # padding may hold anything
    adv = torch.tensor([[1.0], [-2.0]])
    loss, info = grpo.policy_loss(logp, old, adv, mask, old, kl_coef=0.5)
    assert loss.item() == -1 - 1 + 2 and info["kl"].item() == 0  # a sum: the caller divides
    loss, _ = grpo.policy_loss(logp, 0 * logp.detach(), adv, mask)
    loss.backward()
    assert logp.grad.tolist() == [[-1, -1, 0], [2, 0, 0]]


def ids_of(backbone, text):
    return backbone.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_reward_cases(backbone):
    target = backbone.action_tokenizer.encode(chunks(1, seed=5))[0]
    assert len(target) > 2
    act = model.action_answer(target)
    body = act.removeprefix("<answer>").removesuffix("</answer>")
    good = f"<think>go left</think>{act}<|im_end|>"
    cases = {  # text -> r_f, tags, markers, decodes
        good: (1, 1, 1, 1),
        f" <think>go\nleft</think>\n{act}<|im_end|>": (1, 1, 1, 1),
        good.replace("<think>", ""): (0, 0, 1, 1),
        good.replace("</think>", ""): (0, 0, 1, 1),
        good.replace("go left", " "): (0, 0, 1, 1),  # an empty thought
        good.replace("<answer>", ""): (0, 0, 1, 1),
        good.replace("</answer>", ""): (0, 0, 1, 1),
        good.replace("<|im_end|>", ""): (0, 0, 1, 1),  # cut at --max-new-tokens
        act + "<|im_end|>": (0, 0, 1, 1),  # no thought
        good.replace("<|im_end|>", " and so on<|im_end|>"): (0, 0, 1, 1),
        good.replace("<ACTION_START>", ""): (0, 1, 0, 0),
        good.replace("<ACTION_END>", ""): (0, 1, 0, 1),
        good.replace(body, "go left"): (0, 1, 0, 0),
        good.replace(body, "<ACTION_START><ACTION_END>"): (0, 1, 0, 0),
        good.replace("<ACTION_END>", "left<ACTION_END>"): (0, 1, 0, 1),
        good.replace("go left", "<FAST_1>"): (0, 1, 0, 1),  # action tokens in the thought
        good.replace(body, body + body): (0, 1, 0, 1),
        good.replace("<ACTION_START>", "<ACTION_START><FAST_0>"): (0, 1, 1, 0),  # too many values
        "": (0, 0, 0, 0),
    }
    rows = [ids_of(backbone, text) for text in cases]
    r, info = grpo.reward(backbone, rows, [target] * len(rows))
    for i, (text, (form, tags, markers, decodes)) in enumerate(cases.items()):
        got = [info[k][i] for k in ("r_f", "tags", "markers", "decodes")]
        assert got == [form, tags, markers, decodes], text
        assert r[i] == form, text  # the action is the target's: r_a is 1, or 0 where r_f is
        assert info["r_a"][i] == form, text
    direct = ids_of(backbone, act + "<|im_end|>")
    assert grpo.reward(backbone, [direct], [target], think=False)[0] == [1]
    assert len(grpo.reward(backbone, [], [])[0]) == 0


def test_reward_of_partly_right_actions(backbone):
    # one token a coefficient, so that every sequence of K x A of them decodes
    letters = [
        i for i, piece in backbone.action_tokenizer.pieces.items() if len(piece.decode()) == 1
    ]
    a, b, *_ = letters
    target = [a] * 12

    def score(action, kind="prefix", target=target):
        text = f"<think>x</think>{model.action_answer(action)}<|im_end|>"
        r, info = grpo.reward(backbone, [ids_of(backbone, text)], [target], kind)
        assert r[0] == (info["r_f"][0] + info["r_a"][0]) / 2
        return info["r_a"][0]

    assert score([a] * 12) == 1
    assert score([a] * 3 + [b] + [a] * 8) == 3 / 12
    assert score([b] + [a] * 11) == 0
    assert score([b] + [a] * 11, "lcs") == 11 / 12
    merged = next(i for i, p in backbone.action_tokenizer.pieces.items() if len(p.decode()) == 2)
    # a full match of a shorter target, then surplus tokens: max(m, n) makes them cost
    assert score([a] * 12, target=[a] * 10 + [merged]) == 10 / 12
    assert score([a] * 10 + [merged], target=[a] * 12) == 10 / 12
    gap = np.abs(np.subtract(*backbone.action_tokenizer.decode([[b] + [a] * 11, target])[0])).mean()
    assert score([b] + [a] * 11, "l1") == pytest.approx(math.exp(-gap / 0.1), rel=1e-5)
    assert score([a] * 12, "l1") == 1
    assert score([a] * 13, "l1") == 0  # does not decode: a failure, never zeros
    # the ladder: rungs below the first wrong token are whole, those from there on are partly paid
    near = score([a] * 9 + [b] + [a] * 2, "ladder")
    assert 9 / 12 < near < 1 and score([b] + [a] * 11, "ladder") < near
    assert score([a] * 12, "ladder") == 1 and score([a] * 13, "ladder") == 0
    assert score([a] * 12, "format") == score([b] * 12, "format") == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -0.25], "reward mine gave -0.25 where action ids .*; give numbers from 0 to 1"),
        ([1.0, np.nan], "reward mine gave nan where action ids .*; give numbers from 0 to 1"),
        ([1.0, 3], "reward mine gave 3 where"),
        (0.5, r"reward mine gave an array \(\) for 2 completions; give one number for each"),
        (np.ones((2, 3)), r"reward mine gave an array \(2, 3\) for 2 completions"),
    ],
)
def test_a_new_reward_gives_a_number_from_0_to_1_for_each(backbone, monkeypatch, values, message):
    """One beyond them trained in silence, NaN ended as a loss that is not finite, and one number
    for all was paid to each."""
    monkeypatch.setitem(grpo.REWARDS, "mine", lambda tokenizer, generated, targets: values)
    target = backbone.action_tokenizer.encode(chunks(1, seed=5))[0]
    row = ids_of(backbone, f"<think>x</think>{model.action_answer(target)}<|im_end|>")
    with pytest.raises(ValueError, match=message):
        grpo.reward(backbone, [row, row], [target, target], "mine")
    monkeypatch.setitem(grpo.REWARDS, "mine", lambda tokenizer, generated, targets: [1, np.nan])
    r, _ = grpo.reward(backbone, [row, row[:-1]], [target, target], "mine")
    assert r.tolist() == [1, 0], "what is malformed earns nothing, whatever it decodes to"


def test_the_ladder_by_hand(backbone):
    """Each rung compares what as many tokens of both decode to, with zeros for the rest."""
    one = [i for i, p in backbone.action_tokenizer.pieces.items() if len(p.decode()) == 1]
    a, b = one[0], one[1]
    generated, target = [a, b, *[a] * 10], [a] * 12
    rungs = []
    for k in range(1, 13):
        chunks, ok = backbone.action_tokenizer.decode([generated[:k], target[:k]], partial=True)
        assert ok.all()
        rungs.append(grpo.closeness(backbone.action_tokenizer, chunks[:1], chunks[1:])[0])
    assert rungs[0] == 1 > rungs[1]
    ladder = grpo.ladder_rewards(backbone.action_tokenizer, [generated], [target])
    assert ladder == pytest.approx([np.mean(rungs)])
    # up to the longer of the two: a token of two coefficients is ahead by one at each rung but the
    # last, where both have said all
    pieces = backbone.action_tokenizer.pieces
    merged = next(i for i, piece in pieces.items() if len(piece.decode()) == 2)
    apart = [i for c in pieces[merged].decode() for i in one if pieces[i].decode() == c]
    short, long = [merged, *[a] * 10], [*apart, *[a] * 10]
    chunks, ok = backbone.action_tokenizer.decode([short, long])
    assert ok.all() and np.array_equal(chunks[0], chunks[1])
    rungs = []
    for k in range(1, 13):
        chunks, _ = backbone.action_tokenizer.decode([short[:k], long[:k]], partial=True)
        rungs.append(grpo.closeness(backbone.action_tokenizer, chunks[:1], chunks[1:])[0])
    assert rungs[-1] == 1 > min(rungs)
    ladder = grpo.ladder_rewards(backbone.action_tokenizer, [short, long], [long, short])
    assert ladder == pytest.approx([np.mean(rungs)] * 2)


def test_the_ladder_is_not_climbed_where_nothing_decodes(backbone, monkeypatch):
    """2,000 tokens without an end, as of a policy that has collapsed, were 2,000 chunks to decode
    (two million ids) for an answer that earns nothing."""
    decode = backbone.action_tokenizer.decode
    counts = []

    def counted(ids, partial=False):
        counts.append(len(ids))
        return decode(ids, partial)

    monkeypatch.setattr(backbone.action_tokenizer, "decode", counted)
    one = next(i for i, p in backbone.action_tokenizer.pieces.items() if len(p.decode()) == 1)
    generated = [[one] * 2000, [one] * 12, []]
    ladder = grpo.ladder_rewards(backbone.action_tokenizer, generated, [[one] * 12] * 3)
    assert ladder.tolist() == [0, 1, 0]
    assert sum(counts) < 100


def test_credit_ends_at_the_first_wrong_token(backbone):
    """Two completions of one prompt, both well formed, r_a 1 and 1/3: A = +-0.707 (std over G - 1).
    What follows the wrong token gets the format's part alone, which is 0 here; with a third,
    malformed one it is not."""
    target = [1, 2, 3]
    texts = [model.action_answer([1, 2, 3]), model.action_answer([1, 9, 3]), "no answer"]
    rows = [ids_of(backbone, f"<think>x</think>{text}<|im_end|>") for text in texts]
    start = rows[1].index(backbone.vocab.action_start)

    r = torch.tensor([[1.0, 2 / 3]])
    A = grpo.advantage(r)
    F = grpo.advantage(r, paid=torch.tensor([[0.5, 0.5]]))
    right, wrong = grpo.token_advantages(backbone, rows[:2], [target] * 2, A[0], F[0])
    assert A[0].tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4) and F.tolist() == [[0, 0]]
    end = rows[0].index(backbone.vocab.action_end) + 1
    assert (right[:end] == A[0, 0]).all() and (right[end:] == 0).all()
    assert (wrong[: start + 3] == A[0, 1]).all()  # up to the wrong one, the second
    assert (wrong[start + 3 :] == 0).all() and len(wrong) == len(rows[1])

    r = torch.tensor([[1.0, 2 / 3, 0.0]])
    A = grpo.advantage(r)
    F = grpo.advantage(r, paid=torch.tensor([[0.5, 0.5, 0.0]]))
    R = grpo.advantage(r, paid=torch.tensor([[0.5, 1 / 6, 0.0]]))
    assert torch.allclose(A, F + R)  # the parts sum to the whole
    _, wrong, malformed = grpo.token_advantages(backbone, rows, [target] * 3, A[0], F[0])
    assert (wrong[: start + 3] == A[0, 1]).all() and (wrong[start + 3 :] == F[0, 1]).all()
    assert (malformed == A[0, 2]).all()  # all of it


def test_the_expected_prefix_reward_is_the_mean_of_sampled_ones():
    """Probabilities 0.5, 0.8, 1 of the target's tokens: (0.5 + 0.4 + 0.4) / 3. And the mean of
    200,000 answers whose tokens are right with other probabilities."""
    is_target = torch.tensor([[False, True, True, True], [False] * 4])
    logp = torch.tensor([[-9.0, *np.log([0.5, 0.8, 1.0])], [-1.0] * 4])
    expected = grpo.expected_prefix(logp, is_target)
    assert expected.tolist() == pytest.approx([1.3 / 3, 0])
    rng = np.random.default_rng(0)
    p = rng.uniform(0.3, 1, 6)
    is_right = rng.uniform(size=(200_000, 6)) < p
    r_a = is_right.cumprod(1).sum(1) / 6
    expected = grpo.expected_prefix(torch.tensor(np.log([p])), torch.ones(1, 6, dtype=torch.bool))
    assert expected.item() == pytest.approx(r_a.mean(), abs=4 * r_a.std() / 200_000**0.5)


def sampled_as(backbone, texts):
    """What model.generate() puts out for completions of these texts, log-probabilities -1 each."""
    ids = [torch.tensor(ids_of(backbone, text)) for text in texts]
    mask = [torch.ones_like(one) for one in ids]
    return {
        "ids": pad_sequence(ids, True),
        "mask": pad_sequence(mask, True),
        "logp": -pad_sequence(mask, True).float(),
    }


def test_the_expected_reward_pays_the_thought_and_teaches_the_answer(backbone, world, monkeypatch):
    """Three completions of one prompt: right, wrong, malformed. The thoughts of the first two get
    the target's answer, whatever was drawn, so that equal thoughts are paid alike; the third stays
    as it is, and is worth 0."""
    target, other = backbone.action_tokenizer.encode(chunks(2))
    texts = [f"<think>x</think>{model.action_answer(ids)}<|im_end|>" for ids in (target, other)]
    texts.append("no answer<|im_end|>")
    samples = sampled_as(backbone, texts)
    monkeypatch.setattr(model, "generate", lambda *args, **flags: samples)
    rows = prompt_rows(backbone, [2])
    cfg = grpo.Config(credit="expected", kl_coef=0.0)
    groups, sums, _ = grpo.rollout(backbone, cfg, rows, [target], [0], 0, 3)
    (group,) = groups
    vocab = backbone.vocab
    right = [*(vocab.fast[i] for i in target), vocab.action_end]
    start = group.ids[0].tolist().index(vocab.action_start) + 1
    for g in (0, 1):
        n = int(group.mask[g].sum())
        assert group.ids[g, start:n].tolist() == right
        assert group.ids[g, :start].tolist() == samples["ids"][g, :start].tolist()
        assert (group.target_weight[g] > 0).nonzero().flatten().tolist() == [*range(start, n)]
        assert (group.old_logp[g, :start] == -1).all() and (group.advantages[g, start:n] == 0).all()
    malformed = ids_of(backbone, texts[2])
    assert group.ids[2][group.mask[2].bool()].tolist() == malformed
    assert (group.target_weight[2] == 0).all()

    # paid: by hand from the log-probabilities of full rows
    logp = grpo.completion_logp(backbone, rows, group.ids, group.mask)
    end = start + len(right)
    expected = logp[0, start:end].exp().cumprod(0).mean().item()
    assert sums["expected_r_a"] == pytest.approx([2 * expected, 3])
    r, parts = grpo.reward(backbone, [ids_of(backbone, text) for text in texts], [target] * 3)
    assert parts["r_f"].tolist() == [1, 1, 0] and r[0] == 1 > r[1]
    std = np.std(r, ddof=1) + 1e-6
    worth = np.array([(1 + expected) / 2, (1 + expected) / 2, 0])
    assert group.advantages[:, 0].tolist() == pytest.approx(list((worth - worth.mean()) / std))
    assert group.target_weight[0, start].item() == pytest.approx(0.5 / std)

    # and the answers learn by the gradient of E[r_a], times 0.5 / std
    parameters = [p for p in backbone.net.parameters() if p.requires_grad]

    def gradient(loss):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    with_answers, _ = grpo.group_loss(backbone, None, groups, cfg)
    thoughts_alone, _ = grpo.group_loss(backbone, None, groups, grpo.Config(kl_coef=0.0))
    logp = grpo.completion_logp(backbone, rows, group.ids, group.mask)
    of_both = logp[:2, start:end].exp().cumprod(1).mean(1)
    by_hand = -0.5 / std * of_both.sum()
    difference = gradient(with_answers) - gradient(thoughts_alone)
    assert torch.allclose(difference, gradient(by_hand), atol=1e-5)
    assert difference.abs().max() > 1e-4

    # the halves alone: what one leaves out is all that the other has
    halves = {}
    for half in ("thought", "answer"):
        one = dataclasses.replace(cfg, credit=f"expected-{half}")
        (half_group,), _, _ = grpo.rollout(backbone, one, rows, [target], [0], 0, 3)
        halves[half] = half_group
    assert torch.equal(halves["thought"].advantages, group.advantages)
    assert torch.equal(halves["answer"].target_weight, group.target_weight)
    assert (halves["thought"].target_weight == 0).all() and (halves["answer"].advantages == 0).all()
    of_halves = 0
    for half, half_group in halves.items():
        loss, _ = grpo.group_loss(
            backbone, None, [half_group], dataclasses.replace(cfg, credit=f"expected-{half}")
        )
        of_halves = of_halves + gradient(loss)
    with_answers, _ = grpo.group_loss(backbone, None, groups, cfg)
    assert torch.allclose(of_halves, gradient(with_answers), atol=1e-5)


def right_answer(score, text, **row):
    return grpo.RightAnswer(score, text, row, grpo.Path())


def test_answers_in_words_learn_whole_in_either_half(backbone, world, monkeypatch):
    """There is no E[r_a] of them, so that no half of it can be left out."""
    texts = [f"<think>x</think><answer>{word}</answer><|im_end|>" for word in ("left", "right")]
    samples = sampled_as(backbone, texts)
    monkeypatch.setattr(model, "generate", lambda *args, **flags: samples)
    rows, target = prompt_rows(backbone, [2]), right_answer("exact", "left")
    for credit in grpo.CREDITS:
        cfg = grpo.Config(credit=credit)
        (group,), _, _ = grpo.rollout(backbone, cfg, rows, [target], [0], 0, 2)
        assert group.ids.tolist() == samples["ids"].tolist()
        signs = group.advantages.sign() * group.mask
        assert torch.equal(signs, torch.tensor([[1.0], [-1.0]]) * group.mask), credit
        assert (group.target_weight == 0).all()


def test_reward_of_answers_in_words(backbone):
    """r_f asks for the tags alone; r_a is the row's score, graded, and 0 where r_f is."""
    number = right_answer("number", "10", tolerance=2)
    act = model.action_answer([0, 1])
    cases = {  # text -> r_f, r_a
        "<think>far</think><answer>10</answer><|im_end|>": (1, 1),
        " <think>far</think>\n<answer> 13 </answer> <|im_end|>": (1, math.exp(-0.5)),
        "<think>far</think><answer>10</answer><|im_end|>11<|im_end|>": (1, 1),  # it has ended
        "<think>far</think><answer>near</answer><|im_end|>": (1, 0),
        "<think>far</think><answer></answer><|im_end|>": (1, 0),
        "<think> </think><answer>10</answer><|im_end|>": (0, 0),  # no thought
        "<answer>10</answer><|im_end|>": (0, 0),
        "<think>far</think><answer>10</answer>": (0, 0),  # cut off
        "<think>far</think><answer>10</answer> and so on<|im_end|>": (0, 0),
        "<think>far<answer>10</answer><|im_end|>": (0, 0),
        "<think>far</think>10<|im_end|>": (0, 0),
        "<think>a</think><answer>9</answer><answer>10</answer><|im_end|>": (0, 0),
        f"<think>far</think>{act}<|im_end|>": (0, 0),  # acts where it was asked
        f"<think>{model.ACTION_END}</think><answer>10</answer><|im_end|>": (0, 0),
        "": (0, 0),
    }
    rows = [ids_of(backbone, text) for text in cases]
    r, info = grpo.reward(backbone, rows, [number] * len(rows))
    for i, (text, (r_f, r_a)) in enumerate(cases.items()):
        assert [info["r_f"][i], info["r_a"][i]] == pytest.approx([r_f, r_a]), text
        assert r[i] == pytest.approx((r_f + r_a) / 2), text
    direct = ids_of(backbone, "<answer>10</answer><|im_end|>")
    assert grpo.reward(backbone, [direct], [number], think=False)[0] == [1]


def test_words_and_actions_in_one_batch(backbone):
    """Each by its own kind, in the order of the prompts; what is said of actions is of actions."""
    target = backbone.action_tokenizer.encode(chunks(1, seed=5))[0]
    word = "<think>a</think><answer>Red</answer><|im_end|>"
    act = f"<think>a</think>{model.action_answer(target)}<|im_end|>"
    red = right_answer("exact", "red")
    texts = [word, act, word, act]
    targets = [red, target, target, red]
    ids = [ids_of(backbone, text) for text in texts]
    r, info = grpo.reward(backbone, ids, targets)
    assert r.tolist() == [1, 1, 0, 0]
    alone, _ = grpo.reward(backbone, [ids[1], ids[2]], [target, target])
    assert alone.tolist() == [1, 0]
    zero_std = torch.zeros(2, dtype=torch.bool)
    pairs = [red, red, target, target]  # two groups of two
    ids = [ids[0], ids[0], ids[1], ids[2]]
    r, info = grpo.reward(backbone, ids, pairs)
    info["entropy"] = info["prompt_length"] = np.zeros(4)
    sums = grpo.rollout_metrics(backbone, ids, pairs, r, info, zero_std, 2)
    assert sums["decodes"] == sums["markers"] == [1, 2]
    assert sums["distinct_answers"] == [0.5, 1] and sums["distinct_actions"] == [1, 1]
    assert sums["r_a_exact"] == [2, 2] and sums["r_a_action"] == [1, 2]
    assert sums["completion_length"] == [sum(map(len, ids)), 4] and sums["truncated"] == [0, 4]
    cut = [ids[0][:-1], *ids[1:]]  # of the one that does not end
    assert grpo.rollout_metrics(backbone, cut, pairs, r, info, zero_std, 2)["truncated"] == [1, 4]
    means = grpo.means(sums)
    assert means["r_a"] == 0.75 and means["r_a_exact"] == 1 and means["r_a_action"] == 0.5
    assert "r_a_path" not in means
    last = {name: values[2:] for name, values in info.items()}
    only = grpo.rollout_metrics(backbone, ids[2:], pairs[2:], r[2:], last, zero_std[1:], 2)
    assert not [name for name in grpo.means(only) if name.startswith("r_a_")], "it is r_a itself"
    assert "distinct_answers" not in grpo.means(only)


def test_the_spread_of_rewards_is_trls(backbone):
    """reward_std of TRL 1.16 is over all completions of a step, with N - 1, and not the mean of
    the groups' own: of 0, 0 and 1, 1 it is 0.577, and both groups have none. Equal rewards have
    exactly none: 0.6 squared is rounded."""

    def spread(*of_ranks):
        sums = {name: [0.0, 0] for name in grpo.METRICS}
        for rewards in of_ranks:
            r = np.array(rewards)
            more = {"reward": [r.sum(), len(r)], "reward_squared": [(r**2).sum(), len(r)]}
            sums = grpo.add_sums(sums, {**{name: [0.0, 0] for name in grpo.METRICS}, **more})
        return grpo.means(sums)

    assert spread([0, 0, 1, 1])["reward_std"] == pytest.approx((1 / 3) ** 0.5)
    values = np.random.default_rng(0).uniform(0, 1, 40)
    whole = spread(values[:11], values[11:])
    assert whole["reward_std"] == pytest.approx(torch.tensor(values).std().item())
    assert "reward_squared" not in whole and list(whole)[:2] == ["reward", "reward_std"]
    for n in (1, 2, 7, 32, 1000):
        assert spread([0.6] * n)["reward_std"] == spread([0.1] * n)["reward_std"] == 0
    assert "reward_std" not in spread([])


def test_surplus_tokens_are_punished():
    assert model.prefix_reward([1, 2, 3], [1, 2, 3]) == 1
    assert model.prefix_reward([1, 2, 3, 4], [1, 2, 3]) == 0.75
    assert model.prefix_reward([], [1, 2]) == model.prefix_reward([], []) == 0


def test_common_subsequence():
    assert grpo.common_subsequence([1, 2, 3, 4], [2, 9, 4, 1]) == 2
    assert grpo.common_subsequence([], [1]) == grpo.common_subsequence([1], [2]) == 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", ["tiny-qwen3-vl", "tiny-qwen2.5-vl", "tiny-vlm"])
def test_shared_prompt_equals_full_rows(size, recompute):
    """Log-probabilities and gradients of the update against plain right-padded rows, also when the
    activations of both its passes are computed again, and the prompt's keys are not."""
    backbone = make_backbone(size)
    backbone.net.train()
    G = 3
    rows = prompt_rows(backbone, [3, 12, 6])
    lengths = [5, 1, 4, 7, 2, 3, 6, 6, 1]  # of G completions each
    T = max(lengths)
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(5, 300, (9, T)))
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    ids = ids.masked_fill(mask == 0, backbone.vocab.pad)
    weight = torch.randn(9, T, generator=torch.Generator().manual_seed(0)) * mask

    def gradients(logp):
        backbone.net.zero_grad()
        (logp * weight).sum().backward()
        return {k: p.grad.clone() for k, p in backbone.net.named_parameters() if p.grad is not None}

    calls = []
    block = backbone.net.model.language_model.layers[0]
    block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    if recompute:
        model.recompute_activations(backbone.net)
    logp = grpo.completion_logp(backbone, rows, ids, mask, temperature=0.7)
    assert len(calls) == 2  # prompts, completions
    shared = gradients(logp)
    assert len(calls) == (4 if recompute else 2)
    backbone.net.activation_checkpointing_disable()
    full_rows = []
    for i in range(9):
        row = rows[i // G]
        n = len(row["ids"])
        new = ids[i, : lengths[i]].numpy()
        pos = row["positions"].max() + 1 + np.arange(len(new))
        full_rows.append(
            {
                **row,
                "ids": np.concatenate([row["ids"], new]),
                "target": np.arange(n + len(new)) >= n,
                "positions": np.concatenate([row["positions"], np.tile(pos, (3, 1))], 1),
            }
        )
    batch = model.collate(full_rows, backbone.vocab.pad)
    on = batch["target"][:, 1:]
    flat = grpo.token_logp(
        backbone.net,
        model.hidden_states(backbone.net, batch)[:, :-1][on],
        batch["ids"][:, 1:][on],
        0.7,
        backbone.vocab.banned,
    )
    plain = torch.zeros(9, T).masked_scatter(mask.bool(), flat)
    assert torch.allclose(logp, plain, atol=1e-5)
    assert (logp[mask == 0] == 0).all()
    full = gradients(plain)
    assert full.keys() == shared.keys() and len(full) > 20
    for k, g in full.items():
        assert (g - shared[k]).abs().max() <= 1e-5 * max(1.0, g.abs().max()), k


def make_groups(backbone, n=3, G=4, max_new_tokens=6):
    cfg = grpo.Config(group=G, max_new_tokens=max_new_tokens)
    rows = prompt_rows(backbone, range(2, 2 + n))
    targets = backbone.action_tokenizer.encode(chunks(n))
    groups, sums, _ = grpo.rollout(backbone, cfg, rows, targets, range(n), 0, G)
    for i, group in enumerate(groups):  # an untrained model earns nothing: advantages by hand
        group.zero_std = i == 1
        one_each = torch.zeros(G) if group.zero_std else torch.linspace(-1, 1, G)
        group.advantages = one_each[:, None].expand(group.ids.shape)
    return groups, sums


def test_first_update_is_on_policy(backbone):
    """The sampler's log-probabilities are those of the update: ratio 1, nothing clipped."""
    groups, sums = make_groups(backbone)
    assert sums["reward"][1] == 12 and sums["frac_reward_zero_std"] == [3.0, 3]
    logp = grpo.completion_logp(backbone, [groups[0].row], groups[0].ids, groups[0].mask)
    assert torch.allclose(logp, groups[0].old_logp, atol=1e-5)
    _, sums = grpo.group_loss(backbone, None, groups, grpo.Config())
    assert sums["clipped"] == 0 and sums["kl"] == 0


def test_entropy_is_of_all_sampled_tokens(backbone, monkeypatch):
    """It was the mean over the groups that are forwarded: those whose rewards are all equal, where
    a collapse shows first, were left out. Minus the mean log-probability of what was sampled is
    the entropy, and needs no forward."""
    groups, sums = make_groups(backbone, n=8, G=16, max_new_tokens=12)
    tokens = torch.cat([group.old_logp[group.mask.bool()] for group in groups])
    total, count = sums["entropy"]
    assert count == len(tokens) and total == pytest.approx(-tokens.sum().item(), rel=1e-5)
    hidden = []  # where each sampled token is predicted

    def watched(net, rows, ids, *_):
        hidden.append(rows)
        return torch.zeros(len(ids))

    monkeypatch.setattr(grpo, "token_logp", watched)
    for group in groups:
        grpo.completion_logp(backbone, [group.row], group.ids, group.mask)
    logits = model.logits(backbone.net, torch.cat(hidden)).detach()
    logits[:, backbone.vocab.banned] = -1e9
    logp = logits.log_softmax(-1)
    assert total / count == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=0.05)


def shifted_sampler(monkeypatch, by):
    """A sampler whose log-probabilities are off by so much, as if it rounded."""
    generate = model.generate

    def shifted(*args, **kw):
        samples = generate(*args, **kw)
        return {**samples, "logp": samples["logp"] - by * samples["mask"]}

    monkeypatch.setattr(model, "generate", shifted)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gap_between_sampler_and_update_is_logged(world, monkeypatch, capsys, recompute):
    """In bf16 a quarter of the sampled tokens were outside the clip range before any update, and
    nothing said so. Ratios to the update's own log-probabilities do not see the gap, in any update
    of the rollout."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    shifted_sampler(monkeypatch, by=0.5)  # ratio e^0.5 = 1.65
    out = f"gap-{recompute}"
    more = ["--no-skip-zero-std"]  # two updates a step
    if recompute:
        more.append("--recompute-old-logp")
    grpo.main(flags(world, out, "--steps", "2", "--lr", "1e-6", *more))
    steps = [record for record in records(world / out) if "r_f" in record]
    printed = capsys.readouterr().out
    for record in steps:
        assert record["updates"] == 2, "so that ratios of a second update are seen too"
        assert record["sampler_gap"] == pytest.approx(0.5, abs=1e-3)
        assert record["sampler_outside_clip"] == 1
        line = f"warning: step {record['step']}: 100.0% of the sampled tokens"
        assert line in printed, "it named the step before"
        assert record["clip_fraction"] == 0 if recompute else record["clip_fraction"] > 0.05


def test_the_terminal_shows_six_figures_and_the_log_all(world, capsys):
    """A step's line was 350 characters of 23 figures."""
    grpo.main(flags(world, "shown", "--steps", "1", "--eval-every", "1"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line[:4] == "step"]
    names = [line[::2] for line in lines if "rollout" not in line]
    figures = {"reward", "r_a", "frac_reward_zero_std", "entropy", "completion_length", "kl"}
    ways = [f"eval_{style}" for style in ("greedy", "sampled")]
    evaluated = {f"{way}_{name}" for way in ways for name in ("reward", "r_f", "r_a")}
    assert [set(line[1:]) for line in names] == [evaluated, figures, evaluated]
    *_, step, last = records(world / "shown")
    assert figures < step.keys() and {"clip_fraction", "lr", "update_s"} < step.keys()
    assert evaluated < last.keys()


def test_a_small_gap_is_no_warning(world, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    grpo.main(flags(world, "small gap", "--steps", "1"))
    record = records(world / "small gap")[2]
    assert 0 < record["sampler_gap"] < 1e-5 and record["sampler_outside_clip"] == 0
    assert "warning" not in capsys.readouterr().out


def test_old_logp_of_the_update_itself(backbone):
    """Bit for bit: the first update's ratios are 1. Groups that are not forwarded keep theirs."""
    groups, _ = make_groups(backbone, n=4)
    before = [group.old_logp for group in groups]
    cfg = grpo.Config(group=4, micro_batch=2)
    sums = grpo.recompute_old_logp(backbone, [groups[:2], groups[2:]], cfg)
    forwarded = [groups[i] for i in (0, 2, 3)]  # 1 is tied
    assert sums["forwarded"] == sum(int(group.mask.sum()) for group in forwarded)
    assert groups[1].old_logp is before[1] and groups[0].old_logp is not before[0]
    for batch in ([groups[0]], groups[2:]):
        _, logged = grpo.group_loss(backbone, None, batch, cfg)
        assert logged["gap"] == 0


def step_once(groups, **flags):
    """One update of a fresh backbone -> (its sums, all weights in one vector)."""
    backbone = make_backbone()
    dist = model.Dist(0, 1, torch.device("cpu"))
    cfg = grpo.Config(batch=len(groups), group=4, max_new_tokens=6, **flags)
    optim = model.make_optimizer(backbone.net, 1e-3, 0.0, (0.9, 0.999))
    ref = make_backbone() if cfg.kl_coef else None
    sums = grpo.update_step(backbone, ref, optim, groups, cfg, dist, "step 7")
    return sums, all_weights(backbone)


def all_weights(backbone):
    return torch.cat([p.detach().flatten() for p in backbone.net.parameters()])


def test_skipping_equal_rewards_changes_nothing_without_kl(backbone):
    """A group of equal rewards has no gradient, and its tokens stay in the denominator."""
    groups, _ = make_groups(backbone)
    skip, w_skip = step_once(groups, kl_coef=0.0)
    every, w_every = step_once(groups, kl_coef=0.0, skip_zero_std=False, micro_batch=2)
    assert skip["forwarded"] < every["forwarded"]
    assert skip["loss"] == pytest.approx(every["loss"], abs=1e-6)
    assert skip["grad_norm"] == pytest.approx(every["grad_norm"], rel=1e-4)
    assert (w_skip - w_every).abs().max() < 1e-4
    for g in groups:
        g.zero_std = True
    nothing, same = step_once(groups, kl_coef=0.0)
    assert nothing == {}
    assert (same - all_weights(make_backbone())).abs().max() == 0


def test_constant_denominator(backbone):
    groups, _ = make_groups(backbone)
    tokens = sum(int(g.mask.sum()) for g in groups)
    mean, _ = step_once(groups, kl_coef=0.0)
    constant, _ = step_once(groups, kl_coef=0.0, advantage="drgrpo")
    assert mean["grad_norm"] * tokens == pytest.approx(constant["grad_norm"] * 3 * 4 * 6, rel=1e-4)


def test_non_finite_loss_stops(backbone, tmp_path):
    groups, _ = make_groups(backbone)
    groups[0].old_logp[0, 0] = torch.nan
    groups[0].row["sample_id"] = "push.safetensors:3"
    with pytest.raises(ValueError, match=r"step 7, rank 0: the loss is nan.* push\.safetensors:3"):
        step_once(groups, out=str(tmp_path))
    saved = load_file(tmp_path / "failed_step_7_rank_0.safetensors")
    for i, g in enumerate(groups):  # all that the loss was made of, on every prompt of the update
        assert np.array_equal(saved[f"{i}.prompt_pixels"], g.row["pixels"])
        assert np.array_equal(saved[f"{i}.prompt_ids"], g.row["ids"])
        for k in ("ids", "mask", "old_logp", "advantages"):
            assert torch.equal(saved[f"{i}.{k}"].nan_to_num(), getattr(g, k).nan_to_num())


class Rows:
    """A source of n rows to train on, after `first` others."""

    def __init__(self, n, first=0):
        self.train = range(first, first + n)


def picked(seed, sizes, weights, numbers, again=0):
    sources = [Rows(n) for n in sizes]
    picks = grpo.draw_prompts(seed, sources, weights, numbers, again)
    return [tuple(pick) for pick in picks]


def test_prompt_order():
    first = picked(0, [10], [1], range(10))
    assert sorted(first) == [(0, i) for i in range(10)] and first != sorted(first)  # each once
    both = picked(0, [10], [1], range(4, 14))
    assert both[:6] == first[4:] and both[6:] == picked(0, [10], [1], range(10, 14))
    assert picked(0, [10], [1], range(1, 9, 2)) == first[1:9:2]  # a rank's share
    assert picked(1, [10], [1], range(10)) != first


def test_prompts_of_one_folder_are_those_of_earlier_versions():
    """The committed results were made by this formula, before there were mixtures."""

    def before(seed, n, numbers):
        shuffled = {
            e: model.rng(seed, "prompts", e).permutation(n) for e in {k // n for k in numbers}
        }
        return [(0, int(shuffled[k // n][k % n])) for k in numbers]

    numbers = range(7, 40)
    assert picked(3, [13], [0.5], numbers) == before(3, 13, numbers)
    fresh = [number + (2 << 40) for number in numbers]  # of dynamic sampling, round 2
    assert picked(3, [13], [0.5], numbers, again=2) == before(3, 13, fresh)


def test_prompts_of_a_mixture_are_drawn_by_weight_and_each_row_once_before_any_again():
    sizes, weights = [50, 20, 7], [1, 2, 0]
    picks = picked(0, sizes, weights, range(600))
    by_source = [[i for s, i in picks if s == source] for source in range(3)]
    assert [len(rows) / 600 for rows in by_source] == pytest.approx([1 / 3, 2 / 3, 0], abs=0.05)
    for rows, n in zip(by_source[:2], sizes, strict=False):
        for start in range(0, len(rows) - n, n):
            assert sorted(rows[start : start + n]) == list(range(n))
        assert rows[:n] != rows[n : 2 * n], "shuffled anew"
    assert picks[5:600:3] == picked(0, sizes, weights, range(5, 600, 3)), "a rank's share"
    assert picks[:40] == picked(0, sizes, weights, range(40)), "a shorter run begins like a longer"
    assert picked(0, sizes, weights, range(40), again=1) != picks[:40]


def test_prompts_match_their_targets(backbone, world):
    """Targets past an episode's end once repeated its last movement: the arm would go on moving.
    Episodes of 6, 7 and 8 steps have 3, 4 and 5 that begin a chunk of 4."""
    source = model.EpisodeDataset(world / "data", backbone.action_tokenizer)
    files = source.episodes
    ends = source.ends.tolist()
    picks = [grpo.Pick(0, i) for i in (0, ends[0] - 1, ends[0], ends[1])]
    rows, targets = grpo.prompt_rows(backbone, [source], picks, grpo.Config())
    encode = backbone.action_tokenizer.encode
    assert targets[0] == encode(files[0].action[None, :K])[0]
    assert targets[1] == encode(files[0].action[None, -K:])[0]  # the last
    assert targets[2] == encode(files[1].action[None, :K])[0]
    text = backbone.tokenizer.decode(rows[3]["ids"])
    assert files[2].task in text and model.THINK in text and text.endswith("assistant\n")
    pixels, _ = model.fit_image(files[1].frame(0), backbone.image_spec)
    assert np.array_equal(rows[2]["pixels"], pixels)
    assert rows[2]["sample_id"] == f"{files[1]}:0"
    with pytest.raises(IndexError):  # 12 steps begin a whole chunk
        grpo.prompt_rows(backbone, [source], [grpo.Pick(0, 12)], grpo.Config())


def test_controls_of_the_thought(backbone, world, monkeypatch):
    """--thought none asks for a direct answer, filler gives full stops to go on from; of both a
    right answer without a thought of its own earns all, and --thought own nothing for it."""
    source = model.EpisodeDataset(world / "data", backbone.action_tokenizer)
    own, none, filler = (
        grpo.prompt_rows(backbone, [source], [grpo.Pick(0, 3)], cfg)
        for cfg in (
            grpo.Config(),
            grpo.Config(thought="none"),
            grpo.Config(thought="filler", filler=7),
        )
    )
    assert own[1] == none[1] == filler[1], "the target"
    texts = [backbone.tokenizer.decode(rows[0]["ids"]) for rows, _ in (own, none, filler)]
    assert texts[1] == texts[0].replace(model.THINK, model.DIRECT) != texts[0]
    assert texts[2] == texts[0] + "<think>.......</think>"
    assert len(filler[0][0]["ids"]) == len(own[0][0]["ids"]) + 7 + 2

    answer = ids_of(backbone, model.action_answer(own[1][0]) + "<|im_end|>")
    ids = torch.tensor([answer, answer])
    samples = {"ids": ids, "mask": torch.ones_like(ids), "logp": torch.zeros(ids.shape)}
    monkeypatch.setattr(model, "generate", lambda *args, **flags: samples)
    for thought, worth in (("own", 0), ("none", 1), ("filler", 1)):
        cfg = grpo.Config(thought=thought)
        _, sums, _ = grpo.rollout(backbone, cfg, *own, [0], 0, 2)
        assert sums["reward"] == [2 * worth, 2], thought


def test_grpo_raises_the_reward(monkeypatch):
    """A bandit: the reward is whether one token was used; a few steps must make it common."""
    backbone = make_backbone()
    wanted = ids_of(backbone, "e")[0]

    def contains(backbone, ids, targets, kind, think):
        r = np.array([float(wanted in i) for i in ids])
        return r, dict.fromkeys(("r_f", "r_a", "tags", "markers", "decodes"), r)

    monkeypatch.setattr(grpo, "reward", contains)
    cfg = grpo.Config(batch=2, group=16, max_new_tokens=6, kl_coef=0.0)
    dist = model.Dist(0, 1, torch.device("cpu"))
    history = []  # mean reward of each step
    optim = model.make_optimizer(backbone.net, 3e-3, 0.0, (0.9, 0.999))
    rows = prompt_rows(backbone, [1, 4])
    for step in range(25):
        keys = range(2 * step, 2 * step + 2)
        groups, sums, _ = grpo.rollout(backbone, cfg, rows, [[1], [1]], keys, 0, cfg.group)
        grpo.update_step(backbone, None, optim, groups, cfg, dist, f"step {step}")
        history.append(sums["reward"][0] / sums["reward"][1])
    assert np.mean(history[:3]) < 0.3 and np.mean(history[-3:]) > 0.8, history


def flags(world, out, *more):
    paths = {"--init": world / "sft", "--data": world / "data", "--out": world / out}
    argv = ["tabletop"]
    for flag, value in {**paths, **SMALL}.items():
        argv += [flag, str(value)]
    return [*argv, *more]


@pytest.fixture(scope="module")
def questions(world):
    """Rows of three kinds, one without an image, and of actions, in turn."""
    folder = world / "questions"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(3):
        image = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
        image.save(folder / f"images/{i}.png")
    lines = []
    for i in range(16):
        kind, answer, more = [
            ("where", "d5", {"score": "exact"}),
            ("far+think", "10", {"score": "number", "tolerance": 2}),
            ("way", "(0.1, 0.1), (0.5, 0.1)", {"score": "path"}),
            ("act", "<ACTION>", {"chunk": chunks(1, seed=i)[0].tolist()}),
        ][i % 4]
        images = [] if kind == "far+think" else [f"images/{i % 3}.png"]
        messages = [
            {"role": "user", "content": "<image>" * len(images) + f"{kind} {i}?"},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
        ]
        lines.append({"images": images, "messages": messages, "kind": kind, **more})
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "q.jsonl"


def mixed(world, questions, out, *more):
    data = f"{world / 'data'}:1,{questions}:2"
    return flags(world, out, "--data", data, "--holdout-rows", "4", *more)


def test_questions_as_prompts(backbone, questions):
    source = model.ConversationDataset(questions, backbone.action_tokenizer, 4)
    rows, targets = grpo.prompt_rows(
        backbone, [source], [grpo.Pick(0, i) for i in range(4)], grpo.Config()
    )
    for i, row in enumerate(rows):
        text = backbone.tokenizer.decode(row["ids"])
        assert f"{i}?\n{model.THINK}" in text and "<answer>" not in text.partition(model.THINK)[2]
        assert row["sample_id"] == f"{questions}:{i + 1}"
    assert [target.score for target in targets[:3]] == ["exact", "number", "path"]
    assert targets[1].text == "10" and targets[1].row["tolerance"] == 2
    assert targets[3] == backbone.action_tokenizer.encode(chunks(1, seed=3))[0]


def test_the_first_answer_of_a_row_says_what_is_asked_for(backbone, tmp_path):
    """Of a row that talks first and acts later the talk was asked for, and scored as actions."""
    chunk = chunks(1, seed=3)[0].tolist()
    turns = [
        [("Where is it?", "<answer>d5</answer>"), ("What next?", "<answer><ACTION></answer>")],
        [("What next?", "<answer><ACTION></answer>"), ("Where is it?", "<answer>d5</answer>")],
    ]
    lines = []
    for pairs in turns:
        messages = []
        for question, answer in pairs:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        lines.append(json.dumps({"messages": messages, "score": "exact", "chunk": chunk}) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(lines))
    source = model.ConversationDataset(tmp_path / "q.jsonl", backbone.action_tokenizer, 0)
    grpo.keep_kinds([source], "")
    talk, act = grpo.target_of(source, 0), grpo.target_of(source, 1)
    assert (talk.score, talk.text) == ("exact", "d5")
    assert act == backbone.action_tokenizer.encode(np.float32([chunk]))[0]
    # evaluate.py vqa compares an answer by actions with the tokens themselves, not with "<ACTION>"
    right = grpo.right_answer(source, 1)
    tokens = model.answer_text(model.action_answer(act))
    assert right.text == tokens and grpo.answer_score(tokens, right) == 1


def test_kinds_leave_rows_of_conversations_alone(backbone, world, questions):
    def opened(kinds):
        sources = [
            model.EpisodeDataset(world / "data", backbone.action_tokenizer),
            model.ConversationDataset(questions, backbone.action_tokenizer, 4),
        ]
        before = sources[0].train
        grpo.keep_kinds(sources, kinds)
        assert sources[0].train == before
        return list(sources[1].train), list(sources[1].held)

    assert opened("") == (list(range(12)), list(range(12, 16)))
    assert opened("far, where") == ([0, 1, 4, 5, 8, 9], [12, 13])
    with pytest.raises(ValueError, match="no row is of kind fra"):
        opened("far,fra")
    with pytest.raises(ValueError, match="q.jsonl: no row to train on is of --kinds fra"):
        opened("fra")


def test_words_and_actions_resume_exactly(world, questions, monkeypatch):
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    more = ["--steps", "4", "--save-every", "2", "--eval-prompts", "6"]
    grpo.main(mixed(world, questions, "mixed", *more))
    final = weights(world / "mixed" / "final")
    for folder in "step_000004", "final":  # as if killed in step 3
        shutil.rmtree(world / "mixed" / folder)
    grpo.main(mixed(world, questions, "mixed", *more, "--resume"))
    for k, p in weights(world / "mixed" / "final").items():
        assert torch.equal(p, final[k]), k
    steps = [r for r in records(world / "mixed") if "r_f" in r]
    for a, b in zip(steps[2:4], steps[4:], strict=True):
        assert all(a[k] == b[k] for k in a.keys() - CLOCK)
    seen = set().union(*steps)
    assert {"r_a_action", "r_a_exact", "r_a_number", "r_a_path"} <= seen
    run = json.loads((world / "mixed" / "final" / "run.json").read_text())
    assert run["data"].keys() == {str(world / "data"), str(questions)}
    assert [split["folder"] for split in run["split"]] == [str(world / "data")]
    assert run["metrics"].keys() >= {"eval_greedy_r_a_action", "eval_sampled_r_a_exact"}
    lines = questions.read_text()
    questions.write_text(lines.replace("d5", "d6"))
    with pytest.raises(ValueError, match="q.jsonl: has changed since"):
        grpo.main(mixed(world, questions, "mixed", *more, "--resume"))
    questions.write_text(lines)


def test_words_and_actions_on_two_ranks_equal_one(world, questions, monkeypatch):
    """A rank whose questions were all without an image had no gradient for the vision tower, while
    the other had one: their reductions did not match, and the run ended or hung."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    both = ["--steps", "2", "--batch", "4", "--micro-batch", "1", "--eval-prompts", "7"]
    grpo.main(mixed(world, questions, "mixed one", *both))
    on_ranks(grpo.main, mixed(world, questions, "mixed two", *both), 2)
    one, two = records(world / "mixed one"), records(world / "mixed two")
    assert len(one) == len(two) == 5
    for a, b in zip(one[1:], two[1:], strict=True):
        late = a["step"] > 1 or ("eval_greedy_reward" in a and a["step"])
        assert a.keys() == b.keys()
        for k in a.keys() - CLOCK:
            assert a[k] == pytest.approx(b[k], rel=1e-3 if late else 1e-5, abs=1e-6), (a["step"], k)


def test_questions_alone_need_no_action_tokens(world, questions, tmp_path):
    """Language RL of a model that sft.py trained on words alone: it was refused."""
    plain = backbones.random_backbone("tiny-qwen3-vl")
    model.save(tmp_path / "base", plain, {"stage": "base", "step": 1, "config": {}, "parent": ""})
    more = ["--data", str(questions), "--kinds", "where,far", "--holdout-rows", "4"]
    grpo.main(flags(world, "words", "--steps", "1", "--init", str(tmp_path / "base"), *more))
    record = records(world / "words")[2]
    assert record["r_f"] == 0 and "markers" not in record and "distinct_actions" not in record
    assert {"r_a_exact", "r_a_number", "distinct_answers"} <= record.keys()


def test_rows_that_cannot_be_scored_are_named_before_the_first_step(world, questions):
    def error(line, match):
        lines = questions.read_text().splitlines()
        bad = questions.parent / "bad.jsonl"
        bad.write_text("\n".join([*lines[:5], json.dumps(line), *lines[6:]]) + "\n")
        with pytest.raises(ValueError, match=match):
            grpo.main(flags(world, "bad", "--data", str(bad), "--holdout-rows", "4"))

    good = json.loads(questions.read_text().splitlines()[1])
    error({**good, "score": "taste"}, """bad.jsonl:6: its "score" is 'taste'; write one of exact""")
    error({**good, "score": ["number"]}, "bad.jsonl:6: its \"score\" is \\['number'\\]; write one")
    bare = {name: value for name, value in good.items() if name != "score"}
    error(bare, 'bad.jsonl:6: its "score" is None')
    error({**good, "score": "path"}, "bad.jsonl:6: its answer '10' is none for the score path")
    # these were UFuncTypeError, KeyError, cannot reshape: numpy's words and Python's
    for score, field, cure, values in (
        ("number", "tolerance", "a number of at least 0", (-1, "2", None, True, np.nan, [1])),
        ("items", "tolerance", "a number of at least 0", (10**400,)),
        ("path", "grid", r"\[columns, rows\], numbers of at least 1", ([8], 8, [8, 0], ["a", "b"])),
        ("point", "box", r"\[left, top, right, bottom\] in 0 .. 1", ([1, 2], "x", None, [0] * 4)),
        ("point", "box", r"\[left, top, right, bottom\] in 0 .. 1", ([0, 0, 2, 1],)),
        ("point", "box", r"\[left, top, right, bottom\] in 0 .. 1", ([0.9, 0, 1.02, 1],)),
        ("point", "mask", 'the path of an image, or a "box"', (None, 3, ["m.png"])),
    ):
        for value in values:
            fault = f'bad.jsonl:6: for the score {score} its "{field}" is .*; write {cure}'
            error({**good, "score": score, field: value}, fault)
    error({**good, "score": "point"}, 'bad.jsonl:6: for the score point its "mask" is None; write')
    error({**good, "mask": "../0.png"}, "^[^:]*bad.jsonl:6: image ../0.png lies outside")
    error({**good, "images": ["images/9.png"]}, "bad.jsonl:6: .*9.png: image does not open")


@pytest.mark.parametrize("preset", ["language", "visual"])
def test_presets_of_rl_in_words_run_on_tabletops_questions(preset, world, tmp_path):
    out = tmp_path / "tabletop"
    tabletop_data.main(
        ["--out", str(out), "--episodes", "0", "--conversations", "90", "--size", "32", "--single"]
    )
    argv = flags(world, preset, "--steps", "1", "--data", str(out / "conversations.jsonl"))
    grpo.main([preset, *argv[1:], "--holdout-rows", "30"])
    names = {name for name in records(world / preset)[2] if name.startswith("r_a_")}
    kinds = tabletop_data.SCENE | tabletop_data.TASK
    asked = set(grpo.PRESETS[preset]["kinds"].split(","))
    assert names and names <= {f"r_a_{kinds[kind].score['score']}" for kind in asked}
    both = [grpo.PRESETS[name]["kinds"].split(",") for name in ("language", "visual")]
    assert sorted(both[0] + both[1]) == sorted(kinds)


def spread_rewards(backbone, ids, targets, kind="prefix", think=True):
    """Untrained rollouts all earn 0; here groups differ within, but for those of some targets."""
    r = np.array([sum(i) % 5 / 5 * (len(t) % 2) for i, t in zip(ids, targets, strict=True)])
    return r, dict.fromkeys(("r_f", "r_a", "tags", "markers", "decodes"), r)


def records(out):
    return [json.loads(line) for line in open(out / "log.jsonl")]


def weights(folder):
    return dict(model.load(folder).net.named_parameters())


def test_resume_equals_uninterrupted(world, monkeypatch):
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    warm = ["--warmup-ratio", "0.5"]
    grpo.main(flags(world, "whole", "--steps", "4", *warm))
    grpo.main(flags(world, "parts", "--steps", "4", "--save-every", "2", *warm))
    final = weights(world / "parts" / "final")
    for folder in "step_000004", "final":  # as if killed in step 3
        shutil.rmtree(world / "parts" / folder)
    grpo.main(flags(world, "parts", "--steps", "4", "--save-every", "2", *warm, "--resume"))
    whole = weights(world / "whole" / "final")
    for k, p in weights(world / "parts" / "final").items():
        assert torch.equal(p, whole[k]) and torch.equal(p, final[k]), k
    assert any(not torch.equal(p, whole[k]) for k, p in weights(world / "sft").items())
    steps = [r for r in records(world / "parts") if "r_f" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 3, 4]
    assert [r["lr"] for r in steps] == pytest.approx([0.001, 0.002, *[0.003] * 4]), "no decay"
    for a, b in zip(steps[2:4], steps[4:], strict=True):
        assert all(a[k] == b[k] for k in a.keys() - CLOCK)
    completions = 4 * 4  # a step: prompts x group, of flags()
    tokens = 0
    for step in steps[:4]:
        tokens += completions * (step["prompt_length"] + step["completion_length"])
        assert step["num_tokens"] == pytest.approx(tokens), "so far, through the resume"
        assert step["reward_std"] > 0
    run = json.loads((world / "whole" / "final" / "run.json").read_text())
    assert (run["stage"], run["step"], run["parent"]) == ("grpo", 4, str(world / "sft"))
    with pytest.raises(ValueError, match="step_000004: is past --steps 3; give 4 or more"):
        grpo.main(flags(world, "parts", "--steps", "3", "--save-every", "2", *warm, "--resume"))
    with pytest.raises(ValueError, match="was run with another --lr"):
        grpo.main(flags(world, "parts", "--steps", "5", "--lr", "0.1", *warm, "--resume"))


def test_changed_episodes_are_named_on_resume(world, tmp_path, monkeypatch):
    """Another episode moves all prompts of the run, and --resume went on without a word."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    shutil.copytree(world / "data", tmp_path / "data")
    more = ["--data", str(tmp_path / "data"), "--save-every", "1", "--eval-every", "0"]
    grpo.main(flags(world, "grown", "--steps", "1", *more))
    first = tmp_path / "data" / "episode_000000.safetensors"
    shutil.copy(first, tmp_path / "data" / "episode_000009.safetensors")
    more.append("--resume")
    with pytest.raises(ValueError, match="data: has changed since .*step_000001; put the old"):
        grpo.main(flags(world, "grown", "--steps", "2", *more))
    grpo.main(flags(world, "grown", "--steps", "2", *more, "--changed-data"))


def test_a_last_evaluation_that_fails_loses_nothing(world, monkeypatch):
    """It came before final was saved. What it measures is added to final's run.json."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    evaluate = grpo.evaluate
    calls = []

    def fails_at_the_end(*args):
        calls.append(1)
        if len(calls) == 2:  # after step 0's
            raise ValueError("no room on the device")
        return evaluate(*args)

    monkeypatch.setattr(grpo, "evaluate", fails_at_the_end)
    with pytest.raises(ValueError, match="no room"):
        grpo.main(flags(world, "fails", "--steps", "1"))
    run = json.loads((world / "fails" / "final" / "run.json").read_text())
    assert run["step"] == 1 and "metrics" not in run
    grpo.main(flags(world, "succeeds", "--steps", "1"))
    run = json.loads((world / "succeeds" / "final" / "run.json").read_text())
    last = records(world / "succeeds")[-1]
    assert run["metrics"] and run["metrics"].items() <= last.items() and last["step"] == 1
    ours, theirs = weights(world / "fails" / "final"), weights(world / "succeeds" / "final")
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    # resumed, it is measured again and not trained again
    monkeypatch.setattr(grpo, "update_step", None)
    grpo.main(flags(world, "fails", "--steps", "1", "--resume"))
    again = json.loads((world / "fails" / "final" / "run.json").read_text())
    assert again["metrics"] == run["metrics"]
    ours = weights(world / "fails" / "final")
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_no_steps_and_no_evaluation(world, capsys):
    """--steps 0 measures the model that RL would start from, and saves it as it is."""
    grpo.main(flags(world, "none", "--steps", "0"))
    before, after = weights(world / "sft"), weights(world / "none" / "final")
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert [r["step"] for r in records(world / "none")[1:]] == [0]
    grpo.main(flags(world, "not measured", "--steps", "1", "--eval-every", "0"))
    assert "metrics" not in json.loads((world / "not measured/final/run.json").read_text())
    assert not [r for r in records(world / "not measured") if "eval_greedy_reward" in r]


def test_held_out_prompts_by_the_weights_of_their_sources(monkeypatch):
    """Of 8 prompts a quarter and three quarters, spread over what each source holds out; a source
    that holds out fewer gives each once, one that holds out none nothing. Ranks take turns."""
    monkeypatch.setattr(grpo, "prompt_rows", lambda backbone, sources, picks, cfg: picks)

    def asked(held, weights, rank=0, world_size=1):
        sources = [SimpleNamespace(held=range(100, 100 + n)) for n in held]
        cfg = grpo.Config(eval_prompts=8)
        dist = model.Dist(rank, world_size, torch.device("cpu"))
        return [tuple(pick) for pick in grpo.held_out_prompts(None, cfg, sources, weights, dist)]

    whole = asked([11, 51], [1, 3])
    assert whole == [(0, 100), (0, 110), *[(1, 100 + 10 * i) for i in range(6)]]
    assert [asked([11, 51], [1, 3], rank, 2) for rank in (0, 1)] == [whole[::2], whole[1::2]]
    assert asked([0, 2], [1, 1]) == [(1, 100), (1, 101)]
    with pytest.raises(ValueError, match="--eval-every 25: no row to ask is held out"):
        asked([0, 0], [1, 1])


def test_more_evaluation_prompts_than_held_out_steps(world, monkeypatch):
    """The same step was asked several times and counted as several prompts."""
    asked = []
    rollout = grpo.rollout

    def watched(backbone, cfg, rows, targets, keys, *rest):
        asked.append([row["sample_id"] for row in rows])
        return rollout(backbone, cfg, rows, targets, keys, *rest)

    monkeypatch.setattr(grpo, "rollout", watched)
    grpo.main(flags(world, "many", "--steps", "0", "--eval-prompts", "50"))
    held_out = asked[0]
    assert asked == [held_out, held_out] and len(set(held_out)) == len(held_out)
    episodes = read_episodes(world / "data")
    _, (episode,) = split_episodes(episodes)
    assert len(held_out) == len(episode) - K + 1, "each of its steps with a whole chunk"


def test_actions_longer_than_a_completion_are_told(world, capsys):
    """Of a robot with many dimensions every rollout was cut off and worth 0, and nothing said why:
    the terminal shows no `truncated`."""
    grpo.main(flags(world, "long", "--steps", "0", "--max-new-tokens", "4"))
    said = "warning: the right actions of 3 of 3 evaluation prompts have more tokens than --max-new"
    assert said in capsys.readouterr().err
    grpo.main(flags(world, "short", "--steps", "0", "--max-new-tokens", "40"))
    assert "warning" not in capsys.readouterr().err


def test_the_split_is_recorded_and_compared(world, tmp_path, capsys):
    """A stage that holds out other episodes than the one before measures on what was trained."""
    grpo.main(flags(world, "split", "--steps", "0"))
    run = json.loads((world / "split" / "final" / "run.json").read_text())
    episodes = read_episodes(world / "data")
    assert run["split"] == [split_record(episodes, split_episodes(episodes)[1])]
    shutil.copytree(world / "split" / "final", tmp_path / "other")
    assert "held out" not in capsys.readouterr().err
    run["split"][0]["sha256"] = "of other names"
    (tmp_path / "other" / "run.json").write_text(json.dumps(run))
    grpo.main(flags(world, "other split", "--steps", "0", "--init", str(tmp_path / "other")))
    assert "an earlier stage held out others" in capsys.readouterr().err


def test_dynamic_sampling_puts_fresh_prompts_in_the_place_of_equal_rewards(world, monkeypatch):
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    seen = {}  # run -> (sample_id, zero_std, ids) of each group
    update_step = grpo.update_step

    def watched(backbone, ref, optim, groups, *rest):
        assert backbone.net.training, "or --recompute would do nothing"
        seen[name].extend((g.row["sample_id"], g.zero_std, g.ids.tolist()) for g in groups)
        return update_step(backbone, ref, optim, groups, *rest)

    monkeypatch.setattr(grpo, "update_step", watched)
    for name, more in (
        ("static", []),
        ("dynamic", ["--dynamic-sampling", "3"]),
        ("again", ["--dynamic-sampling", "3"]),
    ):
        seen[name] = []
        grpo.main(flags(world, name, "--steps", "1", "--batch", "4", *more))
    assert seen["dynamic"] == seen["again"]
    equal = {run: sum(zero_std for _, zero_std, _ in groups) for run, groups in seen.items()}
    assert len(seen["static"]) == len(seen["dynamic"]) and equal["dynamic"] < equal["static"]
    for static, dynamic in zip(seen["static"], seen["dynamic"], strict=True):
        _, zero_std, ids = static
        if zero_std:  # makes way, also for another group of equal rewards
            assert ids != dynamic[2]
        else:
            assert static == dynamic


def test_no_two_rollouts_draw_the_same(world, monkeypatch):
    """A sample is a function of (seed, key). Fresh prompts, and the same one asked again, get
    numbers of their own; the evaluation's are its own too, and the same at each."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    rollout = grpo.rollout
    drawn = []  # (seed, keys) of each rollout

    def watched(backbone, cfg, rows, targets, keys, seed, *rest):
        drawn.append((seed, list(keys)))
        return rollout(backbone, cfg, rows, targets, keys, seed, *rest)

    monkeypatch.setattr(grpo, "rollout", watched)
    more = ["--steps", "2", "--dynamic-sampling", "2", "--eval-every", "1", "--eval-prompts", "3"]
    grpo.main(flags(world, "draws", *more))
    of_evaluation = [call for call in drawn if call[0] == 1]  # --seed is 0
    assert len(of_evaluation) == 6 and of_evaluation[:2] * 3 == of_evaluation
    of_training = [(seed, key) for seed, keys in drawn if seed != 1 for key in keys]
    assert {seed for seed, _ in of_training} == {0}
    assert len(of_training) > 8, "some of them fresh ones"
    assert len(set(of_training)) == len(of_training)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(2, []), (4, ["--shards", "2", "--recompute", "--cpu-offload", "--recompute-old-logp"])],
)
def test_ranks_equal_one(world, monkeypatch, ranks, more):
    """Blocks are sharded one by one, as large models are. Samples are a function of (seed, prompt),
    so that rollouts are the same; gradients pass through the shared prompt, recomputed or not."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    monkeypatch.setattr(model, "SMALL", 0)
    both = ["--steps", "2", "--batch", "4", "--micro-batch", "1", "--show-every", "1"]
    if not (world / "one" / "final").exists():
        grpo.main(flags(world, "one", *both))
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 15 * 512)  # ranks have unequally many slices
    on_ranks(grpo.main, flags(world, f"on{ranks}", *both, *more), ranks)
    one, many = records(world / "one"), records(world / f"on{ranks}")
    assert len(one) == len(many) == 7 and many[0]["world"] == ranks  # 2 evaluations, 2 x 2 a step
    for a, b in zip(one[1:], many[1:], strict=True):
        late = a["step"] > 1 or ("eval_greedy_reward" in a and a["step"])
        for k in a.keys() - CLOCK - {"rollout"}:
            # Adam divides by sqrt(v): rounding differences grow after the first update
            assert a[k] == pytest.approx(b[k], rel=1e-3 if late else 1e-5, abs=1e-6), (a["step"], k)
        assert a.get("rollout") == b.get("rollout")
    # in one update only some ranks have a group left, and the others forward along
    assert one[2]["grad_norm"] > 0
    assert 0 < one[2]["frac_reward_zero_std"] + one[4]["frac_reward_zero_std"] < 2
    ours = weights(world / "one" / "final")
    theirs = weights(world / f"on{ranks}" / "final")
    assert ours.keys() == theirs.keys()
    gaps = [(p - theirs[k]).abs().max().item() for k, p in ours.items()]
    assert max(gaps) < 3e-4  # Adam makes much of the last bits of tiny gradients; 2 steps move 6e-3


# ---- The anchor


def moved(size="tiny-qwen3-vl"):
    """A policy that has left the reference, and the reference."""
    policy, reference = make_backbone(size), make_backbone(size)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.net.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    reference.net.requires_grad_(False).eval()
    return policy, reference


def features_of_the_head(backbone, layer, row):
    """What vla.py's head reads of one prompt alone, (t, D), with gradient."""
    cut = vla.whole_copy(backbone).net
    vla.truncate(cut, layer)
    return model.hidden_states(cut, model.collate([row], backbone.vocab.pad))[0]


@pytest.mark.parametrize(
    ("size", "layer", "recompute"),
    [
        ("tiny-qwen3-vl", 0, False),  # layer 1: behind it more of the image is added
        ("tiny-qwen3-vl", 2, True),  # the last: before the final norm
        ("tiny-qwen2.5-vl", 1, True),
    ],
)
def test_the_anchors_gradient_by_plain_autograd(size, layer, recompute):
    """Of the head's own features, prompt by prompt; an idle group, whose tokens do not count, has
    no part in it."""
    policy, reference = moved(size)
    groups, _ = make_groups(reference)
    for group, length in zip(groups, (6, 3, 5), strict=True):
        group.mask[0, length:] = 0  # prompts count by their completions' tokens
    groups.append(grpo.idle_group(groups[0]))
    losses, gradients = [], []
    policy.net.train()
    if recompute:
        model.recompute_activations(policy.net)
    for coef in (0.0, 3.0):
        cfg = grpo.Config(group=4, kl_coef=0.0, anchor_coef=coef, anchor_layer=layer)
        policy.net.zero_grad()
        loss, logged = grpo.group_loss(policy, reference, groups, cfg)
        loss.backward()
        losses.append(loss.item())
        gradients.append({k: p.grad.clone() for k, p in policy.net.named_parameters()})
    policy.net.activation_checkpointing_disable()
    policy.net.zero_grad()
    anchor = 0
    for group in groups[:3]:
        own = features_of_the_head(policy, layer, group.row)
        ref = features_of_the_head(reference, layer, group.row)
        shares = ((own - ref) ** 2).sum(1) / (ref**2).sum(1)  # of each token
        anchor = anchor + shares.mean() * group.mask.sum()
    (3 * anchor).backward()
    assert logged["anchor"].item() == pytest.approx(anchor.item(), rel=1e-4) and anchor > 0.1
    assert losses[1] - losses[0] == pytest.approx(3 * anchor.item(), rel=1e-4)
    touched = 0
    for k, p in policy.net.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        gap = gradients[1][k] - gradients[0][k] - want
        assert gap.abs().max() <= 1e-4 * max(1.0, want.abs().max()), k
        touched += bool(want.any())
    assert touched > 10


def test_the_anchor_holds_the_features_and_without_it_they_move():
    """Six updates on the same groups; distances in units of the reference's own mean square."""
    reference = make_backbone()
    groups, _ = make_groups(reference, n=2)
    groups[1].advantages = groups[0].advantages[:, :1].expand(groups[1].ids.shape)
    groups[1].zero_std = False
    dist = model.Dist(0, 1, torch.device("cpu"))
    last = {}
    for coef in (0.0, 100.0):
        policy = make_backbone()
        cfg = grpo.Config(batch=2, group=4, kl_coef=0.0, anchor_coef=coef)
        optim = model.make_optimizer(policy.net, 1e-3, 0.0, (0.9, 0.999))
        for i in range(6):
            sums = grpo.update_step(policy, reference, optim, groups, cfg, dist, f"update {i}")
            if coef and i == 0:
                assert sums["anchor"] == 0, "the policy is still the reference"
        cfg = dataclasses.replace(cfg, anchor_coef=1.0)
        with torch.no_grad():
            _, logged = grpo.group_loss(policy, reference, groups, cfg)
        last[coef] = logged["anchor"].item() / logged["forwarded"].item()
    assert last[0.0] > 1e-3 and last[100.0] < last[0.0] / 10, last


def one_rank_as_two(world, name, both, keys):
    """Trains on one rank, and on two by blocks, recomputed, in smaller micro-batches: the same
    steps and weights. -> the records of the one."""
    grpo.main(flags(world, f"{name}1", *both))
    on_ranks(grpo.main, flags(world, f"{name}2", *both, "--micro-batch", "1", "--recompute"), 2)
    one, two = records(world / f"{name}1")[1:], records(world / f"{name}2")[1:]
    assert [len(one), len(two)] == [2, 2] and one[0]["grad_norm"] > 0
    for a, b in zip(one, two, strict=True):
        for k in ("loss", "grad_norm", "kl", *keys):
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-6), (a["step"], k)
    theirs = weights(world / f"{name}2" / "final")
    for k, p in weights(world / f"{name}1" / "final").items():
        assert (p - theirs[k]).abs().max() < 3e-4, k
    return one


def test_the_anchor_on_two_ranks_equals_one(world, monkeypatch):
    """Without the KL: its reference is there for the anchor alone."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    monkeypatch.setattr(model, "SMALL", 0)
    both = ["--steps", "2", "--batch", "4", "--kl-coef", "0", "--anchor-coef", "5"]
    both += ["--eval-every", "0"]
    one = one_rank_as_two(world, "anchor", both, ["anchor"])
    assert one[0]["anchor"] == 0 < one[1]["anchor"], "one update a step"


def test_the_expected_reward_on_two_ranks_equals_one(world, monkeypatch):
    """Of completions that all begin an answer after their second token: an untrained model begins
    none."""
    monkeypatch.setattr(grpo, "reward", spread_rewards)
    monkeypatch.setattr(
        grpo, "answer_start", lambda backbone, sequence, think: min(2, len(sequence))
    )
    monkeypatch.setattr(model, "SMALL", 0)
    both = ["--steps", "2", "--batch", "4", "--credit", "expected", "--eval-every", "0"]
    both += ["--dynamic-sampling", "2"]
    one = one_rank_as_two(world, "expected", both, grpo.EXPECTED_METRICS)
    assert one[1]["expected_r_a"] > one[0]["expected_r_a"] > 0


def test_bad_input_is_one_line(world, questions, tmp_path):
    def error(*more, **kw):
        with pytest.raises((ValueError, FileNotFoundError), **kw):
            grpo.main(flags(world, "bad", "--steps", "1", *more))

    plain = backbones.random_backbone("tiny-qwen3-vl")
    for stage in ("sft", "vla"):
        model.save(tmp_path / stage, plain, {"stage": stage, "step": 1, "config": {}, "parent": ""})
    error("--init", str(tmp_path / "vla"), match="stage 'vla', expected base or sft or grpo")
    error("--init", str(tmp_path / "sft"), match="no fast/ in this checkpoint")
    error("--init", str(tmp_path / "none"), match="no such folder")
    error("--data", str(tmp_path), match="no episode_")
    error("--prompts", "3", match="--prompts 3 must be a multiple of --batch 2")
    error("--group", "1", match="at least 2 completions")
    error("--anchor-layer", "1", match="--anchor-layer 1 without --anchor-coef: nothing is anch")
    error("--anchor-coef", "1", "--anchor-layer", "3", match=r"layer 3 is not in 1\.\.2")
    error(
        "--filler", "20", match="--filler 20 --thought own: there is no filler; give --thought fi"
    )
    error("--dual-clip", "0.5", match="--dual-clip 0.5 .* give more than 1, or 0")
    error("--reward", "exact", match="--reward exact.*prefix, ladder, l1, lcs")
    error("--credit", "first", match="--credit first: choose one of all, prefix, expected")
    error("--credit", "prefix", "--reward", "l1", match="--credit prefix --reward l1: it rests")
    error(
        "--credit", "expected", "--reward", "lcs", match="--credit expected --reward lcs: it rests"
    )
    more = ["--data", str(questions), "--kinds", "way", "--holdout-rows", "0"]
    error(*more, match="--eval-every .*: no row to ask is held out; raise --holdout-rows")
    two = {
        "image": np.zeros((4, 32, 32, 3), np.uint8),
        "state": np.zeros((4, 2), np.float32),
        "action": np.zeros((4, 2), np.float32),
    }
    for i in range(2):
        save_file(two, tmp_path / f"episode_{i}.safetensors", {"task": "go"})
    error("--data", str(tmp_path), match="actions have 2 dimensions, the action tokenizer 3")
