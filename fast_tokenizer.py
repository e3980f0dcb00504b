"""FAST action tokenizer (arXiv 2501.09747): action chunks <-> short lists of token ids.

In: episodes (folder/*.safetensors: image (T, H, W, 3) uint8, state (T, S), action (T, A) float32).
Out: fast.json, one file that holds all that decoding needs, and report.json beside it.
1. normalise each action dimension: its 1% / 99% quantiles -> -1 / +1 (outliers go beyond)
2. orthonormal DCT-II along time: K actions -> K frequencies a dimension
3. quantise: round(scale * c); clipped to the range met in fitting, and counted
4. flatten (K, A) row-major, low frequencies first; one character chr(c - min_coef) a coefficient
5. byte-pair encoding over those characters: a token is a run of coefficients
Our deviations: no byte level and no regex under the BPE; ids that do not decode to exactly K x A
coefficients are reported (ok False, NaN rows), never zeros; horizon and dimensions are stored.

python fast_tokenizer.py fit --data data/tabletop --out fast/ --horizon 5 --scale 2 --vocab 64
python fast_tokenizer.py report --fast fast/ --data data/tabletop
Seconds on one CPU core. Legend: B batch, K chunk length, A action dims, S state dims, T steps.
"""

import argparse
import ast
import contextlib
import io
import json
import pickle
import shutil
import sys
import tokenize
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import compress
from operator import itemgetter
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers
from tqdm import tqdm

MANY = 1024  # chunks a call from which on the automaton encodes
STILL = 1e-6  # a dimension whose q99 - q01 is below this never moves: it maps to 0 and back to q01
BROKEN = "\ufffd"  # what bytes that are no UTF-8 decode as
LAST_CODE = 0xD7FF  # the largest character code below the surrogates, which no text can hold


def statistics(x):
    """q01, q99, mean, std (lists of A, units of x) and count N of x (N, A). ValueError on NaN."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"statistics need a finite, non-empty (N, A) array, got shape {x.shape}")
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)  # (A,)
    rows = {"q01": q01, "q99": q99, "mean": x.mean(0), "std": x.std(0)}
    return {**{k: v.tolist() for k, v in rows.items()}, "count": len(x)}


def _affine(x, stats):
    """x = (y + one) * half + low and y = (x - low) * gain - one, in the kind and type of x."""
    if not hasattr(x, "new_tensor"):  # numpy; torch tensors keep their type and device
        x = np.asarray(x)
        x = x if x.dtype.kind == "f" else x.astype(np.float64)
    low, high = np.asarray(stats["q01"]), np.asarray(stats["q99"])
    moves = high - low >= STILL  # (A,)
    half = np.where(moves, (high - low) / 2, 0.0)
    gain = np.divide(1, half, out=np.zeros_like(half), where=moves)
    like = x.new_tensor if hasattr(x, "new_tensor") else lambda v: v.astype(x.dtype)
    return x, like(low), like(half), like(gain), like(moves.astype(np.float64))


def normalize(x, stats):
    """x (..., A) in dataset units -> q01 at -1, q99 at +1, not clipped. numpy or torch."""
    x, low, _, gain, one = _affine(x, stats)
    return (x - low) * gain - one


def unnormalize(x, stats):
    """Inverse of normalize: x (..., A) -> dataset units; dimensions that never move give q01."""
    x, low, half, _, one = _affine(x, stats)
    return (x + one) * half + low


def check_stats(stats, dim, where="stats"):
    """A copy of stats as plain lists. ValueError naming `where` unless it fits dim dimensions."""
    if not isinstance(stats, dict) or not {"q01", "q99"} <= set(stats):
        raise ValueError(f"{where}: no q01 and q99; make it with fast_tokenizer.statistics")
    stats = {k: np.asarray(v).tolist() for k, v in stats.items()}
    for k in sorted({"q01", "q99", "mean", "std"} & set(stats)):
        if np.shape(stats[k]) != (dim,) or not np.isfinite(stats[k]).all():
            raise ValueError(f"{where}: {k} is not {dim} finite numbers; recompute the statistics")
    if (np.asarray(stats["q99"]) < stats["q01"]).any():
        raise ValueError(f"{where}: q99 lies below q01; recompute the statistics")
    return stats


class FastTokenizer:
    """FAST: (B, K, A) action chunks <-> token ids 0 .. vocab_size - 1 (arXiv 2501.09747).

    vocab_size: the true number of ids, at most what fit was asked for. min_coef .. max_coef: range
    of the quantised coefficients. stats: statistics of the dataset units, None when chunks come
    normalised to about [-1, 1]. clipped: coefficients that the last encode had to move."""

    def __init__(self, bpe, scale, horizon, dim, min_coef, max_coef, stats=None):
        self.bpe, self.scale, self.horizon, self.dim = bpe, float(scale), int(horizon), int(dim)
        self.stats, self.min_coef, self.clipped = stats, int(min_coef), 0
        vocab = bpe.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        # The published vocabulary is spelled in bytes; one token may hold a part of a character.
        spell = _byte_characters() if isinstance(bpe.decoder, decoders.ByteLevel) else []
        byte = {c: b for b, c in enumerate(spell)}
        self.pieces = {
            i: bytes(byte[c] for c in piece) if byte.keys() >= set(piece) else piece.encode()
            for piece, i in vocab.items()
        }  # id -> UTF-8 bytes
        self.kind, self.texts = "latin-1" if spell else "utf-8", [BROKEN] * 2 * self.vocab_size
        for i, piece in self.pieces.items():  # ids that are not there, -1 too, make a text BROKEN
            self.texts[i] = piece.decode(self.kind)
        # It may also lack bytes, and then drops characters silently: encode goes to the nearest
        # coefficient that can be written instead. Our own vocabulary can write the whole range.
        codes = [
            c
            for c in range(int(max_coef - min_coef) + 1)
            if all(p in vocab for p in ([spell[b] for b in chr(c).encode()] if spell else chr(c)))
        ]
        if not codes:
            raise ValueError("the BPE vocabulary can write no coefficient; fit the tokenizer again")
        self.max_coef = codes[-1] + self.min_coef
        middle = (np.array(codes[1:]) + codes[:-1]) / 2
        self.nearest = np.array(codes)[np.searchsorted(middle, range(codes[-1] + 1))]  # by code
        self.automaton = None

    @classmethod
    def fit(cls, chunks, vocab_size, scale, stats=None):
        """Learn range and merges from chunks (B, K, A): dataset units with stats, else normalised.

        scale: quantisation steps a unit (10 in the paper); more is finer and longer. The same
        chunks give the same file. ValueError on NaN, wrong shapes, or vocab_size < alphabet."""
        chunks = _check_chunks(chunks)
        if len(chunks) == 0 or not (np.isfinite(scale) and scale > 0):
            raise ValueError(f"fit got {len(chunks)} chunks, scale {scale}; both must be positive")
        if stats is not None:
            stats = check_stats(stats, chunks.shape[2])
            chunks = normalize(chunks, stats)
        coefs = np.rint(dct(chunks, axis=1, norm="ortho") * float(scale))  # (B, K, A)
        low, high = coefs.min(), coefs.max()
        if not high - low + 1 <= min(vocab_size, LAST_CODE + 1):
            raise ValueError(
                f"vocab_size {vocab_size} is smaller than the alphabet of {high - low + 1:.0f} "
                f"coefficients ({low:.0f} .. {high:.0f}); raise --vocab or lower --scale"
            )
        bpe = Tokenizer(models.BPE())  # no pre-tokenizer: tokens may span steps and dimensions
        trainer = trainers.BpeTrainer(
            vocab_size=int(vocab_size),
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=[chr(i) for i in range(int(high - low) + 1)],
        )
        bpe.train_from_iterator(_texts(coefs - low), trainer)
        return cls(bpe, scale, *chunks.shape[1:], low, high, stats)

    def encode(self, chunks):
        """chunks (B, K, A) -> B lists of ids. Sets .clipped. ValueError on NaN or another shape."""
        chunks = _check_chunks(chunks, self.horizon, self.dim)
        if self.stats is not None:
            chunks = normalize(chunks, self.stats)
        coefs = np.rint(dct(chunks, axis=1, norm="ortho") * self.scale)  # (B, K, A)
        # both ends are clipped; the reference clips the low end only, and counts nothing
        codes = np.clip(coefs, self.min_coef, self.max_coef).astype(int) - self.min_coef
        codes = self.nearest[codes]
        self.clipped = int((codes + self.min_coef != coefs).sum())
        if len(codes) >= MANY and self.kind == "utf-8":
            self.automaton = self.automaton or Automaton(self.bpe)
            if self.automaton.exact:
                return self.automaton.encode(codes.reshape(len(codes), -1))
        return [row.ids for row in self.bpe.encode_batch(_texts(codes))]

    def decode(self, ids):
        """B lists of ids -> (chunks (B, K, A) float32, ok (B,) bool).

        ok is False for a sequence that is empty, holds an id out of range or gives no K x A
        coefficients (byte level: or no valid text); its chunk is NaN."""
        rows, n = [x.tolist() if hasattr(x, "tolist") else x for x in ids], self.horizon * self.dim
        try:
            texts = ["".join(itemgetter(*row)(self.texts)) if row else "" for row in rows]
        except IndexError:  # far out of range
            return self.decode([np.clip(row, -1, self.vocab_size).astype(int) for row in rows])
        if self.kind == "latin-1":  # what it spells are bytes
            texts = [
                text if BROKEN in text else text.encode("latin-1").decode(errors="replace")
                for text in texts
            ]
        ok = np.array([len(text) == n and BROKEN not in text for text in texts], bool)
        chunks = np.full((len(ids), self.horizon, self.dim), np.nan, np.float32)
        if ok.any():
            codes = np.frombuffer("".join(compress(texts, ok)).encode("utf-16-le"), "<u2")
            coefs = (codes + float(self.min_coef)).reshape(
                -1, *chunks.shape[1:]
            )  # (ok.sum(), K, A)
            actions = idct(coefs / self.scale, axis=1, norm="ortho", overwrite_x=True)
            chunks[ok] = actions if self.stats is None else unnormalize(actions, self.stats)
        return chunks, ok

    def save(self, folder):
        """Write folder/fast.json, complete or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        keys = ("scale", "horizon", "dim", "min_coef", "max_coef", "vocab_size", "stats")
        record = {**{k: getattr(self, k) for k in keys}, "bpe": json.loads(self.bpe.to_str())}
        path = Path(folder) / "fast.json"
        path.with_suffix(".tmp").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        path.with_suffix(".tmp").replace(path)

    @classmethod
    def load(cls, folder, horizon=None, dim=None):
        """Read our fast.json, or a folder of the published processor (physical-intelligence/fast).

        horizon, dim: needed for published folders that do not store them; ValueError when missing
        or not the stored ones, or on a damaged file. FileNotFoundError without either layout."""
        folder = Path(folder)
        path, text = folder / "fast.json", None
        if not path.exists():  # transformers 5 puts the tokenizer into a folder of its own
            path, text = folder / "processor_config.json", folder / "tokenizer.json"
            text = text if text.exists() else folder / "bpe_tokenizer" / "tokenizer.json"
            if not path.exists() or not text.exists():
                raise FileNotFoundError(
                    f"{folder}: neither fast.json nor processor_config.json "
                    "with tokenizer.json; run fast_tokenizer.py fit"
                )
        try:
            record = json.loads(path.read_text())
            if text:
                low = record["min_token"]
                record = {
                    "horizon": record.get("time_horizon") or horizon,
                    "min_coef": low,
                    "dim": record.get("action_dim") or dim,
                    "max_coef": low + LAST_CODE,
                    "scale": record["scale"],
                    "bpe": json.loads(text.read_text()),
                }
                if record["bpe"]["decoder"]["type"] != "ByteLevel":
                    raise ValueError(f"{text}: not a byte-level BPE; fit the tokenizer again")
            for name, given in (("horizon", horizon), ("dim", dim)):
                if record[name] is None or given not in (None, record[name]):
                    raise ValueError(
                        f"{path}: {name} is {record[name]}, load was given {given}; "
                        f"pass the {name} that the tokenizer was fitted for"
                    )
            if stats := record.get("stats"):
                stats = check_stats(stats, record["dim"], path)
            bpe = Tokenizer.from_str(json.dumps(record["bpe"]))
            return cls(
                bpe,
                *(record[k] for k in ("scale", "horizon", "dim", "min_coef", "max_coef")),
                stats,
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{path}: not a FAST tokenizer ({e!r}); fit or save it again") from e


class Automaton:
    """BPE of many texts at once: the ids of `tokenizers`, in a sixth of its time. Speed alone.

    A list of tokens is what BPE makes of its text exactly if BPE makes of each two neighbours those
    two. So each text has one last token, the one that fits the last token of the text before it;
    to read on, it is enough to know which tokens may be open since where: a state. 1,024 tokens
    have some 2,000; what follows a state is worked out when the state is first met."""

    def __init__(self, bpe):
        model = json.loads(bpe.to_str())["model"]
        self.ids, V = model["vocab"], len(model["vocab"])
        made = [self.ids[a + b] for a, b in model["merges"]]
        self.exact = made == list(
            range(V - len(made), V)
        )  # as fit leaves them: ids in order of rank
        self.merge = np.full((V, V + 1), V)  # of two tokens, in order of rank; V: none
        left, self.right = np.full((2, V + 1), V)
        for new, (a, b) in zip(made, model["merges"]):
            left[new], self.right[new] = self.ids[a], self.ids[b]
            self.merge[left[new], self.right[new]] = new
        self.starts, self.until = [np.arange(V)], [np.full(V, V)]  # tokens begin so, until a merge
        while self.starts[-1].min() < V:
            self.until.append(self.starts[-1])
            self.starts.append(left[self.starts[-1]])
        self.longer = Counter()  # text -> bits of the tokens that go on after it
        for text, i in self.ids.items():
            for k in range(len(text)):
                self.longer[text[:k]] |= 1 << i
        self.length = np.array([len(text) for text in sorted(self.ids, key=self.ids.get)])
        self.fits, self.states = cache(self.fits), {(0, (("", self.longer[""]),)): 0}
        self.next = np.full((1024, V - len(made)), -1)  # (states, codes)

    def fits(self, a):
        """Bit b: BPE leaves token b behind token a. No merge joins an end of a with a start of b
        while both are there; of equal merges the left one comes first."""
        joined, V = False, len(self.merge)
        until = V
        while a < V:
            new = self.merge[a][np.array(self.starts)]  # (depth, V)
            joined |= ((new < until) & (new <= self.until)).any(0)
            a, until = self.right[a], a
        return int.from_bytes(np.packbits(~joined, bitorder="little").tobytes(), "little")

    def follow(self, s):
        """Fill next[s]. A state: (last token, ((text since a token may be open, bits of which), ...))."""
        for c, (_, opened) in enumerate([list(self.states)[s]] * self.next.shape[1]):
            still = [(text + chr(c), may) for text, may in opened]
            (last,) = (
                i for text, may in still if may >> (i := self.ids.get(text, len(self.ids))) & 1
            )
            still = [
                (text, may & self.longer[text]) for text, may in still if may & self.longer[text]
            ]
            state = last, (*still, ("", self.fits(last)))
            self.next[s, c] = self.states.setdefault(state, len(self.states))
        if len(self.states) + self.next.shape[1] > len(self.next):
            self.next = np.concatenate([self.next, np.full_like(self.next, -1)])

    def encode(self, codes):
        """codes (B, T) -> B lists of ids."""
        codes = np.ascontiguousarray(codes.T)  # (T, B)
        at, states = np.zeros(codes.shape[1], int), np.empty_like(codes)
        for t, c in enumerate(codes):
            for s in np.unique(at[self.next[at, c] < 0]):
                self.follow(s)
            at = states[t] = self.next[at, c]
        last = np.array([token for token, _ in self.states])[states]  # (T, B) of each prefix
        length, left = self.length[last], np.full_like(at, len(codes))
        for t in reversed(
            range(len(codes))
        ):  # the last token, the last of what stands before it, ...
            length[t] *= left == t + 1
            left -= length[t]
        ends = length.T > 0  # (B, T)
        ids, cuts = last.T[ends].tolist(), np.cumsum(ends.sum(1)).tolist()
        return [ids[a:b] for a, b in zip([0, *cuts], cuts)]


def _check_chunks(chunks, horizon=None, dim=None):
    chunks = np.asarray(chunks)
    if chunks.dtype not in (np.float32, np.float64):  # those stay: ties in rounding depend on it
        chunks = chunks.astype(np.float64)
    if chunks.ndim != 3 or 0 in chunks.shape[1:]:
        raise ValueError(f"chunks have shape {chunks.shape}, not (B, K, A); give one as x[None]")
    _, k, a = chunks.shape
    if horizon not in (None, k):
        raise ValueError(
            f"chunk horizon {k}, tokenizer was fitted for {horizon}; refit with "
            f"--horizon {k} or cut chunks of {horizon} steps"
        )
    if dim not in (None, a):
        raise ValueError(f"chunk has {a} action dimensions, tokenizer was fitted for {dim}; refit")
    bad = np.argwhere(~np.isfinite(chunks))
    if len(bad):
        raise ValueError(
            "chunk {}, step {}, dimension {} is not finite; repair or drop that action".format(
                *bad[0]
            )
        )
    return chunks


def _texts(codes):
    """Codes (B, K, A), whole numbers from 0 to LAST_CODE -> B strings of K * A characters."""
    text, n = codes.astype("<u4").tobytes().decode("utf-32-le"), codes[0].size if len(codes) else 1
    return [text[i : i + n] for i in range(0, len(text), n)]


def _byte_characters():
    """The 256 printable characters by which byte-level BPE (GPT-2) spells the bytes 0 .. 255."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(b if b in plain else next(spare)) for b in range(256)]


@dataclass(eq=False)
class EpisodeFile:
    """One recorded episode; frames stay on disk (memory-mapped) until they are asked for."""

    path: Path
    task: str  # the instruction
    fps: float  # 0: not recorded
    source: str
    action: np.ndarray  # (T, A) float32, dataset units
    state: np.ndarray  # (T, S) float32
    cameras: tuple  # "image" and any "image_<name>"
    handle: object = None  # safe_open, made at the first frame

    def __len__(self):
        return len(self.action)

    def frame(self, t, name="image"):
        """Frame of a camera at step t (0 .. T-1): (H, W, 3) uint8. ValueError if there is none."""
        if name not in self.cameras or not 0 <= t < len(self):
            raise ValueError(
                f"{self.path}: no frame {t} of {name!r}; it has {len(self)} steps of "
                f"{', '.join(self.cameras)}"
            )
        if self.handle is None:
            self.handle = safe_open(self.path, "numpy")
        return self.handle.get_slice(name)[t : t + 1][0]


def read_episode(path):
    """Open and check one episode -> EpisodeFile. ValueError naming the file, the row, the cure."""
    path, arrays, shapes = Path(path), {}, {}
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            for name in sorted(file.keys()):
                view, image = file.get_slice(name), name == "image" or name.startswith("image_")
                if not image and name not in ("action", "state"):
                    continue
                shape = shapes[name] = view.get_shape()
                if (view.get_dtype(), len(shape)) != (("U8", 4) if image else ("F32", 2)):
                    raise ValueError(
                        f"{path}: {name} is {view.get_dtype()} {shape}, not "
                        f"{'U8 (T, H, W, 3)' if image else 'F32 (T, D)'}; convert it again"
                    )
                if not image:
                    arrays[name] = file.get_tensor(name)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{path}: no such episode; give the path of a recording") from e
    except (SafetensorError, OSError) as e:
        raise ValueError(
            f"{path}: not a complete safetensors file ({e}); record it again or delete it"
        ) from e
    for name in ("image", "state", "action", "task"):
        if name not in shapes and not (name == "task" and name in header):
            raise ValueError(f"{path}: {name} is missing; convert or record the episode again")
    if len({s[0] for s in shapes.values()}) != 1 or len(arrays["action"]) == 0:
        raise ValueError(f"{path}: steps differ or are none ({shapes}); record it again")
    for name, value in sorted(arrays.items()):
        bad = np.flatnonzero(~np.isfinite(value).all(1))
        if len(bad):
            raise ValueError(
                f"{path}: {name} row {bad[0]} is not finite; repair that row or delete the episode"
            )
    fps = header.get("fps", "0")
    if not fps.replace(".", "", 1).isdigit():
        raise ValueError(f"{path}: fps {fps!r} is not a number; convert the episode again")
    return EpisodeFile(
        path,
        header["task"],
        float(fps),
        header.get("source", ""),
        arrays["action"],
        arrays["state"],
        tuple(sorted(set(shapes) - set(arrays))),
    )


def _root(folder):
    return Path(folder) / "episodes" if (Path(folder) / "episodes").is_dir() else Path(folder)


def read_episodes(folder, limit=0, fast=None):
    """Episodes of folder (or folder/episodes) by name, the first `limit` (0: all), for a tokenizer.

    FileNotFoundError when there are none; ValueError when A or S differs between files, or A from
    that of `fast`."""
    paths = sorted(_root(folder).glob("*.safetensors"))[: limit or None]
    if not paths:
        raise FileNotFoundError(f"{folder}: no episode_*.safetensors here; record or convert some")
    files = [read_episode(p) for p in paths]
    for file in files:
        for name in ("action", "state"):
            size, first = (getattr(f, name).shape[1] for f in (file, files[0]))
            if size != first:
                raise ValueError(
                    f"{file.path}: {size} {name} dimensions, {paths[0].name} has "
                    f"{first}; keep different robots in different folders"
                )
    if fast is not None and files[0].action.shape[1] != fast.dim:
        raise ValueError(
            f"{folder}: actions have {files[0].action.shape[1]} dimensions, the action "
            f"tokenizer {fast.dim}; give the episodes of its robot"
        )
    return files


def locate_step(files, ends, i):
    """Step i of all files, counted through (`ends`: the cumulated lengths) -> (file, its step)."""
    e = int(np.searchsorted(ends, i, side="right"))
    return files[e], int(i) - int(ends[e] - len(files[e]))


def split_episodes(files, share=0.05):
    """Episodes -> (to train on, held out): the one rule of all stages, the last share, at least one.
    ValueError when none would be left to train on."""
    last = max(1, int(share * len(files) + 1e-9))
    if last >= len(files):
        raise ValueError(
            f"{files[0].path.parent}: {len(files)} episodes, all of them held out; record more"
        )
    return files[:-last], files[-last:]


def read_stats(folder, files):
    """{"action", "state"} -> statistics: stats.json beside the episodes, else made from files."""
    path = _root(folder) / "stats.json"
    if not path.exists():
        return {
            k: statistics(np.concatenate([getattr(f, k) for f in files]))
            for k in ("action", "state")
        }
    try:
        stats = json.loads(path.read_text())
        return {
            k: check_stats(stats[k], getattr(files[0], k).shape[1], f"{path}: {k}")
            for k in ("action", "state")
        }
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: no statistics ({e!r}); delete it to have them computed") from e


def action_chunks(episode, horizon):
    """The `horizon` actions from each step (T, K, A) float32; past the end the last one repeats."""
    if horizon < 1:
        raise ValueError(f"horizon {horizon}; a chunk has at least 1 step")
    steps = np.arange(len(episode))[:, None] + np.arange(horizon)  # (T, K)
    return episode.action[np.minimum(steps, len(episode) - 1)]  # (T, K, A)


def write_episode(path, arrays, header):
    """safetensors with the header's keys sorted: the library leaves them in random order."""
    data = save(arrays, header)
    n = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:n]) | {"__metadata__": dict(sorted(header.items()))}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode().ljust(n - 8)
    path.write_bytes(data[:8] + text + data[n:])


class Damaged(ValueError):
    """One line about data that cannot be used: where, what is wrong, the cure."""


@contextlib.contextmanager
def reading(where, *more):
    """What goes wrong inside becomes Damaged, naming `where`. more: further kinds of errors."""
    try:
        yield
    except Damaged:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        zlib.error,
        *more,
    ) as e:
        kind = "" if type(e) is ValueError else f"{type(e).__name__}: "
        why = str(e).replace("\n", " ")
        raise Damaged(f"{where}: {kind}{why}; repair it or copy the dataset again") from e


def write_episodes(out, made):
    """Episodes that a converter makes, (arrays, header) each -> folder `out` with its stats.json.
    A conversion that fails ends in one line and leaves nothing behind."""
    out, seen = Path(out), {"action": [], "state": []}
    part = out.with_name(out.name + ".part")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"error: {out} already holds data; name another --out or delete it")
    try:
        part.mkdir(parents=True)
    except OSError as e:
        raise SystemExit(f"error: {e}; another command writes there, or delete it") from e
    try:
        for number, (arrays, header) in enumerate(tqdm(made, "episodes", disable=None)):
            for name, rows in seen.items():
                rows.append(arrays[name].astype(np.float32))
                if len(bad := np.flatnonzero(~np.isfinite(rows[-1]).all(1))):
                    raise ValueError(
                        f"{header['source']}: {name} of step {bad[0]} is not finite; "
                        "repair it or copy the dataset again"
                    )
                arrays[name] = rows[-1]
            write_episode(part / f"episode_{number:06d}.safetensors", arrays, header)
        if not seen["action"]:
            raise ValueError(f"no episodes for {out}; give a folder with some as --data")
        stats = {name: statistics(np.concatenate(rows)) for name, rows in seen.items()}
        (part / "stats.json").write_text(json.dumps(stats, indent=1))
        part.replace(out)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: {number + 1} episodes of {stats['action']['count']} steps")


def round_trip_report(fast, chunks):
    """Round trip of chunks (B, K, A) against one 256-bin token a number ("naive") -> dict: errors
    in units of chunks, share clipped, lengths in tokens, nats, coefficients that a token covers."""
    ids = fast.encode(chunks)
    decoded, ok = fast.decode(ids)
    error = (decoded - chunks)[ok].astype(np.float64)  # (B, K, A)
    stats = fast.stats or {"q01": [-1] * fast.dim, "q99": [1] * fast.dim}
    bins = np.clip(np.floor((normalize(chunks, stats) + 1) * 128), 0, 255)
    naive = unnormalize((bins + 0.5) / 128 - 1, stats) - chunks  # from the centres of the bins
    length, first = np.array([len(row) for row in ids]), np.array([row[0] for row in ids])
    p = np.unique(first, return_counts=True)[1] / len(first)
    # coefficients a token covers: its characters, that is its bytes that begin one
    cover = [sum(b & 0xC0 != 0x80 for b in fast.pieces[i]) for i in first]
    return {
        "chunks": len(ids),
        "malformed": int((~ok).sum()),
        "clipped": fast.clipped / chunks.size,
        "mse": (error**2).mean((0, 1)).tolist(),
        "max_error": np.abs(error).max((0, 1)).tolist(),
        "naive_mse": (naive**2).mean((0, 1)).tolist(),
        "naive_tokens": chunks[0].size,
        "tokens_mean": float(length.mean()),
        "tokens_p95": float(np.percentile(length, 95)),
        "first_entropy": float(p @ np.log(1 / p)),
        "first_cover": float(np.mean(cover)),
        "cover": chunks.size / float(length.sum()),
    }


# ---- Command line of the stages ---------------------------------------------------------------

FLAG_TYPES = {"int": int, "float": float, "str": str}  # annotation of a field -> type of its flag


def config_parser(path: str | Path) -> argparse.ArgumentParser:
    """The command line `[PRESET] [--flag value ...]` of the stage file at `path`, from its source.

    A field of its `class Config` is a flag, the comment behind the field its help; a bool is a pair
    --flag and --no-flag. The keys of its dict PRESETS are the presets, the first is the default.
    Where a field has a dict of its choices, as `reward` has REWARDS, the help shows the keys.
    parse_args() returns the preset and the flags that were given, no others.

    The source is parsed, not imported: torch takes seconds, and --help should not. ValueError when
    Config holds what can be no flag."""
    source = Path(path).read_text(encoding="utf-8")
    module = ast.parse(source)
    comments = _comments_by_line(source)
    constants = _module_constants(module)
    parser = argparse.ArgumentParser(
        description=ast.get_docstring(module),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = _dict_keys(constants["PRESETS"])
    parser.add_argument("preset", nargs="?", choices=presets, default=presets[0])
    for field in _config_fields(module):
        name = field.target.id
        if name == "preset":
            continue
        annotation = ast.unparse(field.annotation)
        if annotation == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        elif annotation in FLAG_TYPES:
            kind = {"type": FLAG_TYPES[annotation], "metavar": annotation.upper()}
        else:
            raise ValueError(f"{path}: Config.{name} is {annotation}; use int, float, str or bool")
        choices = constants.get(name.upper() + "S")
        if isinstance(choices, ast.Dict):
            kind["metavar"] = "{" + ",".join(_dict_keys(choices)) + "}"
        lines = range(field.lineno, field.end_lineno + 1)  # several, where the field is in brackets
        comment = " ".join(comments[line] for line in lines if line in comments)
        text = f"{comment} ({_shown_default(field.value, constants)})"
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, help=text.replace("%", "%%"), **kind)
    return parser


def answer_help(path: str | Path) -> None:
    """If -h or --help is on the command line: print the help of the stage file, end the process.

    A stage calls this before it imports torch, so that the help comes at once."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser = config_parser(path)
        parser.print_help()
        parser.exit()


def _comments_by_line(source):
    """Line number -> text of the comment on that line."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    return comments


def _module_constants(module):
    """Name -> syntax tree of the value, of what is assigned at the top level of a module."""
    constants = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign):
            constants[node.target.id] = node.value
    return constants


def _config_fields(module):
    """The annotated assignments of the module's class Config, in order."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return []


def _dict_keys(node):
    return [ast.literal_eval(key) for key in node.keys]


def _shown_default(node, constants):
    """The default of a field as the help shows it; a constant of the module by its value."""
    if isinstance(node, ast.Name) and node.id in constants:
        node = constants[node.id]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fit a FAST action tokenizer, or report on one.")
    commands = parser.add_subparsers(dest="command", required=True)
    fit, rep = commands.add_parser("fit"), commands.add_parser("report")
    for sub in (fit, rep):
        sub.add_argument("--data", required=True, help="folder of episodes, or holding episodes/")
        sub.add_argument("--stride", type=int, default=1, help="a chunk every this many steps")
        sub.add_argument(
            "--max-episodes", type=int, default=0, help="first N episodes only; 0: all"
        )
    fit.add_argument("--out", required=True, help="folder for fast.json and report.json")
    rep.add_argument(
        "--out",
        help="save it here too, with the statistics of --data: what sft.py "
        "needs of a published processor",
    )
    fit.add_argument("--horizon", type=int, default=5, help="actions a chunk (K)")
    fit.add_argument("--scale", type=float, default=2, help="quantisation steps a unit coefficient")
    fit.add_argument("--vocab-size", type=int, default=64, help="number of FAST tokens, at most")
    rep.add_argument(
        "--tokenizer", required=True, help="folder: fast.json, or a published processor"
    )
    rep.add_argument("--horizon", type=int, help="for published folders that do not store it")
    args = parser.parse_args(argv)
    if args.stride < 1 or args.max_episodes < 0:
        raise ValueError("--stride must be at least 1 and --limit at least 0")
    files = read_episodes(args.data, args.max_episodes)
    stats = read_stats(args.data, files)["action"]
    held = files[9::10]  # every 10th episode is held out of the fit, when there are 10

    def cut(some, horizon):
        return np.concatenate(
            [action_chunks(f, horizon)[:: args.stride] for f in some]
        )  # (B, K, A)

    if args.command == "fit":
        kept = [f for i, f in enumerate(files) if i % 10 != 9]
        fast = FastTokenizer.fit(cut(kept, args.horizon), args.vocab_size, args.scale, stats)
    else:
        fast = FastTokenizer.load(args.tokenizer, args.horizon, files[0].action.shape[1])
        fast.stats = fast.stats or stats  # published processors expect normalised chunks
    result = {**round_trip_report(fast, cut(held or files, fast.horizon)), "held_out": bool(held)}
    print(
        f"horizon {fast.horizon}, {fast.dim} dimensions, scale {fast.scale:g}, vocabulary "
        f"{fast.vocab_size}, coefficients {fast.min_coef} .. {fast.max_coef}\nround trip of "
        f"{result['chunks']} {'held-out' if held else 'fitted'} chunks, in dataset units"
    )
    for name, x in result.items():  # what they are: see round_trip_report()
        print(f"  {name:14s}" + "".join(f" {v:10.4g}" for v in (x if isinstance(x, list) else [x])))
    if args.out:
        fast.save(args.out)
        (Path(args.out) / "report.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as e:
        raise SystemExit(f"error: {e}") from e
