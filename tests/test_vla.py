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
import untrained
from ranks import on_ranks
from safetensors.numpy import save_file
from safetensors.torch import load_file

import model
import sft
import vla
from benchmarks import libero
from fast_tokenizer import (
    FastTokenizer,
    all_chunks,
    read_episodes,
    read_stats,
    split_episodes,
    split_record,
)
from tools import backbones
from vla import FlowBlock, FlowHead, HeadConfig

ROOT = Path(__file__).parents[1]
LENGTHS = (9, 5, 7, 12, 6)  # of the episodes of `data`
TASKS = ("put the red block into the bowl", "open it")


def small_head(**changes):
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
    return FlowHead(HeadConfig(**{**sizes, **changes}))


def example(batch=2, tokens=6, seed=0):
    """Random feats, mask, state, action, action_mask for small_head()."""
    generator = torch.Generator().manual_seed(seed)
    feats = torch.randn(batch, tokens, 16, generator=generator)
    state = torch.randn(batch, 3, generator=generator)
    action = torch.randn(batch, 5, 4, generator=generator)
    return feats, torch.ones(batch, tokens), state, action, torch.ones(batch, 5, 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five short episodes with two cameras and instructions of unequal length."""
    folder = tmp_path_factory.mktemp("episodes")
    rng = np.random.default_rng(0)
    for number, length in enumerate(LENGTHS):
        action = rng.normal(size=(length, 4)).astype(np.float32)
        action = action * [1, 5, 0.1, 0]  # one dimension is still
        save_file(
            {
                "image": rng.integers(0, 256, (length, 32, 32, 3), np.uint8),
                "image_wrist": rng.integers(0, 256, (length, 32, 32, 3), np.uint8),
                "state": rng.normal(size=(length, 3)).astype(np.float32),
                "action": action.astype(np.float32),
            },
            folder / f"episode_{number:06d}.safetensors",
            metadata={"task": TASKS[number % 2]},
        )
    return folder


def argv(data, out, **changes):
    """The command line of a run of 4 small steps."""
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
        **changes,
    }
    words = []
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("vla")
    vla.main(argv(data, out))
    return out


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(checkpoint):
    """Of head and backbone, by name."""
    return load_file(checkpoint / "head.safetensors") | load_file(checkpoint / "model.safetensors")


# ---- The head ------------------------------------------------------------------------------------


def test_loss_by_hand(monkeypatch):
    head = small_head()
    action = torch.full((1, 5, 4), 3.0)
    noise = torch.full((1, 1, 5, 4), -1.0)
    drawn = (noise, torch.tensor([[0.25]]))
    seen = []  # x_t of each call

    def velocity(x_t, t, state, context):
        seen.append(x_t)
        return torch.full_like(x_t, 1.5)

    monkeypatch.setattr(head, "velocity", velocity)
    feats, mask, state, _, action_mask = example(1)
    action_mask[:, 2:] = 0  # three of five steps lie past the end
    action_mask[:, :, 3] = 0  # and one dimension is padding
    args = (feats, mask, state, action, action_mask)
    loss, info = head.loss(*args, drawn)
    assert torch.equal(seen[0], torch.zeros(1, 5, 4))  # 0.75 * -1 + 0.25 * 3
    assert loss.item() == 6.25  # (3 - -1 - 1.5)^2
    assert info["count"] == 6 and info["sum"] == 37.5
    assert head.loss(*args, drawn, divisor=75)[0].item() == 0.5
    action[:, 2:] = 1e3  # what is masked has no influence
    assert head.loss(*args, drawn)[0].item() == 6.25
    action_mask[:] = 0
    assert head.loss(*args, drawn)[0].item() == 0  # not NaN


def test_time_is_s_minus_u_over_s():
    class FixedRng:
        def beta(self, a, b, shape):
            assert (a, b) == (1.5, 1.0)
            return np.array([[0.0, 0.4995, 0.999, 1.0]])  # the last one is clamped at s

        def standard_normal(self, shape, dtype):
            return np.zeros(shape, dtype)

    noise, time = small_head().draw(FixedRng(), 1, 4)
    assert noise.shape == (1, 4, 5, 4)
    torch.testing.assert_close(time, torch.tensor([[1.0, 0.5, 0.0, 0.0]]))
    time = small_head().draw(model.rng(0), 200, 100).time
    assert abs(time.mean() - (1 - 0.6 / 0.999)) < 0.01  # E[u] = 1.5 / 2.5
    assert time.min() >= 0 and time.max() <= 1


def test_sample_integrates_a_straight_flow_exactly(monkeypatch):
    head = small_head(steps=4)
    feats, mask, state, goal, _ = example()
    times = []

    def velocity(x_t, t, state, context):
        times.append(t.item())
        return (goal - x_t) / (1 - t)  # the field of straight paths that end in `goal`

    monkeypatch.setattr(head, "velocity", velocity)
    torch.testing.assert_close(head.sample(feats, mask, state, torch.randn_like(goal)), goal)
    assert times == [0, 0.25, 0.5, 0.75]


def test_context_is_computed_once_and_equals_one_per_step():
    head = small_head()
    feats, mask, state, noise, _ = example()
    mask[1, 4:] = 0
    calls = []
    head.kv.register_forward_hook(lambda *_: calls.append(1))
    sampled = head.sample(feats, mask, state, noise)
    assert len(calls) == 1
    with torch.no_grad():
        x_t = noise
        for i in range(4):
            state_token = head.state_in(state)[:, None]
            t = torch.full((len(x_t),), i / 4)  # one time a frame here, one for all in sample()
            x_t = x_t + head.velocity(x_t, t, state_token, head.context(feats, mask)) / 4
    torch.testing.assert_close(sampled, x_t)
    assert torch.equal(sampled, head.sample(feats, mask, state, noise))
    assert not torch.allclose(sampled, head.sample(feats, mask, state, -noise))


def test_self_attention_block_equals_torchs_own_layer():
    torch.manual_seed(0)
    ours = FlowBlock(16, 2)
    x = torch.randn(3, 6, 16)
    mask = torch.arange(6) < torch.tensor([6, 4, 5])[:, None]  # (B, T)
    gelu = functools.partial(F.gelu, approximate="tanh")
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 64, 0, gelu, batch_first=True, norm_first=True)
    their_names = {
        "qkv.": "self_attn.in_proj_",
        "proj.": "self_attn.out_proj.",
        "norm1.": "norm1.",
        "norm2.": "norm2.",
        "mlp.0.": "linear1.",
        "mlp.3.": "linear2.",
    }
    weights = {}
    for our_name, their_name in their_names.items():
        for kind in ("weight", "bias"):
            weights[their_name + kind] = ours.get_parameter(our_name + kind)
    theirs.load_state_dict(weights)
    want = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask=mask[:, None, None])[mask], want[mask])


def test_cross_attention_block_equals_the_formula():
    torch.manual_seed(0)
    block = FlowBlock(16, 2, ada=True, cross=True)
    time = torch.randn(6, 16)  # B = 3 frames, R = 2 draws of each
    k = torch.randn(3, 2, 7, 8)  # (B, H, T, d)
    v = torch.randn(3, 2, 7, 8)
    x = torch.randn(6, 4, 16)  # (B*R, Q, D)

    scale, shift = block.ada(time)[:, None].chunk(2, -1)
    normed = F.layer_norm(x, (16,)) * (1 + scale) + shift
    q = block.qkv(normed).view(6, 4, 2, 8).transpose(1, 2)  # (B*R, H, Q, d)
    score = (q @ k.repeat_interleave(2, 0).mT / 8**0.5).softmax(-1)  # (B*R, H, Q, T)
    attended = (score @ v.repeat_interleave(2, 0)).transpose(1, 2).reshape(6, 4, 16)
    want = x + block.proj(attended)
    want = want + block.mlp(F.layer_norm(want, (16,)))

    kv = [tensor.transpose(1, 2).reshape(3, 7, 16) for tensor in (k, v)]  # (B, T, D)
    torch.testing.assert_close(block(x, time, kv), want)


def test_padding_of_the_features_changes_nothing():
    head = small_head(vl_layers=2)
    feats, mask, state, noise, _ = example()
    want = head.sample(feats, mask, state, noise)
    torch.testing.assert_close(want, head.sample(feats, None, state, noise))
    padded_feats = torch.cat([feats, torch.randn(2, 3, 16) * 50], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 3)], dim=1)
    torch.testing.assert_close(want, head.sample(padded_feats, padded_mask, state, noise))
    unmasked = head.sample(padded_feats, None, state, noise)
    assert not torch.allclose(want, unmasked)  # and the mask is needed


def test_draws_share_features_and_equal_a_loop():
    head = small_head()
    args = example()
    _, mask, _, _, action_mask = args
    mask[0, 4:] = 0
    action_mask[1, 3:] = 0
    noise, time = small_head().draw(model.rng(0), 2, 3)
    together = head.loss(*args, drawn=(noise, time))[0]
    losses = []
    for r in range(3):
        one_draw = (noise[:, r : r + 1], time[:, r : r + 1])
        losses.append(head.loss(*args, drawn=one_draw)[0])
    looped = sum(losses) / 3
    torch.testing.assert_close(together, looped)
    params = list(head.parameters())
    grads = torch.autograd.grad(together, params)
    looped_grads = torch.autograd.grad(looped, params)
    for grad, looped_grad in zip(grads, looped_grads, strict=True):
        torch.testing.assert_close(grad, looped_grad, atol=1e-5, rtol=1e-4)
    assert all(grad.abs().sum() > 0 for grad in grads)  # every parameter takes part
    again = small_head().draw(model.rng(0), 2, 3)
    assert torch.equal(again.noise, noise) and torch.equal(again.time, time)


@pytest.mark.parametrize(
    "change", [{"vl_layers": 0}, {"future_tokens": 0}, {"layers": 1}, {"horizon": 1}]
)
def test_corner_sizes(change):
    head = small_head(**change)
    feats, mask, state, _, _ = example()
    noise = torch.zeros(2, head.cfg.horizon, 4)
    assert head.sample(feats, mask, state, noise).shape == noise.shape


def test_heads_must_divide_the_width():
    for sizes in ({"heads": 3}, {"dim": 48, "heads": 3}):
        with pytest.raises(ValueError, match="width .* multiple of --heads 3"):
            small_head(**sizes)


def test_head_overfits_8_samples():
    head = small_head(dim=64)
    feats, mask, state, action, action_mask = example(8)
    action = action.tanh()
    optim = torch.optim.Adam(head.parameters())
    for step in range(150):
        optim.param_groups[0]["lr"] = model.learning_rate(step, 150, 3e-3, 0.05)
        drawn = head.draw(model.rng(0, step), 8, 8)
        loss, _ = head.loss(feats, mask, state, action, action_mask, drawn)
        optim.zero_grad()
        loss.backward()
        optim.step()
    noise = torch.randn(action.shape, generator=torch.manual_seed(0))
    sampled = head.sample(feats, mask, state, noise)
    assert (sampled - action).square().mean() < 0.02  # 0.36 for the mean action


# ---- Frames and features -------------------------------------------------------------------------


def test_frames_mask_what_lies_past_the_end(data):
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    assert frames.ends.tolist() == [9, 14, 21, 33, 39]
    assert frames.locate(0) == (0, 0)
    assert frames.locate(13) == (1, 4)
    assert frames.locate(14) == (2, 0)
    assert frames.mask[13].tolist() == [True, False, False, False]
    assert frames.mask[11].tolist() == [True, True, True, False]
    raw = frames.episodes[1].action[[2, 3, 4, 4]]  # padded with the last action
    q01 = np.array(frames.stats["action"]["q01"])
    q99 = np.array(frames.stats["action"]["q99"])
    want = 2 * (raw[:, :3] - q01[:3]) / (q99 - q01)[:3] - 1
    np.testing.assert_allclose(frames.action[11][:, :3], want, rtol=1e-4, atol=1e-5)
    assert (frames.action[..., 3] == 0).all()  # the still dimension
    _, action, action_mask = vla.training_targets(frames, np.array([11, 0]), "cpu")
    assert action_mask.shape == action.shape == (2, 4, 4)
    assert action_mask[0, 3].sum() == 0


def test_held_out_frames_are_those_of_the_held_out_episodes(data):
    """They were the last frames. Episodes are drawn, and frames keep their numbers."""
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4, holdout_share=0.4))
    _, held_out = split_episodes(read_episodes(data), 0.4)
    assert [episode.name for episode in held_out] == ["episode_000002", "episode_000004"]
    held_names = {frames.episodes[frames.locate(i)[0]].name for i in frames.held}
    assert held_names == {episode.name for episode in held_out}
    assert sorted([*frames.train, *frames.held]) == list(range(39))
    batch = vla.sample_order(vla.Config(batch=len(frames.train)), frames.train, 3)
    assert sorted(batch) == frames.train.tolist(), "a pass"


def test_every_frame_is_seen_once_a_pass():
    cfg = vla.Config(batch=4, seed=3)
    seen = np.concatenate([vla.sample_order(cfg, np.arange(6), step) for step in range(3)])
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6].tolist() != seen[6:].tolist()


def source_of(data, out, kind, **changes):
    """The features of `data` by a random backbone; kind: cached or live."""
    cfg = vla.Config(data=str(data), out=str(out), horizon=4, **changes)
    frames = vla.FrameDataset(cfg)
    backbone = backbones.random_backbone("tiny-vlm")
    vla.freeze_backbone(backbone, cfg.layer)
    dist = model.Dist(0, 1, torch.device("cpu"))
    if kind == "cached":
        return vla.build_cache(backbone, frames, cfg, dist)
    return vla.LiveFeatures(backbone, frames, cfg, dist.device)


def features_of(source, frame_ids):
    return source.features(source.read(frame_ids))


def test_cached_features_equal_features_in_the_loop(data, tmp_path, monkeypatch):
    both_cameras = {"cameras": "image,image_wrist"}
    frame_ids = np.array([0, 38, 12, 30])  # both instructions, so unequal lengths
    cached = features_of(source_of(data, tmp_path, "cached", **both_cameras), frame_ids)
    live = features_of(source_of(data, tmp_path, "live", **both_cameras), frame_ids)
    mask = cached.mask
    assert torch.equal(mask, live.mask.bool())
    assert not mask.all()
    assert cached.feats.dtype == torch.float16
    torch.testing.assert_close(cached.feats.float()[mask], live.feats[mask], atol=2e-3, rtol=2e-3)
    other = features_of(source_of(data, tmp_path, "live", layer=4, **both_cameras), frame_ids)
    assert (other.feats - live.feats).abs().max() > 0.1  # the layer matters
    tensors = load_file(tmp_path / "features" / "episode_000004.safetensors")  # an ordinary file
    assert tensors["features"].shape == (6, *cached.feats[0][mask[0]].shape)
    monkeypatch.setattr(vla, "encode_prompts", None)  # a second run does not touch the backbone
    again = features_of(source_of(data, tmp_path, "cached", **both_cameras), frame_ids)
    assert torch.equal(again.feats, cached.feats)


def test_stride_keeps_every_third_frame(data, tmp_path):
    """Of episodes of unequal lengths: the same chunks, targets and features as without it."""
    every = source_of(data, tmp_path / "every", "cached", stride=1)
    third = source_of(data, tmp_path / "third", "cached", stride=3)
    count = len(third.files.frames.state)
    assert count == sum(-(-len(episode) // 3) for episode in third.files.frames.episodes)
    places = [third.files.frames.locate(i) for i in range(count)]
    for number, step in places:
        assert step % 3 == 0
        assert step < len(third.files.frames.episodes[number])
    same = [
        i for i in range(len(every.files.frames.state)) if every.files.frames.locate(i) in places
    ]
    for name in ("state", "action", "mask"):
        assert np.array_equal(
            getattr(third.files.frames, name), getattr(every.files.frames, name)[same]
        )
    for a, b in zip(third.read(range(count)), every.read(same), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
    first_held = every.files.frames.locate(every.files.frames.held[0])
    assert first_held == third.files.frames.locate(third.files.frames.held[0])


def test_stale_cache_is_refused(data, tmp_path):
    source_of(data, tmp_path, "cached")
    for change, name in (
        ({"layer": 1}, "backbone, layer"),
        ({"think": True}, "prompts"),
        ({"cameras": "image_wrist"}, "cameras"),
    ):
        with pytest.raises(ValueError, match=f"features of other {name} than"):
            source_of(data, tmp_path, "cached", **change)
    path = data / "episode_000000.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="other episodes than.*delete the folder"):
        source_of(data, tmp_path, "cached")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "features" / "episode_000001.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="episode_000001.* to compute it again"):
        source_of(data, tmp_path, "cached")
    (tmp_path / "features" / "fingerprint.json").unlink()  # incomplete, so computed again
    source_of(data, tmp_path, "cached")


def test_image_tokens_of_libero():
    """What is said beside the command: published LIBERO, 128 px, is a third of what 256 px are for
    Qwen2.5-VL. The preset looks by both cameras; by one, as it did, the gripper is seldom seen."""
    sides = {"qwen2.5-vl-7b": (25, 81), "qwen3-vl-8b": (64, 64)}
    for size, tokens in sides.items():
        spec = backbones.image_spec(backbones.SIZES[size])
        for side, want in zip((128, 256), tokens, strict=True):
            grid = model.image_grid(side, side, spec)
            assert np.prod(grid) // spec.merge**2 == want
            assert str(want) in vla.__doc__
    assert vla.PRESETS["paper"]["cameras"].split(",") == list(libero.VIEWS)


# ---- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"ema-decay": 0.999, "muon": True},
        {"ema-decay": 0},
        {"cache": "none", "backbone-lr": 1e-3, "muon": True},
        {"cache": "none", "backbone-lr": 1e-3, "ce-weight": 0.5},
    ],
)
def test_resume_equals_uninterrupted(data, speaking, tmp_path, changes):
    flags = {"dropout": 0.1, "save-every": 3, "steps": 6, "log-every": 2, **changes}
    flags["init"] = speaking
    vla.main(argv(data, tmp_path, **flags))
    want = weights_of(tmp_path / "final")
    first = records(tmp_path)
    (tmp_path / "final").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "step_000006")  # as if killed in step 5, between two lines of the log
    vla.main(argv(data, tmp_path, **flags, resume=True))
    got = weights_of(tmp_path / "final")
    assert all(torch.equal(got[name], want[name]) for name in want)
    again = records(tmp_path)[len(first) + 1 :]
    assert [record["step"] for record in again] == [4, 6, 6]
    for a, b in zip(first[2:], again, strict=True):
        for key in a.keys() - {"seconds", "steps_per_s"}:
            assert a[key] == b[key], (a, b)
    with pytest.raises(ValueError, match="another --lr; resume with --lr 0.001"):
        vla.main(argv(data, tmp_path, **flags, resume=True, lr=1e-2))
    with pytest.raises(ValueError, match="step_000006: is past --steps 5; give 6 or more"):
        vla.main(argv(data, tmp_path, **{**flags, "steps": 5}, resume=True))
    with pytest.raises(ValueError, match="already holds a run; go on with --resume"):
        vla.main(argv(data, tmp_path, **flags))


@pytest.mark.parametrize("changes", [{}, {"ema-decay": 0}, {"condition": "thought"}])
def test_to_resume_an_ended_run_evaluates_it_and_no_more(
    data, speaking, tmp_path, monkeypatch, changes
):
    """Without a step_* it trained all over again, and wrote over final/."""
    flags = {"init": speaking, "save-every": 0, "steps": 2, **changes}
    vla.main(argv(data, tmp_path, **flags))
    want, metrics = weights_of(tmp_path / "final"), records(tmp_path)[-1]
    monkeypatch.setattr(vla, "train_step", None)
    vla.main(argv(data, tmp_path, **flags, resume=True))
    got = weights_of(tmp_path / "final")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    again = records(tmp_path)[-1]
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}


def test_changed_episodes_are_named_on_resume(data, tmp_path):
    """A cache of features is refused then; a run without one went on."""
    shutil.copytree(data, tmp_path / "data")
    flags = {"cache": "none", "save-every": 1, "steps": 1}
    vla.main(argv(tmp_path / "data", tmp_path / "out", **flags))
    path = tmp_path / "data" / "episode_000002.safetensors"
    arrays = {name: tensor.numpy().copy() for name, tensor in load_file(path).items()}
    arrays["state"] += 1
    save_file(arrays, path, {"task": TASKS[0]})
    flags = {**flags, "steps": 2, "resume": True}
    with pytest.raises(ValueError, match="data: has changed since .*step_000001; put the old"):
        vla.main(argv(tmp_path / "data", tmp_path / "out", **flags))
    vla.main(argv(tmp_path / "data", tmp_path / "out", **flags, **{"changed-data": True}))


def test_four_ranks_equal_one(data, tmp_path):
    """Gradient norms, held-out error and weights. Features are written by one rank and by four;
    pairs of ranks share one copy of the weights."""
    flags = {"batch": 8, "ema-decay": 0.9, "muon": True}
    flags["eval-rows"] = 5  # on 4 ranks: 3 are filled up
    vla.main(argv(data, tmp_path / "one", **flags))
    on_ranks(vla.main, argv(data, tmp_path / "four", **flags, shards=2), 4)
    one = records(tmp_path / "one")[1:]
    four = records(tmp_path / "four")[1:]
    assert len(one) == len(four) == 5
    for a, b in zip(one, four, strict=True):
        # Adam divides by sqrt(v): rounding differences grow from step to step
        rel = 1e-5 if a["step"] == 1 else 1e-4
        for key in set(a) - {"steps_per_s", "seconds"}:
            assert a[key] == pytest.approx(b[key], rel=rel), key
    one_head = load_file(tmp_path / "one" / "final" / "head.safetensors")
    four_head = load_file(tmp_path / "four" / "final" / "head.safetensors")
    for name in one_head:  # the gradient of a key's bias is 0 but for rounding, which Adam blows up
        if not name.endswith("kv.bias"):
            torch.testing.assert_close(one_head[name], four_head[name], atol=1e-5, rtol=1e-4)
    # another world size reads the features that four ranks wrote
    cache = tmp_path / "four" / "features"
    vla.main(argv(data, tmp_path / "again", **flags, **{"cache-dir": cache}))
    again = [record["loss"] for record in records(tmp_path / "again")[1:5]]
    assert again == pytest.approx([record["loss"] for record in one[:4]], rel=1e-4)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_without_future_tokens_trains_sharded_as_on_one_rank(data, tmp_path, shards):
    """The preset speedrun's has none, and a GPU always shards, alone too: FSDP could not reduce the
    gradient of no numbers. The file keeps the empty tensor, and either world resumes the other."""
    flags = {"future-tokens": 0, "vl-layers": 0, "save-every": 2, "cache": "none"}
    vla.main(argv(data, tmp_path / "one", **flags))
    on_ranks(vla.main, argv(data, tmp_path / "two", **flags, shards=shards), 2)
    one = records(tmp_path / "one")[1:]
    two = records(tmp_path / "two")[1:]
    for a, b in zip(one, two, strict=True):
        for key in set(a) - {"steps_per_s", "seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    head = load_file(tmp_path / "two" / "final" / "head.safetensors")
    assert head["future"].shape == (0, 32)
    for name, world in (("one", 2), ("two", 1)):  # the run before, with the other number of ranks
        shutil.rmtree(tmp_path / name / "final")
        shutil.rmtree(tmp_path / name / "step_000004")
        on_ranks(vla.main, argv(data, tmp_path / name, **flags, resume=True), world)
        assert records(tmp_path / name)[-1]["held_loss"] == pytest.approx(
            one[-1]["held_loss"], rel=1e-4
        )


def test_features_in_the_loop_train_alike(data, trained, tmp_path, monkeypatch):
    """Also on two ranks, of which the second builds no weights: with a whole backbone on each, as
    where there is room for it, and with a sharded one, a unit for each block, which gathers all of
    it in each step (10.8 GB of a cut 7B)."""
    monkeypatch.setattr(model, "SMALL", 0)
    shard = model.shard

    def no_backbone_here(net, *args):
        assert isinstance(net, FlowHead)
        return shard(net, *args)

    for kind, free in (("whole", 1e9), ("sharded", 1e9), ("no room", 1e5)):
        flags = {"save-every": 2}
        if kind == "sharded":
            flags["shard-backbone"] = True
        with monkeypatch.context() as patched:
            patched.setattr(vla, "free_memory", lambda dist, free=free: free)
            if kind == "whole":
                patched.setattr(model, "shard", no_backbone_here)
            on_ranks(vla.main, argv(data, tmp_path / kind, cache="none", **flags), 2)
        assert not (tmp_path / kind / "features").exists()
    whole = records(tmp_path / "whole")[1:]
    for kind, rel in (("sharded", 1e-6), ("no room", 1e-6), (trained, 2e-3)):  # fp16 features
        for a, b in zip(whole, records(tmp_path / kind)[1:], strict=True):
            for key in {"loss", "held_loss", "held_l1"} & set(a):
                assert a[key] == pytest.approx(b[key], rel=rel), (kind, key)
    saved = [
        load_file(tmp_path / kind / "final/model.safetensors") for kind in ("whole", "no room")
    ]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[1])


def test_a_backbone_is_whole_where_it_takes_half_of_the_free_memory(monkeypatch):
    """On the rank with the least: all must do the same."""
    net = torch.nn.Linear(10, 10, bias=False).to(torch.bfloat16)  # 200 bytes
    cpu = torch.device("cpu")
    for free, want in ((400, True), (399, False)):
        monkeypatch.setattr(vla, "free_memory", lambda dist, free=free: free)
        assert vla.has_room(net, model.Dist(0, 1, cpu)) is want
    monkeypatch.undo()
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    memory = vla.free_memory(model.Dist(0, 1, cpu))
    assert vla.free_memory(model.Dist(1, 4, cpu)) == memory / 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two nodes
    assert vla.free_memory(model.Dist(1, 4, cpu)) == memory / 2


def test_what_torch_keeps_of_a_gpu_after_own_thoughts_is_free(monkeypatch):
    """A backbone that has thought is off the GPU, its memory was still torch's: where that was half
    of the GPU, the cut backbone was sharded without need."""
    gpu = {"kept": 60, "free": 20}

    def empty_cache():
        gpu["free"] += gpu.pop("kept")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu["free"], 80))
    assert vla.free_memory(model.Dist(0, 1, torch.device("cuda", 0))) == 80


def test_a_gradient_that_is_not_finite_stops_with_its_batch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "clip_gradients", lambda *_: float("nan"))
    with pytest.raises(ValueError, match=r"step 1, rank 0: the gradient norm is nan.*episode_\d+"):
        vla.main(argv(data, tmp_path))
    saved = load_file(tmp_path / "failed_step_1_rank_0.safetensors")
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    frame_ids = vla.sample_order(vla.Config(batch=8), frames.train, 0)
    assert np.array_equal(saved["0.frame"], frame_ids)
    assert np.array_equal(saved["0.action"], frames.action[frame_ids])


@pytest.mark.parametrize("flags", [{"holdout-share": 0}, {"eval-rows": 0}])
def test_a_run_without_held_out_frames_ends_whole(data, tmp_path, flags):
    """Nothing is evaluated, nothing is logged as if it had been."""
    vla.main(argv(data, tmp_path, **flags, **{"eval-every": 2}))
    assert [set(record) >= {"loss"} for record in records(tmp_path)[1:]] == [True] * 4
    run = json.loads((tmp_path / "final" / "run.json").read_text())
    assert run["metrics"] == {} and run["step"] == 4
    everything = vla.FrameDataset(vla.Config(data=str(data), horizon=4, holdout_share=0))
    assert everything.train.tolist() == list(range(sum(LENGTHS))) and len(everything.held) == 0


def test_what_fails_in_the_last_evaluation_leaves_the_policy(data, tmp_path, monkeypatch):
    """It was saved after the evaluation, so that a fault there lost the whole run."""

    def broken(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vla, "evaluate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        vla.main(argv(data, tmp_path))
    images, instructions, states = observations(data)
    assert vla.Policy.load(tmp_path).act(images[0], instructions[0], states[0]).shape == (4, 4)
    run = json.loads((tmp_path / "final" / "run.json").read_text())
    assert "metrics" not in run and run["step"] == 4


def test_the_bound_of_the_images_stays_on_resume(data, tmp_path):
    """It decides the features."""
    flags = {"cache": "none", "save-every": 2, "steps": 2, "max-pixels": 256}
    vla.main(argv(data, tmp_path, **flags))
    flags |= {"resume": True, "steps": 3}
    with pytest.raises(ValueError, match="another --max-pixels"):
        vla.main(argv(data, tmp_path, **{**flags, "max-pixels": 1024}))
    vla.main(argv(data, tmp_path, **flags))


def test_the_split_is_recorded_and_another_one_is_told(data, tmp_path, capsys):
    """A stage before that held out other episodes of this folder may have trained on those that are
    evaluated here. A run that holds out none evaluates none."""
    backbone = backbones.random_backbone("tiny-vlm")
    episodes = read_episodes(data)
    _, held_out = split_episodes(episodes)
    split = [split_record(episodes, held_out)]
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 1, "split": split})
    flags = {"init": tmp_path / "sft", "steps": 1}
    for share, is_told in ((0.05, False), (0.4, True), (0, False)):
        out = tmp_path / str(share)
        vla.main(argv(data, out, **flags, **{"holdout-share": share}))
        assert ("an earlier stage held out others (1 of 5)" in capsys.readouterr().err) == is_told
        run = json.loads((out / "final" / "run.json").read_text())
        assert run["split"][-1]["held_out"] == {0.05: 1, 0.4: 2, 0: 0}[share]
        assert split[0] in run["split"], "what an earlier stage has seen"
        assert (run["split"] == split) == (share == 0.05)


def test_average_of_weights():
    heads = {"head": small_head(), "raw": small_head()}
    with torch.no_grad():
        heads["raw"].kv.bias += 1
    before = heads["head"].kv.bias.clone()
    vla.update_average(heads, 0.9, 0)  # (1 + 0) / (10 + 0) is below 0.9
    torch.testing.assert_close(heads["head"].kv.bias, before + 0.9)
    vla.update_average(heads, 0.9, 10**6)
    torch.testing.assert_close(heads["head"].kv.bias, before + 0.91)


# ---- A backbone that is trained ------------------------------------------------------------------

BY_FLOW = {"cache": "none", "backbone-lr": 1e-3}
BY_BOTH = {**BY_FLOW, "ce-weight": 0.5}
CPU = model.Dist(0, 1, torch.device("cpu"))


def speak(backbone, data):
    """The backbone gets tokens for three actions of `data`."""
    episodes = read_episodes(data)
    stats = read_stats(data, episodes)["action"]
    backbone.action_tokenizer = FastTokenizer.fit(all_chunks(episodes, 3, 1), 40, 1, stats)
    sft.grow_vocabulary(backbone, backbone.action_tokenizer.vocab_size)


def untie(net):
    """lm_head gets weights of its own, as in a published 7B."""
    net.config.tie_word_embeddings = False
    net.config.text_config.tie_word_embeddings = False
    table = net.lm_head.weight.detach()
    net.lm_head.weight = torch.nn.Parameter(table.flip(0).contiguous())


@pytest.fixture(scope="module")
def speaking(data, tmp_path_factory):
    """A checkpoint that knows action tokens."""
    folder = tmp_path_factory.mktemp("speaking")
    backbone = backbones.random_backbone("tiny-vlm")
    speak(backbone, data)
    model.save(folder / "sft", backbone, {"stage": "sft", "step": 1})
    return folder / "sft"


def plain_losses(backbone, head, frames, cfg, frame_ids, layer):
    """Of a step: flow loss and cross-entropy by transformers' forward of each frame alone, its row
    encoded as sft.py does."""
    drawn = head.draw(model.rng(cfg.seed, "flow", 0), cfg.batch, cfg.draws)
    state, action, action_mask = vla.training_targets(frames, frame_ids, "cpu")
    flow = 0
    cross_entropy = 0
    tokens = 0
    source = model.EpisodeDataset(cfg.data, backbone.action_tokenizer)
    for b, frame_id in enumerate(frame_ids):
        number, step = frames.locate(frame_id)
        images, instruction = frames.observation(frame_id)
        messages = model.action_prompt(instruction, False)
        prompt = model.encode(backbone, messages, images, prompt_only=True)
        row = prompt
        if step + 3 <= LENGTHS[number]:  # else there is no whole chunk
            chunk = frames.episodes[number].action[None, step : step + 3]
            (action_ids,) = source.action_tokenizer.encode(chunk)
            answer = {"role": "assistant", "content": model.action_answer(action_ids)}
            row = model.encode(backbone, [*messages, answer], images)
        batch = model.collate([row], backbone.vocab.pad)
        output = backbone.net(
            input_ids=batch["ids"],
            attention_mask=batch["mask"],
            pixel_values=model.cut_patches(batch["pixels"], batch["grid"], backbone.image_spec),
            image_grid_thw=batch["grid"],
            mm_token_type_ids=(batch["ids"] == backbone.vocab.image).int(),
            output_hidden_states=True,
        )
        feats = output.hidden_states[layer][:, : len(prompt["ids"])]
        rows = slice(b, b + 1)
        targets = (state[rows], action[rows], action_mask[rows], drawn.rows(rows))
        flow += head.loss(feats, None, *targets, divisor=action_mask.sum() * cfg.draws)[0]
        is_target = batch["target"][0, 1:]
        cross_entropy += F.cross_entropy(
            output.logits[0, :-1][is_target], batch["ids"][0, 1:][is_target], reduction="sum"
        )
        tokens += is_target.sum()
    return flow, cross_entropy / tokens


@pytest.mark.parametrize("ce_weight", [0, 0.5])
@pytest.mark.parametrize(
    ("size", "layer", "tied"), [("tiny-vlm", 3, True), ("tiny-qwen2.5-vl", 1, False)]
)
def test_gradients_of_a_trained_backbone_are_those_of_plain_autograd(
    data, size, layer, tied, ce_weight
):
    """By the flow loss alone what lies above --layer has none, nor has lm_head of its own. Our
    forward is one for both losses, of rows padded behind their answers; the third frame has no
    whole chunk of three actions ahead of it, so no answer."""
    cfg = vla.Config(
        data=str(data), horizon=4, batch=3, cache="none", backbone_lr=1e-3, ce_weight=ce_weight
    )
    frames = vla.FrameDataset(cfg)
    frame_ids = np.array([0, 10, 13])
    backbone, plain = (backbones.random_backbone(size) for _ in range(2))
    for each in (backbone, plain):
        if not tied:
            untie(each.net)
        speak(each, data)
    width = backbone.net.config.text_config.hidden_size
    head = small_head(vl_dim=width, horizon=4)
    flow, cross_entropy = plain_losses(plain, head, frames, cfg, frame_ids, layer)
    wanted = dict(plain.net.named_parameters())
    grads = torch.autograd.grad(
        flow + ce_weight * cross_entropy, list(wanted.values()), allow_unused=True
    )
    wanted = dict(zip(wanted, grads, strict=True))

    answers = vla.frame_answers(backbone, frames, cfg) if ce_weight else None
    vla.choose_trained(backbone, layer, cfg)
    source = vla.LiveFeatures(backbone, frames, cfg, CPU.device, None, answers, layer)
    fetched = vla.Fetched(frame_ids, source.read(frame_ids))
    loss, info = vla.flow_loss(head, source, frames, cfg, 0, fetched, CPU)
    loss.backward()
    assert loss.item() == pytest.approx((flow + ce_weight * cross_entropy).item(), rel=1e-5)
    if ce_weight:
        ce_loss = info["answers"].loss / info["answers"].tokens
        assert ce_loss.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    for name, p in backbone.net.named_parameters():
        grad = wanted.pop(name)
        if name == "lm_head.weight" and not ce_weight:
            assert p.grad is None and not p.requires_grad
        elif grad is None:  # of a block between whose output and the head nothing lies
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-5, msg=name)
    above = {name: grad for name, grad in wanted.items() if grad is not None and grad.any()}
    assert not above, "what is left out by the cut"


def test_a_trained_backbone_lowers_the_loss_of_a_head_that_stands_still(data, speaking, tmp_path):
    """On nine frames, by the same draws: what the head could learn by itself it may not."""
    flags = {"init": speaking, "max-episodes": 1, "holdout-share": 0, "steps": 12, "log-every": 6}
    flags |= {"lr": 1e-6, "ema-decay": 0, "draws": 8}
    logs = {}
    for name, more in (("frozen", {"cache": "none"}), ("flow", BY_FLOW), ("both", BY_BOTH)):
        vla.main(argv(data, tmp_path / name, **{**flags, **more}))
        logs[name] = records(tmp_path / name)[1:3]
    for name in ("flow", "both"):
        assert logs[name][1]["loss"] < 0.95 * logs["frozen"][1]["loss"]
    first, last = logs["both"]
    assert last["ce_loss"] < 0.8 * first["ce_loss"]
    assert last["token_accuracy"] > first["token_accuracy"]


@pytest.mark.parametrize("flags", [BY_FLOW, BY_BOTH])
def test_two_ranks_train_a_backbone_as_one(data, speaking, tmp_path, monkeypatch, flags):
    """In units of a block each, of which the second rank builds none. lm_head, which the flow alone
    leaves frozen, is no unit of the input's table."""
    monkeypatch.setattr(model, "SMALL", 0)
    init = tmp_path / "untied"
    backbone = model.load(speaking)
    untie(backbone.net)
    model.save(init, backbone, {"stage": "sft", "step": 1})
    flags = {"init": init, "steps": 2, "muon": True, "eval-every": 1, **flags}
    vla.main(argv(data, tmp_path / "one", **flags))
    on_ranks(vla.main, argv(data, tmp_path / "two", **flags), 2)
    one = records(tmp_path / "one")[1:]
    two = records(tmp_path / "two")[1:]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"steps_per_s", "seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    assert one[0]["backbone_grad_norm"] > 0
    start = load_file(init / "model.safetensors")
    weights = [load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two")]
    moved = set()
    for name, tensor in weights[0].items():
        other = weights[1][name]
        # Adam blows up the rounding of gradients near 0: compare how far each has moved
        assert (tensor - other).norm() <= 1e-2 * (tensor - start[name]).norm() + 1e-6, name
        if not torch.equal(tensor, start[name]):
            moved.add(name)
    assert len(moved) > 0.8 * len(weights[0])
    assert ("lm_head.weight" in moved) == ("ce-weight" in flags)


@pytest.mark.parametrize("flags", [BY_FLOW, BY_BOTH])
def test_the_policy_has_the_trained_backbone(data, speaking, tmp_path, flags):
    """What is evaluated at the end of the run is what the checkpoint gives."""
    vla.main(argv(data, tmp_path, **{**flags, "init": speaking, "save-every": 4}))
    run = json.loads((tmp_path / "final" / "run.json").read_text())
    assert run["trained"] == ["head", "backbone"]
    card = (tmp_path / "final" / "README.md").read_text()
    assert "| trained | head and backbone |" in card
    policy = vla.Policy.load(tmp_path)
    cfg = vla.Config(data=str(data), horizon=4, batch=8, eval_rows=6)
    frames = vla.FrameDataset(cfg)
    source = vla.LiveFeatures(policy.backbone, frames, cfg, CPU.device)
    assert vla.evaluate(policy.head, source, frames, cfg, CPU) == pytest.approx(run["metrics"])
    images, instructions, states = observations(data)
    assert policy.act_batch(images, instructions, states).shape == (3, 4, 4)

    whole = "ce-weight" in flags
    net = model.load(tmp_path).net
    assert len(net.model.language_model.layers) == (4 if whole else 3)
    start = model.load(speaking).net.state_dict()
    norm = "model.language_model.norm.weight"
    for name, tensor in net.state_dict().items():
        if name.endswith("weight") and (whole or name != norm):
            assert not torch.equal(tensor, start[name]), name
    if not whole:
        assert torch.equal(net.state_dict()[norm], start[norm])


def test_tokens_of_another_robot_are_no_answers(data):
    backbone = backbones.random_backbone("tiny-vlm")
    unit = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mean": [0.0] * 7, "std": [1.0] * 7}
    chunks = np.random.default_rng(0).uniform(-1, 1, (99, 3, 7))
    backbone.action_tokenizer = FastTokenizer.fit(chunks, 40, 1, unit)
    cfg = vla.Config(data=str(data), horizon=4)
    with pytest.raises(ValueError, match="actions have 4 dimensions, the action tokenizer 7"):
        vla.frame_answers(backbone, vla.FrameDataset(cfg), cfg)


# ---- The policy ----------------------------------------------------------------------------------


def observations(data):
    """-> images, instructions, states of three frames."""
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    images, instructions, states = [], [], []
    for number, step in [(0, 0), (1, 2), (0, 5)]:
        episode = frames.episodes[number]
        images.append(episode.frame(step))
        instructions.append(TASKS[number])
        states.append(episode.state[step])
    return images, instructions, np.stack(states)


def test_a_policy_that_lost_its_record_is_told_to_be_copied(trained, tmp_path):
    """It was told to have no policy, and to train one from the cut backbone."""
    shutil.copytree(trained / "final", tmp_path / "copied")
    (tmp_path / "copied" / "run.json").unlink()
    with pytest.raises(ValueError, match="copied: has lost its run.json; copy the whole folder"):
        vla.load_policy(tmp_path / "copied")


def without(run, *names):
    """run.json, where what names lead to has been taken out."""
    run = json.loads(json.dumps(run))
    *before, last = names
    part = run
    for name in before:
        part = part[name]
    del part[last]
    return run


def with_policy(run, **change):
    return run | {"policy": run["policy"] | change}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda run: [run], 'holds no "stage"; copy the whole folder again'),
        (lambda run: without(run, "stage"), 'holds no "stage"; copy'),
        (lambda run: without(run, "policy"), "it is None"),
        (lambda run: without(run, "policy", "head"), "head is missing"),
        (lambda run: without(run, "policy", "cameras"), "cameras is missing"),
        (lambda run: without(run, "policy", "layer"), "layer is missing"),
        (lambda run: without(run, "policy", "think"), "think is missing"),
        (lambda run: without(run, "policy", "stats"), "stats is missing"),
        (lambda run: without(run, "policy", "stats", "state"), "stats.state: no q01"),
        (lambda run: without(run, "policy", "stats", "action", "q99"), "stats.action: no q01"),
        (lambda run: without(run, "policy", "head", "dim"), "missing .* 'dim'"),
        (lambda run: with_policy(run, layer="1"), "layer, or a size"),
        (lambda run: with_policy(run, stats=[]), "no attribute 'get'"),
        (lambda run: with_policy(run, cameras="image"), "cameras is no list"),
        (lambda run: with_policy(run, condition="thought", thoughts="own"), "max_thought is miss"),
        (
            lambda run: with_policy(run, head=run["policy"]["head"] | {"future_tokens": 1}),
            ": head.safetensors is not of the sizes that policy.head in run.json says; copy",
        ),
    ],
)
def test_an_edited_record_of_a_policy_is_one_line(trained, tmp_path, edit, message):
    """These were KeyErrors and TypeErrors, and without "stats" the first action failed."""
    shutil.copytree(trained / "final", tmp_path / "copied")
    path = tmp_path / "copied" / "run.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"copied.*{message}") as e:
        vla.load_policy(tmp_path / "copied")
    assert "copy the whole folder again" in str(e.value) and "\n" not in str(e.value)
    assert str(tmp_path / "copied") in str(e.value) and "run.json" in str(e.value)


def test_a_policy_that_lost_its_head_is_told_to_be_copied(trained, tmp_path):
    """ "No such file or directory: .../head.safetensors" was all that was said."""
    shutil.copytree(trained / "final", tmp_path / "copied")
    (tmp_path / "copied" / "head.safetensors").unlink()
    with pytest.raises(ValueError, match="copied: not whole .*head.safetensors.; copy the whole"):
        vla.load_policy(tmp_path / "copied")


def test_policy_round_trip(data, trained):
    images, instructions, states = observations(data)
    policy = vla.Policy.load(trained)
    assert (policy.horizon, policy.action_dim, policy.cameras) == (4, 4, ["image"])
    chunks = policy.act_batch(images, instructions, states)
    assert chunks.shape == (3, 4, 4) and chunks.dtype == np.float32
    again = vla.Policy.load(trained / "final").act_batch(images, instructions, states)
    assert np.array_equal(chunks, again)
    next_call = policy.act_batch(images, instructions, states)
    assert not np.array_equal(chunks, next_call)  # fresh noise
    other_seed = vla.Policy.load(trained, seed=1).act_batch(images, instructions, states)
    assert not np.array_equal(chunks, other_seed)
    single = vla.Policy.load(trained).act([images[0]], instructions[0], states[0])
    np.testing.assert_allclose(single, chunks[0], atol=1e-4)  # padded in the batch, alone here
    assert (chunks[..., 3] == 0).all()  # the still dimension stays where it is


def test_a_key_draws_the_same_noise_for_each_policy_in_any_batch(data, trained):
    """So that in a paired difference of two models their luck falls out, as far as it can."""
    images, instructions, states = observations(data)
    keys = [["shelf", 0, 8], ["shelf", 1, 8], [3]]

    def noise_of(policy, order):
        """-> what the head starts from, (rows, K, A)."""
        starts = []

        def sample(feats, mask, state, noise):
            starts.extend(noise.numpy())
            return noise

        policy.head.sample = sample
        policy.act_batch(
            [images[i] for i in order],
            [instructions[i] for i in order],
            states[order],
            [keys[i] for i in order],
        )
        return np.stack(starts)

    one = vla.Policy.load(trained)
    other = vla.Policy.load(trained)
    with torch.no_grad():
        for p in other.head.parameters():
            p.mul_(0.5)
    other.act_batch(images, instructions, states)  # another number of calls before
    noise = noise_of(one, [0, 1, 2])
    assert len(np.unique(noise[:, 0, 0])) == 3
    np.testing.assert_array_equal(noise_of(other, [2, 0]), noise[[2, 0]])
    np.testing.assert_array_equal(noise_of(other, [1]), noise[[1]])
    seed_1 = noise_of(vla.Policy.load(trained, seed=1), [0, 1, 2])
    assert (seed_1 != noise).any((1, 2)).all()


def test_policy_equals_its_parts(data, trained):
    """Backbone at --init, saved head, noise, statistics of the episodes."""
    images, instructions, states = observations(data)
    policy = vla.Policy.load(trained)
    chunks = policy.act_batch(images, instructions, states)

    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    backbone = backbones.random_backbone("tiny-vlm")
    vla.freeze_backbone(backbone, 0)
    head = FlowHead(HeadConfig(**policy.spec["head"])).eval()
    head.load_state_dict(load_file(trained / "final" / "head.safetensors"))
    prompt = vla.prompt_row(backbone, [images[1]], instructions[1], False)
    features = vla.encode_prompts(backbone, [prompt], "cpu")
    state = torch.from_numpy(frames.state[11:12])  # step 2 of episode 1
    noise = model.rng(0, "policy", 0).standard_normal((3, 4, 4), np.float32)[1:2]
    sampled = head.sample(*features, state, torch.from_numpy(noise))
    want = vla.unnormalize(sampled.numpy(), frames.stats["action"])
    np.testing.assert_allclose(chunks[1], want[0], atol=1e-4)


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
    assert run["stage"] == "vla"
    assert run["parent"] == untrained.folder("tiny-vlm")
    assert run["step"] == 4


# ---- Thoughts ------------------------------------------------------------------------------------

WORDS = ("The block is at b4. Now reach: left 3.", "open it", "")
VIEW = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)


def rows_with_thoughts(backbone):
    """Of unequal lengths, prompts and thoughts both."""
    rows = []
    for instruction, words in zip((*TASKS, "go"), WORDS, strict=True):
        prompt = vla.prompt_row(backbone, [VIEW], instruction, True)
        rows.append(model.with_thought(prompt, model.encode_thought(backbone, words)))
    return rows


@pytest.mark.parametrize(
    ("size", "layer"), [("tiny-vlm", 3), ("tiny-qwen2.5-vl", 1), ("tiny-qwen3-vl", 2)]
)
def test_features_of_thoughts_are_those_of_one_plain_forward(size, layer):
    """Of transformers, with its own positions, of each row alone: padding in our batch counts for
    nothing. thought-only are the last of them. Of Qwen3-VL it is the last layer, behind the final
    norm: between its first ones it adds to image tokens what its hidden_states do not show."""
    backbone = backbones.random_backbone(size)
    rows = rows_with_thoughts(backbone)
    wants = []
    for row in rows:
        batch = model.collate([row], backbone.vocab.pad)
        patches = model.cut_patches(batch["pixels"], batch["grid"], backbone.image_spec)
        with torch.no_grad():
            output = backbone.net(
                input_ids=batch["ids"],
                attention_mask=batch["mask"],
                pixel_values=patches,
                image_grid_thw=batch["grid"],
                mm_token_type_ids=(batch["ids"] == backbone.vocab.image).int(),
                output_hidden_states=True,
            )
        wants.append(output.hidden_states[layer][0])  # (T, D)
    is_last = layer == len(backbone.net.model.language_model.layers)
    final_norm = vla.freeze_backbone(backbone, layer)
    norm = final_norm if is_last else torch.nn.Identity()
    both = vla.encode_prompts(backbone, rows, "cpu", "thought").rows()
    alone = vla.encode_prompts(backbone, rows, "cpu", "thought-only").rows()
    for row, want, of_both, of_thought in zip(rows, wants, both, alone, strict=True):
        length = int(row["target"].sum())
        text = backbone.tokenizer.decode(row["ids"][-length:])
        assert text.startswith("<think>") and text.endswith("</think>")
        torch.testing.assert_close(norm(of_both), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm(of_thought), want[-length:], rtol=1e-4, atol=1e-4)
    assert len({len(feats) for feats in alone}) == 3


def test_thoughts_are_the_same_in_any_batch_and_by_a_copy_beside_the_cut_backbone():
    """The copy shares the weights and stays whole."""
    backbone = backbones.random_backbone("tiny-vlm")
    prompts = [vla.prompt_row(backbone, [VIEW], text, True) for text in (*TASKS, "go")]
    singles = [vla.write_thoughts(backbone, [prompt], 7)[0] for prompt in prompts]
    whole = vla.whole_copy(backbone)
    vla.freeze_backbone(backbone, 1)
    together = vla.write_thoughts(whole, prompts, 7)
    assert all(np.array_equal(*pair) for pair in zip(singles, together, strict=True))
    assert len(whole.net.model.language_model.layers) == 4 and len(together[0]) == 7
    for name, p in backbone.net.named_parameters():
        assert name.endswith("norm.weight") or p is whole.net.get_parameter(name), name


def test_where_a_thought_ends(monkeypatch):
    """At the token that completes </think>, which is one in Qwen3 and text in Qwen2.5; a thought
    that never closes is used as far as it got."""
    backbone = backbones.random_backbone("tiny-vlm")
    encode = backbone.tokenizer.encode
    one_token = encode("<think>left</think>")
    in_pieces = [*encode("<think>up"), *encode("</"), *encode("think"), *encode(">")]
    unfinished = encode("<think>and on")
    written = [one_token, [*in_pieces, *encode("\n<answer>")], unfinished, [backbone.vocab.eos]]
    stops = []

    def generate(backbone, rows, stop, **flags):
        stops.append(stop)
        ids = [torch.tensor(ids) for ids in written]
        mask = [torch.ones_like(row) for row in ids]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {"ids": pad(ids), "mask": pad(mask)}

    monkeypatch.setattr(model, "generate", generate)
    thoughts = vla.write_thoughts(backbone, [None] * 4, 9)
    want = [one_token, in_pieces, unfinished, [backbone.vocab.eos]]
    assert [thought.tolist() for thought in thoughts] == want
    finished = [vla.is_finished(backbone, thought) for thought in thoughts]
    assert finished == [True, True, False, False]
    texts = [vla.thought_text(backbone, thought) for thought in thoughts]
    assert texts == ["left", "up", "and on", ""]
    assert stops == [{backbone.vocab.eos, one_token[-1]}], "the action token is not known yet"


def test_an_answer_is_no_part_of_a_thought():
    """Where </think> was missing, the answer behind it, or the end of the turn, was kept as thought
    and given to the model again; a written <image> ended the run."""
    backbone = backbones.random_backbone("tiny-vlm")
    sft.grow_vocabulary(backbone, 4)
    for tail in (
        "<answer>b</answer>",
        model.action_answer([1, 2]),
        "<|im_end|>",
        "<image>.</think>",
    ):
        ids = backbone.tokenizer.encode(f"<think>The cube {tail}")
        assert vla.thought_text(backbone, ids) == "The cube"


def test_short_episodes_are_thought_about_together(data):
    """The groups are the same on any number of ranks, and so are the batches."""
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    assert vla.episode_groups(frames, 16) == [[0, 1], [2], [3], [4]]  # of 9, 5, 7, 12, 6 frames
    assert vla.episode_groups(frames, 18) == [[0, 1], [2], [3, 4]]
    assert vla.episode_groups(frames, 5) == [[0], [1], [2], [3], [4]]


THINKING = {"condition": "thought", "max-thought": 5, "save-every": 2}


@pytest.fixture(scope="module")
def thinking(data, tmp_path_factory):
    """A run whose head reads the untrained model's own thoughts."""
    out = tmp_path_factory.mktemp("thinking")
    vla.main(argv(data, out, **THINKING))
    return out


def test_resume_with_thoughts_equals_uninterrupted(data, thinking, tmp_path, monkeypatch):
    """Also where the thoughts on disk are not written again."""
    shutil.copytree(thinking, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "step_000004")
    monkeypatch.setattr(model, "generate", None)
    vla.main(argv(data, tmp_path / "run", **THINKING, resume=True))
    got = load_file(tmp_path / "run" / "final" / "head.safetensors")
    want = load_file(thinking / "final" / "head.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)
    for old, new in zip(records(thinking)[-3:], records(tmp_path / "run")[-3:], strict=True):
        for key in old.keys() - {"seconds", "steps_per_s"}:
            assert old[key] == new[key]


def test_thoughts_on_two_ranks_and_in_the_loop_train_alike(data, thinking, tmp_path):
    """--cache none on two ranks, of which the second builds no weights, against cached features on
    one: the same thoughts, and features up to fp16."""
    on_ranks(vla.main, argv(data, tmp_path, **THINKING, cache="none"), 2)
    for path in sorted((thinking / "features" / "thoughts").glob("*.safetensors")):
        other = load_file(tmp_path / "features" / "thoughts" / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, other[name]), path
    assert not list((tmp_path / "features").glob("*.safetensors"))
    for a, b in zip(records(thinking)[1:], records(tmp_path)[1:], strict=True):
        for key in {"loss", "held_loss", "held_l1"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=2e-3), key
    weights = [load_file(out / "final" / "model.safetensors") for out in (thinking, tmp_path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_head_reads_at_run_time_what_it_read_in_training(data, thinking):
    """The features of frames, by the checkpoint alone: it holds the whole backbone, which
    transformers loads."""
    policy = vla.Policy.load(thinking)
    seen = []

    def sample(feats, mask, state, noise):
        seen.extend(vla.Features(feats, mask).rows())
        return noise

    policy.head.sample = sample
    images, instructions, states = observations(data)
    policy.act_batch(images, instructions, states)
    for feats, (episode, step) in zip(seen, [(0, 0), (1, 2), (0, 5)], strict=True):
        stored = load_file(thinking / "features" / f"episode_{episode:06d}.safetensors")
        torch.testing.assert_close(stored["features"][step].float(), feats, atol=2e-3, rtol=2e-3)
    assert len(policy.thoughts) == 3 and policy.count["thinking"] > 0
    assert policy.count["unfinished"] == 3, "an untrained model closes none: counted, not refused"
    assert len(policy.writer.net.model.language_model.layers) == 4
    assert len(policy.backbone.net.model.language_model.layers) == policy.spec["layer"] == 3
    assert {"condition": "thought", "thoughts": "own", "max_thought": 5}.items() <= (
        policy.spec.items()
    )


def test_a_thinking_policy_gives_a_row_the_same_in_any_batch(data, thinking, capsys):
    images, instructions, states = observations(data)
    keys = [[0], [1], [2]]
    policy = vla.Policy.load(thinking)
    chunks = policy.act_batch(images, instructions, states, keys)
    for i in range(3):
        row = slice(i, i + 1)
        single = policy.act_batch(images[row], instructions[row], states[row], keys[row])
        np.testing.assert_allclose(single[0], chunks[i], atol=1e-4)
    assert policy.count["unfinished"] == policy.count["chunks"] == 6


@pytest.fixture(scope="module")
def thoughtful(data, tmp_path_factory):
    """`data` with a thought at each step."""
    folder = tmp_path_factory.mktemp("thoughtful")
    for number, length in enumerate(LENGTHS):
        name = f"episode_{number:06d}.safetensors"
        thoughts = [f"step {step} " + "on " * (step % 3) for step in range(length)]
        header = {"task": TASKS[number % 2], "thoughts": json.dumps(thoughts)}
        tensors = {name: tensor.numpy() for name, tensor in load_file(data / name).items()}
        save_file(tensors, folder / name, header)
    return folder


def test_recorded_thoughts_condition_the_head(data, thoughtful, tmp_path, monkeypatch):
    """Nothing is written, the backbone is stored cut, and acting takes the thoughts in words."""
    flags = {"condition": "thought-only", "thoughts": "recorded", "steps": 1}
    monkeypatch.setattr(model, "generate", None)
    vla.main(argv(thoughtful, tmp_path, **flags))
    stored = load_file(tmp_path / "features" / "episode_000001.safetensors")
    policy = vla.Policy.load(tmp_path)
    lengths = []
    for step in range(LENGTHS[1]):
        words = f"step {step} " + "on " * (step % 3)
        lengths.append(len(model.encode_thought(policy.backbone, words)))
    assert stored["length"].tolist() == lengths and stored["features"].shape[1] == max(lengths)
    assert policy.writer is None and len(policy.backbone.net.model.language_model.layers) == 3
    images, instructions, states = observations(data)
    given = policy.act_batch(images, instructions, states, [[0]] * 3, ["a", "b", "c"])
    other = policy.act_batch(images, instructions, states, [[0]] * 3, ["a", "b", "left"])
    assert np.allclose(given[:2], other[:2], atol=1e-4) and not np.allclose(given[2], other[2])
    assert policy.thoughts == ["a", "b", "left"]
    for thoughts, message in (
        (None, "recorded thoughts and is given none here; train it"),
        (["a"], "1 thoughts for 3 observations; give one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.act_batch(images, instructions, states, thoughts=thoughts)


def test_recorded_thoughts_train_a_backbone(thoughtful, tmp_path):
    flags = {"condition": "thought-only", "thoughts": "recorded", "steps": 1, **BY_FLOW}
    vla.main(argv(thoughtful, tmp_path, **flags))
    policy = vla.Policy.load(tmp_path)
    untouched = backbones.random_backbone("tiny-vlm").net.state_dict()
    for name in ("model.language_model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        assert not torch.equal(policy.backbone.net.state_dict()[name], untouched[name])


def test_a_recorded_thought_that_stands_for_an_image_names_its_step(thoughtful, tmp_path):
    """Its token met no image in the forward, and the error named neither file nor cure."""
    folder = tmp_path / "data"
    shutil.copytree(thoughtful, folder)
    path = folder / "episode_000001.safetensors"
    thoughts = ["so"] * LENGTHS[1]
    thoughts[2] = "I see <|image_pad|>"
    tensors = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"task": TASKS[1], "thoughts": json.dumps(thoughts)})
    flags = {"condition": "thought", "thoughts": "recorded"}
    with pytest.raises(ValueError, match="episode_000001: thought of step 2: .*image_pad"):
        vla.main(argv(folder, tmp_path / "run", **flags))


def test_wrong_combinations_of_thoughts_are_one_line(data, thoughtful, thinking, tmp_path):
    for folder, flags, words in (
        (data, {"condition": "mind"}, "--condition mind: choose prompt or thought or thought-only"),
        (data, {"thoughts": "true"}, "--thoughts true: choose own or recorded"),
        (thoughtful, {"thoughts": "recorded"}, "the head reads none; add --condition thought"),
        (
            data,
            {"condition": "thought", "thoughts": "recorded"},
            "episode_000000: holds no thoughts; record it .* or use --thoughts own",
        ),
        (data, {"condition": "thought", "layer": 5}, r"layer 5 is not in 1\.\.4"),
    ):
        with pytest.raises(ValueError, match=words) as e:
            vla.main(argv(folder, tmp_path, **flags))
        assert "\n" not in str(e.value)
    assert not list(tmp_path.rglob("*.safetensors")), "refused before anything is made"
    cache = {"cache-dir": thinking / "features"}
    for flags, words in (
        ({"max-thought": 6}, "thoughts: thoughts of other max_thought than"),
        ({"condition": "thought-only"}, "features: features of other condition than"),
        ({"condition": "prompt", "think": True}, "features of other .*condition, thoughts than"),
    ):
        with pytest.raises(ValueError, match=words):
            vla.main(argv(data, tmp_path, **{**THINKING, **flags}, **cache))


# ---- Bad input -----------------------------------------------------------------------------------


def test_bad_flags_stop_with_a_clear_line(data, trained, tmp_path):
    for flags, text in (
        ({"init": trained}, "stage 'vla', expected base or sft or grpo"),
        ({"horizon": 13}, "not in 1..12, the length of the longest episode"),
        ({"cameras": "image,top"}, "no camera 'top'; choose --cameras among image, image_wrist"),
        ({"layer": 5}, "layer 5 is not in 1..4"),
        ({"cache": "ram"}, "choose features or none"),
        ({"heads": 5}, "--dim 32 must be even and a multiple of --heads 5"),
        (
            {"dim": 30, "heads": 10},
            "backbone width .* multiple of --heads 10",
        ),
        ({"cameras": "image,image"}, "name each of them once"),
        ({"ce-weight": 1}, "--ce-weight 1.0: the backbone is frozen; add --backbone-lr"),
        ({"backbone-lr": 1e-3}, "change in each step; add --cache none"),
        ({**BY_BOTH, "think": True}, "does not ask to think; leave out --think and --condition"),
        ({**BY_FLOW, "condition": "thought"}, "before it was trained; add --thoughts recorded"),
        (BY_BOTH, "tiny-vlm has no action tokenizer with statistics; train it .* with sft.py"),
    ):
        with pytest.raises(ValueError, match=text):
            vla.main(argv(data, tmp_path, **flags))
    assert not list(tmp_path.rglob("*.safetensors")), "refused before any feature is made"


def test_bad_observations_stop_with_a_clear_line(data, trained):
    images, instructions, states = observations(data)
    policy = vla.Policy.load(trained)
    with pytest.raises(ValueError, match="2 images; the policy was trained with the cameras image"):
        policy.act(images[:2], instructions[0], states[0])
    with pytest.raises(ValueError, match="give as many of each, states"):
        policy.act_batch(images, instructions, states[:, :2])
    with pytest.raises(ValueError, match="instruction 1 is blank"):
        policy.act_batch(images, [instructions[0], " ", instructions[2]], states)
    states[1] = np.nan
    with pytest.raises(ValueError, match="state 1 is not finite"):
        policy.act_batch(images, instructions, states)


def test_a_head_that_reads_no_thought_is_given_none(data, trained):
    """It acted as if none were given; one thought for three observations was fine, too."""
    policy = vla.Policy.load(trained)
    with pytest.raises(ValueError, match="this policy reads none; give none, or a head trained"):
        policy.act_batch(*observations(data), thoughts=["left"])


def test_the_size_of_the_images_travels_in_the_checkpoint(data, trained, capsys):
    """An image of twice the size gave other tokens, 64 instead of 16 of them, and other actions,
    without a word. Each pixel doubled and brought back to the size of training, it means the same,
    within what a cubic filter changes; what cannot be brought back is refused by its camera."""
    images, instructions, states = observations(data)
    spec = json.loads((trained / "final" / "run.json").read_text())["policy"]
    assert spec["image_sizes"] == {"image": [32, 32]}
    policy = vla.Policy.load(trained)
    flat = [np.full_like(image, 100 + 20 * i) for i, image in enumerate(images)]
    twice = [image.repeat(2, 0).repeat(2, 1) for image in flat]
    keys = [[0], [1], [2]]
    want = policy.act_batch(flat, instructions, states, keys)
    assert "resized" not in capsys.readouterr().out
    for _ in range(2):
        assert np.array_equal(policy.act_batch(twice, instructions, states, keys), want)
    line = "image: images of 64 x 64 pixels are resized to 32 x 32, as in training\n"
    assert capsys.readouterr().out == line, "said once"
    with pytest.raises(ValueError, match=r"image is 48 x 32 \(height x width\), .* at 32 x 32"):
        policy.act(np.zeros((48, 32, 3), np.uint8), instructions[0], states[0])
    with pytest.raises(ValueError, match=r"image is float32 \(64, 64, 3\); give uint8"):
        policy.act(twice[0].astype(np.float32), instructions[0], states[0])
    for height, width in ((719, 1279), (360, 640)):  # within a pixel of 16:9
        vla.check_view("image", np.zeros((height, width, 3), np.uint8), [720, 1280])
    policy.views.image_sizes = {}  # of a checkpoint of before: as it was
    assert not np.array_equal(policy.act_batch(twice, instructions, states, keys), want)


def test_episodes_of_two_image_sizes_are_refused(data, tmp_path):
    """They trained silently, on prompts of two lengths, and no size was the policy's."""
    for number, side in enumerate((32, 32, 16)):
        save_file(
            {
                "image": np.zeros((9, side, side, 3), np.uint8),
                "state": np.zeros((9, 3), np.float32),
                "action": np.zeros((9, 4), np.float32),
            },
            tmp_path / f"episode_{number:06d}.safetensors",
            metadata={"task": "wave"},
        )
    words = "episode_000002.*image is 16 x 16, in episode_000000 32 x 32"
    with pytest.raises(ValueError, match=words):
        vla.FrameDataset(vla.Config(data=str(tmp_path), horizon=4))


def test_views_go_by_name(data, tmp_path):
    """A list in the wrong order is two images of one size: no one can tell. A dict cannot be in the
    wrong order; what it has besides is not looked at, what it lacks is named."""
    vla.main(argv(data, tmp_path, cameras="image_wrist,image", steps=1))
    policy = vla.Policy.load(tmp_path)
    frames = vla.FrameDataset(vla.Config(data=str(data), cameras="image_wrist,image", horizon=4))
    (wrist, front), instruction = frames.observation(0)
    state = frames.episodes[0].state[:1]
    by_order = policy.act_batch([[wrist, front]], [instruction], state, [[0]])
    views = {"image": front, "image_wrist": wrist, "image_top": front}
    by_name = policy.act_batch([views], [instruction], state, [[0]])
    assert np.array_equal(by_name, by_order)
    with pytest.raises(ValueError, match="1 images; .* the cameras image_wrist, image"):
        policy.act({"image": front}, instruction, state[0])


def test_the_range_of_the_actions_travels_in_the_checkpoint(data, trained):
    """Least and largest of the episodes trained on, in dataset units: simulators compare it with
    what they take. The held-out ones do not count."""
    spec = json.loads((trained / "final" / "run.json").read_text())["policy"]
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4))
    actions = np.concatenate(
        [e.action for e in frames.episodes if e not in frames.held_out_episodes]
    )
    assert len(actions) == len(frames.train) < sum(LENGTHS)
    assert spec["action_range"] == {"low": actions.min(0).tolist(), "high": actions.max(0).tolist()}
    # of two that are held out one reaches further than all others
    frames = vla.FrameDataset(vla.Config(data=str(data), horizon=4, holdout_share=0.4))
    known = [e.action for e in frames.episodes if e not in frames.held_out_episodes]
    low, high = np.concatenate(known).min(0), np.concatenate(known).max(0)
    held_out = np.concatenate([e.action for e in frames.held_out_episodes])
    assert ((held_out < low) | (held_out > high)).any()
    assert frames.action_range == {"low": low.tolist(), "high": high.tolist()}


def test_a_policy_does_not_grow_with_what_it_is_asked(data, trained):
    """Policy.memo kept the row of each new prompt for ever, a leak in a server: 64 KB for one of
    2,000 characters."""

    def lengths():
        held = dict(vars(policy))
        for part in ("backbone", "views"):
            for name, value in vars(getattr(policy, part)).items():
                held[f"{part}.{name}"] = value
        return {name: len(value) for name, value in held.items() if hasattr(value, "__len__")}

    images, _, states = observations(data)
    policy = vla.Policy.load(trained)
    policy.act(images[0], "say", states[0])
    before = lengths()
    for i in range(5):
        policy.act(images[0], f"say {i}", states[0])
    assert lengths() == before and "views.image_sizes" in before


def test_a_checkpoint_of_another_stage_is_no_policy(tmp_path):
    backbone = backbones.random_backbone("tiny-vlm")
    model.save(tmp_path / "sft", backbone, {"stage": "sft", "step": 1})
    with pytest.raises(ValueError, match="stage 'sft', expected vla"):
        vla.Policy.load(tmp_path / "sft")


def test_damaged_episodes_end_the_command_in_one_line(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    save_file(
        {
            "image": np.zeros((3, 32, 32, 3), np.uint8),
            "state": np.zeros((3, 3), np.float32),
            "action": np.full((3, 4), np.nan, np.float32),
        },
        folder / "episode_000000.safetensors",
        metadata={"task": "wave"},
    )
    done = subprocess.run(
        [sys.executable, ROOT / "vla.py", *argv(folder, tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "action row 0 is not finite" in done.stderr
