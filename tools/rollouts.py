"""A page of rollouts: what checkpoints answer to the same prompts, and what each answer is worth.

    python -m tools.rollouts --policy runs/grpo --data data/test --out rollouts.html
    python -m tools.rollouts --policy runs/sft runs/grpo --data data/test --out compared.html

writes one HTML file with everything inside, which any browser shows without a server. A prompt is a
card: its frame with the target's path, then for each checkpoint a group of --samples completions
side by side: reward, r_f, r_a and advantage, the thought, the action tokens with the first wrong
one marked, the decoded chunk over the frame and as curves beside the target. Filters above the
cards: reward, words, malformed answers, groups without spread; and the order of the cards. The
prompts of episodes are those that `evaluate.py actions` draws with the same --seed; of questions,
.jsonl, the kinds take turns, and an answer in words stands in place of the tokens.

Where a chunk moves the hand in the image is fitted, by least squares, on episodes that record the
hand's pixel (Tabletop, LIBERO, Meta-World, CALVIN): summed actions -> its shift. The page tells the
error; without such a recording, or where the fit is poor, chunks are curves alone.

In the order of the file: what is asked, what is answered, chunks in the image, the page, the
command. G completions a prompt, K steps of a chunk, A action dimensions.
"""

import argparse
import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import evaluate
import grpo
import model
import vla
from fast_tokenizer import (
    EpisodeFile,
    FastTokenizer,
    Stats,
    action_chunks,
    chunk_starts,
    count,
    natural,
    normalize,
)
from tools.question_page import points_of, rows_in_turn

# ---- What is asked -------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What a checkpoint is asked: the same of all, but for what is in its own tokens."""

    sample_id: str
    question: str  # the user's words
    frames: list[np.ndarray]  # (H, W, 3) uint8
    row: model.Row  # in its own tokens
    target: grpo.Target  # its own action ids, or what words are scored by
    chunk: np.ndarray | None  # (K, A) dataset units: what was done; None for words
    hand: np.ndarray | None  # (2,) where the hand is in the first frame, shares; None: unknown


def prompts_of_episodes(
    backbone: model.Backbone, episodes: list[EpisodeFile], args: argparse.Namespace
) -> list[Prompt]:
    """Prompts at random steps, as `evaluate.py actions` draws them."""
    think = args.mode == "think"
    drawn = evaluate.draw_prompts(backbone, episodes, args, think, slice(None))
    prompts = []
    for row, target, chunk, (episode, step) in zip(
        drawn.rows, drawn.targets, drawn.chunks, drawn.steps, strict=True
    ):
        hand = None
        if episode.hand_pixel is not None and np.isfinite(episode.hand_pixel[step]).all():
            hand = episode.hand_pixel[step]
        question = model.action_question(episode.task)
        frames = [episode.frame(step)]
        prompts.append(Prompt(f"{episode}:{step}", question, frames, row, target, chunk, hand))
    return prompts


def prompts_of_questions(backbone: model.Backbone, args: argparse.Namespace) -> list[Prompt]:
    """Questions of a file, kinds in turn. ValueError naming the row."""
    source = model.ConversationDataset(args.data, backbone.action_tokenizer, 0, args.outside_images)
    prompts = []
    for i in rows_in_turn(source, args.prompts):
        if "chunk" in source.row(i) and backbone.action_tokenizer is None:
            raise ValueError(
                f"{source.sample_id(i)}: it asks for actions, and the checkpoint has no fast/, so "
                "knows no action tokens; name one of sft.py or grpo.py, or questions in words"
            )
        target = grpo.target_of(source, i)
        grpo.check_question(source, i, target)
        asked = source.question(i, args.mode == "think")
        row = model.encode_sample(backbone, asked, prompt_only=True)
        words = source.row(i)["messages"][len(asked.messages) - 1]["content"]
        chunk = None
        if not isinstance(target, grpo.RightAnswer):
            chunk = np.asarray(source.row(i)["chunk"], np.float32)
        frames = model.open_images(asked)
        question = words.replace("<image>", "").strip()
        prompts.append(Prompt(asked.sample_id, question, frames, row, target, chunk, None))
    return prompts


# ---- What is answered ----------------------------------------------------------------------------


class Completion(NamedTuple):
    """One answer, and what it is worth."""

    reward: float
    r_f: float
    r_a: float
    advantage: float
    faults: list[str]  # what is wrong with its form: "no tags", ...
    thought: str
    text: str  # all that was written
    action_ids: list[int]
    chunk: np.ndarray | None  # (K, A) dataset units; None: it does not decode, or is in words
    answer: str  # in words; "" for actions


class Group(NamedTuple):
    """A checkpoint's G completions of a prompt."""

    target: grpo.Target
    completions: list[Completion]
    zero_std: bool  # all rewards are equal: no advantage

    @property
    def mean(self) -> float:
        return float(np.mean([completion.reward for completion in self.completions]))


FAULTS = {"tags": "no tags", "markers": "no run of tokens", "decodes": "does not decode"}


def answer_prompts(
    backbone: model.Backbone, prompts: list[Prompt], args: argparse.Namespace
) -> list[Group]:
    """A group for each prompt, whose rows and targets are this checkpoint's own. The draws are a
    function of (seed, prompt, g), the same for each checkpoint."""
    G = args.samples
    think = args.mode == "think"
    limit = model.token_limit(args.max_new_tokens, backbone, 96)
    settings = argparse.Namespace(**{**vars(args), "max_new_tokens": limit, "cuda_graphs": True})
    rows = [prompt.row for prompt in prompts]
    asked = evaluate.Prompts(list(range(len(rows))), rows, [], np.zeros(0), [])
    sequences = evaluate.complete(backbone, asked, G, False, settings)
    targets = [prompt.target for prompt in prompts for _ in range(G)]
    rewards, parts = grpo.reward(backbone, sequences, targets, args.reward, think)
    by_group = torch.tensor(rewards, dtype=torch.float32).view(-1, G)
    advantages = grpo.advantage(by_group)  # (B, G)
    zero_std = grpo.has_zero_std(by_group)  # (B,)
    groups = []
    for b, prompt in enumerate(prompts):
        in_words = isinstance(prompt.target, grpo.RightAnswer)
        completions = []
        for i in range(b * G, b * G + G):
            parsed = model.parse_actions(backbone, sequences[i])
            chunk = None
            if parts["decodes"][i]:
                chunk = backbone.action_tokenizer.decode([parsed.action_ids])[0][0]  # (K, A)
            names = ["tags"] if in_words else list(FAULTS)
            completion = Completion(
                reward=float(rewards[i]),
                r_f=float(parts["r_f"][i]),
                r_a=float(parts["r_a"][i]),
                advantage=float(advantages.flatten()[i]),
                faults=[FAULTS[name] for name in names if not parts[name][i]],
                thought=vla.thought_text(backbone, sequences[i]),
                text=backbone.tokenizer.decode(sequences[i]),
                action_ids=[] if in_words else parsed.action_ids,
                chunk=chunk,
                answer=model.parse_words(backbone, sequences[i]).answer if in_words else "",
            )
            completions.append(completion)
        groups.append(Group(prompt.target, completions, bool(zero_std[b])))
    return groups


# ---- Chunks in the image -------------------------------------------------------------------------

LARGEST_ERROR = 0.05  # shares of the image: a fit that is further off draws nothing
FITTED_EPISODES = 50


class PixelMap(NamedTuple):
    """How far the hand has moved in the image after some actions: their sum, times a matrix."""

    matrix: np.ndarray  # (A, 2), shares of width and height
    error: float  # mean distance to where the hand was, over the steps of chunks

    def path(self, hand: np.ndarray, chunk: np.ndarray) -> list[tuple[float, float]]:
        """Where the hand (2,) goes by a chunk (K, A): K + 1 points in shares, from the hand on."""
        shifts = np.cumsum(chunk, 0) @ self.matrix  # (K, 2)
        return [tuple(point) for point in np.vstack([hand, hand + shifts]).tolist()]


def fit_pixel_map(episodes: Sequence[EpisodeFile], horizon: int) -> PixelMap | None:
    """By least squares over the chunks of the first episodes that know the hand's pixel; None where
    none does."""
    all_sums = []
    all_shifts = []
    for episode in [e for e in episodes if e.hand_pixel is not None][:FITTED_EPISODES]:
        sums = np.cumsum(action_chunks(episode, horizon), 1)  # (T, K, A)
        for start in chunk_starts(episode, horizon):
            after = episode.hand_pixel[start + 1 : start + 1 + horizon]  # (k, 2), k <= K
            all_sums.append(sums[start, : len(after)])
            all_shifts.append(after - episode.hand_pixel[start])
    if not all_sums:
        return None
    x = np.concatenate(all_sums).astype(np.float64)  # (N, A)
    y = np.concatenate(all_shifts).astype(np.float64)  # (N, 2)
    is_seen = np.isfinite(y).all(1)
    if not is_seen.any():
        return None
    matrix = np.linalg.lstsq(x[is_seen], y[is_seen], rcond=None)[0]
    distances = np.linalg.norm(x[is_seen] @ matrix - y[is_seen], axis=1)
    return PixelMap(matrix, float(distances.mean()))


def map_sentence(pixel_map: PixelMap | None) -> str:
    """What the page says of the paths."""
    if pixel_map is None:
        return "No path is drawn over the frames: the data does not record the hand's pixel."
    error = f"{100 * pixel_map.error:.1f}% of the image"
    if pixel_map.error > LARGEST_ERROR:
        return f"No path is drawn over the frames: the fit of actions to pixels is {error} off."
    return f"Paths over frames: summed actions, fitted to the hand's pixel; mean error {error}."


# ---- The page ------------------------------------------------------------------------------------

STYLE = """
body { font: 13px/1.35 system-ui, sans-serif; margin: 0; background: #f4f6f8; color: #1f2933 }
header { padding: 10px 16px; background: #fff; border-bottom: 1px solid #cbd2d9 }
h1 { font-size: 18px; margin: 0 0 4px }
header p { margin: 2px 0; color: #52606d }
form { display: flex; flex-wrap: wrap; gap: 6px 18px; padding: 8px 16px; background: #e4e9ee;
  position: sticky; top: 0; z-index: 1; align-items: center }
table { border-collapse: collapse; margin: 6px 0 }
td, th { padding: 1px 14px 1px 0; text-align: left }
.prompt { display: flex; gap: 12px; margin: 12px 16px; padding: 10px; background: #fff;
  border: 1px solid #cbd2d9; border-radius: 4px }
.asked { flex: 0 0 200px } .asked .frame { width: 200px }
.groups { flex: 1; min-width: 0 }
.completions { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 8px;
  padding: 4px 0 12px }
.completion { flex: 1 0 130px; max-width: 170px; box-sizing: border-box; padding: 6px;
  border: 1px solid #cbd2d9; border-top: 5px solid; overflow-wrap: break-word }
.frame { position: relative; background-size: 100% 100%; image-rendering: pixelated; margin: 3px 0 }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
.curves { display: block; width: 100%; height: 30px; margin: 3px 0; background: #f4f6f8 }
.worth { display: flex; justify-content: space-between } .worth b { font-size: 15px }
.id, .small { color: #7b8794; font-size: 11px; overflow-wrap: anywhere }
.question { white-space: pre-wrap; font-weight: 600; margin: 4px 0 }
.thought { font-style: italic; color: #52606d; margin: 4px 0 }
.fault { color: #b00020; font-weight: 600 }
.tokens span { display: inline-block; padding: 0 3px; margin: 1px; border-radius: 2px;
  font: 11px monospace; background: #e4e9ee; color: #7b8794 }
.tokens .right { background: #c6f0d2; color: #0b5c2b }
.tokens .wrong { background: #b00020; color: #fff; font-weight: bold }
.tokens .target { background: #fff4c2; color: #5c4a00 }
.tokens .missing { background: none; color: #b00020; border: 1px dashed }
.name { font-weight: 600; margin-right: 10px }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 11px; margin: 4px 0 }
.hidden { display: none }
"""
SCRIPT = """
const form = document.querySelector("form");
const list = document.querySelector("main");
const prompts = [...document.querySelectorAll(".prompt")];
const orders = {
  drawn: prompt => Number(prompt.dataset.index),
  low: prompt => Number(prompt.dataset.mean),
  high: prompt => -Number(prompt.dataset.mean),
  gain: prompt => -Number(prompt.dataset.gain),
  loss: prompt => Number(prompt.dataset.gain),
};
function show() {
  const low = Number(form.low.value), high = Number(form.high.value);
  const words = form.words.value.toLowerCase();
  let shown = 0, total = 0;
  for (const prompt of prompts) {
    let any = false;
    for (const group of prompt.querySelectorAll(".group")) {
      const spread = !form.spread.checked || group.dataset.spread === "1";
      let inGroup = 0;
      for (const one of group.querySelectorAll(".completion")) {
        const reward = Number(one.dataset.reward);
        const fits = spread && reward >= low - 1e-6 && reward <= high + 1e-6
          && (!form.malformed.checked || one.dataset.form === "0")
          && (prompt.dataset.question + " " + one.textContent).toLowerCase().includes(words);
        one.classList.toggle("hidden", !fits);
        inGroup += fits; total += 1;
      }
      group.classList.toggle("hidden", inGroup === 0);
      shown += inGroup;
      any = any || inGroup > 0;
    }
    prompt.classList.toggle("hidden", !any);
  }
  const key = orders[form.order.value];
  for (const prompt of [...prompts].sort((a, b) => key(a) - key(b))) list.append(prompt);
  form.low.nextElementSibling.textContent = low.toFixed(2);
  form.high.nextElementSibling.textContent = high.toFixed(2);
  document.getElementById("shown").textContent = `${shown} of ${total} completions`;
}
form.addEventListener("input", show);
form.addEventListener("submit", event => event.preventDefault());
show();
"""
CONTROLS = """
<form><label>reward from <input type="range" name="low" min="0" max="1" step="0.05" value="0">
<output></output></label>
<label>to <input type="range" name="high" min="0" max="1" step="0.05" value="1"> <output></output>
</label>
<label><input type="checkbox" name="malformed"> malformed alone</label>
<label><input type="checkbox" name="spread"> groups with spread alone</label>
<label>words <input type="search" name="words" size="14"></label>
<label>order <select name="order"><option value="drawn">as drawn</option>
<option value="low">lowest reward first</option><option value="high">highest reward first</option>
{compared}</select></label><b id="shown"></b></form>
"""
COMPARED = """<option value="gain">largest gain of the last checkpoint first</option>
<option value="loss">largest loss of it first</option>"""

TARGET_COLOUR = "#ffd60a"


def reward_colour(reward: float) -> str:
    """From red over yellow to green, for 0 .. 1."""
    return f"hsl({120 * reward:.0f} 70% 42%)"


def png_data(frame: np.ndarray) -> str:
    png = io.BytesIO()
    Image.fromarray(frame).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def polyline(points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> str:
    """A line through points (x, y), 0 .. 100, over a darker one; its end is a dot."""
    places = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    end_x, end_y = points[-1]
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<polyline points="{places}" fill="none" stroke="#000" stroke-width="3"/>'
        f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'
        f'<circle cx="{end_x:.2f}" cy="{end_y:.2f}" r="2.2" fill="{colour}" stroke="#000" '
        'stroke-width="0.6"/>'
    )


def frame_html(name: str, frame: np.ndarray, drawn: Sequence[str]) -> str:
    """A frame, whose pixels the style sheet has under `name`, with shapes over it."""
    height, width = frame.shape[:2]
    return (
        f'<div class="frame {name}" style="aspect-ratio: {width} / {height}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(drawn)}</svg></div>'
    )


def curves_html(chunk: np.ndarray | None, target: np.ndarray, stats: Stats | None) -> str:
    """A cell for each action dimension: the target (K, A) dashed, the chunk over it; -1 .. 1 of the
    statistics from bottom to top."""
    K, A = target.shape
    drawn = []
    for values, colour, dash in ((target, "#9aa5b1", "2 2"), (chunk, "#1769aa", "")):
        if values is None:
            continue
        scaled = normalize(values, stats) if stats is not None else values
        heights = 15 - 13 * np.clip(scaled, -1.1, 1.1) / 1.1  # (K, A)
        steps = np.linspace(2, 18, K) if K > 1 else np.array([10.0])
        for a in range(A):
            points = " ".join(
                f"{20 * a + x:.1f},{y:.1f}" for x, y in zip(steps, heights[:, a], strict=True)
            )
            drawn.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5" '
                f'stroke-dasharray="{dash}"/>'
            )
    borders = [f'<path d="M{20 * a} 0V30" stroke="#cbd2d9" stroke-width=".5"/>' for a in range(A)]
    return (
        f'<svg class="curves" viewBox="0 0 {20 * A} 30" preserveAspectRatio="none">'
        f"{''.join([*borders, *drawn])}</svg>"
    )


def target_html(action_ids: Sequence[int]) -> str:
    spans = [f'<span class="target">{action_id}</span>' for action_id in action_ids]
    return f'<div class="tokens">{"".join(spans)}</div>'


def tokens_html(action_ids: Sequence[int], target: Sequence[int]) -> str:
    """The ids of an answer: right up to the first wrong one, then what counts for nothing; or how
    many of the target are missing.

    target 4 9 5, answer 4 7 5: right, wrong, after;  answer 4 9: right, right, "1 missing" """
    right = model.common_prefix(action_ids, target)
    kinds = ["right"] * right + ["wrong"] + ["after"] * len(action_ids)
    spans = []
    for action_id, kind in zip(action_ids, kinds, strict=False):
        spans.append(f'<span class="{kind}">{action_id}</span>')
    if right == len(action_ids) < len(target):
        spans.append(f'<span class="missing">{len(target) - right} missing</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


def shapes_of_words(answer: str, right: grpo.RightAnswer, colour: str) -> list[str]:
    """The points that an answer in words names, those of a path joined."""
    points = [(100 * x, 100 * y) for x, y in points_of(answer, right.row)]
    if right.score not in ("point", "path") or not points:
        return []
    if right.score == "path":
        return [polyline(points, colour)]
    return [polyline([point], colour) for point in points]


class Drawing(NamedTuple):
    """What the cards of a page are drawn with."""

    pixel_map: PixelMap | None  # None: no paths
    stats: Stats | None  # of the actions

    def path(self, prompt: Prompt, chunk: np.ndarray | None, colour: str, dashes="") -> list[str]:
        if self.pixel_map is None or prompt.hand is None or chunk is None:
            return []
        points = self.pixel_map.path(prompt.hand, chunk)
        return [polyline([(100 * x, 100 * y) for x, y in points], colour, dashes)]


def completion_html(
    prompt: Prompt, name: str, group: Group, completion: Completion, drawing: Drawing
) -> str:
    colour = reward_colour(completion.reward)
    parts = [
        f'<article class="completion" data-reward="{completion.reward:.4f}" '
        f'data-form="{completion.r_f:.0f}" style="border-top-color: {colour}">',
        f'<div class="worth"><b>{completion.reward:.3f}</b>'
        f"<span>r_f {completion.r_f:.0f} · r_a {completion.r_a:.2f}</span></div>",
        f'<div class="small">advantage {completion.advantage:+.2f}</div>',
    ]
    if completion.faults:
        parts.append(f'<div class="fault">{html.escape(", ".join(completion.faults))}</div>')
    in_words = isinstance(group.target, grpo.RightAnswer)
    drawn = drawing.path(prompt, prompt.chunk, TARGET_COLOUR, "4 3")
    drawn += drawing.path(prompt, completion.chunk, colour)
    if in_words:
        drawn += shapes_of_words(group.target.text, group.target, TARGET_COLOUR)
        drawn += shapes_of_words(completion.answer, group.target, colour)
    if drawn and prompt.frames:
        parts.append(frame_html(f"{name}_0", prompt.frames[0], drawn))
    if completion.thought:
        parts.append(f'<p class="thought">{html.escape(completion.thought)}</p>')
    if in_words:
        parts.append(f"<p><b>{html.escape(completion.answer or '-')}</b></p>")
    else:
        parts.append(tokens_html(completion.action_ids, group.target))
        parts.append(curves_html(completion.chunk, prompt.chunk, drawing.stats))
    is_open = " open" if set(completion.faults) - {FAULTS["decodes"]} else ""
    parts.append(
        f'<details{is_open}><summary class="small">as written</summary>'
        f"<pre>{html.escape(completion.text)}</pre></details></article>"
    )
    return "\n".join(parts)


def group_html(
    prompt: Prompt, name: str, checkpoint: str, group: Group, drawing: Drawing
) -> list[str]:
    parts = [
        f'<div class="group" data-spread="{int(not group.zero_std)}">'
        f'<span class="name">{html.escape(checkpoint)}</span>mean reward {group.mean:.3f}'
    ]
    if group.zero_std:
        parts.append(' <span class="fault">all rewards equal: no advantage</span>')
    parts.append('<div class="small">target</div>')
    if isinstance(group.target, grpo.RightAnswer):
        parts.append(f"<div><b>{html.escape(group.target.text)}</b></div>")
    else:
        parts.append(target_html(group.target))
    parts.append('<div class="completions">')
    for completion in group.completions:
        parts.append(completion_html(prompt, name, group, completion, drawing))
    parts.append("</div></div>")
    return parts


def page(
    prompts: list[Prompt], groups: dict[str, list[Group]], sentences: list[str], drawing: Drawing
) -> str:
    """The page. groups: checkpoint -> a group for each prompt. sentences: what is said above."""
    styles = [STYLE]
    cards = []
    for index, prompt in enumerate(prompts):
        name = f"p{index}"
        for k, frame in enumerate(prompt.frames):
            styles.append(f".{name}_{k} {{ background-image: url({png_data(frame)}) }}")
        own = [of_checkpoint[index] for of_checkpoint in groups.values()]
        mean = np.mean([group.mean for group in own])
        gain = own[-1].mean - own[0].mean
        drawn = drawing.path(prompt, prompt.chunk, TARGET_COLOUR)
        frames = []
        for k, frame in enumerate(prompt.frames):
            frames.append(frame_html(f"{name}_{k}", frame, [] if k else drawn))
        question = html.escape(prompt.question)
        cards += [
            f'<section class="prompt" data-index="{index}" data-mean="{mean:.4f}" '
            f'data-gain="{gain:.4f}" data-question="{question}"><div class="asked">',
            *frames,
            f'<div class="question">{question}</div>',
            f'<div class="id">{html.escape(prompt.sample_id)}</div></div><div class="groups">',
        ]
        for checkpoint, of_checkpoint in groups.items():
            cards += group_html(prompt, name, checkpoint, of_checkpoint[index], drawing)
        cards.append("</div></section>")
    paragraphs = [f"<p>{html.escape(sentence)}</p>" for sentence in sentences]
    controls = CONTROLS.format(compared=COMPARED if len(groups) > 1 else "")
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Rollouts</title>',
            f"<style>{''.join(styles)}</style></head><body>",
            "<header><h1>Rollouts</h1>",
            *paragraphs,
            *summary_html(groups),
            f"</header>{controls}<main>",
            *cards,
            f"</main><script>{SCRIPT}</script></body></html>\n",
        ]
    )


def summary_html(groups: dict[str, list[Group]]) -> list[str]:
    """A table: what the completions on the page are worth on average."""
    lines = [
        "<table><tr><th>checkpoint</th><th>reward</th><th>r_f</th><th>r_a</th>"
        "<th>groups without spread</th></tr>"
    ]
    for checkpoint, of_checkpoint in groups.items():
        completions = [one for group in of_checkpoint for one in group.completions]
        means = [
            np.mean([getattr(c, key) for c in completions]) for key in ("reward", "r_f", "r_a")
        ]
        cells = [f"{mean:.3f}" for mean in means]
        without = sum(group.zero_std for group in of_checkpoint)
        cells.append(f"{without} of {len(of_checkpoint)}")
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><td>{html.escape(checkpoint)}</td>{row}</tr>")
    return [*lines, "</table>"]


# ---- Command -------------------------------------------------------------------------------------


def chunk_shape(tokenizer: FastTokenizer | None) -> tuple[int, int] | None:
    """(K, A) of its chunks; None without one."""
    return None if tokenizer is None else (tokenizer.horizon, tokenizer.action_dim)


def make_page(args: argparse.Namespace) -> str:
    """The page of args.policy on args.data. ValueError naming what does not fit.

    1. the prompts, by the first checkpoint   2. each checkpoint's answers   3. the page"""
    is_file = args.data.endswith(".jsonl")
    if is_file and args.split != "auto":
        raise ValueError(f"--split {args.split}: of episodes, and --data is a file; leave it out")
    if args.outside_images and not is_file:
        raise ValueError("--outside-images: of a file, and --data is episodes; leave it out")
    groups = {}
    episodes = []
    with_actions = not is_file
    for path in args.policy:
        dtype = model.compute_dtype(args.device)
        backbone = model.load(path, args.device, dtype, stages=("base", "sft", "grpo"))
        shape = chunk_shape(backbone.action_tokenizer)
        if with_actions and shape is None:
            raise ValueError(
                f"{path}: no fast/ in this checkpoint, so it knows no action tokens; name one of "
                "sft.py or grpo.py, or questions in words, .jsonl, as --data"
            )
        if not groups:
            first = backbone.action_tokenizer
        elif with_actions and shape != chunk_shape(first):
            raise ValueError(
                f"{path}: its chunks (steps, dimensions) are {shape}, those of {args.policy[0]} "
                f"{chunk_shape(first)}; compare checkpoints that have the same"
            )
        if is_file:
            words = f"questions of {args.data}, kinds in turn"
            asked = prompts_of_questions(backbone, args)
        else:
            if not episodes:
                episodes, words = evaluate.episodes_to_ask(backbone, args.data, args.split)
            asked = prompts_of_episodes(backbone, episodes, args)
        if not groups:
            prompts = asked
            with_actions = any(prompt.chunk is not None for prompt in prompts)
        groups[path] = answer_prompts(backbone, asked, args)
        del backbone  # before the next one is loaded
    pixel_map = fit_pixel_map(episodes, first.horizon) if episodes else None
    sentences = [
        f"{len(prompts)} prompts, {args.samples} completions each at temperature 1, {args.mode}, "
        f"seed {args.seed}: {words}."
    ]
    if with_actions:
        sentences += [
            "Action tokens: green up to the first wrong one, which is red. Curves: a cell for each "
            "action dimension, blue decoded, grey dashes the target.",
            map_sentence(pixel_map),
        ]
    if pixel_map is not None and pixel_map.error > LARGEST_ERROR:
        pixel_map = None
    stats = first.stats if first is not None else None
    return page(prompts, groups, sentences, Drawing(pixel_map, stats))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.rollouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--policy", nargs="+", required=True, help="checkpoints of sft.py or grpo.py, to compare")
    add("--data", required=True, help="folder of episodes, or conversations, .jsonl")
    add("--out", required=True, help="file to write, .html")
    add("--prompts", type=count, default=12, help="prompts")
    add("--samples", type=count, default=8, help="completions of each (G)")
    add("--mode", default="think", choices=["think", "direct"], help="with a thought or without")
    add("--reward", default="prefix", choices=list(grpo.REWARDS), help="measure of r_a")
    add("--max-new-tokens", type=count, help="as in the checkpoint's own run if not given")
    add("--batch", type=count, default=64, help="prompts a forward")
    add("--seed", type=natural, default=0, help="of prompts and samples")
    evaluate.split_flag(add)
    add("--outside-images", action="store_true", help="images may lie outside the file's folder")
    has_gpu = torch.cuda.is_available()
    add("--device", type=model.device_name, default="cuda" if has_gpu else "cpu")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix != ".html":
        raise ValueError(f"--out {out}: no page; name it .html")
    if len(set(args.policy)) < len(args.policy):
        raise ValueError("--policy: a checkpoint is named twice; name each once")
    if out.is_dir():
        raise ValueError(f"--out {out}: a folder; name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    model.quiet_libraries()
    out.write_text(make_page(args), encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    model.run_main(main, "--batch")
