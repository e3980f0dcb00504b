"""Stage 3: the flow head against hand-worked numbers and torch's own layers, the feature cache, the
training script and the policy. Everything runs on CPU with a random backbone of 1M parameters."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from safetensors.numpy import save_file
from safetensors.torch import load_file

import model
import vla
from vla import FlowBlock, FlowHead, HeadConfig
import untrained
from tools import backbones

ROOT = Path(__file__).parents[1]
LENGTHS = (9, 5, 7, 12, 6)
TASKS = ("put the red block into the bowl", "open it")


def small(**change):
    sizes = {
        "vl_dim": 16,
        "dim": 32,
        "layers": 3,
        "heads": 2,
        "vl_layers": 1,
        "state_dim": 3,
        "action_dim": 4,
        "horizon": 5,
        "future_tokens": 2,
    }
    torch.manual_seed(0)
    return FlowHead(HeadConfig(**{**sizes, **change}))


def example(batch=2, tokens=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, tokens, 16), (batch, 3), (batch, 5, 4))
    feats, state, action = (torch.randn(s, generator=g) for s in shapes)
    return feats, torch.ones(batch, tokens), state, action, torch.ones(batch, 5, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five short episodes with two cameras and instructions of unequal length."""
    folder, rng = tmp_path_factory.mktemp("episodes"), np.random.default_rng(0)
    for e, n in enumerate(LENGTHS):
        action = rng.normal(size=(n, 4)).astype(np.float32) * [1, 5, 0.1, 0]  # one is still
        save_file(
            {
                "image": rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
                "image_wrist": rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
                "state": rng.normal(size=(n, 3)).astype(np.float32),
                "action": action.astype(np.float32),
            },
            folder / f"episode_{e:06d}.safetensors",
            metadata={"task": TASKS[e % 2]},
        )
    return folder


def argv(data, out, **flags):
    flags = {
        "init": untrained.folder("tiny-vlm"),
        "data": data,
        "out": out,
        "dim": 32,
        "heads": 2,
        "layers": 2,
        "horizon": 4,
        "batch": 8,
        "steps": 4,
        "eval-rows": 6,
        "log-every": 1,
        **flags,
    }
    return [x for k, v in flags.items() for x in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("vla")
    vla.main(argv(data, out))
    return out


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# The head


def test_loss_by_hand(monkeypatch):
    head = small()
    action, noise = torch.full((1, 5, 4), 3.0), torch.full((1, 1, 5, 4), -1.0)
    seen = []

    def velocity(noised, time, state, context):
        seen.append((noised, time))
        return torch.full_like(noised, 1.5)

    monkeypatch.setattr(head, "velocity", velocity)
    feats, mask, state, _, counts = example(1)
    counts[:, 2:] = 0  # three of five steps lie past the end
    counts[:, :, 3] = 0  # and one dimension is padding
    args = (feats, mask, state, action, counts)
    loss, info = head.loss(*args, drawn=(noise, torch.tensor([[0.25]])))
    assert torch.equal(seen[0][0], torch.zeros(1, 5, 4))  # 0.75 * -1 + 0.25 * 3
    assert loss.item() == 6.25  # (3 - -1 - 1.5)^2
    assert info["count"] == 6 and info["sum"] == 37.5
    assert head.loss(*args, drawn=(noise, torch.tensor([[0.25]])), count=75)[0].item() == 0.5
    action[:, 2:] = 1e3  # what is masked has no influence
    assert head.loss(*args, drawn=(noise, torch.tensor([[0.25]])))[0].item() == 6.25
    counts[:] = 0
    assert head.loss(*args, drawn=(noise, torch.tensor([[0.25]])))[0].item() == 0  # not NaN


def test_time_is_s_minus_u_over_s():
    class Fixed:
        def beta(self, a, b, shape):
            assert (a, b) == (1.5, 1.0)
            return np.array([[0.0, 0.4995, 0.999, 1.0]])  # the last one is clamped at s

        def standard_normal(self, shape, dtype):
            return np.zeros(shape, dtype)

    noise, time = small().draw(Fixed(), 1, 4)
    assert noise.shape == (1, 4, 5, 4)
    torch.testing.assert_close(time, torch.tensor([[1.0, 0.5, 0.0, 0.0]]))
    time = small().draw(model.rng(0), 200, 100)[1]
    assert abs(time.mean() - (1 - 0.6 / 0.999)) < 0.01  # E[u] = 1.5 / 2.5
    assert time.min() >= 0 and time.max() <= 1


def test_sample_integrates_a_straight_flow_exactly(monkeypatch):
    head, times = small(steps=4), []
    feats, mask, state, goal, _ = example()

    def velocity(noised, time, state, context):
        times.append(time.item())
        return (goal - noised) / (1 - time)  # the field of straight paths that end in `goal`

    monkeypatch.setattr(head, "velocity", velocity)
    torch.testing.assert_close(head.sample(feats, mask, state, torch.randn_like(goal)), goal)
    assert times == [0, 0.25, 0.5, 0.75]


def test_context_is_computed_once_and_equals_one_per_step(monkeypatch):
    head = small()
    feats, mask, state, noise, _ = example()
    mask[1, 4:] = 0
    calls = []
    head.kv.register_forward_hook(lambda *_: calls.append(1))
    x = head.sample(feats, mask, state, noise)
    assert len(calls) == 1
    with torch.no_grad():
        y = noise
        for i in range(4):
            start = head.state_in(state)[:, None]
            time = torch.full((len(y),), i / 4)  # one time a sample here, one for all in sample()
            y = y + head.velocity(y, time, start, head.context(feats, mask)) / 4
    torch.testing.assert_close(x, y)
    assert torch.equal(x, head.sample(feats, mask, state, noise))
    assert not torch.allclose(x, head.sample(feats, mask, state, -noise))


def test_blocks_equal_torchs_own_layers():
    torch.manual_seed(0)
    ours, x = FlowBlock(16, 2), torch.randn(3, 6, 16)
    mask = torch.arange(6) < torch.tensor([6, 4, 5])[:, None]  # (B, T)
    gelu = functools.partial(F.gelu, approximate="tanh")
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0, gelu, batch_first=True, norm_first=True)
    renamed = {
        "qkv": "self_attn.in_proj",
        "proj": "self_attn.out_proj",
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.0": "linear1",
        "mlp.3": "linear2",
    }
    theirs.load_state_dict(
        {
            f"{new}{'_' if 'in_proj' in new else '.'}{kind}": ours.get_parameter(f"{old}.{kind}")
            for old, new in renamed.items()
            for kind in ("weight", "bias")
        }
    )
    want = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask=mask[:, None, None])[mask], want[mask])

    cross, ada = FlowBlock(16, 2, ada=True, cross=True), torch.randn(6, 16)  # two draws a sample
    k, v, x = torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8), torch.randn(6, 4, 16)
    scale, shift = cross.ada(ada)[:, None].chunk(2, -1)
    q = cross.qkv(F.layer_norm(x, (16,)) * (1 + scale) + shift).view(6, 4, 2, 8).transpose(1, 2)
    score = (q @ k.repeat_interleave(2, 0).mT / 8**0.5).softmax(-1)  # (B*R, H, N, T)
    y = x + cross.proj((score @ v.repeat_interleave(2, 0)).transpose(1, 2).reshape(6, 4, 16))
    y = y + cross.mlp(F.layer_norm(y, (16,)))
    flat = [t.transpose(1, 2).reshape(3, 7, 16) for t in (k, v)]  # as they come: (B, T, D)
    torch.testing.assert_close(cross(x, ada, flat), y)


def test_padding_of_the_features_changes_nothing():
    head = small(vl_layers=2)
    feats, mask, state, noise, _ = example()
    x = head.sample(feats, mask, state, noise)
    torch.testing.assert_close(x, head.sample(feats, None, state, noise))
    long = torch.cat([feats, torch.randn(2, 3, 16) * 50], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 3)], dim=1)
    torch.testing.assert_close(x, head.sample(long, longer, state, noise))
    assert not torch.allclose(x, head.sample(long, None, state, noise))  # and the mask is needed


def test_draws_share_features_and_equal_a_loop():
    head = small()
    args, drawn = example(), small().draw(model.rng(0), 2, 3)
    args[1][0, 4:] = 0
    args[4][1, 3:] = 0
    many = head.loss(*args, drawn=drawn)[0]
    grads = torch.autograd.grad(many, list(head.parameters()))
    one = (
        sum(
            head.loss(*args, drawn=(drawn[0][:, r : r + 1], drawn[1][:, r : r + 1]))[0]
            for r in range(3)
        )
        / 3
    )
    torch.testing.assert_close(many, one)
    for a, b in zip(grads, torch.autograd.grad(one, list(head.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(g.abs().sum() > 0 for g in grads)  # every parameter takes part
    again = small().draw(model.rng(0), 2, 3)
    assert all(torch.equal(x, y) for x, y in zip(again, drawn))


def test_corner_sizes():
    for change in ({"vl_layers": 0}, {"future_tokens": 0}, {"layers": 1}, {"horizon": 1}):
        head = small(**change)
        feats, mask, state, _, _ = example()
        noise = torch.zeros(2, head.cfg.horizon, 4)
        assert head.sample(feats, mask, state, noise).shape == noise.shape
    with pytest.raises(ValueError, match="multiple of 3 heads"):
        small(heads=3)


def test_head_overfits_8_samples():
    head = small(dim=64)
    feats, mask, state, action, counts = example(8)
    action = action.tanh()
    optim = torch.optim.Adam(head.parameters())
    for step in range(150):
        optim.param_groups[0]["lr"] = model.learning_rate(step, 150, 3e-3, 0.05)
        loss, _ = head.loss(feats, mask, state, action, counts, head.draw(model.rng(0, step), 8, 8))
        optim.zero_grad()
        loss.backward()
        optim.step()
    x = head.sample(feats, mask, state, torch.randn(action.shape, generator=torch.manual_seed(0)))
    assert (x - action).square().mean() < 0.02  # 0.36 for the mean action


# Frames and features


def test_frames_mask_what_lies_past_the_end(data):
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    assert frames.ends.tolist() == [9, 14, 21, 33, 39]
    assert (len(frames.train), frames.held) == (33, range(33, 39))  # at least one episode
    assert frames.at(0) == (0, 0) and frames.at(13) == (1, 4) and frames.at(14) == (2, 0)
    assert frames.mask[13].tolist() == [True, False, False, False]
    assert frames.mask[11].tolist() == [True, True, True, False]
    raw = frames.files[1].action[[2, 3, 4, 4]]  # padded with the last action
    q01, q99 = (np.array(frames.stats["action"][k]) for k in ("q01", "q99"))
    want = 2 * (raw[:, :3] - q01[:3]) / (q99 - q01)[:3] - 1
    np.testing.assert_allclose(frames.action[11][:, :3], want, rtol=1e-4, atol=1e-5)
    assert (frames.action[..., 3] == 0).all()  # the still dimension
    _, action, mask = vla.training_targets(frames, np.array([11, 0]), "cpu")
    assert mask.shape == action.shape == (2, 4, 4) and mask[0, 3].sum() == 0


def test_every_frame_is_seen_once_a_pass():
    cfg = vla.Config(batch=4, seed=3)
    seen = np.concatenate([vla.sample_order(cfg, 6, step) for step in range(3)])
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6].tolist() != seen[6:].tolist()


def source_of(data, out, kind, **change):
    cfg = vla.Config(data=str(data), out=str(out), horizon=4, **change)
    frames, backbone = vla.FrameDataset(cfg), backbones.random_backbone("tiny-vlm")
    vla.freeze_backbone(backbone, cfg.layer)
    dist = model.Dist(0, 1, torch.device("cpu"))
    return (
        vla.build_cache(backbone, frames, cfg, dist)
        if kind == "cache"
        else vla.LiveFeatures(backbone, frames, cfg, dist.device)
    )


def test_cached_features_equal_features_in_the_loop(data, tmp_path, monkeypatch):
    change = {"cameras": "image,image_wrist"}
    cached = source_of(data, tmp_path, "cache", **change)
    loop = source_of(data, tmp_path, "loop", **change)
    ids = np.array([0, 38, 12, 30])  # both instructions, so unequal lengths
    (a, mask), (b, want) = (s.features(s.read(ids)) for s in (cached, loop))
    assert torch.equal(mask, want.bool()) and not mask.all() and a.dtype == torch.float16
    torch.testing.assert_close(a.float()[mask], b[mask], atol=2e-3, rtol=2e-3)
    assert (
        source_of(data, tmp_path, "loop", layer=4, **change)
        .features(loop.read(ids))[0]
        .sub(b)
        .abs()
        .max()
        > 0.1
    )  # the layer matters
    tensors = load_file(tmp_path / "features" / "episode_000004.safetensors")  # an ordinary file
    assert tensors["features"].shape == (6, *a[0][mask[0]].shape)
    monkeypatch.setattr(vla, "encode_prompts", None)  # a second run does not touch the backbone
    again = source_of(data, tmp_path, "cache", **change)
    assert torch.equal(again.features(again.read(ids))[0], a)


def test_stride_keeps_every_third_frame(data, tmp_path):
    """Of episodes of unequal lengths: the same chunks, targets and features as without it."""
    whole, thin = (source_of(data, tmp_path / k, "cache", stride=int(k)) for k in "13")
    assert len(thin.frames.state) == sum(-(-len(f) // 3) for f in thin.frames.files)
    places = list(map(thin.frames.at, range(len(thin.frames.state))))
    assert all(t % 3 == 0 and t < len(thin.frames.files[e]) for e, t in places)
    same = [i for i in range(len(whole.frames.state)) if whole.frames.at(i) in places]
    for name in ("state", "action", "mask"):
        assert np.array_equal(getattr(thin.frames, name), getattr(whole.frames, name)[same])
    for a, b in zip(thin.read(range(len(same))), whole.read(same)):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    assert whole.frames.at(whole.frames.held[0]) == thin.frames.at(thin.frames.held[0])


def test_stale_cache_is_refused(data, tmp_path):
    source_of(data, tmp_path, "cache")
    for change, name in (
        ({"layer": 1}, "backbone, layer"),
        ({"think": True}, "prompts"),
        ({"cameras": "image_wrist"}, "cameras"),
    ):
        with pytest.raises(ValueError, match=f"features of other {name} than"):
            source_of(data, tmp_path, "cache", **change)
    path = data / "episode_000000.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="other episodes than.*delete the folder"):
        source_of(data, tmp_path, "cache")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "features" / "episode_000001.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="episode_000001.* to compute it again"):
        source_of(data, tmp_path, "cache")
    (tmp_path / "features" / "fingerprint.json").unlink()  # incomplete, so computed again
    source_of(data, tmp_path, "cache")


# Training


@pytest.mark.parametrize("some", [{"ema-decay": 0.999, "muon": True}, {"ema-decay": 0}])
def test_resume_equals_uninterrupted(data, tmp_path, some):
    flags = {"dropout": 0.1, "save-every": 3, "steps": 6, "log-every": 2, **some}
    vla.main(argv(data, tmp_path, **flags))
    want = load_file(tmp_path / "final" / "head.safetensors")
    first = records(tmp_path)
    (tmp_path / "final").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "step_000006")  # as if killed in step 5, between two lines of the log
    vla.main(argv(data, tmp_path, **flags, resume=True))
    got = load_file(tmp_path / "final" / "head.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    again = records(tmp_path)[len(first) + 1 :]
    assert [r["step"] for r in again] == [4, 6, 6]
    for a, b in zip(first[2:], again, strict=True):
        assert all(a[k] == b[k] for k in a.keys() - {"seconds", "steps_per_s"}), (a, b)
    with pytest.raises(ValueError, match="another --lr; resume with --lr 0.001"):
        vla.main(argv(data, tmp_path, **flags, resume=True, lr=1e-2))
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        vla.main(argv(data, tmp_path, **flags))


def test_four_ranks_equal_one(data, tmp_path):
    """Gradient norms, held-out error and weights; features written by one rank and by four; pairs of
    ranks share one copy of the weights."""
    flags = {
        "batch": 8,
        "eval-rows": 5,
        "ema-decay": 0.9,
        "muon": True,
    }  # 5 rows on 4 ranks: 3 filled up
    vla.main(argv(data, tmp_path / "one", **flags))
    on_ranks(vla.main, argv(data, tmp_path / "two", **flags, shards=2), 4)
    one, two = records(tmp_path / "one")[1:], records(tmp_path / "two")[1:]
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        for k in set(a) - {"steps_per_s", "seconds"}:
            # Adam divides by sqrt(v): rounding differences grow from step to step
            assert a[k] == pytest.approx(b[k], rel=1e-5 if a["step"] == 1 else 1e-4), k
    a, b = (load_file(tmp_path / k / "final" / "head.safetensors") for k in ("one", "two"))
    for k in a:  # the gradient of a key's bias is 0 but for rounding, which Adam blows up
        if not k.endswith("kv.bias"):
            torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=1e-4)
    vla.main(argv(data, tmp_path / "3", **flags, **{"cache-dir": tmp_path / "two" / "features"}))
    again = records(tmp_path / "3")[1:]  # another world size reads the parts of four ranks
    assert [r["loss"] for r in again[:4]] == pytest.approx([r["loss"] for r in one[:4]], rel=1e-4)


def test_features_in_the_loop_train_alike(data, trained, tmp_path, monkeypatch):
    """Also on two ranks, of which the second builds no weights, with a unit for each block."""
    monkeypatch.setattr(model, "SMALL", 0)
    on_ranks(vla.main, argv(data, tmp_path, cache="none", **{"save-every": 2}), 2)
    assert not (tmp_path / "features").exists()
    for a, b in zip(records(trained)[1:], records(tmp_path)[1:]):
        for k in {"loss", "held_loss", "held_l1"} & set(a):
            assert a[k] == pytest.approx(b[k], rel=2e-3)


# The policy


def observation(data):
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    places = [(0, 0), (1, 2), (0, 5)]
    return (
        [frames.files[e].frame(t) for e, t in places],
        [TASKS[e] for e, _ in places],
        np.stack([frames.files[e].state[t] for e, t in places]),
    )


def test_a_gradient_that_is_not_finite_stops_with_its_batch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "clip_gradients", lambda *_: float("nan"))
    with pytest.raises(ValueError, match=r"step 1, rank 0: the gradient norm is nan.*episode_\d+"):
        vla.main(argv(data, tmp_path))
    saved = load_file(tmp_path / "failed_step_1_rank_0.safetensors")
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    ids = vla.sample_order(vla.Config(batch=8), len(frames.train), 0)
    assert np.array_equal(saved["0.frame"], ids)
    assert np.array_equal(saved["0.action"], frames.action[ids])


def test_policy_round_trip(data, trained):
    images, tasks, states = observation(data)
    policy = vla.Policy.load(trained)
    assert (policy.horizon, policy.action_dim, policy.cameras) == (4, 4, ["image"])
    chunks = policy.act_batch(images, tasks, states)
    assert chunks.shape == (3, 4, 4) and chunks.dtype == np.float32
    again = vla.Policy.load(trained / "final").act_batch(images, tasks, states)
    assert np.array_equal(chunks, again)
    assert not np.array_equal(chunks, policy.act_batch(images, tasks, states))  # fresh noise
    other = vla.Policy.load(trained, seed=1).act_batch(images, tasks, states)
    assert not np.array_equal(chunks, other)
    single = vla.Policy.load(trained).act([images[0]], tasks[0], states[0])
    np.testing.assert_allclose(single, chunks[0], atol=1e-4)  # padded in the batch, alone here
    # The same from the parts: backbone at --init, saved head, noise, statistics of the episodes.
    backbone, frames = (
        backbones.random_backbone("tiny-vlm"),
        vla.FrameDataset(vla.Config(data=str(data), horizon=4)),
    )
    vla.freeze_backbone(backbone, 0)
    head = FlowHead(HeadConfig(**policy.spec["head"])).eval()
    head.load_state_dict(load_file(trained / "final" / "head.safetensors"))
    seen = vla.encode_prompts(
        backbone, [vla.prompt_row(backbone, [images[1]], tasks[1], False, {})], "cpu"
    )
    noise = model.rng(0, "policy", 0).standard_normal((3, 4, 4), np.float32)[1:2]
    x = head.sample(*seen, torch.from_numpy(frames.state[11:12]), torch.from_numpy(noise))
    want = vla.unnormalize(x.numpy(), frames.stats["action"])
    np.testing.assert_allclose(chunks[1], want[0], atol=1e-4)
    assert (chunks[..., 3] == 0).all()  # the still dimension stays where it is


def test_checkpoint_loads_in_transformers_with_nothing_missing(trained):
    from transformers import AutoModelForImageTextToText

    net, info = AutoModelForImageTextToText.from_pretrained(
        trained / "final", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(net.model.language_model.layers) == 3  # round(0.64 * 4)
    base = backbones.random_backbone("tiny-vlm").net.model.language_model
    assert torch.equal(net.model.language_model.norm.weight, base.norm.weight)
    run = json.loads((trained / "final" / "run.json").read_text())
    assert (
        run["stage"] == "vla" and run["parent"] == untrained.folder("tiny-vlm") and run["step"] == 4
    )


def test_average_of_weights():
    heads = {"head": small(), "raw": small()}
    with torch.no_grad():
        heads["raw"].kv.bias += 1
    before = heads["head"].kv.bias.clone()
    vla.update_average(heads, 0.9, 0)  # (1 + 0) / (10 + 0) is below 0.9
    torch.testing.assert_close(heads["head"].kv.bias, before + 0.9)
    vla.update_average(heads, 0.9, 10**6)
    torch.testing.assert_close(heads["head"].kv.bias, before + 0.91)


def test_bad_input_stops_with_a_clear_line(data, trained, tmp_path):
    for flags, text in (
        ({"init": trained}, "stage 'vla', expected base or sft or grpo"),
        ({"horizon": 13}, "not in 1..12, the length of the longest episode"),
        ({"cameras": "image,top"}, "no camera 'top'; choose --cameras among image, image_wrist"),
        ({"layer": 5}, "layer 5 is not in 1..4"),
        ({"cache": "ram"}, "choose features or none"),
        ({"heads": 5}, "must be even and a multiple of 5 heads"),
        ({"draws": 0}, "the first three start at 1"),
        ({"holdout-share": 1.0}, "all of them held out"),
    ):
        with pytest.raises(ValueError, match=text):
            vla.main(argv(data, tmp_path, **flags))
    images, tasks, states = observation(data)
    policy = vla.Policy.load(trained)
    with pytest.raises(ValueError, match="2 images; the policy was trained with the cameras image"):
        policy.act(images[:2], tasks[0], states[0])
    with pytest.raises(ValueError, match="give as many of each, states"):
        policy.act_batch(images, tasks, states[:, :2])
    with pytest.raises(ValueError, match="state 1 is not finite"):
        policy.act_batch(images, tasks, np.where(np.arange(3)[:, None] == 1, np.nan, states))
    backbone = backbones.random_backbone("tiny-vlm")
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 1})
    with pytest.raises(ValueError, match="stage 'sft', expected vla"):
        vla.Policy.load(tmp_path / "sft")
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file(
        {
            "image": np.zeros((3, 32, 32, 3), np.uint8),
            "state": np.zeros((3, 3), np.float32),
            "action": np.full((3, 4), np.nan, np.float32),
        },
        bad / "episode_000000.safetensors",
        metadata={"task": "wave"},
    )
    done = subprocess.run(
        [sys.executable, ROOT / "vla.py", *argv(bad, tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "action row 0 is not finite" in done.stderr
