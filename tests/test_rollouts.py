"""What tools/rollouts.py shows of answers whose worth is known by hand, and that its page needs
nothing else; in a browser where one is installed."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import untrained
from PIL import Image

import evaluate
import fast_tokenizer
import model
import sft
from tools import rollouts

K, A = 4, 3
SHIFT = np.array([[0.02, 0], [0, 0.03], [0, 0]])  # of the hand in the image, by an action of 1


def recordings(pixels):
    """Episodes of 12 steps in which the hand moves by SHIFT; pixels: where, of (T, 2) that."""
    rng = np.random.default_rng(0)
    for number in range(24):
        action = rng.uniform(-1, 1, (12, A)).astype(np.float32)
        moved = np.cumsum(action @ SHIFT, 0)
        hand = np.vstack([[0.5, 0.5], 0.5 + moved[:-1]]).astype(np.float32)
        arrays = {
            "image": np.full((12, 16, 32, 3), number, np.uint8),
            "state": np.zeros((12, 2), np.float32),
            "action": action,
            **pixels(hand),
        }
        yield arrays, {"task": "put <it> away", "fps": "10", "source": "lab"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """-> a folder with data, and an untrained model with action tokens, as sft.py saves it."""
    folder = tmp_path_factory.mktemp("rollouts")
    fast_tokenizer.write_episodes(folder / "data", recordings(lambda hand: {"hand_pixel": hand}))
    files = fast_tokenizer.read_episodes(folder / "data")
    stats = fast_tokenizer.read_stats(folder / "data", files)["action"]
    chunks = fast_tokenizer.all_chunks(files, K, 1)
    backbone = model.load(untrained.folder("tiny-vlm"))
    backbone.action_tokenizer = fast_tokenizer.FastTokenizer.fit(chunks, 30, 2, stats)
    sft.grow_vocabulary(backbone, 30)
    run = {"stage": "sft", "step": 1, "config": {"max_new_tokens": 7}, "parent": "", "split": []}
    model.save(folder / "sft" / "final", backbone, run)
    return folder


class Page(HTMLParser):
    """The completions of a page: of each its data, tokens, faults, texts and drawn lines."""

    def __init__(self, text: str):
        super().__init__()
        self.completions = []
        self.groups = []  # data of each
        self.prompts = []
        self.asked_for = []  # what a browser would fetch
        self.open_class = ""
        self.inside = False  # a completion
        self.feed(text)

    def handle_endtag(self, tag):
        if tag == "article":
            self.inside = False

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        name = attributes.get("class", "")
        self.open_class = name or tag
        self.asked_for += [attributes[key] for key in ("src", "href") if key in attributes]
        if "prompt" in name.split():
            self.prompts.append(attributes)
        if "group" in name.split():
            self.groups.append(attributes)
        if "completion" in name.split():
            self.completions.append({**attributes, "texts": [], "tokens": [], "lines": []})
            self.inside = True
        if tag == "polyline" and attributes["stroke"] != "#000" and self.inside:
            self.completions[-1]["lines"].append(attributes)

    def handle_data(self, data):
        if self.inside and data.strip():
            if self.open_class in ("right", "wrong", "after", "missing"):
                self.completions[-1]["tokens"].append((self.open_class, data))
            self.completions[-1]["texts"].append((self.open_class, data.strip()))


def made(folder, tmp_path, *flags, data="data"):
    out = tmp_path / "page.html"
    argv = ["--policy", str(folder / "sft"), "--data", str(folder / data), "--out", str(out)]
    rollouts.main([*argv, "--device", "cpu", "--prompts", "2", *flags])
    return out.read_text()


def scripted(monkeypatch, answers):
    """The sampler says these of each prompt; answers(target) -> G texts. -> targets so far."""
    targets = []
    of_reward = rollouts.grpo.reward

    def complete(backbone, prompts, n, greedy, args):
        return [None] * (len(prompts.rows) * n)

    def reward(backbone, sequences, of_each, *args):
        n = len(answers(of_each[0], backbone))
        for i in range(len(sequences)):
            sequences[i] = backbone.tokenizer(answers(of_each[i], backbone)[i % n]).input_ids
        targets.extend(of_each[::n])
        return of_reward(backbone, sequences, of_each, *args)

    monkeypatch.setattr(evaluate, "complete", complete)
    monkeypatch.setattr(rollouts.grpo, "reward", reward)
    return targets


def four_answers(target, backbone):
    """Right; the second token wrong; two too many; without a thought or an end."""
    thought = "<think>a < b</think>"
    others = [[target[0], i, *target[2:]] for i in range(30) if i != target[1]]
    wrong = next(ids for ids in others if backbone.action_tokenizer.decode([ids])[1][0])
    texts = [f"{thought}{model.action_answer(ids)}<|im_end|>" for ids in (target, wrong)]
    longer = f"{thought}{model.action_answer([*target, 1, 2])}<|im_end|>"
    return [*texts, longer, "<answer>so <script>"]


def test_tokens_are_told_apart_and_rewards_are_those_of_rl(written, tmp_path, monkeypatch):
    targets = scripted(monkeypatch, four_answers)
    page = Page(made(written, tmp_path, "--samples", "4"))
    assert len(page.prompts) == len(page.groups) == len(targets) == 2
    assert len(page.completions) == 8
    right, wrong, longer, malformed = page.completions[:4]
    m = len(targets[0])
    assert right["data-reward"] == "1.0000" and right["data-form"] == "1"
    ids = [str(i) for i in targets[0]]
    assert right["tokens"] == [("right", i) for i in ids]
    assert ("thought", "a < b") in right["texts"]
    assert [kind for kind, _ in wrong["tokens"]] == ["right", "wrong", *["after"] * (m - 2)]
    assert [i for _, i in wrong["tokens"][2:]] == ids[2:], "they count for nothing all the same"
    w = (1 + 1 / m) / 2
    assert float(wrong["data-reward"]) == pytest.approx(w, abs=1e-4)
    # two coefficients too many do not decode
    assert longer["tokens"] == [("right", i) for i in ids] + [("wrong", "1"), ("after", "2")]
    assert longer["data-reward"] == "0.0000"
    assert ("fault", "does not decode") in longer["texts"]
    assert malformed["data-form"] == "0" and malformed["tokens"] == [("missing", f"{m} missing")]
    assert ("fault", "no tags, no run of tokens, does not decode") in malformed["texts"]
    assert ("pre", "<answer>so <script>") in malformed["texts"], "as text"
    # as in GRPO: the advantage of rewards 1, w, 0, 0
    rewards = np.array([1, w, 0, 0])
    advantage = (1 - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
    assert ("small", f"advantage {advantage:+.2f}") in right["texts"]


def test_paths_over_frames_are_where_the_hand_goes(written, tmp_path, monkeypatch):
    """The fit finds SHIFT. The target's line ends where its actions move the hand; what is decoded
    is that but for rounding."""
    episodes = fast_tokenizer.read_episodes(written / "data")
    fitted = rollouts.fit_pixel_map(episodes, K)
    np.testing.assert_allclose(fitted.matrix, SHIFT, atol=1e-6)
    assert fitted.error < 1e-6
    chunk = np.array([[1, 0, 9], [1, 1, 9], [0, -2, 9]])
    path = fitted.path(np.array([0.5, 0.5]), chunk)
    expected = [(0.5, 0.5), (0.52, 0.5), (0.54, 0.53), (0.54, 0.47)]
    np.testing.assert_allclose(path, expected, atol=1e-5)
    scripted(monkeypatch, four_answers)
    text = made(written, tmp_path, "--samples", "4")
    page = Page(text)
    assert "mean error 0.0% of the image" in text
    name, step = re.search(r"(episode_\d+):(\d+)</div>", text).groups()
    (episode,) = [one for one in episodes if one.name == name]
    target_line, own_line = page.completions[0]["lines"][:2]
    assert target_line["stroke"] == rollouts.TARGET_COLOUR
    ends = [line["points"].split()[-1].split(",") for line in (target_line, own_line)]
    first = int(step)
    arrives = episode.hand_pixel[first] + episode.action[first : first + K].sum(0) @ SHIFT
    np.testing.assert_allclose(np.array(ends[0], float), 100 * arrives, atol=0.02)
    assert np.abs(np.subtract(*np.array(ends, float))).max() < 4, "decoded, not copied"
    assert len(page.completions[3]["lines"]) == 1 + A, "malformed: the target's path and curves"


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (lambda hand: {}, "does not record the hand"),
        (lambda hand: {"hand_pixel": hand[::-1] * 7 % 1}, "is .*% of the image off"),
    ],
)
def test_what_does_not_fit_is_not_drawn(written, tmp_path, monkeypatch, pixels, words):
    fast_tokenizer.write_episodes(tmp_path / "other", recordings(pixels))
    scripted(monkeypatch, four_answers)
    text = made(written, tmp_path, "--samples", "4", data=tmp_path / "other")
    assert re.search(words, text)
    lines = Page(text).completions[0]["lines"]
    assert len(lines) == 2 * A, "curves alone: target and chunk"


def write_questions(folder: Path) -> str:
    Image.new("RGB", (64, 32), (90, 90, 90)).save(folder / "grey.png")
    rows = []
    for kind, answer, more in (
        ("path", "(0.10, 0.50), (0.50, 0.50)", {"score": "path"}),
        ("colour", "grey", {"score": "exact"}),
    ):
        messages = [
            {"role": "user", "content": "<image>Which?"},
            {"role": "assistant", "content": f"<answer>{answer}</answer>"},
        ]
        rows.append({"images": ["grey.png"], "messages": messages, "kind": kind, **more})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_answers_in_words(written, tmp_path, monkeypatch):
    def answers(target, backbone):
        own = f"<think>t</think><answer>{target.text}</answer><|im_end|>"
        return [own, "<think>t</think><answer>red</answer><|im_end|>"]

    scripted(monkeypatch, answers)
    data = write_questions(tmp_path)
    text = made(written, tmp_path, "--samples", "2", data=data)
    assert "Action tokens" not in text and "over the frames" not in text
    page = Page(text)
    assert [one["data-reward"] for one in page.completions] == ["1.0000", "0.5000"] * 2
    assert [prompt["data-question"] for prompt in page.prompts] == ["Which?"] * 2
    own, red = page.completions[0]["lines"], page.completions[1]["lines"]
    assert [line["points"] for line in own] == ["10.00,50.00 50.00,50.00"] * 2, "target and answer"
    assert len(red) == 1 and ("b", "red") in page.completions[1]["texts"]
    assert not page.completions[2]["lines"], "a colour is nowhere"


def test_two_real_checkpoints_are_asked_the_same(written, tmp_path):
    """Two names of one checkpoint: the same prompts and draws, so the same answers."""
    (tmp_path / "copy").symlink_to(written / "sft")
    policies = ["--policy", str(written / "sft"), str(tmp_path / "copy")]
    text = made(written, tmp_path, *policies, "--samples", "3", "--mode", "direct")
    page = Page(text)
    assert len(page.completions) == 2 * 2 * 3
    written_texts = [dict(one["texts"])["pre"] for one in page.completions]
    assert written_texts[:3] == written_texts[3:6] and written_texts[6:9] == written_texts[9:]
    assert {prompt["data-gain"] for prompt in page.prompts} == {"0.0000"}
    assert all(target.startswith("data:image/png") for target in page.asked_for)
    links = re.findall(r"url\((.{22})|https?:", text)
    assert links and set(links) == {"data:image/png;base64,"}, "it fetches nothing"


def test_a_base_model_is_compared_in_words(written, tmp_path, monkeypatch):
    """It has no chunks, which nobody asks for here: it was refused for that."""
    answer = "<think>t</think><answer>red</answer><|im_end|>"
    scripted(monkeypatch, lambda target, backbone: [answer])
    policies = ["--policy", untrained.folder("tiny-vlm"), str(written / "sft")]
    page = Page(
        made(written, tmp_path, *policies, "--samples", "1", data=write_questions(tmp_path))
    )
    assert len(page.groups) == 4 and ("b", "red") in page.completions[0]["texts"]


def test_what_was_written_is_no_part_of_the_page(written, tmp_path, monkeypatch):
    """Questions and thoughts are anyone's: they are text, in attributes too."""
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    answer = f"<think>{evil}</think><answer>{evil}</answer><|im_end|>"
    scripted(monkeypatch, lambda target, backbone: [answer])
    data = write_questions(tmp_path)
    Path(data).write_text(Path(data).read_text().replace("Which?", evil.replace('"', '\\"')))
    text = made(written, tmp_path, "--samples", "1", data=data)
    page = Page(text)
    assert page.prompts[0]["data-question"] == evil
    assert ("thought", evil) in page.completions[0]["texts"]
    assert text.count("<script") == 1 and "<img" not in text


def test_what_cannot_be_shown_is_one_line(written, tmp_path):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="a folder; name a file"):  # before the minutes of answers
        rollouts.main(["--policy", "x", "--data", "y", "--out", str(tmp_path / "folder.html")])
    with pytest.raises(ValueError, match="name it .html"):
        rollouts.main(["--policy", "x", "--data", "y", "--out", "page.png"])
    with pytest.raises(ValueError, match="named twice"):
        rollouts.main(["--policy", "x", "x", "--data", "y", "--out", "page.html"])
    base = ["--policy", untrained.folder("tiny-vlm")]
    with pytest.raises(ValueError, match="no fast/ in this checkpoint"):
        made(written, tmp_path, *base)
    # both flags did nothing
    with pytest.raises(ValueError, match="--split all: of episodes, and --data is a file"):
        made(written, tmp_path, "--split", "all", data=write_questions(tmp_path))
    with pytest.raises(ValueError, match="--outside-images: of a file, and --data is episodes"):
        made(written, tmp_path, "--outside-images")
    # it was told to give a flag that there is none of
    messages = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": "<answer><ACTION></answer>"},
    ]
    row = {"messages": messages, "chunk": [[0.5] * A] * K}
    (tmp_path / "actions.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"actions.jsonl:1: it asks for actions, and the check"):
        made(written, tmp_path, *base, data=tmp_path / "actions.jsonl")


@pytest.mark.parametrize("dims", [(K - 1, A), (K, A - 1)])
def test_checkpoints_of_other_chunks_are_not_compared(written, tmp_path, monkeypatch, dims):
    """They were asked first, at other steps, and where the dimensions differ that ended in numpy's
    "cannot reshape"."""
    other = model.load(written / "sft")
    chunks = np.random.default_rng(0).uniform(-1, 1, (60, *dims)).astype(np.float32)
    stats = fast_tokenizer.statistics(chunks.reshape(-1, dims[1]))
    other.action_tokenizer = fast_tokenizer.FastTokenizer.fit(chunks, 30, 2, stats)
    run = {"stage": "sft", "step": 1, "config": {}, "parent": "", "split": []}
    model.save(tmp_path / "other" / "final", other, run)
    asked = scripted(monkeypatch, four_answers)
    policies = ["--policy", str(written / "sft"), str(tmp_path / "other")]
    words = re.escape(f"other: its chunks (steps, dimensions) are {dims}, those of ")
    with pytest.raises(ValueError, match=words):
        made(written, tmp_path, *policies, "--samples", "4")
    assert len(asked) == 2, "the first checkpoint's prompts alone"


FILTERS = {  # settings: what is left of each prompt's 1, w, 0, 0
    "": "1w00",
    "form.low.value = 0.95": "1",
    "form.high.value = 0.05": "00",
    "form.malformed.checked = true": "00",
    "form.words.value = 'SO <script>'": "0",
    "form.words.value = 'put <it> away'": "1w00",
    "form.words.value = 'nowhere'": "",
}
WATCH = """<pre id="seen"></pre><script>
const seen = [];
for (const settings of %s) {
  form.reset(); eval(settings); show();
  const left = [...document.querySelectorAll(".completion:not(.hidden)")];
  const cards = document.querySelectorAll(".prompt:not(.hidden) .group:not(.hidden)").length;
  const count = document.getElementById("shown").textContent;
  seen.push([left.map(one => one.dataset.reward), count, cards]);
}
document.getElementById("seen").textContent = JSON.stringify(seen);
</script></body>"""


def test_filters_in_a_browser(written, tmp_path, monkeypatch):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("apt-get install chromium")
    scripted(monkeypatch, four_answers)
    text = made(written, tmp_path, "--samples", "4")
    rewards = [one["data-reward"] for one in Page(text).completions]
    shown = tmp_path / "shown.html"
    shown.write_text(text.replace("</body>", WATCH % json.dumps(list(FILTERS))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{shown}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search(r'id="seen">(.*?)<', done.stdout)[1])
    for (settings, left), (values, count, cards) in zip(FILTERS.items(), seen, strict=True):
        expected = []
        for w in (rewards[1], rewards[5]):
            expected += [{"1": "1.0000", "w": w, "0": "0.0000"}[letter] for letter in left]
        assert values == expected, settings
        assert count == f"{len(expected)} of 8 completions"
        assert cards == (2 if left else 0), "a group of which nothing is left is hidden too"
