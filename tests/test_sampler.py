"""The sampler against transformers' generate, a full forward, and the probabilities themselves."""

import datetime
import weakref

import numpy as np
import pytest
import torch
import untrained
from scipy.stats import chisquare
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.proxy_tensor import make_fx

import grpo
import model
import sft

FAMILIES = [untrained.folder("tiny-qwen3-vl"), untrained.folder("tiny-qwen2.5-vl")]


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    return model.load(request.param)


@pytest.fixture
def small():
    return model.load(FAMILIES[0])  # fresh, for tests that change it


def prompts(backbone, few=False):
    """Four prompts of unequal length: one image, none, two images, one of another size."""
    rng = np.random.default_rng(0)

    def image(h, w):
        return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)

    asked = [
        ("<image>Where is the red block?", [image(32, 32)]),
        ("The robot moves down and closes the gripper.", []),
        ("<image>What is here?<image>", [image(48, 32), image(32, 64)]),
        ("<image>" + model.ask(model.action_question("lift it"), True), [image(64, 64)]),
    ]
    return [
        model.encode(backbone, [{"role": "user", "content": text}], images, prompt_only=True)
        for text, images in asked[: 2 if few else 4]
    ]


def samples(out):
    """-> the sampled ids of each row, without padding."""
    return [i[m.bool()].tolist() for i, m in zip(out["ids"], out["mask"], strict=True)]


def reference(backbone, row, max_new, stop):
    """transformers' greedy continuation of one prompt, unpadded and alone."""
    ids = torch.from_numpy(row["ids"])[None]
    images = {}
    if row["pixels"] is not None:
        batch = model.collate([row], backbone.vocab.pad)
        images = {
            "pixel_values": model.cut_patches(batch["pixels"], batch["grid"], backbone.image_spec),
            "image_grid_thw": batch["grid"],
            "mm_token_type_ids": (ids == backbone.vocab.image).int(),
        }
    out = backbone.net.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new,
        **images,
        do_sample=False,
        suppress_tokens=backbone.vocab.banned,
        eos_token_id=stop,
        pad_token_id=backbone.vocab.pad,
    )
    return out[0, ids.shape[1] :].tolist()


def test_greedy_equals_transformers(backbone):
    rows = prompts(backbone)
    want = [reference(backbone, row, 24, [backbone.vocab.eos]) for row in rows]
    got = model.generate(backbone, rows, max_new_tokens=24, greedy=True)
    assert samples(got) == want
    # the same with rows that end at different steps, two of them before the others
    stop = [want[0][2], want[2][5]]
    early = [reference(backbone, row, 24, stop) for row in rows]
    assert 2 <= len({len(i) for i in early}) and min(map(len, early)) <= 3
    once = samples(model.generate(backbone, rows, max_new_tokens=24, greedy=True, stop=stop))
    assert once == early
    twice = samples(model.generate(backbone, rows, n=2, max_new_tokens=24, greedy=True, stop=stop))
    assert twice[0::2] == twice[1::2] == early


def test_greedy_without_padding(backbone):  # no padding takes the path without an attention mask
    row = prompts(backbone)[3]
    got = samples(model.generate(backbone, [row] * 2, max_new_tokens=12, greedy=True))
    assert got == [reference(backbone, row, 12, [backbone.vocab.eos])] * 2


def test_logp_equals_a_full_forward(backbone):
    rows = prompts(backbone)
    n, temperature = 3, 0.7
    ends = range(0, len(backbone.tokenizer), 9)
    out = model.generate(backbone, rows, n, 20, temperature, seed=1, stop=ends)
    assert out["mask"].sum(1).unique().numel() > 3  # rows left the batch at many steps
    assert (out["logp"][out["mask"] == 0] == 0).all()
    for k, new in enumerate(samples(out)):
        row = rows[k // n]
        pos = np.arange(len(new)) + row["positions"].max() + 1
        full = {
            **row,
            "ids": np.concatenate([row["ids"], new]),
            "positions": np.concatenate([row["positions"], np.tile(pos, (3, 1))], 1),
            "target": np.zeros(len(row["ids"]) + len(new), bool),
        }
        with torch.no_grad():
            h = model.hidden_states(backbone.net, model.collate([full], backbone.vocab.pad))[0]
            want, _ = grpo.token_logp(
                backbone.net,
                h[-len(new) - 1 : -1],
                torch.tensor(new),
                temperature,
                backbone.vocab.banned,
            )
        torch.testing.assert_close(out["logp"][k, : len(new)], want, atol=1e-4, rtol=0)


def test_the_batch_does_not_change_the_samples(backbone):
    rows = prompts(backbone)
    kw = {"n": 3, "max_new_tokens": 16, "seed": 5, "stop": range(0, 300, 11)}
    whole = samples(model.generate(backbone, rows, **kw))
    assert len({tuple(i) for i in whole}) == len(whole)  # every prompt and sample draws its own
    first = samples(model.generate(backbone, rows[:1], keys=range(1), **kw))
    others = samples(model.generate(backbone, rows[1:], keys=range(1, 4), **kw))
    assert first + others == whole
    back = samples(model.generate(backbone, rows[::-1], keys=[3, 2, 1, 0], **kw))
    assert [back[9 - 3 * b + g] for b in range(4) for g in range(3)] == whole
    same = samples(model.generate(backbone, rows[:1] * 2, keys=[0, 9], **kw))
    assert same[:3] == whole[:3]
    assert all(a != b for a, b in zip(same[:3], same[3:], strict=True))
    assert samples(model.generate(backbone, rows, **{**kw, "n": 2}))[:2] == whole[:2]
    assert samples(model.generate(backbone, rows, **{**kw, "seed": 6})) != whole


def traced(graphs):
    """model.record on a CPU: the operations of a step, as those of a CUDA graph, run again on the
    tensors that they were traced on, without the Python that chose them. Tracing stops at what a
    graph cannot hold: a decision about the values in a tensor."""

    def record(step, device):
        assert device == torch.device("cpu")  # of the net, which need not be the current one
        tensors = vars(step.__self__).values()
        before = [(x, x.clone()) for x in tensors if isinstance(x, torch.Tensor)]

        def without_self():  # make_fx takes a method's self for an input
            step()

        graph = make_fx(without_self, tracing_mode="fake", _allow_non_fake_inputs=True)()
        for x, was in before:  # tracing counts in t, recording a CUDA graph does not
            x.copy_(was)
        called = {str(node.target) for node in graph.graph.nodes}
        assert not [x for x in called if "nonzero" in x or "lift_fresh" in x or "scalar_dense" in x]
        graphs.append(0)

        def replay():
            graphs[-1] += 1
            graph()

        return replay

    return record


@pytest.mark.parametrize("greedy", [False, True])
def test_replayed_steps_sample_the_same(backbone, monkeypatch, greedy):
    rows = prompts(backbone)
    graphs = []  # how often each was replayed
    monkeypatch.setattr(model, "record", traced(graphs))
    for stop, top_p in (([], 1.0), (range(0, 300, 40), 0.9)):
        kw = {"n": 3, "max_new_tokens": 150, "stop": stop, "top_p": top_p, "greedy": greedy}
        want = model.generate(backbone, rows, **kw)
        assert not graphs
        got = model.generate(backbone, rows, **kw, cuda_graphs=True)
        assert samples(got) == samples(want) and got["ids"].shape == want["ids"].shape
        assert torch.equal(got["ids"], want["ids"]) and torch.equal(got["mask"], want["mask"])
        torch.testing.assert_close(got["logp"], want["logp"], atol=1e-5, rtol=0)
        if not stop:
            # token 0 from the prompt; two blocks of the cache, the first step of each plain
            assert graphs == [127, 20]
        graphs.clear()


def test_a_step_that_looks_at_values_cannot_be_recorded(small, monkeypatch):
    monkeypatch.setattr(model, "record", traced([]))
    draw = model.draw_tokens
    monkeypatch.setattr(model, "draw_tokens", lambda logp, u, p, wait: draw(logp, u, p, True))
    with pytest.raises(RuntimeError, match="data-dependent"):
        model.generate(small, prompts(small), cuda_graphs=True)


def test_tensors_stay_on_their_device(small, monkeypatch):
    """Shapes and types alone, in bf16 on a pretended device, whose tensors must not meet those of a
    CPU."""
    rows = prompts(small)[1:2] * 4  # no image: transformers' tower asks for values there
    n = 8
    monkeypatch.setattr(model, "record", lambda step, device: step)
    monkeypatch.setattr(model, "int", lambda x: 32 if torch.is_tensor(x) else int(x), raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in small.net.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    there = fake.from_tensor(p.detach()).to("lazy:0", torch.bfloat16)
                    module._parameters[name] = nn.Parameter(there)
            for name, b in module._buffers.items():
                module._buffers[name] = fake.from_tensor(b).to("lazy:0")
        for kw in {"greedy": True}, {"top_p": 0.5}:
            out = model.generate(small, rows, n, 32, cuda_graphs=True, **kw)
            assert {k: (*x.shape, x.dtype) for k, x in out.items()} == {
                "ids": (32, 32, torch.long),
                "mask": (32, 32, torch.long),
                "logp": (32, 32, torch.float32),
            }
            assert {str(x.device) for x in out.values()} == {"lazy:0"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs(small):
    small.net.cuda()
    rows = prompts(small)
    kw = {"n": 3, "max_new_tokens": 150, "stop": range(0, 300, 40)}
    want = model.generate(small, rows, **kw, cuda_graphs=False)
    got = model.generate(small, rows, **kw, cuda_graphs=True)
    same = sum(a == b for a, b in zip(samples(got), samples(want), strict=True))
    assert same >= 11  # of 12: a near tie may fall otherwise, and what follows it
    assert samples(model.generate(small, rows, **kw, cuda_graphs=True)) == samples(got)


def test_chunks_of_like_length(small, monkeypatch):
    rows = prompts(small)
    whole = model.generate(small, rows, 2, 9, stop=[])
    collate = model.collate
    seen = []  # the lengths of each batch

    def watched(rows, *a, **kw):
        seen.append([len(row["ids"]) for row in rows])
        return collate(rows, *a, **kw)

    monkeypatch.setattr(model, "collate", watched)
    got = model.generate(small, rows, 2, 9, stop=[], rollout_batch=3)
    lengths = [len(row["ids"]) for row in rows]
    by_length = sorted(lengths)
    assert seen == [by_length[:3], by_length[3:]] and by_length != lengths
    assert torch.equal(got["ids"], whole["ids"])
    torch.testing.assert_close(got["logp"], whole["logp"], atol=1e-5, rtol=0)


def test_finished_rows_stop_and_leave(small):
    stop = list(range(0, len(small.tokenizer), 5))
    seen = []  # rows in each forward
    small.net.lm_head.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    small.net.train()
    out = model.generate(small, prompts(small), n=8, max_new_tokens=99, seed=2, stop=stop)
    assert small.net.training  # as before
    length = out["mask"].sum(1)
    assert out["ids"].shape[1] == length.max() < 99 and length.min() < 3
    for ids, mask, k in zip(
        out["ids"].tolist(), out["mask"].tolist(), length.tolist(), strict=True
    ):
        assert mask == [1] * k + [0] * (len(ids) - k)
        assert ids[k - 1] in stop and not set(ids[: k - 1]) & set(stop)
        assert set(ids[k:]) <= {small.vocab.pad}
    assert sum(seen) == out["mask"].sum()  # no row is computed after its end


def test_banned_ids_are_never_sampled(small):
    with torch.no_grad():
        small.net.lm_head.weight.zero_()  # all ids as likely, also for the embedding tied to it
    small.vocab.banned = [*small.vocab.banned, 0, 1, *range(100, 300)]
    out = model.generate(small, prompts(small), n=64, max_new_tokens=64, seed=3, stop=[])
    free = set(range(small.net.lm_head.out_features)) - set(small.vocab.banned)
    assert set(out["ids"].flatten().tolist()) == free  # 16,384 draws reach each free id
    torch.testing.assert_close(out["logp"], torch.full_like(out["logp"], -np.log(len(free))))
    greedy = model.generate(small, prompts(small), max_new_tokens=4, greedy=True)
    assert set(greedy["ids"].flatten().tolist()) <= free  # id 0 would be the argmax


def test_frequencies_are_the_probabilities(small):
    rows = prompts(small, few=True)[:1]
    N = 4000
    with torch.no_grad():
        batch = model.collate(rows, small.vocab.pad)
        logits = model.logits(small.net, model.hidden_states(small.net, batch)[0, -1:])[0] / 1.5
    logits[small.vocab.banned] = -torch.inf
    want = N * logits.softmax(-1).double().numpy()
    out = model.generate(small, rows, N, 1, temperature=1.5, stop=[])
    got = np.bincount(out["ids"][:, 0].numpy(), minlength=len(want))
    often = want >= 5  # the chi-square rule of thumb; the rest is one class
    assert often.sum() > 20
    observed = [*got[often], got[~often].sum()]
    expected = np.array([*want[often], want[~often].sum()])
    assert chisquare(observed, expected * N / sum(expected)).pvalue > 0.01


def test_draw_by_hand():
    p = torch.tensor([0.0, 0.3, 0.0, 0.5, 0.05, 0.15, 0.0])
    u = torch.tensor([1e-30, 0.29, 0.31, 0.79, 0.81, 0.84, 0.86, 1.0])

    def draw(u, **kw):
        return model.draw_tokens(p.log().expand(len(u), -1), u, **kw).tolist()

    assert draw(u) == [1, 1, 3, 3, 4, 4, 5, 5]  # ids 0, 2 and 6 have no probability
    even = (torch.arange(1000) + 0.5) / 1000
    assert np.bincount(draw(even)).tolist() == [0, 300, 0, 500, 50, 150]
    # .5 alone reaches .4; .5 + .3 reach .75, and are drawn as 5 : 3; the tail is out
    assert np.bincount(draw(even, top_p=0.4)).tolist() == [0, 0, 0, 1000]
    assert np.bincount(draw(even, top_p=0.75)).tolist() == [0, 375, 0, 625]
    assert set(draw(even, top_p=0.9)) == {1, 3, 5}


def test_top_p_in_generate(small):
    rows = prompts(small)
    greedy = model.generate(small, rows, max_new_tokens=8, greedy=True, stop=[])
    narrow = model.generate(small, rows, n=2, max_new_tokens=8, top_p=1e-6, stop=[])
    assert samples(narrow)[::2] == samples(narrow)[1::2] == samples(greedy)
    torch.testing.assert_close(narrow["logp"][::2], greedy["logp"])  # logp is that before top_p


def test_wrong_arguments_and_no_prompts(small):
    with pytest.raises(ValueError, match="greedy=True"):
        model.generate(small, prompts(small), temperature=0)
    with pytest.raises(ValueError, match="top_p 0"):
        model.generate(small, prompts(small), top_p=0)
    assert model.generate(small, [])["ids"].shape == (0, 0)


def test_one_cache_at_a_time(small, monkeypatch):
    """The cache of the prompts before was still alive while the next ones were forwarded: at the
    paper's size 9 GB of a GPU."""
    alive, most = weakref.WeakSet(), []

    class Counted(model.SampleKV):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(model, "SampleKV", Counted)
    model.generate(small, prompts(small), n=2, max_new_tokens=4, stop=[], rollout_batch=2)
    layers = len(small.net.model.language_model.layers)
    assert len(most) == 2 * layers and max(most) == layers


def two_ranks(rank, folder):
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=300),
    )
    backbone = model.load(FAMILIES[0])
    rows = prompts(backbone)
    want = model.generate(backbone, rows, n=2, max_new_tokens=9, seed=4, stop=range(0, 300, 7))
    row = model.encode(
        backbone,
        [
            {"role": "user", "content": "What is here?"},
            {"role": "assistant", "content": "A small cube."},
        ],
    )
    batch = model.collate([row], backbone.vocab.pad)
    sft.token_loss(backbone.net, batch)[0].backward()
    grads = {k: p.grad.clone() for k, p in backbone.net.named_parameters() if p.grad is not None}
    backbone.net.zero_grad()
    blocks = backbone.net.model.language_model.layers
    for block in blocks:  # shard() leaves so small a model in one unit
        fully_shard(block)
    model.shard(backbone.net, model.Dist(rank, 2, torch.device("cpu")))
    root = backbone.net._get_fsdp_state()
    roots = []  # whom each forward of the first block takes for the root
    blocks[0].register_forward_pre_hook(lambda *_: roots.append(root._state_ctx.iter_forward_root))
    for of_ranks in [range(4), range(0)], [range(1), range(1, 4)]:
        local_prompts = of_ranks[rank]
        with model.unsharded(backbone.net):
            got = model.generate(
                backbone,
                [rows[i] for i in local_prompts],
                n=2,
                max_new_tokens=9,
                seed=4,
                keys=local_prompts,
                stop=range(0, 300, 7),
            )
        assert samples(got) == [samples(want)[2 * i + g] for i in local_prompts for g in range(2)]
        # a block that takes itself for the root waits for streams, which no CUDA graph may hold
        assert all(r is root for r in roots) and (len(roots) > 2 or not local_prompts)
        roots.clear()
        sft.token_loss(backbone.net, batch)[0].backward()
        for k, p in backbone.net.named_parameters():
            if k in grads:
                torch.testing.assert_close(p.grad.full_tensor(), grads[k])
        backbone.net.zero_grad()
    distributed.destroy_process_group()


def test_sharded_ranks_with_unequal_prompts(tmp_path):
    """Ranks with 4 and 0, then 1 and 3 prompts sample what one process does, and train after it.

    The first pair hung in the backward: FSDP prefetched by the order of the rollouts' forwards,
    which the rank without a prompt did not have.
    """
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
