"""What the pages say that a reader could try: links lead somewhere, commands are parsed by the
programs that they call, and flags, functions, tests and files that are named exist.

docs/log.md tells of commits long gone: of it only the links are followed."""

import argparse
import contextlib
import importlib
import inspect
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

import evaluate
from benchmarks import simulate
from tools import study, study_report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results/README.md"]
PAGES += [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("assets/*/README.md"))]
TODAYS = [page for page in PAGES if page.name != "log.md"]

MODULES = [path.stem for path in ROOT.glob("*.py")]
for folder in ("benchmarks", "tools"):
    MODULES += [f"{folder}.{path.stem}" for path in (ROOT / folder).glob("*.py")]

# What a command is run by: python, another one's Python, or torchrun with its flags.
PROGRAM = r"(?:\bpython3?|torchrun(?: --\w+ \d+)*) +((?:-m )?[\w./]+)"
FLAG = r"(?<![\w-])--[a-z][\w-]*"
# Words of the pages for what a reader fills in -> something that is allowed there.
FILLED_IN = {
    "${model#*:}": "runs/sft",
    "${model%%:*}": "SFT",
    "--episodes $2 --seed $3": "--episodes 1 --seed 0",
    "--reward NAME": "--reward prefix",
    "--python .venv-libero/bin/python": f"--python {sys.executable}",
}
# Flags of torchrun, git, pip, hf, tensorboard and ruff, and two that ours had under another name.
OTHERS = {"--nproc_per_node", "--shutdown-timeout", "--recursive", "--detach", "--no-deps"}
OTHERS |= {"--exclude", "--local-dir", "--logdir", "--fix", "--arm", "--fast"}
# Programs with commands of their own.
COMMANDS = {
    "evaluate.py": [*evaluate.SIMULATORS, "tokens", "actions", "thought", "vqa", "probe", "blind"],
    "-m tools.memory": ["sft", "grpo", "vla"],
    "-m tools.lerobot": ["export"],
    "-m tools.study": ["report"],
}
COMMANDS["evaluate.py"].append("report")


def name_of(page):
    return str(page.relative_to(ROOT))


def without_blocks(page):
    """Its text, without what stands between ``` and ```."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def spans(page):
    """What stands between ` and `, also over the end of a line."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", without_blocks(page))]


# ---- Links ---------------------------------------------------------------------------------------


@cache
def anchors(page):
    """Of its headings, as GitHub makes them: "Two suites, with thoughts" -> two-suites-with-..."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
        found.add(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = without_blocks(page)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(link)
    assert wrong == []


# ---- Commands ------------------------------------------------------------------------------------


class ParsedError(Exception):
    """A command line was accepted; nothing of the command is run."""


real_parse = argparse.ArgumentParser.parse_known_args


def only_parse(parser, args=None, namespace=None):
    parsed, rest = real_parse(parser, args, namespace)
    if parser.prog == "python -m tools.memory" and parsed.stage:
        return parsed, rest  # the rest are flags of the stage, whose own parser comes next
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    raise ParsedError


def call(program, argv, monkeypatch):
    """Hands argv to a program of this repository, "sft.py" or "-m tools.plot"."""
    module = importlib.import_module(program.removeprefix("-m ").removesuffix(".py"))
    if hasattr(module, "main"):
        module.main(argv)
    else:  # a simulator, which records
        monkeypatch.setattr(sys, "argv", [program, *argv])
        simulate.record(module.__name__.split(".")[-1], getattr(module, "convert", None))


def is_ours(program):
    return program.removeprefix("-m ").removesuffix(".py") in MODULES


def commands(page):
    """Of its bash blocks: the program and its words."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r" *\\\n\s*", " ", block).splitlines():
            filled_in = line
            for words, others in FILLED_IN.items():
                filled_in = filled_in.replace(words, others)
            for match in re.finditer(rf"{PROGRAM}(.*)", filled_in):
                words = shlex.split(match[2].replace(";", " ; "), comments=True)
                if is_ours(match[1]):
                    yield match[1], words[: words.index(";")] if ";" in words else words


@pytest.mark.parametrize("page", TODAYS, ids=name_of)
def test_commands_are_parsed(page, monkeypatch, capsys):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
    wrong = []
    for program, words in commands(page):
        try:
            call(program, words, monkeypatch)
        except ParsedError:
            continue
        except (SystemExit, ValueError) as e:
            message = capsys.readouterr().err.strip().splitlines() or [str(e)]
            wrong.append((program, *words, message[-1]))
    assert wrong == []


def test_commands_are_found():
    """A test that looks at nothing passes."""
    counts = {page.name: len(list(commands(page))) for page in TODAYS}
    assert counts["README.md"] >= 8 and counts["data.md"] >= 30 and counts["simulators.md"] >= 20


# ---- Flags ---------------------------------------------------------------------------------------


def flags_of_parser(parser):
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= flags_of_parser(command)
    return found


@cache
def flags_of(program, command=""):
    """All that `program` takes, or this command of it."""
    parsers = []

    def keep(parser, args=None, namespace=None):
        parsers.append(parser)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
        with contextlib.suppress(ParsedError):
            call(program, [command] if command else [], patch)
    (parser,) = parsers
    if program == "-m tools.memory" and command:
        return flags_of_parser(parser) | flags_of(f"{command}.py")
    for action in parser._actions:
        if command and isinstance(action, argparse._SubParsersAction):
            return flags_of_parser(action.choices[command])
    return flags_of_parser(parser)


@cache
def all_flags():
    found = set(OTHERS)
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        if '__name__ == "__main__"' in source and name != "benchmarks.simulate":
            program = f"-m {name}" if "." in name else f"{name}.py"
            for command in ["", *COMMANDS.get(program, [])]:
                found |= flags_of(program, command)
    return found


def is_known(flag, known):
    """--skip-... stands for --skip-blank and --skip-damaged."""
    return flag in known or (flag.endswith("-") and any(one.startswith(flag) for one in known))


@pytest.mark.parametrize("page", TODAYS, ids=name_of)
def test_flags_exist(page):
    """Beside the name of a command those of this command, alone those of any."""
    wrong = []
    for span in spans(page):
        flags = re.findall(FLAG, span)
        known = all_flags()
        match = re.match(rf"(?:{PROGRAM}|(\w+\.py)) *(\w+(?: ?\| ?\w+)*)?", span)
        program = match and (match[1] or match[2])
        if flags and program and is_ours(program):
            known = set(OTHERS)
            for command in re.split(r" ?\| ?", match[3] or ""):
                is_one = command in COMMANDS.get(program, [])
                known |= flags_of(program, command if is_one else "")
        wrong += [(flag, span) for flag in flags if not is_known(flag, known)]
    assert wrong == []


# ---- Names ---------------------------------------------------------------------------------------


@cache
def owners():
    """model, tools/plot, plot, FlowHead -> the module or the class."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        found[name.replace(".", "/")] = found[name.split(".")[-1]] = module
        for key, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == name:
                found[key] = value
    return found


@cache
def names_of_tests():
    found = {path.stem for path in ROOT.glob("tests/*.py")}
    for path in ROOT.glob("tests/*.py"):
        found |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    return found


def exists(span):
    """Whether a function, class, test or file exists, if the text between ` and ` is one's name."""
    for name in re.findall(r"\btest_\w+", span):
        if name not in names_of_tests():
            return False
    match = re.fullmatch(r"([\w/]+)\.(\w+)(?:\(.*\))?", span)
    if match and match[1] in owners() and match[2] not in ("py", "md", "sh", "json", "jsonl"):
        owner = owners()[match[1]]
        return hasattr(owner, match[2]) or match[2] in getattr(owner, "__annotations__", {})
    if re.match(r"(benchmarks|tools|tests|docs|assets)/[\w./-]+$", span):
        return (ROOT / span).exists() or (ROOT / f"{span}.py").exists()
    return True


@pytest.mark.parametrize("page", TODAYS, ids=name_of)
def test_functions_tests_and_files_exist(page):
    of_others = {"model.vocab", "model.merges"}  # keys in the JSON of the package tokenizers
    wrong = [span for span in spans(page) if not exists(span) and span not in of_others]
    assert wrong == []


def test_the_readme_counts_lines():
    """To two in a hundred."""
    text = (ROOT / "README.md").read_text()
    counts = dict(re.findall(r"^(\w+\.py) +([\d,]+)  ", text, re.MULTILINE))
    assert set(counts) == {path.name for path in ROOT.glob("*.py")}
    for name, count in counts.items():
        lines = len((ROOT / name).read_text().splitlines())
        assert int(count.replace(",", "")) == pytest.approx(lines, rel=0.02), name


def test_the_page_of_the_study_declares_its_matrix():
    """A model more in tools/study.py is missing on the page until `tools.study report` is run."""
    page = (ROOT / "docs/study.md").read_text()
    block = page.split("<!-- study: matrix -->\n")[1].split("<!-- end -->")[0]
    report = study_report.Report({}, study.MATRIX, [], {})
    assert block.splitlines() == study_report.matrix_table(report)


def test_each_results_file_has_its_line():
    """Which command made it, and at which commit."""
    text = (ROOT / "results/README.md").read_text()
    for path in (ROOT / "results").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in text or path.name == "README.md", name
