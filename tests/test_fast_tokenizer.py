"""FAST tokenizer: the published algorithm as reference, hand-worked numbers, refusals, command."""

import dataclasses
import doctest
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.fft import dct, idct
from tokenizers import ByteLevelBPETokenizer
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import fast_tokenizer as ft
from fast_tokenizer import FastTokenizer

ROOT = Path(ft.__file__).parent

# ---- FAST tokenizer ------------------------------------------------------------------------------


def smooth(n, k=5, a=3, seed=0):
    """Random walks of n chunks, mostly inside [-1, 1]: (n, k, a)."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(-0.8, 0.8, (n, 1, a))
    return start + rng.normal(0, 0.1, (n, k, a)).cumsum(1)


class Published:
    """The published processor, rewritten from its description: tokenizer.json and a config."""

    def __init__(self, bpe, scale, min_token, horizon, dim):
        self.bpe = bpe
        self.scale = scale
        self.min_token = min_token
        self.horizon = horizon
        self.dim = dim

    @classmethod
    def fit(cls, chunks, vocab_size, scale):
        coefs = np.around(dct(chunks, axis=1, norm="ortho") * scale)
        low = int(coefs.min())
        high = int(coefs.max())
        bpe = ByteLevelBPETokenizer()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(i) for i in range(high - low + 1)],
            max_token_length=10000,
        )
        texts = ("".join(map(chr, (c.flatten() - low).astype(int))) for c in coefs)
        bpe._tokenizer.train_from_iterator(texts, trainer=trainer)
        bpe = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
        return cls(bpe, scale, low, *chunks.shape[1:])

    def encode(self, chunks):
        coefs = np.around(dct(chunks, axis=1, norm="ortho") * self.scale)
        codes = [np.maximum(c.flatten() - self.min_token, 0).astype(int) for c in coefs]
        return [self.bpe("".join(map(chr, c)))["input_ids"] for c in codes]

    def decode(self, ids):
        out = []
        for row in ids:
            coefs = np.array(list(map(ord, self.bpe.decode(row)))) + self.min_token
            out.append(idct(coefs.reshape(-1, self.dim) / self.scale, axis=0, norm="ortho"))
        return np.stack(out)

    def save(self, folder, new_layout=False, named=True):
        self.bpe.save_pretrained(folder / "bpe_tokenizer" if new_layout else folder)
        config = {
            "processor_class": "UniversalActionProcessor",
            "scale": self.scale,
            "vocab_size": 1024,
            "min_token": self.min_token,
        }
        if named:
            config |= {"action_dim": self.dim, "time_horizon": self.horizon}
        (folder / "processor_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tok():
    return FastTokenizer.fit(smooth(500), 128, 4)


# scale 10: characters below 128; scale 100: two-byte characters, so a token may hold half of one
@pytest.mark.parametrize(
    ("scale", "dtype"), [(10, np.float64), (10, np.float32), (100, np.float64)]
)
def test_published_folder_gives_the_same_ids_and_actions(tmp_path, scale, dtype):
    chunks = smooth(800, k=8, a=4).astype(dtype)
    reference = Published.fit(chunks[:700], 700, scale)
    reference.save(tmp_path)
    ours = FastTokenizer.load(tmp_path)
    assert (ours.horizon, ours.action_dim, ours.scale) == (8, 4, scale)
    ids = ours.encode(chunks[:700])
    assert ids == reference.encode(chunks[:700])
    decoded, ok = ours.decode(ids)
    assert ok.all()
    np.testing.assert_allclose(decoded, reference.decode(ids), atol=1e-6)
    # saved in our own layout, a published tokenizer stays the same
    ours.save(tmp_path / "own")
    again = FastTokenizer.load(tmp_path / "own")
    assert again.encode(chunks[:700]) == ids and again.max_coef == ours.max_coef
    # unseen chunks: the reference drops characters it cannot spell, ours always decodes
    assert ours.decode(ours.encode(chunks[700:] * 1.5))[1].all()


def test_no_chunk_takes_more_ids(tmp_path, tok):
    """sft.py measures episodes by it. It took K x A for the most, where a published vocabulary has
    several tokens for a rare coefficient: rows could be too long in the middle of a run."""
    Published.fit(smooth(400, k=8, a=4), 300, 100).save(tmp_path)
    published = FastTokenizer.load(tmp_path)
    wild = np.random.default_rng(0).uniform(-1, 1, (50, 8, 4))
    longest = max(len(ids) for ids in published.encode(wild))
    assert 8 * 4 < longest <= published.max_ids
    assert tok.max_ids == tok.horizon * tok.action_dim


def test_half_a_character_is_malformed(tmp_path):
    """A byte-level token may end inside a character; the reference then decodes U+FFFD."""
    chunks = smooth(400, k=8, a=4)
    Published.fit(chunks, 300, 100).save(tmp_path)
    ours = FastTokenizer.load(tmp_path)
    lead = next(i for i, piece in ours.pieces.items() if len(piece) == 1 and piece[0] >= 0xC3)
    row = [next(i for i, piece in ours.pieces.items() if piece == b"A")] * 31
    rows = [[*row, lead], [*row, row[0]], [*row, ours.vocab_size], []]
    decoded, ok = ours.decode(rows)
    assert ok.tolist() == [False, True, False, False] and np.isnan(decoded[0]).all()


def test_bytes_of_a_rare_character_are_a_coefficient(tmp_path):
    """Four tokens of one byte spell U+10000, which UTF-16 writes as two units: decode once read
    two coefficients there and stopped. The reference reads one."""
    reference = Published.fit(smooth(400, k=8, a=4), 300, 100)
    reference.save(tmp_path)
    ours = FastTokenizer.load(tmp_path)
    id_of = {piece: i for i, piece in ours.pieces.items()}
    rare = [id_of[bytes([byte])] for byte in chr(0x10000).encode()]
    row = [id_of[b"A"]] * 31 + rare
    decoded, ok = ours.decode([row])
    assert ok.all()
    np.testing.assert_allclose(decoded, reference.decode([row]), rtol=1e-6)


def test_older_published_folders_need_horizon_and_dim(tmp_path):
    reference = Published.fit(smooth(100), 200, 10)
    reference.save(tmp_path, new_layout=True, named=False)
    with pytest.raises(ValueError, match="horizon is None"):
        FastTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="action_dim is None"):
        FastTokenizer.load(tmp_path, horizon=5)
    ours = FastTokenizer.load(tmp_path, horizon=5, action_dim=3)
    assert ours.encode(smooth(9)) == reference.encode(smooth(9))
    reference.save(tmp_path)
    with pytest.raises(ValueError, match="horizon is 5, load was given 8"):
        FastTokenizer.load(tmp_path, horizon=8)


def test_example_in_the_docstring():
    example = doctest.testmod(ft)
    assert example.attempted > 5 and example.failed == 0


def test_by_hand():
    """K 2, A 1, scale 10: (1, 0) has coefficients 1/sqrt2, 1/sqrt2 -> 7, 7; (0, 0) -> 0, 0;
    (-1, 0) -> -7, -7. So min_coef -7, 15 characters, and 7, 7 back is 1.4 / sqrt2 = .98995, 0."""
    chunks = np.array([[[1.0], [0.0]], [[0.0], [0.0]], [[-1.0], [0.0]]])
    tok = FastTokenizer.fit(chunks, 15, 10)
    assert (tok.min_coef, tok.max_coef, tok.vocab_size) == (-7, 7, 15)
    assert tok.encode(chunks) == [[14, 14], [7, 7], [0, 0]]
    decoded, ok = tok.decode([[14, 14]])
    np.testing.assert_allclose(decoded[0, :, 0], [1.4 / 2**0.5, 0], atol=1e-6)
    assert ok.all() and decoded.dtype == np.float32
    # one merge of a pair seen twice: two coefficients, one token
    twice = FastTokenizer.fit(chunks[[0, 0, 1, 2]], 16, 10)
    assert twice.vocab_size == 16 and twice.encode(chunks) == [[15], [7, 7], [0, 0]]
    # dimensions are interleaved, low frequencies first
    two = np.concatenate([chunks[:1], -chunks[:1]], 2)
    assert FastTokenizer.fit(two, 15, 10).encode(two) == [[14, 0, 14, 0]]
    assert FastTokenizer.fit(two[[0, 0]], 16, 10).encode(two) == [[15, 15]]  # (14, 0): 4 times


def test_transform_is_the_orthonormal_dct2(tok):
    k = tok.horizon
    n = np.arange(k)
    basis = np.sqrt(2 / k) * np.cos(np.pi * (n + 0.5) * n[:, None] / k)  # (K, K), DCT-II
    basis[0] /= np.sqrt(2)
    np.testing.assert_allclose(basis @ basis.T, np.eye(k), atol=1e-12)
    chunks = smooth(50)
    want = np.rint(np.einsum("fk,bka->bfa", basis, chunks) * tok.scale)
    want = np.clip(want, tok.min_coef, tok.max_coef)
    ids = tok.encode(chunks)
    codes = [[ord(c) for i in row for c in tok.pieces[i].decode()] for row in ids]
    assert (np.array(codes).reshape(want.shape) + tok.min_coef == want).all()
    np.testing.assert_allclose(
        tok.decode(ids)[0], np.einsum("fk,bfa->bka", basis, want / tok.scale), atol=1e-6
    )


def test_round_trip_error_is_half_a_quantisation_step(tok):
    chunks = smooth(500)
    decoded, ok = tok.decode(tok.encode(chunks))
    assert ok.all() and tok.clipped == 0
    error = np.abs(dct(decoded - chunks, axis=1, norm="ortho"))
    assert 0.4 / tok.scale < error.max() <= 0.5 / tok.scale + 1e-6


def test_malformed_ids_are_reported_not_zeroed(tok):
    good = tok.encode(smooth(1))[0]
    one = [next(i for i, piece in tok.pieces.items() if len(piece) == 1)] * 3  # a whole action
    rows = [
        good,
        good[:-1],
        good + good[:1],
        good + good,
        one * 5,
        one * 4,
        one * 6,
        [],
        [*good[:-1], tok.vocab_size],
        [-1, *good[1:]],
    ]
    decoded, ok = tok.decode(rows)
    assert ok.tolist() == [True, False, False, False, True] + [False] * 5
    assert np.isfinite(decoded[ok]).all() and np.isnan(decoded[~ok]).all()
    far = [[*good[:-1], i * tok.vocab_size] for i in (-1, -2, -9, 2, 9)]
    far[-1] = [i - 2 * tok.vocab_size for i in good]  # from the end of a list they were good ones
    assert tok.decode([*far, good, []])[1].tolist() == [False] * 5 + [True, False]
    assert tok.decode([torch.tensor(good), np.array(good)])[1].all()
    decoded, ok = tok.decode([])
    assert decoded.shape == (0, 5, 3) and ok.shape == (0,)
    assert np.isnan(tok.decode([[]])[0]).all()


def test_a_partial_chunk_has_zeros_for_what_is_missing(tok):
    """Of coefficients, not of codes: the code 0 is the least coefficient. By the transform, not by
    decode itself."""
    ids = tok.encode(smooth(20))
    basis = idct(np.eye(tok.horizon), axis=0, norm="ortho")  # (K, K): time by frequency
    for row in ids:
        for k in range(len(row) + 1):
            text = "".join(tok.pieces[i].decode() for i in row[:k])
            coefs = np.zeros(tok.horizon * tok.action_dim)
            coefs[: len(text)] = [ord(character) + tok.min_coef for character in text]
            want = basis @ coefs.reshape(tok.horizon, tok.action_dim) / tok.scale
            decoded, ok = tok.decode([row[:k]], partial=True)
            assert ok.all()
            np.testing.assert_allclose(decoded[0], want, atol=1e-6)
    too_long, ok = tok.decode([[*ids[0], *ids[1]]], partial=True)
    assert ok.all()
    np.testing.assert_array_equal(too_long, tok.decode(ids[:1])[0])


def test_what_is_nearest_takes_the_place_of_what_cannot_be_written():
    """Of two as near the lower; of a range without 0 its end, for what a partial chunk misses."""
    assert ft._nearest_writable([0, 2, 5]).tolist() == [0, 0, 2, 2, 5, 5]
    below = FastTokenizer.fit(np.array([[[-1.0]], [[-0.8]]]), 16, 10)
    assert (below.min_coef, below.max_coef) == (-10, -8)
    decoded, ok = below.decode([[]], partial=True)
    assert ok.all() and decoded[0, 0, 0] == pytest.approx(-0.8)


def test_the_last_call_alone_is_counted():
    """Two actions beyond the clip, of one dimension; then none."""
    tok = FastTokenizer.fit(np.zeros((1, 2, 2)), 1, 10, clip=3)
    tok.encode(np.array([[[4.0, 0.0], [-4.0, 3.0]]]))
    assert tok.clipped_actions.tolist() == [2, 0] and tok.clipped > 0
    tok.encode(np.zeros((1, 2, 2)))
    assert tok.clipped_actions.tolist() == [0, 0] and tok.clipped == 0


def test_both_ends_are_clipped_and_counted(tok):
    chunks = np.zeros((2, 5, 3))
    chunks[0, :, 0] = 1e9  # constant in time: one coefficient each
    chunks[1, :, 2] = -1e9
    ids = tok.encode(chunks)
    assert tok.clipped == 2
    decoded, ok = tok.decode(ids)
    assert ok.all()
    np.testing.assert_allclose(decoded[0, :, 0], tok.max_coef / tok.scale / 5**0.5, rtol=1e-6)
    np.testing.assert_allclose(decoded[1, :, 2], tok.min_coef / tok.scale / 5**0.5, rtol=1e-6)
    both = chunks[:1] + chunks[1:]  # in one row of coefficients
    tok.encode(both)
    assert tok.clipped == 2
    tok.encode(chunks * 0)
    assert tok.clipped == 0


def test_every_coefficient_of_the_range_has_a_token():
    """-20 and 20 are met, nothing between: the alphabet still holds all 41."""
    chunks = np.array([[[2.0]], [[-2.0]]])
    tok = FastTokenizer.fit(chunks, 64, 10)
    assert tok.vocab_size == 41  # no pair to merge: fewer than asked for
    every = np.arange(-20, 21).reshape(-1, 1, 1) / 10
    decoded, ok = tok.decode(tok.encode(every))
    assert ok.all() and tok.clipped == 0
    np.testing.assert_allclose(decoded, every, atol=1e-6)


def heavy_tailed(B=4000, K=5, seed=0):
    """Smooth actions of two dimensions, normalised, and a jump of up to 38 in 1% of the chunks, as
    in BridgeV2, whose published extremes are up to 39 times as far apart as q01 and q99."""
    rng = np.random.default_rng(seed)
    chunks = rng.uniform(-0.9, 0.9, (B, 1, 2)) + rng.normal(0, 0.05, (B, K, 2)).cumsum(1)
    jumps = rng.choice(B, B // 100, replace=False)
    chunks[jumps, 2, 0] = rng.choice([-1, 1], len(jumps)) * rng.uniform(5, 38, len(jumps))
    return chunks


def test_outliers_do_not_take_the_vocabulary():
    """The alphabet is the range of the coefficients: by BridgeV2's published ranges 500 to 900 of
    2,048 ids went to single coefficients that hardly occur."""
    chunks = heavy_tailed()
    free = FastTokenizer.fit(chunks, 1024, 10, clip=None)
    tok = FastTokenizer.fit(chunks, 1024, 10)
    assert tok.clip == 3
    alphabets = [t.max_coef - t.min_coef + 1 for t in (free, tok)]
    assert alphabets[0] > 400 and alphabets[1] < 100
    ids = tok.encode(chunks)
    assert tok.clipped_actions.tolist() == [40, 0] and tok.clipped == 0  # each jump, counted
    free_ids = free.encode(chunks)
    assert free.clipped_actions.tolist() == [0, 0]
    assert np.mean([len(row) for row in ids]) < np.mean([len(row) for row in free_ids])
    decoded, ok = tok.decode(ids)
    ordinary = (np.abs(chunks) < 3).all((1, 2))
    assert ok.all() and np.abs(decoded - chunks)[ordinary].max() < 0.15
    assert np.abs(decoded).max() < 3.15


def test_clip_is_stored_and_old_tokenizers_do_not_clip(tmp_path):
    chunks = heavy_tailed()
    tok = FastTokenizer.fit(chunks, 1024, 10, clip=2.5)
    tok.save(tmp_path)
    assert FastTokenizer.load(tmp_path).encode(chunks) == tok.encode(chunks)
    assert FastTokenizer.load(tmp_path).clip == 2.5
    path = tmp_path / "fast.json"
    free = FastTokenizer.fit(chunks, 1024, 10, clip=None)
    free.save(tmp_path)
    old = json.loads(path.read_text())
    del old["clip"]
    path.write_text(json.dumps(old))
    again = FastTokenizer.load(tmp_path)
    assert again.clip is None and again.encode(chunks) == free.encode(chunks)
    for wrong in (0, -1, "3"):
        path.write_text(json.dumps(old | {"clip": wrong}))
        with pytest.raises(ValueError, match="fast.json"):
            FastTokenizer.load(tmp_path)


def test_save_and_load_are_exact_and_deterministic(tmp_path):
    chunks = smooth(300) * [0.1, 3, 1] + [0, 7, -2]
    stats = ft.statistics(chunks.reshape(-1, 3))
    for name in "ab":
        FastTokenizer.fit(chunks, 128, 4, stats).save(tmp_path / name)
    one = tmp_path / "a/fast.json"
    assert one.read_bytes() == (tmp_path / "b/fast.json").read_bytes()
    tok = FastTokenizer.load(tmp_path / "a")
    tok.save(tmp_path / "c")
    assert one.read_bytes() == (tmp_path / "c/fast.json").read_bytes()
    fitted = FastTokenizer.fit(chunks, 128, 4, stats)
    for key in ("vocab_size", "scale", "horizon", "action_dim", "min_coef", "max_coef", "stats"):
        assert getattr(tok, key) == getattr(fitted, key), key
    assert tok.vocab_size == 128 and tok.encode(chunks) == fitted.encode(chunks)
    decoded, ok = tok.decode(tok.encode(chunks))  # in dataset units
    assert ok.all() and (np.abs(decoded - chunks).mean((0, 1)) < [0.02, 0.6, 0.2]).all()


def test_damaged_or_missing_files(tmp_path, tok):
    with pytest.raises(FileNotFoundError, match="run fast_tokenizer.py fit"):
        FastTokenizer.load(tmp_path)
    tok.save(tmp_path)
    text = (tmp_path / "fast.json").read_text()
    for damaged in (text[:200], "[]", "{}"):
        (tmp_path / "fast.json").write_text(damaged)
        with pytest.raises(ValueError, match="fast.json: not a FAST tokenizer"):
            FastTokenizer.load(tmp_path)
    for scale in ("null", "0", "-2", '"x"', "true"):  # 0 was loaded, and decoded to NaN
        (tmp_path / "fast.json").write_text(text.replace('"scale": 4.0', f'"scale": {scale}'))
        with pytest.raises(ValueError, match="fast.json: scale is .*, not above 0"):
            FastTokenizer.load(tmp_path)
    record = json.loads(text)
    (tmp_path / "fast.json").write_text(json.dumps(record | {"bpe": {}}))
    with pytest.raises(ValueError, match="fast.json: no BPE vocabulary"):
        FastTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: np.where(np.arange(3) == 1, np.nan, x),
            "chunk 0, step 0, dimension 1 is not fin",
        ),
        (lambda x: x + np.inf, "is not finite"),
        (lambda x: x[0], r"shape \(5, 3\), not \(B, K, A\)"),
        (lambda x: smooth(4, k=8), "chunk horizon 8, tokenizer was fitted for 5; refit with --hor"),
        (lambda x: x[..., :2], "chunk has 2 action dimensions, tokenizer was fitted for 3"),
    ],
)
def test_wrong_chunks_are_refused(tok, change, message):
    with pytest.raises(ValueError, match=message):
        tok.encode(change(smooth(4)))


def test_wrong_fits_are_refused():
    with pytest.raises(ValueError, match="smaller than the alphabet of .* raise --vocab-size"):
        FastTokenizer.fit(smooth(50), 8, 10)
    with pytest.raises(ValueError, match="smaller than the alphabet"):
        FastTokenizer.fit(smooth(50), 10**7, 1e5)  # no text holds that many characters
    with pytest.raises(ValueError, match="must be positive"):
        FastTokenizer.fit(smooth(50), 64, 0)
    with pytest.raises(ValueError, match="0 chunks"):
        FastTokenizer.fit(smooth(50)[:0], 64, 2)
    with pytest.raises(ValueError, match="mean is not 3 finite numbers"):
        FastTokenizer.fit(smooth(50), 64, 2, ft.statistics(smooth(50)[:, 0, :2]))


# ---- Statistics and normalisation ----------------------------------------------------------------


def test_statistics_and_still_dimensions():
    x = np.stack([np.arange(101.0), np.full(101, 5.0)], 1)
    stats = ft.statistics(x)
    assert stats["q01"] == [1, 5] and stats["q99"] == [99, 5] and stats["count"] == 101
    assert stats["mean"] == [50, 5] and stats["std"][1] == 0
    np.testing.assert_allclose(
        ft.normalize(x, stats)[[0, 1, 50, 99]],
        [[-1 - 1 / 49, 0], [-1, 0], [0, 0], [1, 0]],
        atol=1e-12,
    )
    np.testing.assert_allclose(ft.unnormalize(ft.normalize(x, stats), stats), x, atol=1e-12)
    assert ft.unnormalize(np.ones((1, 2)), stats).tolist() == [[99, 5]]
    y = ft.normalize(torch.tensor(x, dtype=torch.float32), stats)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), ft.normalize(x, stats), atol=1e-6)
    np.testing.assert_allclose(ft.unnormalize(y, stats).numpy(), x, atol=1e-4)
    with pytest.raises(ValueError, match="finite"):
        ft.statistics(x * np.nan)


def test_a_rare_dimension_keeps_its_range():
    """A gripper that closed in 0.8% of the steps had q01 = q99 and decoded to "open" for ever, with
    error 0 in the report. A dimension whose quantiles were 5e-5 apart was trained on at 64,169."""
    gripper = np.ones(1000)
    gripper[500:508] = 0
    noisy = np.linspace(-2.5e-5, 2.5e-5, 1000)
    noisy[700] = 1.6
    plain = np.sin(np.arange(1000.0))
    x = np.stack([gripper, noisy, plain, np.full(1000, 0.25)], 1)
    stats = ft.statistics(x)
    assert stats["q01"][0] == stats["q99"][0] == 1
    assert 2 * (1.6 - stats["q01"][1]) / (stats["q99"][1] - stats["q01"][1]) > 60_000
    assert ft.rare_dimensions(stats) == [0, 1]
    y = ft.normalize(x, stats)
    assert np.abs(y[:, :2]).max() == 1 and set(y[:, 0]) == {-1, 1}
    np.testing.assert_allclose(ft.unnormalize(y, stats), x, atol=1e-12)
    low, high = ft.value_range(stats)
    assert low[:2].tolist() == [0, noisy[0]] and high[:2].tolist() == [1, 1.6]
    assert low[2] == stats["q01"][2] and high[2] == stats["q99"][2] and (y[:, 3] == 0).all()
    lines = ft.rare_lines(stats, "action")
    assert lines[0].startswith("action dimension 0 hardly moves (q01 1, q99 1) and then reaches 0 ")
    assert len(lines) == 2
    # statistics without least and largest value, as published ones are: as before
    old = {name: stats[name] for name in ("q01", "q99")}
    assert (ft.normalize(x, old)[:, 0] == 0).all() and ft.rare_dimensions(old) == []
    # and the tokens say when it closes
    chunks = x[:, None, :].repeat(2, 1)
    tokenizer = FastTokenizer.fit(chunks, 256, 10, stats)
    decoded, _ = tokenizer.decode(tokenizer.encode(chunks))
    assert np.abs(decoded[..., 0] - chunks[..., 0]).max() < 0.05


def test_what_trembles_by_a_rounding_stands_still():
    """Below 1e-6 nothing moves, however seldom: a float that is rounded another way in one step of
    1,000 was a dimension of its own, from -1 to 1, and of the lines that warn of such."""
    x = np.full((1000, 2), 0.25)
    x[:, 0] += np.linspace(-2e-7, 2e-7, 1000)  # always
    x[500, 1] += 1e-8  # once
    stats = ft.statistics(x)
    assert (ft.normalize(x, stats) == 0).all()
    assert ft.unnormalize(np.ones((1, 2)), stats).tolist() == [stats["q01"]]
    assert ft.rare_dimensions(stats) == [] and ft.rare_lines(stats, "action") == []


def test_heavy_tails_are_not_rare():
    """BridgeV2's yaw reaches 31 times as far as its quantiles; they still say how it moves."""
    x = np.linspace(-1, 1, 10_000)[:, None]
    x[0] = -39
    x[-1] = 39
    assert ft.rare_dimensions(ft.statistics(x)) == []


def test_statistics_of_other_episodes_are_refused(tmp_path):
    """A stats.json that counted 120 of 600 steps was taken."""
    ft.write_episodes(tmp_path / "out", recordings(6))
    files = ft.read_episodes(tmp_path / "out")
    path = tmp_path / "out/stats.json"
    whole = json.loads(path.read_text())
    assert ft.read_stats(tmp_path / "out", files) == whole
    assert ft.read_stats(tmp_path / "out", files[:2]) == whole  # --max-episodes
    old = {
        name: {k: v for k, v in s.items() if k not in ("min", "max")} for name, s in whole.items()
    }
    path.write_text(json.dumps(old))
    assert ft.read_stats(tmp_path / "out", files) == whole  # least and largest from the files
    no_count = {name: {"q01": s["q01"], "q99": s["q99"]} for name, s in whole.items()}
    path.write_text(json.dumps(no_count))
    assert "count" not in ft.read_stats(tmp_path / "out", files)["action"]
    other = whole | {"action": whole["action"] | {"count": 12}}
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="stats.json counts {'action': 12, .* there have 57; del"):
        ft.read_stats(tmp_path / "out", files)
    with pytest.raises(ValueError, match="there have 57"):
        ft.read_stats(tmp_path / "out", files[:2])
    path.write_text(json.dumps(whole | {"action": whole["action"] | {"count": [57]}}))  # LeRobot's
    with pytest.raises(ValueError, match=r"action: count is \[57\], no number"):  # was a traceback
        ft.read_stats(tmp_path / "out", files)
    path.write_text(json.dumps(whole | {"state": whole["state"] | {"max": [-9.0, 1.0]}}))
    with pytest.raises(ValueError, match="state: max lies below min"):
        ft.read_stats(tmp_path / "out", files)


# ---- Episodes on disk ----------------------------------------------------------------------------


def write(folder, i, steps=20, header=(), **change):
    rng = np.random.default_rng(i)
    action = rng.normal(0, 0.02, (steps, 3)).cumsum(0).astype(np.float32)
    action[:, 2] = 0.25  # a dimension that never moves
    arrays = {
        "image": rng.integers(0, 256, (steps, 8, 8, 3), np.uint8),
        "image_wrist": rng.integers(0, 256, (steps, 4, 4, 3), np.uint8),
        "state": np.zeros((steps, 2), np.float32),
        "action": action,
    } | change
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"episode_{i:06d}.safetensors"
    save_file(
        {k: v for k, v in arrays.items() if v is not None},
        path,
        {"task": "push it", "fps": "10", "source": "test", **dict(header)},
    )
    return path, arrays


def test_read_episode(tmp_path):
    path, arrays = write(tmp_path, 0)
    (episode,) = ft.read_episode_file(path)
    assert (len(episode), episode.task, episode.fps, episode.source) == (20, "push it", 10, "test")
    assert episode.cameras == ("image", "image_wrist") and episode.action.dtype == np.float32
    np.testing.assert_array_equal(episode.frame(7), arrays["image"][7])
    np.testing.assert_array_equal(episode.frame(19, "image_wrist"), arrays["image_wrist"][19])
    for t, name in ((20, "image"), (-1, "image"), (0, "image_top")):
        with pytest.raises(ValueError, match="no frame"):
            episode.frame(t, name)
    chunks = ft.action_chunks(episode, 5)
    assert chunks.shape == (20, 5, 3)
    np.testing.assert_array_equal(chunks[3], arrays["action"][3:8])
    np.testing.assert_array_equal(chunks[18], arrays["action"][[18, 19, 19, 19, 19]])
    assert ft.chunk_starts(episode, 5) == range(16) and ft.chunk_starts(episode, 20) == range(1)
    assert ft.chunk_starts(episode, 30) == range(1)  # shorter than the chunk
    assert ft.all_chunks([episode], 5, 1).shape == (16, 5, 3)
    ends = ft.chunk_ends([episode, episode], 5)
    assert ends.tolist() == [16, 32]
    assert [ft.locate_step([0, 1], ends, i) for i in (15, 16, 31)] == [(0, 15), (1, 0), (1, 15)]


@pytest.mark.parametrize(("deltas", "after"), [("2", (0, 0, 0.25)), ("0", None), ("3", (0, 0, 0))])
def test_past_the_end_a_robot_holds_still_where_it_is_known_how(tmp_path, deltas, after):
    """Movements are 0, positions stay: no chunk began within K - 1 steps of the end, so no model
    learned a task's last movements from action tokens. As Octo's absolute_action_mask does
    (arXiv 2405.12213)."""
    (unknown,) = ft.read_episode_file(write(tmp_path, 0)[0])
    path, arrays = write(tmp_path, 0, header={"deltas": deltas})
    (episode,) = ft.read_episode_file(path)
    assert (episode.deltas, unknown.deltas) == (int(deltas), None)
    last = arrays["action"][-1]
    still = last if after is None else np.float32(after)
    chunks = ft.action_chunks(episode, 5)
    np.testing.assert_array_equal(chunks[18], [arrays["action"][18], last, still, still, still])
    np.testing.assert_array_equal(chunks[:16], ft.action_chunks(unknown, 5)[:16])
    np.testing.assert_array_equal(ft.action_chunks(episode, 1)[:, 0], arrays["action"])
    assert ft.chunk_starts(episode, 5) == range(20) and ft.chunk_starts(unknown, 5) == range(16)
    assert ft.chunk_starts(episode, 30) == range(20)
    assert ft.all_chunks([episode, unknown], 5, 1).shape == (36, 5, 3)
    assert ft.episodes_sha256([episode]) != ft.episodes_sha256([unknown])


@pytest.mark.parametrize("deltas", ["4", "-1", "", "six", "2.0"])
def test_deltas_that_are_no_number_of_dimensions_are_refused(tmp_path, deltas):
    path, _ = write(tmp_path, 0, header={"deltas": deltas})
    message = rf"000000.safetensors: deltas '{re.escape(deltas)}' of 3 .*; give 0 to 3 or none"
    with pytest.raises(ValueError, match=message):
        ft.read_episode_file(path)


@pytest.mark.parametrize("episodes_per_file", [1, 2])
def test_what_a_folder_says_of_movements(tmp_path, capsys, episodes_per_file):
    """Packs keep it for each episode; statistics have it where all agree, also where stats.json is
    older; of episodes that do not say it `fit` tells what they lose; two robots are refused."""

    def saying(*all_deltas):
        for (arrays, header), deltas in zip(recordings(3), all_deltas, strict=True):
            yield arrays, header if deltas is None else header | {"deltas": deltas}

    def write_folder(name, *all_deltas):
        folder = tmp_path / name
        ft.write_episodes(folder, saying(*all_deltas), episodes_per_file)
        files = ft.read_episodes(folder)
        capsys.readouterr()
        ft.main(["fit", "--data", str(folder), "--out", str(tmp_path / f"{name}_fast")])
        return files, ft.read_stats(folder, files)["action"], capsys.readouterr().out

    files, stats, said = write_folder("all", "2", "2", "2")
    assert [file.deltas for file in files] == [2, 2, 2] and stats["deltas"] == 2
    assert "begin no chunk" not in said
    assert FastTokenizer.load(tmp_path / "all_fast").stats["deltas"] == 2
    path = tmp_path / "all/stats.json"
    stored = json.loads(path.read_text())
    del stored["action"]["deltas"]
    path.write_text(json.dumps(stored))
    assert ft.read_stats(tmp_path / "all", files)["action"] == stats
    stored["action"]["deltas"] = 4
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="stats.json: action: deltas is 4; give 0 to 3"):
        ft.read_stats(tmp_path / "all", files)

    files, stats, said = write_folder("some", "2", None, "2")
    assert [file.deltas for file in files] == [2, None, 2] and "deltas" not in stats
    assert "the last 4 steps of 1 of 3 episodes begin no chunk: their headers do not say" in said

    with pytest.raises(SystemExit, match="deltas 3, .* has 2; keep different robots in different"):
        ft.write_episodes(tmp_path / "two", saying("2", "2", "3"), episodes_per_file)


def test_fit_tells_of_episodes_shorter_than_a_chunk(tmp_path, capsys):
    """Of lengths 7, 8 and 9 at horizon 8 it said that the last 7 steps of 3 of 3 episodes begin no
    chunk, and fitted the chunk that repeats the last movement of the first."""
    ft.write_episodes(tmp_path / "data", recordings(3))
    files = ft.read_episodes(tmp_path / "data")
    assert [list(ft.chunk_starts(file, 8)) for file in files] == [[0], [0], [0, 1]]
    for horizon, long, short in ((7, 3, 0), (8, 2, 1), (10, 0, 3), (1, 0, 0)):
        capsys.readouterr()
        out = str(tmp_path / "fast")
        ft.main(["fit", "--data", str(tmp_path / "data"), "--out", out, "--horizon", str(horizon)])
        said = capsys.readouterr().out
        assert said.count(f"the last {horizon - 1} steps of {long} of 3 episodes") == (long > 0)
        line = f"{short} of 3 episodes are shorter than {horizon} steps and say no deltas: "
        assert said.count(line) == (short > 0)
        assert said.count(" of 3 episodes ") == (long > 0) + (short > 0)


@pytest.mark.parametrize("per_file", [1, 2])
def test_two_robots_behind_an_episode_that_says_nothing_are_refused(tmp_path, per_file):
    """All were compared with the first episode: None, 2, 3 passed, where 2, 3 was refused."""

    def saying(*all_deltas):
        for (arrays, header), deltas in zip(recordings(9), all_deltas, strict=False):
            yield arrays, header if deltas is None else header | {"deltas": deltas}

    out = tmp_path / "out"
    message = "recording 3, lab 3: deltas 3, recording 1, lab 1 has 2; keep different robots"
    with pytest.raises(SystemExit, match=message):
        ft.write_episodes(out, saying(None, "2", None, "3"), per_file)
    # the one that says it was written by a call before
    with pytest.raises(SystemExit):
        ft.write_episodes(out, saying(None, "2", None, None, 5), per_file, resume=True)
    message = "recording 4, lab 4: deltas 3, .*_00000[01].safetensors has 2; keep different"
    with pytest.raises(SystemExit, match=message):
        ft.write_episodes(out, saying(None, "2", None, None, "3"), per_file, resume=True)
    # and in reading
    ft.write_episodes(tmp_path / "two", saying(None, "2"), per_file)
    ft.write_episodes(tmp_path / "three", saying("3"))
    other = tmp_path / "two/z.safetensors"
    (tmp_path / "three/episode_000000.safetensors").rename(other)
    with pytest.raises(
        ValueError, match="z.safetensors: deltas 3, .* has 2; keep different robots"
    ):
        ft.read_episodes(tmp_path / "two")
    other.unlink()
    assert [file.deltas for file in ft.read_episodes(tmp_path / "two")] == [None, 2]


def test_wrong_episodes_are_refused(tmp_path):
    action = np.zeros((20, 3), np.float32)
    action[17, 1] = np.nan
    for change, message in (
        ({"action": action}, "action row 17 is not finite; repair"),
        ({"state": np.full((20, 2), np.inf, np.float32)}, "state row 0 is not finite"),
        ({"state": np.zeros((19, 2), np.float32)}, "steps differ"),
        ({"action": None}, "action is missing"),
        ({"image": None}, "image is missing"),
        ({"action": np.zeros((20, 3))}, r"action is F64 \[20, 3\], not F32"),
        ({"image": np.zeros((20, 8, 8), np.uint8)}, "image is U8"),
        ({"image": np.zeros((20, 0, 8, 3), np.uint8)}, r"image is U8 \[20, 0, 8, 3\], not U8"),
    ):
        path, _ = write(tmp_path, 0, **change)
        with pytest.raises(ValueError, match=f"episode_000000.safetensors: {message}"):
            ft.read_episode_file(path)
    path, _ = write(tmp_path, 0)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file .* record it again"):
            ft.read_episode_file(path)
    path.write_bytes(whole)
    write(tmp_path, 1, action=np.zeros((20, 4), np.float32))
    with pytest.raises(ValueError, match="000001.safetensors: 4 action dimensions, .* has 3"):
        ft.read_episodes(tmp_path)
    write(tmp_path, 1, state=np.zeros((20, 5), np.float32))
    with pytest.raises(ValueError, match="000001.safetensors: 5 state dimensions, .* has 2"):
        ft.read_episodes(tmp_path)
    with pytest.raises(FileNotFoundError, match="no episode_"):
        ft.read_episodes(tmp_path / "nothing")


def test_a_file_of_the_same_name_is_read_anew(tmp_path):
    """Open files are kept: frames of a folder that was converted again were those of before."""
    for number in range(2):
        path, arrays = write(tmp_path / f"{number}", number)
        target = tmp_path / "episode.safetensors"
        path.replace(target)
        (episode,) = ft.read_episode_file(target)
        np.testing.assert_array_equal(episode.frame(3), arrays["image"][3])


def test_every_part_of_an_episode_is_in_its_digest(tmp_path):
    """By it a stage knows on --resume that data has changed."""
    ft.write_episodes(tmp_path / "out", recordings(2))
    files = ft.read_episodes(tmp_path / "out")
    digests = [ft.episodes_sha256(files), ft.episodes_sha256(files[::-1])]
    changes = {
        "name": "episode_000009",
        "task": "pull",
        "action": files[0].action + 1,
        "state": files[0].state + 1,
        "thoughts": ["Now reach."] * len(files[0]),
        "deltas": 2,
    }
    for name, value in changes.items():
        changed = dataclasses.replace(files[0], **{name: value})
        digests.append(ft.episodes_sha256([changed, files[1]]))
    assert len(set(digests)) == len(digests) == 8
    assert ft.episodes_sha256(ft.read_episodes(tmp_path / "out")) == digests[0]


def test_a_damaged_list_of_episodes_is_one_line(tmp_path):
    """Of a file of several, whose header another program wrote: TypeError and AttributeError, here
    or when a stage looked at the source."""
    arrays, _ = next(recordings(1))
    path = tmp_path / "pack_000000.safetensors"
    good = {"task": "go", "steps": 7}
    for change, message in (
        ({"steps": 7.0}, "task 'go' of 7.0 steps"),
        ({"steps": "7"}, "task 'go' of '7' steps"),
        ({"source": None}, "source None is no text"),
        ({"task": "a \ud83d b"}, "'utf-8' codec can't encode"),
    ):
        save_file(arrays, path, {"episodes": json.dumps([good | change])})
        with pytest.raises(ValueError, match=f"pack_000000.safetensors: {message}.*; convert"):
            ft.read_episodes(tmp_path)
    save_file(arrays, path, {"episodes": json.dumps([good, good | {"steps": 0}])})
    with pytest.raises(ValueError, match="task 'go' of 0 steps"):  # all in all there are 7
        ft.read_episodes(tmp_path)
    save_file(arrays, path, {"episodes": json.dumps([good])})
    assert len(ft.read_episodes(tmp_path)[0]) == 7


@pytest.mark.parametrize("tag", ["<image>", "<|image_pad|>"])
def test_an_instruction_that_stands_for_an_image_names_its_episode(tmp_path, tag):
    """A stage stopped when it came to such a frame, perhaps after hours: '2 "<image>" but 1
    images', of which of the episodes, nobody knew."""
    path, _ = write(tmp_path, 3, header={"task": f"put {tag} there"})
    with pytest.raises(ValueError, match=r"episode_000003.safetensors: the instruction 'put <"):
        ft.read_episode_file(path)


def recordings(count, steps=7, codec=None):
    """Count recordings of smooth pictures, two cameras; the steps of each differ."""
    for number in range(count):
        rng = np.random.default_rng(number)
        T = steps + number
        ramp = np.arange(T * 16 * 12 * 3).reshape(T, 16, 12, 3) // 64
        cameras = {"image": ramp.astype(np.uint8), "image_wrist": 255 - ramp.astype(np.uint8)}
        arrays = {
            "state": rng.normal(size=(T, 2)).astype(np.float32),
            "action": rng.normal(size=(T, 3)).astype(np.float32),
        }
        header = {"task": f"push {number}", "fps": "10", "source": f"lab {number}"}
        for name, frames in cameras.items():
            added = ({name: frames}, {})
            if codec:
                added = ft.encode_frames(frames, name, codec)
            arrays |= added[0]
            header |= added[1]
        yield arrays, header


@pytest.mark.parametrize("per_file", [1, 3])
@pytest.mark.parametrize("codec", [None, "png", "jpeg 95"])
def test_encoded_frames_and_several_episodes_a_file(tmp_path, codec, per_file):
    """BridgeV2's 1.89M raw frames are 372 GB, and DROID's 76,000 episodes as many files."""
    ft.write_episodes(tmp_path / "out", recordings(7, codec=codec), per_file)
    raw = list(recordings(7))
    files = ft.read_episodes(tmp_path / "out")
    assert len(files) == 7 and len({file.name for file in files}) == 7
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (7 if per_file == 1 else 3)
    for file, (arrays, header) in zip(files, raw, strict=True):
        assert (file.task, file.fps, file.source) == (header["task"], 10, header["source"])
        np.testing.assert_array_equal(file.action, arrays["action"])
        np.testing.assert_array_equal(file.state, arrays["state"])
        assert file.image_sizes == {"image": (16, 12), "image_wrist": (16, 12)}
        for name in file.cameras:
            for t in (0, 3, len(file) - 1):
                off = np.abs(file.frame(t, name).astype(int) - arrays[name][t])
                assert off.max() <= (6 if codec == "jpeg 95" else 0)
        with pytest.raises(ValueError, match="no frame"):
            file.frame(len(file))  # that of the next episode in the file
    assert [file.name for file in ft.read_episodes(tmp_path / "out", 4)] == [
        file.name for file in files[:4]
    ]
    stats = ft.read_stats(tmp_path / "out", files)
    assert stats["action"] == ft.statistics(np.concatenate([arrays["action"] for arrays, _ in raw]))


@pytest.mark.parametrize("per_file", [1, 2])
def test_views_are_written_as_they_read(tmp_path, per_file):
    """The library writes memory as it lies: of a flipped image, of one with its channels moved and
    of columns stacked with .T other numbers came back than were given."""
    rng = np.random.default_rng(0)
    chw = rng.integers(0, 255, (2, 6, 3, 8, 10), dtype=np.uint8)
    given = []
    for number in range(2):
        arrays = {
            "image": chw[number].transpose(0, 2, 3, 1)[:, ::-1, 1:-1],
            "state": rng.normal(size=(2, 6)).T,
            "action": rng.normal(size=(12, 3))[::2],
            "image_wrist": np.stack([frame.transpose(1, 2, 0) for frame in chw[number]])[..., ::-1],
        }
        given.append((arrays, {"task": "go", "fps": "5", "source": "test"}))
    ft.write_episodes(tmp_path / "e", given, episodes_per_file=per_file)
    for (arrays, _), episode in zip(given, ft.read_episodes(tmp_path / "e"), strict=True):
        for name in ("state", "action"):
            np.testing.assert_array_equal(getattr(episode, name), arrays[name].astype(np.float32))
        for camera in ("image", "image_wrist"):
            frames = [episode.frame(t, camera) for t in range(6)]
            np.testing.assert_array_equal(frames, arrays[camera])


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 8, 8, 4), (6, 8, 8, 1)])
def test_images_of_three_channels_last(tmp_path, shape, capsys):
    """Any four dimensions were taken."""
    arrays = {"state": np.zeros((6, 2)), "action": np.zeros((6, 3))}
    arrays["image"] = np.zeros(shape, np.uint8)
    with pytest.raises(SystemExit, match=r"image is uint8 \(6, .*\), not uint8 \(T, H, W, 3\)"):
        ft.write_episodes(tmp_path / "e", [(arrays, {"task": "go", "source": "test"})])


def test_recordings_may_be_lists(tmp_path):
    arrays = {"state": [[0.0]] * 3, "action": [[1.0]] * 3}
    arrays["image"] = [np.zeros((4, 4, 3), np.uint8)] * 3
    ft.write_episodes(tmp_path / "e", [(arrays, {"task": "go", "source": "test"})])
    assert len(ft.read_episodes(tmp_path / "e")[0]) == 3
    with pytest.raises(SystemExit, match="None comes in place of a recording"):
        ft.write_episodes(tmp_path / "n", [(arrays, {"task": "go"}), None], resume=True)


def test_recordings_of_another_size_begin_another_file(tmp_path):
    first, second, third = recordings(3)
    second[0]["image"] = second[0]["image"][:, :8]
    ft.write_episodes(tmp_path / "out", [first, second, third], episodes_per_file=5)
    files = ft.read_episodes(tmp_path / "out")
    assert [file.frame(0).shape[0] for file in files] == [16, 8, 16]
    assert len({file.path for file in files}) == 3


def test_frames_of_another_codec_begin_another_file(tmp_path):
    """The header of a file tells one codec and one size of all its frames."""
    small, header = next(recordings(1))
    for name in ("image", "image_wrist"):
        arrays, more = ft.encode_frames(small[name][:, :8], name, "png")
        small |= arrays
        header |= more
    one, other = (next(recordings(1, codec=codec)) for codec in ("png", "jpeg 95"))
    recorded = [one, other, (small, header)]
    ft.write_episodes(tmp_path / "out", recorded, episodes_per_file=5)
    files = ft.read_episodes(tmp_path / "out")
    assert len({file.path for file in files}) == 3
    headers = []
    for file in files:
        with safe_open(file.path, "numpy") as opened:
            headers.append(opened.metadata())
    assert [header["image.codec"] for header in headers] == ["png", "jpeg 95", "png"]
    assert [file.frame(0).shape for file in files] == [(16, 12, 3), (16, 12, 3), (8, 12, 3)]


def test_frames_of_no_bytes_are_refused(tmp_path):
    """Each frame ends behind the one before it, the last one where all of them end."""
    arrays, header = next(recordings(1, codec="png"))
    path = tmp_path / "episode_000000.safetensors"
    ends = arrays["image.ends"]
    empty_first = np.where(np.arange(7) == 0, 0, ends)
    empty_third = np.where(np.arange(7) == 2, ends[1], ends)
    too_short = ends - (np.arange(7) == 6)
    for wrong in (empty_first, empty_third, too_short):
        save_file(arrays | {"image.ends": wrong}, path, header)
        with pytest.raises(ValueError, match=r"image.ends or image.shape do not fit it"):
            ft.read_episode_file(path)
    save_file(arrays, path, header)
    assert len(ft.read_episode_file(path)[0]) == 7


def test_damaged_encoded_frames_are_one_line(tmp_path):
    ft.write_episodes(tmp_path / "out", recordings(2, codec="png"), 2)
    path = tmp_path / "out/pack_000000.safetensors"
    whole = path.read_bytes()
    second_png = whole.index(b"IDAT", whole.index(b"IDAT") + 1)
    path.write_bytes(whole[:second_png] + b"IDAX" + whole[second_png + 4 :])
    damaged, good = ft.read_episodes(tmp_path / "out")
    good.frame(0)
    with pytest.raises(ValueError, match="pack_000000_0000: step 1, image: image does not open"):
        damaged.frame(1)
    for change, message in (
        (lambda data: data.replace(b'"16 12"', b'"16 13"'), "step 0 of image is"),
        (lambda data: data.replace(b'"16 12"', b'"16 x2"'), "image.ends or image.shape do not fit"),
        (lambda data: data.replace(b'"16 12"', b'"00 12"'), "image.ends or image.shape do not fit"),
        (lambda data: data.replace(rb"steps\": 7", rb"steps\": 6"), "have not 15 steps"),
        (lambda data: data.replace(b"image.codec", b"image.kodec"), "not U8 .T, H, W, 3"),
    ):
        path.write_bytes(change(whole))
        assert path.read_bytes() != whole
        with pytest.raises(ValueError, match=message):
            ft.read_episodes(tmp_path / "out")[0].frame(0)


def objects_of(T, names=("black bowl", "other black bowl"), **change):
    """What a recorder that knows the objects adds -> arrays, header; `change`: header's lists."""
    rng = np.random.default_rng(T)
    arrays = {
        "object_position": rng.normal(size=(T, len(names), 3)).astype(np.float32),
        "object_pixel": rng.uniform(size=(T, len(names), 2)).astype(np.float32),
        "hand_pixel": rng.uniform(size=(T, 2)).astype(np.float32),
    }
    arrays["object_position"][0, -1] = np.nan  # not there yet
    lists = {
        "objects": list(names),
        "targets": [0] * (T - 2) + [1, -1],
        "thoughts": [f"Now reach: left {t}, \u628a." for t in range(T)],
    }
    return arrays, {key: json.dumps(value) for key, value in (lists | change).items()}


@pytest.mark.parametrize("per_file", [1, 3])
def test_objects_of_an_episode_come_back(tmp_path, per_file):
    written = []
    for arrays, header in recordings(7):
        added, said = objects_of(len(arrays["action"]))
        written.append((arrays | added, header | said))
    ft.write_episodes(tmp_path / "out", written, per_file)
    files = ft.read_episodes(tmp_path / "out")
    assert len({file.path for file in files}) == (7 if per_file == 1 else 3)
    for file, (arrays, header) in zip(files, written, strict=True):
        assert file.objects == ["black bowl", "other black bowl"]
        assert file.cameras == ("image", "image_wrist")
        assert file.targets == json.loads(header["targets"])
        assert file.thoughts == json.loads(header["thoughts"])
        for name in ("object_position", "object_pixel", "hand_pixel"):
            np.testing.assert_array_equal(getattr(file, name), arrays[name])
        assert np.isnan(file.object_position[0, 1]).all()


def test_episodes_without_objects_are_what_they_were(tmp_path):
    """Statistics, split and fingerprint are of action and state; thoughts, which a stage may train
    on, count where there are some."""
    plain = list(recordings(5))
    known = []
    for arrays, header in plain:
        added, said = objects_of(len(arrays["action"]))
        del said["thoughts"]
        known.append((arrays | added, header | said))
    ft.write_episodes(tmp_path / "plain", plain)
    ft.write_episodes(tmp_path / "known", known)
    files = ft.read_episodes(tmp_path / "plain")
    of_known = ft.read_episodes(tmp_path / "known")
    first = files[0]
    assert (first.objects, first.targets, first.thoughts) == ([], None, None)
    assert first.object_position is first.object_pixel is first.hand_pixel is None
    assert ft.episodes_sha256(files) == ft.episodes_sha256(of_known)
    stats = [(tmp_path / name / "stats.json").read_bytes() for name in ("plain", "known")]
    assert stats[0] == stats[1]
    of_known[2].thoughts = ["so"] * len(of_known[2])
    assert ft.episodes_sha256(files) != ft.episodes_sha256(of_known)


@pytest.mark.parametrize("per_file", [1, 3])
@pytest.mark.parametrize(
    ("arrays", "header", "message"),
    [
        ({}, {"targets": "[0, 0]"}, "2 targets of 7 steps"),
        ({}, {"targets": "[0, 1, 2, 0, 0, 0, 0]"}, "2 in step 2 is none of 2 objects, nor -1"),
        ({}, {"targets": "[0, -2, 1, 0, 0, 0, 0]"}, "-2 in step 1 is none of 2 objects, nor -1"),
        ({}, {"targets": "[0, 0, 0, true, 0, 0, 0]"}, "targets is no JSON list of int"),
        ({}, {"thoughts": '["one"]'}, "1 thoughts of 7 steps"),
        ({}, {"thoughts": "none"}, "thoughts is no JSON "),
        ({}, {"objects": '{"bowl": 1}'}, "objects is no JSON list of str"),
        ({}, {"objects": '["bowl", "bowl"]'}, "each needs a name of its own"),
        ({}, {"objects": '["bowl", " "]'}, "each needs a name of its own"),
        ({}, {"objects": '["bowl"]', "targets": "[0, 0, 0, 0, 0, 0, 0]"}, "position holds 2 obj"),
        ({"object_pixel": np.zeros((7, 3, 2))}, {}, "object_pixel holds 3 objects, .* names 2"),
        ({"object_position": np.zeros((7, 2, 2))}, {}, r"is no array \(T, N, 3\)"),
        ({"hand_pixel": np.zeros((6, 2))}, {}, "steps differ .*'hand_pixel': 6"),
        ({"hand_pixel": np.full((7, 2), np.inf)}, {}, "hand_pixel of step 0 is not finite"),
    ],
)
def test_objects_that_do_not_fit_are_one_line(tmp_path, per_file, arrays, header, message):
    ours, our_header = next(recordings(1))
    added, said = objects_of(7)
    bad = (ours | added | arrays, our_header | said | header)
    with pytest.raises(SystemExit, match=f"lab 0: .*{message}") as e:
        ft.write_episodes(tmp_path / "out", [bad], per_file)
    assert "\n" not in str(e.value)


def test_damaged_objects_on_disk_are_one_line(tmp_path):
    """As another program, which does not check, may have written them."""
    ours, header = next(recordings(1))
    added, said = objects_of(7)
    path = tmp_path / "episode_000000.safetensors"
    for arrays, words, message in (
        ({}, {"objects": '["bowl"]', "targets": "[]"}, "0 targets of 7 steps; record the"),
        ({"object_position": np.zeros((7, 2, 3))}, said, r"is F64 .*, not F32 \(T, N, 3\); conv"),
        ({"object_pixel": added["object_pixel"]}, {}, "object_pixel holds 2 objects, .* names 0"),
        ({"hand_pixel": np.full((7, 2), -np.inf, np.float32)}, {}, "hand_pixel row 0 is not fin"),
    ):
        save_file(ours | arrays, path, header | words)
        with pytest.raises(ValueError, match=f"episode_000000.safetensors: .*{message}"):
            ft.read_episodes(tmp_path)


def test_many_episodes_need_few_memory_maps(tmp_path):
    """Each episode kept a map: MemoryError near 65,000 of them, hours into a run."""
    ft.write_episodes(tmp_path / "out", (r for _ in range(40) for r in recordings(10)))
    files = ft.read_episodes(tmp_path / "out")
    assert len(files) == 400
    for _ in range(2):
        for file in files:
            file.frame(0)
    maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert ft.OPEN_FILES / 2 < maps <= ft.OPEN_FILES


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    """As of data/ on a larger disk: at the end a folder does not take a link's place, so that hours
    of writing ended in an error."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    ft.write_episodes(tmp_path / "link", recordings(2))
    assert (tmp_path / "link").is_symlink()
    assert len(ft.read_episodes(tmp_path / "disk")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}


@pytest.mark.parametrize("per_file", [1, 3])
@pytest.mark.parametrize("yields_none", [True, False])
def test_a_stopped_writer_goes_on_to_the_same_bytes(tmp_path, per_file, yields_none):
    """A conversion of hours that stopped, by a power cut or a damaged file, began again."""

    def stopping(count):
        yield from itertools.islice(recordings(9), count)
        raise KeyboardInterrupt

    def killed(count):
        yield from itertools.islice(recordings(9), count)
        os._exit(9)

    def rest():
        for number, recording in enumerate(recordings(9)):
            yield None if yields_none and number < there else recording

    ft.write_episodes(tmp_path / "whole", recordings(9), per_file)
    with pytest.raises(KeyboardInterrupt):
        ft.write_episodes(tmp_path / "out", stopping(5), per_file, resume=True)
    child = os.fork()
    if child == 0:  # killed, so that nothing can be tidied up
        ft.write_episodes(tmp_path / "out", killed(7), per_file, resume=True)
    os.waitpid(child, 0)
    assert not (tmp_path / "out").exists()
    (ft.unfinished_folder(tmp_path / "out") / "pack_000009.tmp").write_bytes(b"half a file")
    there = len(ft.unfinished_episodes(tmp_path / "out"))
    assert there == (7 if per_file == 1 else 6)
    ft.write_episodes(tmp_path / "out", rest(), per_file, resume=True)
    assert not ft.unfinished_folder(tmp_path / "out").exists()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole


@pytest.mark.parametrize("per_file", [1, 5])
def test_instructions_keep_every_character(tmp_path, per_file):
    """And half of one, which JSON may hold, ended in "'utf-8' codec can't encode": of which of the
    episodes, nobody knew."""
    written = list(recordings(4))
    texts = ["\U0001f600 \u628a", "e\u0301 \u200b\u200d\ufeff", "a\x00b\u2028\x85", "\U0010ffff"]
    for (_, header), text in zip(written, texts, strict=True):
        header["task"] = text
    ft.write_episodes(tmp_path / "out", written, per_file)
    assert [episode.task for episode in ft.read_episodes(tmp_path / "out")] == texts
    written[2][1].update(task="a \ud83d b", source="bridge:17")
    with pytest.raises(SystemExit, match=r"bridge:17: half a character .*'a \\ud83d b'"):
        ft.write_episodes(tmp_path / "bad", written, per_file)
    written[2][1].update(task="go", source="a\udcff: episode 17")  # a path that is no UTF-8
    with pytest.raises(SystemExit, match=r"a\\udcff: episode 17: half a character in source"):
        ft.write_episodes(tmp_path / "bad", written, per_file)


@pytest.mark.parametrize(
    ("arrays", "header", "message"),
    [
        ({"state": None}, {}, r"lab 0: state is no array \(T, S\)"),
        ({"action": np.zeros(6)}, {}, r"lab 0: action is no array \(T, A\)"),
        ({"action": np.full((6, 2), 1e300)}, {}, "lab 0: action of step 0 is not finite"),
        ({}, {"task": None}, "lab 0: task is None; give it as text"),
        ({}, {"fps": 5}, "lab 0: fps is 5; give it as text"),
        ({"action": np.full((7, 2), "a")}, {}, "lab 0: action: could not convert .*; give numbers"),
        ({"image": None}, {}, r"lab 0: image is object \(\), not uint8 \(T, H, W, 3\)"),
        (
            {"image": np.zeros((7, 0, 4, 3), np.uint8)},
            {},
            r"lab 0: image \(7, 0, .* without a pixel",
        ),
        (
            {"image_top": np.zeros((7, 4, 0, 3), np.uint8)},
            {},
            "lab 0: image_top .* without a pixel",
        ),
        ({"action": np.zeros((7, 0))}, {}, r"lab 0: action is no array \(T, A\); give a row of"),
        ({"image_top": np.zeros((7, 4, 4, 3))}, {}, "lab 0: image_top is float64 .*; give colours"),
        ({"top": np.zeros((7, 4, 4, 3), np.uint8)}, {}, "looks like frames.*call it image_top"),
        ({"success": np.float32(1)}, {}, r"success is float32 \(\), no array of numbers"),
        ({"who": np.full(7, "me")}, {}, r"who is <U2 \(7,\), no array of numbers; leave it out"),
    ],
)
def test_a_recording_of_another_shape_is_one_line(tmp_path, arrays, header, message):
    """Of the first converter that a student writes: KeyError, AttributeError, TypeError."""
    ours, our_header = next(recordings(1))
    with pytest.raises(SystemExit, match=message):
        ft.write_episodes(tmp_path / "out", [(ours | arrays, our_header | header)])
    ours |= {name: ours[name].tolist() for name in ("action", "state")}  # lists are good enough
    ft.write_episodes(tmp_path / "out", [(ours, our_header)])


@pytest.mark.parametrize("per_file", [1, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, header: arrays["action"].__setitem__((3, 1), np.nan), "action of step 3"),
        (lambda arrays, header: arrays.update(image=arrays["image"] / 255), "image is float64"),
        (lambda arrays, header: header.update(deltas="9"), "deltas '9' of 3 action dimensions"),
        (lambda arrays, header: header.update(fps="10 Hz"), "could not convert .*'10 Hz'"),
        (lambda arrays, header: header.pop("task"), "'task' is missing"),
    ],
)
def test_the_recording_that_is_wrong_is_named(tmp_path, per_file, change, message):
    """All of a lab's recordings have one source, as in the example of docs/data.md: "lab: action
    of step 3 is not finite" was all that was said. Of a pack it was the source of the first."""
    given = [(arrays, header | {"source": "lab"}) for arrays, header in recordings(3)]
    change(*given[1])
    with pytest.raises(SystemExit, match=f"^error: recording 1, lab: {message}"):
        ft.write_episodes(tmp_path / "out", given, per_file)


@pytest.mark.parametrize("shape", [lambda a, h: a, lambda a, h: (a, h, 1), lambda a, h: (a, None)])
def test_what_is_no_pair_of_arrays_and_header_is_one_line(tmp_path, shape):
    """It was a TypeError about _checked_recording(), or an AttributeError of None."""
    first, second = recordings(2)
    with pytest.raises(SystemExit, match="recording 1 is no pair of dicts; yield .arrays, header"):
        ft.write_episodes(tmp_path / "out", [first, shape(*second)])


@pytest.mark.parametrize(
    ("count", "resume", "when"),
    [(2, False, "after recording 1, lab 1"), (0, False, "before recording 0"), (2, True, None)],
)
def test_a_fault_in_the_code_that_makes_recordings_is_found(tmp_path, count, resume, when):
    """numpy's words alone were printed, of a converter that had run for an hour."""

    def faulty(numbers):
        yield from recordings(count)
        np.zeros(5).reshape(numbers)  # here

    def bug():
        yield from faulty(3)

    if resume:  # the two are on disk, and a converter may pass over them
        with pytest.raises(SystemExit):
            ft.write_episodes(tmp_path / "out", bug(), resume=True)
        recorded, when = itertools.chain([None] * count, faulty(3)), "after recording 3, lab 1"
    else:
        recorded = bug()
    source = Path(__file__).read_text().split("\n")
    line = next(i for i, text in enumerate(source, 1) if text.endswith("# here"))
    place = rf"\(test_fast_tokenizer.py, line {line}\)"
    with pytest.raises(SystemExit, match=f"^error: {when} {place}: cannot reshape") as stop:
        ft.write_episodes(tmp_path / "out", recorded, resume=resume)
    original = stop.value.__cause__.__cause__
    assert type(original) is ValueError and str(original).startswith("cannot reshape array")


@pytest.mark.parametrize("folder", ["", ".", "/"])
def test_episodes_need_a_folder_of_their_own(folder):
    """--out "" and --out . were tracebacks: the folder that is written first is named after it."""
    with pytest.raises(SystemExit, match="is no folder to write; name a new one"):
        ft.write_episodes(folder, recordings(1))


def test_a_tokenizer_is_not_fitted_for_nowhere(tmp_path):
    """fit --out "" fitted, printed its report, and saved nothing."""
    ft.write_episodes(tmp_path / "data", recordings(2))
    with pytest.raises(ValueError, match="--out is empty"):
        ft.main(["fit", "--data", str(tmp_path / "data"), "--out", ""])


def test_a_writer_goes_on_with_the_same_recordings_only(tmp_path):
    def stopping():
        yield from itertools.islice(recordings(9), 4)
        raise ValueError("a damaged file")

    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"a damaged file \(what was written stays in .*out.part"):
        ft.write_episodes(out, stopping(), resume=True)
    for other, per_file, message in (
        (
            itertools.islice(recordings(9), 1, None),
            1,
            "now .'push 1', 'lab 1', 8, None. comes in its",
        ),
        # a converter that has learned how the robot holds still: half of a folder would not say it
        (
            ((arrays, header | {"deltas": "2"}) for arrays, header in recordings(9)),
            1,
            "'lab 0', 7, None., now .'push 0', 'lab 0', 7, '2'. comes in its",
        ),
        (itertools.islice(recordings(9), 3), 1, "has 4 episodes, now only 3 recordings come"),
        (recordings(9), 2, "begun with other episodes a file"),
    ):
        with pytest.raises(SystemExit, match=message):
            ft.write_episodes(out, other, per_file, resume=True)
    with pytest.raises(SystemExit, match="out.part.*or delete it"):
        ft.write_episodes(out, recordings(9))
    ft.write_episodes(out, recordings(9), resume=True)
    assert len(ft.read_episodes(out)) == 9


@pytest.mark.parametrize("per_file", [1, 2])
def test_a_recording_of_another_robot_is_named_and_not_kept(tmp_path, per_file):
    """A file of out.part was named, which is gone by then. With resume it stayed: the next call
    passed over it, also when the recording was repaired, and could not make the statistics."""
    given = [(arrays, header | {"source": "lab"}) for arrays, header in recordings(4)]
    arrays, header = given[2]
    # the first that differs from what was written in this call, then in the one before
    for change, message in (
        ({"action": arrays["action"][:, :2]}, "2 action dimensions, recording 0, lab has 3"),
        ({"state": arrays["state"][:, :1]}, "1 state dimensions, .*_000000.safetensors has 2"),
    ):
        wrong = [*given[:2], (arrays | change, header), given[3]]
        with pytest.raises(SystemExit, match=f"error: recording 2, lab: {message}; keep"):
            ft.write_episodes(tmp_path / "out", wrong, per_file, resume=True)
    ft.write_episodes(tmp_path / "out", given, per_file, resume=True)
    assert len(ft.read_episodes(tmp_path / "out")) == 4


def test_a_recording_that_cannot_be_read_back_leaves_no_file(tmp_path):
    bad = next(recordings(1))
    bad[0]["image"] = bad[0]["image"].astype(np.float32)
    with pytest.raises(SystemExit, match="recording 2, lab 0: image is float32"):
        ft.write_episodes(tmp_path / "out", [*recordings(2), bad], resume=True)
    assert len(ft.unfinished_episodes(tmp_path / "out")) == 2
    uneven = next(recordings(1))
    uneven[0]["state"] = uneven[0]["state"][:-1]
    with pytest.raises(SystemExit, match="lab 0: steps differ .*'state': 6"):
        ft.write_episodes(tmp_path / "new", [uneven])
    assert not ft.unfinished_folder(tmp_path / "new").exists()


def test_the_split_is_a_shuffle_that_all_stages_share(tmp_path):
    """The last 5% by name were held out: in BridgeV2 the last scenes."""
    ft.write_episodes(tmp_path / "out", (r for _ in range(10) for r in recordings(10)), 7)
    files = ft.read_episodes(tmp_path / "out")
    train, held = ft.split_episodes(files, 0.1)
    assert len(train) == 90 and len(held) == 10
    assert sorted(files, key=str) == files and sorted(train + held, key=str) == files
    assert [train, held] == [sorted(part, key=str) for part in (train, held)]
    places = [files.index(file) for file in held]
    assert np.std(places) > 15 and min(places) < 30 < 70 < max(places)  # not neighbours
    again = ft.split_episodes(ft.read_episodes(tmp_path / "out"), 0.1)[1]
    assert [file.name for file in again] == [file.name for file in held]
    fewer = ft.split_episodes(files)[1]
    assert len(fewer) == 5 and set(fewer) < set(held)  # a smaller share is a part of a larger one
    assert len(ft.split_episodes(files, 0.29)[1]) == 29  # 0.29 * 100 is 28.999999999999996
    counts = [len(ft.split_episodes(files[:n])[1]) for n in (2, 19, 39, 40, 99)]
    assert counts == [1, 1, 1, 2, 4], "whole ones of a twentieth, at least one"
    with pytest.raises(ValueError, match="1 episodes, all of them held out"):
        ft.split_episodes(files[:1])


def test_another_split_is_warned_of(tmp_path, capsys):
    ft.write_episodes(tmp_path / "out", (r for _ in range(4) for r in recordings(10)))
    files = ft.read_episodes(tmp_path / "out")
    record = ft.split_record(files, ft.split_episodes(files)[1])
    assert (record["folder"], record["episodes"], record["held_out"]) == (
        str(tmp_path / "out"),
        40,
        2,
    )
    capsys.readouterr()
    ft.warn_of_other_split([record], [record])
    ft.warn_of_other_split([record | {"folder": "elsewhere", "sha256": "x"}], [record])
    assert capsys.readouterr().err == ""
    other = ft.split_record(files, ft.split_episodes(files, seed=1)[1])
    ft.warn_of_other_split([other], [record])
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path / 'out'}: 2 of 40 episodes")


# ---- Commands fit and report ---------------------------------------------------------------------


def command(*words):
    return subprocess.run(
        [sys.executable, ROOT / "fast_tokenizer.py", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_command(tmp_path):
    for i in range(12):
        write(tmp_path / "data/episodes", i)
    data = tmp_path / "data"
    out = tmp_path / "fast"
    done = command("fit", "--data", data, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "round trip of 16 held-out chunks" in done.stdout  # episode 9 of 12
    result = json.loads((out / "report.json").read_text())
    assert result["malformed"] == 0 and result["naive_tokens"] == 15 > result["tokens_mean"]
    assert result["mse"][2] == 0 and 0 < result["mse"][0] < result["max_error"][0] ** 2 < 0.01
    tok = FastTokenizer.load(out)
    assert (tok.horizon, tok.action_dim, tok.scale, tok.stats["q01"][2]) == (5, 3, 2, 0.25)
    assert tok.vocab_size <= 64
    # the same numbers again, by the other command; another process writes the same bytes
    again = command("report", "--tokenizer", out, "--data", data)
    assert again.stdout.replace("chunks of every 10th episode", "held-out chunks") == done.stdout
    assert command("fit", "--data", data, "--out", tmp_path / "b").returncode == 0
    assert (out / "fast.json").read_bytes() == (tmp_path / "b/fast.json").read_bytes()
    # one without statistics, as the published ones are, is saved with those of the data
    (tmp_path / "bare").mkdir()
    bare = {**json.loads((out / "fast.json").read_text()), "stats": None}
    (tmp_path / "bare/fast.json").write_text(json.dumps(bare))
    done = command(
        "report", "--tokenizer", tmp_path / "bare", "--data", data, "--out", tmp_path / "own"
    )
    assert done.returncode == 0 and FastTokenizer.load(tmp_path / "own").stats == tok.stats
    # stats.json beside the episodes is used when it is there
    stats = {
        k: ft.statistics(np.random.default_rng(0).normal(size=(240, n)))
        for k, n in (("action", 3), ("state", 2))
    }
    (data / "episodes/stats.json").write_text(json.dumps(stats))
    assert command("fit", "--data", data, "--out", tmp_path / "b").returncode == 0
    assert FastTokenizer.load(tmp_path / "b").stats == stats["action"]


def test_command_names_what_is_wrong(tmp_path):
    write(tmp_path, 0)
    action = np.zeros((20, 3), np.float32)
    action[17] = np.inf
    path, _ = write(tmp_path, 1, action=action)
    fit = ("fit", "--data", tmp_path, "--out", tmp_path / "fast")
    lines = [command(*fit)]
    path.write_bytes(path.read_bytes()[:300])
    lines += [command(*fit), command(*fit, "--max-episodes", 1, "--vocab-size", 3)]
    for done, message in zip(
        lines,
        (
            "episode_000001.safetensors: action row 17 is not finite",
            "episode_000001.safetensors: not a complete safetensors file",
            "vocab_size 3 is smaller than the alphabet",
        ),
        strict=True,
    ):
        assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "fast").exists()


def test_report_entropy_and_coverage_by_hand():
    """Four chunks of two coefficients: (7, 7) twice is one token, (0, 0) and (-7, -7) two each.
    First tokens have shares 1/2, 1/4, 1/4: entropy 1.5 ln 2; they cover (2 + 2 + 1 + 1) / 4."""
    chunks = np.array([[[1.0], [0.0]], [[1.0], [0.0]], [[0.0], [0.0]], [[-1.0], [0.0]]])
    r = ft.round_trip_report(FastTokenizer.fit(chunks, 16, 10), chunks)
    assert r["first_entropy"] == pytest.approx(1.5 * np.log(2))
    assert (r["first_cover"], r["tokens_mean"], r["naive_tokens"]) == (1.5, 1.5, 2)
    assert r["cover"] == pytest.approx(8 / 6)
    assert r["naive_mse"][0] == pytest.approx((0.5 / 128) ** 2)
    assert r["outside"] == r["clipped_actions"] == [0]


def test_report_of_lengths_and_bins_by_hand():
    """Of 20 chunks one has two ids, and the 95% quantile lies a twentieth of the way from the last
    but one to it. A bin tells its centre, -1 .. 1 are 256 of them, and what is beyond is told as
    the last one: 1.5 as 255.5 / 128 - 1."""
    chunks = np.zeros((20, 2, 1))
    chunks[0, :, 0] = 1.5, 0.2
    tok = FastTokenizer.fit(np.zeros((20, 2, 1)), 1, 1)
    lengths = [len(ids) for ids in tok.encode(chunks)]
    assert lengths == [2] * 20
    r = ft.round_trip_report(tok, chunks)
    assert r["tokens_p95"] == 2
    last = 255.5 / 128 - 1
    errors = [1.5 - last, 0.2 - (153.5 / 128 - 1), *[0.5 / 128] * 38]
    assert r["naive_mse"][0] == pytest.approx(np.mean(np.square(errors)))
    fitted = np.array([[[0.0], [0.0]]] * 19 + [[[2.0], [-2.0]]])
    r = ft.round_trip_report(FastTokenizer.fit(fitted, 256, 3), fitted)
    assert (r["tokens_mean"], r["tokens_p95"]) == (1.05, pytest.approx(1.05))


def test_what_the_report_is_made_on_was_not_fitted(tmp_path, capsys):
    """Of ten episodes the tenth moves ten times as far: its coefficients are none of the range."""
    given = []
    for number, (arrays, header) in enumerate(recordings(10)):
        action = np.full_like(arrays["action"], 1 + 9 * (number == 9))
        action[::2] *= -1
        given.append((arrays | {"action": action}, header))
    ft.write_episodes(tmp_path / "data", given)
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "fast")]
    ft.main(["fit", *flags, "--vocab-size", "300", "--scale", "10", "--clip", "0"])
    assert "held-out chunks" in capsys.readouterr().out
    report = json.loads((tmp_path / "fast/report.json").read_text())
    assert report["clipped"] > 0 and report["max_error"][0] > 5
    # and a tokenizer keeps its statistics in a report on other data
    own = FastTokenizer.load(tmp_path / "fast").stats
    ft.write_episodes(tmp_path / "other", recordings(10))
    flags = ["--data", str(tmp_path / "other"), "--out", str(tmp_path / "kept")]
    ft.main(["report", "--tokenizer", str(tmp_path / "fast"), *flags])
    assert FastTokenizer.load(tmp_path / "kept").stats == own


def test_a_trembling_gripper_that_the_clip_takes_away_is_named(tmp_path, capsys):
    """Open with a tremble of 0.01, closed in 0.8% of the steps: 20 times as far out as the
    quantiles, so not rare, and clipped to 3: it never closed, and only a share in the report said
    so."""
    arrays, header = next(recordings(1))
    rng = np.random.default_rng(0)
    steps = 1000
    arrays = {name: np.repeat(array[:1], steps, 0) for name, array in arrays.items()}
    gripper = rng.normal(0, 0.01, steps)
    gripper[::125] += 1
    arrays["action"] = np.column_stack([rng.normal(size=steps), gripper])
    ft.write_episodes(tmp_path / "data", [(arrays, header)])
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "fast")]
    ft.main(["fit", *flags, "--vocab-size", "300"])
    said = capsys.readouterr().out
    assert "action dimension 1: 0.72% of the actions lie beyond the clip" in said
    assert "dimension 0" not in said
    ft.main(["fit", *flags, "--vocab-size", "1000", "--clip", "60"])
    assert "beyond the clip" not in capsys.readouterr().out


def test_report_counts_what_lies_outside():
    """Of 8 actions a dimension, 2 lie beyond -1 .. 1 in the first, one of them beyond the clip; the
    second never moved in the statistics and does here, which nothing said."""
    stats = {"q01": [0, 5], "q99": [2, 5]}
    chunks = np.tile([1.0, 5.0], (2, 4, 1))
    tok = FastTokenizer.fit(chunks, 256, 10, stats)
    chunks[0, 0] = 2.5, 6
    chunks[1, 1, 0] = -2.5
    r = ft.round_trip_report(tok, chunks)
    assert r["outside"] == [2 / 8, 1 / 8] and r["clipped_actions"] == [1 / 8, 0]
    assert r["max_error"][1] == 1


@pytest.mark.parametrize("flag", ["--stride", "--horizon", "--scale", "--vocab-size", "--clip"])
def test_flags_out_of_range_stop_before_anything_is_read(flag, capsys):
    with pytest.raises(SystemExit):
        ft.main(["fit", "--data", "nothing", "--out", "nothing", flag, "-1"])
    assert f"argument {flag}: -1 is not a " in capsys.readouterr().err


# ---- Command line of the stages ------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "grpo", "vla"])
def test_help_shows_each_field_with_its_comment_and_default(monkeypatch, stage):
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is wrapped
    help_text = ft.config_parser(ROOT / f"{stage}.py").format_help()
    config = importlib.import_module(stage).Config
    for field in dataclasses.fields(config):
        if field.name != "preset":
            assert f"--{field.name.replace('_', '-')}" in help_text
            assert f"({field.default})" in help_text
    for line in inspect.getsource(config).splitlines():
        code, _, comment = line.partition("  # ")
        if code.strip():  # a line of its own is a heading
            assert comment in help_text


STAGE = '''"""What the stage does."""
import no_such_package
REWARDS = {"prefix": no_such_package.f, "l1": no_such_package.g}
@dataclass(frozen=True)
class Config:
    preset: str = ""
    # data
    out_folder: str = "runs#1"  # run folder
    steps: int = 3  # 100% of them
    lr: float = 1e-3
    batch: int = 24  # samples
    fix: bool = False  # keep it
    reward: str = "prefix"  # which
PRESETS = {"small": {}, "large": {"steps": 9}}
'''


def test_stage_that_cannot_be_imported_shows_its_help(tmp_path):
    """So no stage is imported for its help: torch would take seconds."""
    (tmp_path / "stage.py").write_text(STAGE)
    code = (
        "import sys, fast_tokenizer\n"
        "try: fast_tokenizer.answer_help(sys.argv[1])\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    argv = [sys.executable, "-c", code, tmp_path / "stage.py", "--help"]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.partition("\n\n")[2]
        == """What the stage does.

positional arguments:
  {small,large}

options:
  -h, --help            show this help message and exit
  --out-folder STR      run folder (runs#1)
  --steps INT           100% of them (3)
  --lr FLOAT            (0.001)
  --batch INT           samples (24)
  --fix, --no-fix       keep it (False)
  --reward {prefix,l1}  which (prefix)
"""
    )


def test_config_parser_returns_what_was_given(tmp_path, capsys):
    path = tmp_path / "stage.py"
    path.write_text(STAGE)
    parser = ft.config_parser(path)
    assert vars(parser.parse_args([])) == {"preset": "small"}
    argv = ["large", "--lr", "1e-5", "--steps", "7", "--no-fix", "--out-folder", "x"]
    given = {"preset": "large", "lr": 1e-5, "steps": 7, "fix": False, "out_folder": "x"}
    assert vars(parser.parse_args(argv)) == given
    for wrong in (["huge"], ["--nope", "1"], ["--out", "x"], ["--steps", "1.5"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
    path.write_text(STAGE.replace("steps: int", "steps: list[int]"))
    with pytest.raises(
        ValueError, match=r"Config.steps is list\[int\]; use bool or one of int, float"
    ):
        ft.config_parser(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: float = 1e-3", "lr: float = 1 / 3", "Config.lr is 1 / 3; write a number, a text"),
        ("lr: float = 1e-3", "lr: float", "the default of Config.lr is missing; write a number"),
        ("REWARDS = {", "REWARDS = {**OTHERS, ", "REWARDS is no {...} with each key in it"),
        ("PRESETS = {", "PRESETS = OTHERS | {", "PRESETS is no {...} with each key in it"),
    ],
)
def test_a_new_flag_that_cannot_be_read_is_named(tmp_path, old, new, message):
    """Of whoever adds one: a malformed node at an address, or 'NoneType' has no attribute."""
    path = tmp_path / "stage.py"
    assert old in STAGE
    path.write_text(STAGE.replace(old, new))
    with pytest.raises(ValueError, match=f"stage.py: .*{re.escape(message)}"):
        ft.config_parser(path)


# ---- Images --------------------------------------------------------------------------------------


def test_any_image_is_turned_scaled_to_8_bits_and_made_rgb(tmp_path):
    """Phone photos lay sideways, so that boxes missed; 16-bit gray came out white."""
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 250, 100, 50  # top left
    sideways = Image.fromarray(pixels)
    exif = sideways.getexif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    sideways.save(tmp_path / "phone.png", exif=exif)
    turned = ft.read_image(tmp_path / "phone.png")
    assert turned.shape == (6, 4, 3) and turned[0, 3].tolist() == [250, 100, 50]
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert ft.read_image(tmp_path / "deep.png")[0, :, 1].tolist() == [0, 100, 255]
    Image.fromarray(np.array([[0, 100, 255]], np.int32)).save(
        tmp_path / "wide.tif"
    )  # came out black
    assert ft.read_image(tmp_path / "wide.tif")[0, :, 1].tolist() == [0, 100, 255]
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    assert ft.read_image(tmp_path / "print.tif")[0, 0].tolist() == [255, 0, 0]
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "glass.png")
    data = (tmp_path / "glass.png").read_bytes()
    assert ft.read_image(data)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "fault", ["missing", "empty", "text", "cut short", "broken chunk", "too many pixels", "unknown"]
)
def test_an_image_that_does_not_open_is_one_line(tmp_path, monkeypatch, fault):
    """Pillow also raises SyntaxError and DecompressionBombError, which passed as tracebacks, and
    for a DDS or AVIF that it does not know NotImplementedError and RuntimeError."""
    path = tmp_path / "picture.png"
    if fault != "missing":
        Image.fromarray(np.arange(3000, dtype=np.uint32).astype(np.uint8).reshape(25, 40, 3)).save(
            path
        )
        data = path.read_bytes()
    if fault == "empty":
        path.write_bytes(b"")
    if fault == "text":
        path.write_text("no picture")
    if fault == "unknown":
        path = tmp_path / "picture.dds"
        Image.new("RGB", (4, 4)).save(path)
        data = bytearray(path.read_bytes())
        data[80:84] = bytes(4)  # which format its pixels have
        path.write_bytes(data)
    if fault == "cut short":
        path.write_bytes(data[:100])
    if fault == "broken chunk":
        path.write_bytes(data.replace(b"IDAT", b"ID\0T"))
    if fault == "too many pixels":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(
        ValueError, match="row 3: image does not open .*replace or delete it"
    ) as error:
        ft.read_image(path, "row 3")
    assert "\n" not in str(error.value)


# ---- Ranges of flags -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "grpo", "vla"])
@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--batch", "0", "0 is not a whole number of at least 1"),
        ("--steps", "-1", "-1 is not a whole number of at least 0"),
        ("--lr", "nan", "nan is not a number above 0"),
        ("--lr", "0", "0 is not a number above 0"),
        ("--warmup-ratio", "1.5", "1.5 is not a number from 0 to 1"),
        ("--max-grad-norm", "inf", "inf is not a number of at least 0"),
        ("--keep", "two", "two is not a whole number"),
    ],
)
def test_a_flag_out_of_range_stops_a_stage_before_it_loads(stage, flag, value, says, capsys):
    """`--log-every 0` divided by zero at the first line of the log, `--batch 0` later."""
    parser = ft.config_parser(ROOT / f"{stage}.py")
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([flag, value])
    assert stopped.value.code == 2
    assert f"argument {flag}: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "grpo", "vla"])
def test_the_presets_of_a_stage_are_in_range(stage):
    parser = ft.config_parser(ROOT / f"{stage}.py")
    module = importlib.import_module(stage)
    for preset in module.PRESETS.values():
        for name, value in preset.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                continue
            assert getattr(parser.parse_args([flag, str(value)]), name) == value
