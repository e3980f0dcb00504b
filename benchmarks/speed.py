"""Our code against its peers, taking turns in one process: rollout, GRPO, SFT, head training, FAST.

Weights are random, data synthetic. Prints a line a pair, then one JSON line with medians, quartiles
and the ratio (peer / ours). Both sides start from the same weights and inputs, run once unmeasured,
and must do the same work (tokens, losses) at each turn. CPU: one thread, process CPU seconds; cuda:
wall seconds between synchronisations. In doubt the peer is favoured: its batches are made before
the clock starts (rollout), no gradient checkpointing (TRL). All completions have --new tokens.

python -m benchmarks.speed rollout                       # transformers generate
python -m benchmarks.speed grpo --image 224              # a step of TRL; full rows in the update
python -m benchmarks.speed sft --device cuda --size 3b   # plain transformers, padded rows
python -m benchmarks.speed head                          # the frozen backbone in the loop
python -m benchmarks.speed fast                          # the published code, chunk by chunk
python -m benchmarks.speed cost --repeats 3              # ours alone: group, completion, image grow
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders

import grpo
import model
import vla
from benchmarks import backbones
from fast_tokenizer import FastTokenizer

HORIZON, DIM, FAST = 16, 7, 1024  # steps K of a chunk, action dimensions A, FAST tokens
PEAK = 989e12  # FLOP a second of an H100 or H200 in bf16
SIZES = {"tiny": "speed", "tiny-vlm": "tiny-vlm", "3b": "qwen2.5-vl-3b", "7b": "qwen2.5-vl-7b"}
backbones.SIZES["speed"] = backbones.Size(
    rows=4096, hidden=256, layers=4, heads=8, kv=4, mlp=768, theta=1e6, vision=128, vision_mlp=512,
    patch=14, pixels=(3136, 3211264))


def backbone(args):
    """Random weights, the same at each call, bf16 on GPU; with FAST tokens."""
    bb = backbones.random_backbone(SIZES[args.size], 0, device=args.device)
    bb.net.to(vla.precision(args.device))
    bb.fast = fitted()
    model.grow(bb, FAST)
    bb.vocab.banned = bb.tok.convert_tokens_to_ids(model.SPECIAL)  # the end too
    return bb


def smooth(n, seed):
    """n chunks (n, K, A) in [-1, 1] of some 23 tokens, whose power falls with frequency."""
    coefs = model.rng(0, "chunks", seed).normal(size=(n, HORIZON, DIM))
    fall = 2 / (1 + np.arange(HORIZON)[:, None]) ** 1.8
    return np.tanh(idct(coefs * fall, axis=1, norm="ortho")).astype(np.float32)


def fitted():
    ends = np.ones((2, HORIZON, DIM)) * [[[1.0]], [[-1.0]]]  # the largest coefficients: no clipping
    return FastTokenizer.fit(np.concatenate([smooth(8192, "fit"), ends]), FAST, 10)


def questions(n, side):
    """-> n times (messages, [image (side, side, 3) uint8]); the texts differ in length."""
    images = model.rng(0, "images").integers(0, 256, (n, side, side, 3), np.uint8)
    texts = [f"put the {'far ' * (i % 3)}red block to the left of the blue bowl" for i in range(n)]
    texts = ["<image>" + model.ask(model.action_question(text), think=True) for text in texts]
    return [([{"role": "user", "content": text}], [image]) for text, image in zip(texts, images)]


def plain(bb, rows, device, left=False):
    """Rows -> arguments of transformers' own forward, and where targets are."""
    batch = model.to(model.collate(rows, bb.vocab.pad, left), device)
    return {"input_ids": batch["ids"], "attention_mask": batch["mask"],
            "mm_token_type_ids": (batch["ids"] == bb.vocab.image).int(),
            "pixel_values": batch["patches"], "image_grid_thw": batch["grid"]}, batch["target"]


def measure(args, *sides):
    """Runs each side(k) by turns, turn 0 unmeasured. -> seconds (repeats, sides), and for each turn
    what the sides returned."""
    def clock():
        if args.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    spent, did = np.zeros((args.repeats + 1, len(sides))), []
    for turn in spent:
        did.append([])
        for i, side in enumerate(sides):
            start = clock()
            did[-1].append(side(len(did) - 1))
            turn[i] = clock() - start
    return spent[1:], did


def compare(args, ours, peer, tolerance=0):
    """Sides that return their work, {name: number} -> {"ours", "peer", "ratio" (of the two in each
    turn): quartiles, "unit", "work"}. ValueError when counts differ, or floats beyond tolerance."""
    seconds, did = measure(args, ours, peer)
    for k, (x, y) in enumerate(did):
        for name, a in x.items():
            if not np.isclose(a, y[name], rtol=tolerance * isinstance(a, float), atol=0):
                raise ValueError(f"turn {k}: {name} is {a} in ours, {y[name]} in the peer; they do "
                                 "not do the same work, so a ratio would mean nothing")
    pair, (a, b) = {}, seconds.T
    for name, values in {"ours": a, "peer": b, "ratio": b / a}.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        pair[name] = {"median": median, "q25": low, "q75": high, "n": len(values)}
    return {**pair, "unit": "CPU s" if args.device == "cpu" else "s",
            "work": {name: {"ours": x[name], "peer": y[name]} for name in x}}


def rollout(args):
    """model.generate against transformers' generate, which forwards a prompt once a completion."""
    bb, G, new = backbone(args), args.group, args.new
    rows = [model.encode(bb, *x, prompt_only=True) for x in questions(args.prompts, args.image)]
    batch, _ = plain(bb, rows, args.device, left=True)

    def count(ids):
        return {"tokens": int((ids != bb.vocab.pad).sum())}

    bb.net.eval()
    pair = compare(
        args, lambda k: count(model.generate(bb, rows, G, new, seed=k)["ids"]),
        lambda k: count(bb.net.generate(
            **batch, suppress_tokens=bb.vocab.banned, min_new_tokens=new, max_new_tokens=new,
            do_sample=True, top_k=0, num_return_sequences=G)[:, batch["input_ids"].shape[1]:]))
    if args.device != "cpu":  # a step reads all weights and the cache (prompts once): the bound
        layers, head = bb.net.model.language_model.layers, bb.net.lm_head.weight
        kv = 2 * len(layers) * layers[0].self_attn.k_proj.out_features * head.itemsize  # of a token
        tokens = int(batch["attention_mask"].sum()) + len(rows) * G * new / 2  # midway
        read = sum(p.nbytes for p in (*layers.parameters(), head)) + tokens * kv
        a, b = torch.empty(2, 1 << 28, device=args.device)
        seconds, _ = measure(args, lambda k: a.copy_(b), lambda k: model.generate(bb, rows, G, 1))
        copied, first = np.median(seconds, 0).tolist()
        step, bound = (pair["ours"]["median"] - first) / (new - 1), read * copied / (2 * b.nbytes)
        pair |= {"step_s": step, "bound_step_s": bound, "share_of_bound": bound / step}
    return {"rollout": pair}, {"prompt_tokens": [len(row["ids"]) for row in rows]}


def full_logp(bb, rows, ids, mask, temperature=1.0):
    """What grpo.shared_logp computes, by forwarding B*G full rows; mask (B*G, T) is all 1."""
    (N, T), full = ids.shape, []
    for i, new in enumerate(ids.cpu().numpy()):
        row = rows[i * len(rows) // N]
        after = np.tile(row["pos"].max() + 1 + np.arange(T), (3, 1))
        full.append({**row, "ids": np.concatenate([row["ids"], new]),
                     "pos": np.concatenate([row["pos"], after], 1),
                     "target": np.arange(len(row["ids"]) + T) >= len(row["ids"])})
    batch = model.to(model.collate(full, bb.vocab.pad), ids.device)
    h = model.hidden(bb.net, batch)[:, :-1][batch["target"][:, 1:]]  # (N * T, D)
    found = model.logp(bb.net, h, ids.flatten(), temperature, bb.vocab.banned)
    return [x.view(N, T) for x in found]


class Grpo:
    """The parts of a step of grpo.py, with one update of all prompts."""

    def __init__(self, args, logp=grpo.shared_logp):
        self.bb, self.items, n = backbone(args), questions(args.prompts, args.image), args.prompts
        self.gold, self.logp = self.bb.fast.encode(smooth(n, "gold")), logp
        self.cfg = cfg = grpo.Config(prompts=n, batch=n, micro_batch=n, group=args.group,
                                     max_new=args.new)
        self.ref = replace(self.bb, net=copy.deepcopy(self.bb.net).requires_grad_(False).eval())
        self.optim = model.optimizer(self.bb.net, cfg.lr, cfg.weight_decay, (0.9, cfg.beta2))
        self.dist = model.Dist(0, 1, torch.device(args.device))
        self.sample(0)

    def sample(self, k):
        """Random weights earn nothing and ties would cost nothing: advantages are given."""
        rows, cfg = [model.encode(self.bb, *x, prompt_only=True) for x in self.items], self.cfg
        groups, *_ = grpo.rollout(self.bb, cfg, rows, self.gold, range(len(rows)), k, cfg.group)
        adv = torch.linspace(-1, 1, cfg.group, device=self.dist.device)
        self.groups = [replace(g, adv=adv, tie=False) for g in groups]

    def update(self, k):
        self.bb.net.train()
        with mock.patch.object(grpo, "shared_logp", self.logp):
            sums = grpo.update(self.bb, self.ref, self.optim, self.groups, self.cfg, self.dist, "")
        return {"tokens": int(sums["forwarded"]), "grad_norm": sums["grad_norm"]}

    def step(self, k):
        self.sample(k)
        return {"tokens": self.update(k)["tokens"]}


def grpo_step(args):
    """The update against one on full rows; encoding, sampling, scoring and update against TRL's."""
    ours, loose = Grpo(args), 1e-3 if args.device == "cpu" else 0.1  # differences of steps add up
    pairs = {"update": compare(args, ours.update, Grpo(args, full_logp).update, loose)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            pairs["step"] = compare(args, ours.step, trl_step(ours, args, folder))
        except ImportError as e:
            pairs["step"] = {"skipped": "pip install trl==1.16.0"}
            print(f"no step of TRL to compare with: {e}; {pairs['step']['skipped']}")
    return pairs, {"prompt_tokens": [len(g.row["ids"]) for g in ours.groups]}


def cost(args):
    """Our own seconds of a rollout and an update, as one setting at a time grows."""
    table, start = [], {"group": args.group, "new": args.new, "image": args.image}
    for change in ({}, *({k: m * v} for k, v in start.items() for m in (2, 4))):
        ours = Grpo(argparse.Namespace(**vars(args) | change))
        rollout_s, update_s = np.median(measure(args, ours.sample, ours.update)[0], 0).tolist()
        table.append({**start, **change, "rollout": rollout_s, "update": update_s})
        print("  ".join(f"{k} {v:<7.4g}" for k, v in table[-1].items()))
    return {}, {"cost": table}


def trl_step(ours, args, folder):
    """-> step(k): one step of TRL's GRPOTrainer with our settings, without the logging and data
    loading of its loop. ImportError without TRL."""
    import datasets
    import trl
    from PIL import Image
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

    class Processor(transformers.Qwen3VLProcessor):  # its part for videos wants torchvision
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    bb, cfg = ours.ref, ours.cfg
    bb.net.save_pretrained(folder)  # TRL loads its reference model from where the policy came from
    bb.images.save(folder)
    images = processing.Qwen2VLImageProcessorPil.from_pretrained(folder)
    texts = [talk[0]["content"].removeprefix("<image>") for talk, _ in ours.items]
    data = datasets.Dataset.from_dict({
        "prompt": [[{"role": "user", "content": text}] for text in texts], "target": ours.gold,
        "image": [Image.fromarray(image) for _, [image] in ours.items]})
    config = trl.GRPOConfig(
        folder, use_cpu=args.device == "cpu", bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=args.prompts * cfg.group, num_generations=cfg.group,
        max_completion_length=cfg.max_new, temperature=cfg.temperature, beta=cfg.kl, max_steps=1,
        loss_type="bnpo", learning_rate=cfg.lr, lr_scheduler_type="constant", save_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False, shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": cfg.max_new, "suppress_tokens": bb.vocab.banned})

    def reward(completion_ids, target, **_):  # scored as ours; drawn numbers against ties
        r, _ = grpo.reward(bb, completion_ids, target, cfg.reward)
        return (r + torch.rand(len(r)).numpy()).tolist()

    net = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=bb.net.dtype)
    processor = Processor(images, bb.tok, None, chat_template=bb.tok.chat_template)
    trainer = trl.GRPOTrainer(net, reward, config, data, processing_class=processor)
    trainer.train()  # one step, in which it also makes its optimizer
    batch = next(iter(trainer.get_train_dataloader()))

    def step(k):
        trainer.training_step(trainer.model_wrapped, batch, None)  # samples, scores, backward
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), cfg.grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        return {"tokens": int(trainer._buffered_inputs[0]["completion_mask"].sum())}

    return step


def learner(net, loss, lr=2e-5, weight_decay=0.01, betas=(0.9, 0.999), muon=False, clip=1.0):
    """-> step(k): a copy of net learns by loss(net, k)."""
    net = copy.deepcopy(net).train()
    optim = model.optimizer(net, lr, weight_decay, betas, muon)

    def step(k):
        value = loss(net, k)
        value.backward()
        model.clip_grad(net.parameters(), clip)
        optim.step()
        optim.zero_grad()
        return {"loss": value.item()}

    return step


def sft_step(args):
    """The step of sft.py (packed rows, logits where targets are) against right-padded rows and the
    loss that the net itself computes, from all logits. Answers differ much in length."""
    bb, rng, rows = backbone(args), model.rng(0, "answers"), []
    for i, (talk, images) in enumerate(questions(args.batch or 24, args.image)):
        thought = "the block " * int(rng.integers(80)) * (i % 2)
        answer = f"<think>{thought}</think>" + model.action_answer(rng.integers(0, FAST, 23))
        rows.append(model.encode(bb, [*talk, {"role": "assistant", "content": answer}], images))

    def packed(net, k):
        loss, count, _ = model.token_loss(net, model.to(model.pack(rows), args.device))
        return loss / count

    def padded(net, k):
        batch, target = plain(bb, rows, args.device)
        return net(**batch, labels=batch["input_ids"].masked_fill(~target, -100)).loss

    loose = 1e-4 if args.device == "cpu" else 0.02
    pair = compare(args, learner(bb.net, packed), learner(bb.net, padded), loose)
    tokens = [len(row["ids"]) for row in rows]
    if args.device != "cpu":  # 6 FLOP a parameter for all that it must see; attention not counted
        seen = {bb.net.model.language_model.layers: sum(tokens),
                bb.net.lm_head: sum(int(row["target"].sum()) for row in rows),
                bb.net.model.visual: sum(len(row["patches"]) for row in rows)}
        flop = 6 * sum(p.numel() * n for part, n in seen.items() for p in part.parameters())
        pair |= {f"{side}_mfu": flop / pair[side]["median"] / PEAK for side in ("ours", "peer")}
    return {"step": pair}, {"row_tokens": tokens}


def head_step(args):
    """The step of vla.py on cached features against the same with the frozen backbone in the loop;
    head and optimizer of the speedrun preset, at 3b and 7b of the paper's."""
    cfg = vla.Config(**vla.PRESETS["paper" if args.size in ("3b", "7b") else "speedrun"])
    rng, bb = model.rng(0, "episode"), backbone(args)
    dist = model.Dist(0, 1, torch.device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(cfg, data=folder, out=folder, batch=args.batch or cfg.batch, holdout=0)
        save_file({"image": rng.integers(0, 256, (96, args.image, args.image, 3), np.uint8),
                   "state": rng.normal(size=(96, 8)).astype(np.float32),
                   "action": smooth(96, 0)[:, 0]}, f"{folder}/episode_0.safetensors",
                  {"task": "put the red block to the left of the blue bowl"})
        frames, _ = vla.Frames(cfg), vla.freeze(bb, cfg.layer)
        torch.manual_seed(0)
        head = model.FlowHead(model.HeadConfig(
            bb.net.config.text_config.hidden_size, cfg.dim, cfg.layers, cfg.heads, cfg.vl_layers, 8,
            DIM, cfg.horizon, cfg.future, dropout=cfg.dropout)).to(args.device)

        def side(source):
            def loss(net, k):
                torch.manual_seed(k)  # of dropout
                ids = vla.picks(cfg, len(frames.train), k)
                return vla.flow_loss(net, source, frames, cfg, k, (ids, source.read(ids)), dist)[0]
            return learner(head, loss, cfg.lr, cfg.weight_decay, (cfg.beta1, cfg.beta2), cfg.muon,
                           cfg.clip)

        cached = side(vla.build_cache(bb, frames, cfg, dist))  # it holds 16-bit numbers
        pair = compare(args, cached, side(vla.InLoop(bb, frames, cfg, args.device)), 0.02)
        [row] = frames.rows(bb, [(0, 0)], cfg.think, {})
    return {"step": pair}, {"prompt_tokens": len(row["ids"]), "head": repr(head.cfg)}


def fast_codes(args):
    """FastTokenizer on a batch against physical-intelligence/fast (arXiv 2501.09747), a chunk at a
    time through a tokenizer of transformers; on our vocabulary, hence without its byte level.
    Each turn has fresh chunks and each side its own BPE: a BPE remembers what it has encoded."""
    ours, chunks = fitted(), [smooth(args.chunks, k) for k in range(args.repeats + 2)]
    ids, bpe = list(map(fitted().encode, chunks)), Tokenizer.from_str(ours.bpe.to_str())
    bpe.decoder = decoders.Fuse()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False)

    def encode(chunk):
        coefs = np.around(dct(chunk[None], axis=1, norm="ortho") * ours.scale)[0]  # (K, A)
        codes = np.maximum(coefs.flatten() - ours.min_coef, 0).astype(int)
        return tok("".join(map(chr, codes)))["input_ids"]

    def decode(ids):
        codes = np.array(list(map(ord, tok.decode(ids))))
        coefs = (codes + ours.min_coef).reshape(-1, DIM)  # (K, A)
        return idct(coefs / ours.scale, axis=0, norm="ortho")

    both = ours.decode(ids[-1])[0], np.float32(list(map(decode, ids[-1])))
    if ids[-1] != list(map(encode, chunks[-1])) or not np.array_equal(*both):
        raise ValueError("the published code gives other ids or chunks; a ratio would mean nothing")
    return {
        "encode": compare(args, lambda k: {"tokens": sum(map(len, ours.encode(chunks[k])))},
                          lambda k: {"tokens": sum(len(encode(x)) for x in chunks[k])}),
        "decode": compare(args, lambda k: {"chunks": len(ours.decode(ids[k])[0])},
                          lambda k: {"chunks": len(np.stack([decode(x) for x in ids[k]]))})}, {}


COMMANDS = {"rollout": rollout, "grpo": grpo_step, "sft": sft_step, "head": head_step,
            "fast": fast_codes, "cost": cost}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--size", choices=SIZES, help="backbone (head: tiny-vlm, else tiny)")
    add("--repeats", type=int, default=9, help="measured turns")
    add("--json", action="store_true", help="print the JSON line alone")
    add("--prompts", type=int, default=4, help="rollout, grpo: prompts")
    add("--group", type=int, default=8, help="rollout, grpo: completions a prompt")
    add("--new", type=int, default=64, help="rollout, grpo: tokens a completion")
    add("--image", type=int, help="side of the images, pixels (tiny-vlm: 64, else 112)")
    add("--batch", type=int, help="sft: rows (24); head: frames (that of the preset)")
    add("--chunks", type=int, default=4096, help="fast: chunks a batch")
    args = parser.parse_args(argv)
    if min(args.repeats, args.prompts, args.chunks) < 1 or min(args.group, args.new) < 2:
        parser.error("--repeats, --prompts, --chunks must be at least 1, --group, --new 2")
    args.size = args.size or ("tiny-vlm" if args.command == "head" else "tiny")
    args.image = args.image or (64 if args.size == "tiny-vlm" else 112)
    if args.device == "cpu":
        torch.set_num_threads(1)
    if not torch.cuda.is_available():  # else it starts nccl for FSDP, which is not used here
        model.setup(0)
    with contextlib.redirect_stdout(sys.stderr):  # TRL talks
        pairs, more = COMMANDS[args.command](args)
    cpu = os.popen("lscpu | sed -n 's/^Model name: *//p'").read().strip() or platform.machine()
    trl = {"trl": sys.modules["trl"].__version__} if "trl" in sys.modules else {}
    record = {"benchmark": args.command, "pairs": pairs, "settings": {**vars(args), **more},
              "command": " ".join(["python -m benchmarks.speed", *argv]),
              "hardware": f"{cpu}, 1 thread", "versions": {**model.versions(), **trl},
              "commit": model.commit()}
    if args.device == "cuda":
        record["hardware"] = torch.cuda.get_device_name()
    for name, pair in pairs.items():
        if "ratio" in pair and not args.json:
            sides = (f"{k} {pair[k]['median']:.4g}" for k in ("ours", "peer", "ratio"))
            print(name, *sides, pair["unit"])
    print(json.dumps(record), flush=True)
    return record


if __name__ == "__main__":
    model.entry(main, "--size, --prompts or --batch")
