"""README and manual are true: commands run, tables are those of the code, links lead somewhere."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qconv.cli import manual as command_module
from qconv.cli.main import cli
from qconv.cli.option_types import parse_number
from qconv.config.data_options import PRESETS
from qconv.report.manual_page import name_topics, render
from tests.support.libraries import MOVES_CODES, needs, runner
from tests.support.reference import GENERATED, MANUAL, README, ROOT, between

INDEX = MANUAL / "README.md"
PAGES = {path: path.read_text("utf-8") for path in (README, *sorted(MANUAL.glob("*.md")))}
TOPICS = sorted(path.stem for path in PAGES if path not in (README, INDEX))
PROMISED: set[str] = set()
"""Pages that others link to and that are still to be written: take a name out when its page is there."""
MOST_LINES = 250
COLUMNS = 80


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language on all pages; the same block on two of them counts once."""
    found = (re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for text in PAGES.values())
    return list(dict.fromkeys(block for page in found for block in page))


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages imagine it: model.onnx, imgs, other pictures in test, and qconv on the PATH."""
    folder = tmp_path_factory.mktemp("manual")
    (folder / "model.onnx").write_bytes((ROOT / "tests/models/cifar_mobilenet.onnx").read_bytes())
    for first, name in enumerate(("imgs", "test")):
        (folder / name).mkdir()
        for picture in sorted((ROOT / "calib_samples").glob("*.jpg"))[first::2]:
            (folder / name / picture.name).symlink_to(picture)
    (folder / "bin").mkdir()
    script = folder / "bin" / "qconv"  # as pip writes it
    script.write_text(f"#!{sys.executable}\nfrom qconv.cli.main import run\n\nrun()\n")
    script.chmod(0o755)
    return folder


def shell(place: Path, command: str) -> subprocess.CompletedProcess[str]:
    before = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{ROOT}:{before}" if before else str(ROOT)
    options = {"cwd": place, "env": environment, "capture_output": True, "text": True, "check": False}
    return subprocess.run(["bash", "-e", "-o", "pipefail", "-c", command], **options)


# -- commands run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", blocks("sh"), ids=lambda text: text.splitlines()[0][:60])
def test_commands_run(place: Path, command: str) -> None:
    if any(words in command for words in ("qconv finetune", "qconv synthesize", "reconstruct")):
        pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    if "reconstruct" in command:
        command = f"{command.rstrip()} --effort fast --samples 8"  # the last one counts
    done = shell(place, command)
    assert done.returncode == 0, done.stderr


def test_the_lines_for_ci_run(place: Path) -> None:
    commands = [line.partition("run: ")[2] for block in blocks("yaml") for line in block.splitlines()]
    ours = [command for command in commands if command.startswith("qconv ")]
    assert ours
    for command in ours:
        done = shell(place, command)
        assert done.returncode == 0, done.stderr
        assert all(gate["held"] for gate in json.loads((place / "report.json").read_text())["gates"])


def test_the_makefile_makes(place: Path) -> None:
    (rules,) = blocks("make")
    (place / "Makefile").write_text(rules)
    (place / "model.w8a8.onnx").unlink(missing_ok=True)
    done = shell(place, "make --no-print-directory model.w8a8.onnx")
    assert done.returncode == 0, done.stderr
    assert (place / "model.w8a8.onnx").stat().st_size > 100_000


@pytest.mark.parametrize("lines", blocks("python"), ids=lambda text: text.splitlines()[0][:60])
def test_the_python_lines_run(place: Path, lines: str) -> None:
    (place / "lines.py").write_text(lines)
    done = shell(place, f"'{sys.executable}' lines.py")
    assert done.returncode == 0, done.stderr


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_the_summary_is_that_of_a_run(place: Path) -> None:
    """All but the numbers, which depend on pictures and machine, and with them the order of what was changed.

    So does whether rounding finds better codes for the last layer: next to a tie it hangs on how a CPU adds.
    """
    (block,) = blocks("console")
    command, *shown = block.splitlines()
    done = shell(place, command.removeprefix("$ "))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "its nearest codes err less" not in line]
    assert sorted(map(without_numbers, told)) == sorted(map(without_numbers, shown))


def without_numbers(line: str) -> str:
    """Nor with the count in front of a change, which is left out where it is one."""
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"^(changed +)\d+ x ", r"\1", line))


def test_lines_of_the_summary_are_explained() -> None:
    (block,) = blocks("console")
    names = dict.fromkeys(line[:12].strip() for line in block.splitlines()[1:])
    rows = re.findall(r"^\| `([\w ]+)` \|", PAGES[MANUAL / "quantize.md"], re.MULTILINE)
    assert [row for row in rows if row in names] == list(names)  # some networks have more lines


# -- tables are those of the code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_generated_parts_are_those_of_the_code(name: str) -> None:
    """`make fix` writes them."""
    assert between(PAGES[MANUAL / name]) == GENERATED[name]()


def test_the_keys_of_the_report(place: Path) -> None:
    done = shell(place, "qconv quantize model.onnx --calib imgs --samples 4 --effort fast --json")
    section = PAGES[MANUAL / "report.md"].partition("## The report as JSON")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [key for row in rows for key in re.findall(r"`(\w+)`", row)] == list(json.loads(done.stdout))


def test_the_presets() -> None:
    rows = {
        cells[1].strip(" `"): cells
        for line in PAGES[MANUAL / "preprocessing.md"].splitlines()
        if len(cells := line.split("|")) > 6
    }
    for name, preset in PRESETS.items():
        color, scale, mean, std = (cell.strip() for cell in rows[name][2:6])
        assert color.lower() == preset.color
        assert parse_number(scale) == preset.scale
        assert tuple(map(float, mean.split(","))) == preset.mean
        assert tuple(map(float, std.split(","))) == preset.std


def test_every_command_and_option_that_a_page_names_exists() -> None:
    known = {name for command in cli.load_all().values() for option in command.params for name in option.opts}
    known |= {
        name for command in cli.load_all().values() for option in command.params for name in option.secondary_opts
    }
    for path, text in PAGES.items():
        spoken = "; ".join(words for words in re.findall(r"`([^`\n]+)`", prose(text)) if not words.startswith("make "))
        if path.name == "changes.md":  # it also tells of what was
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]+", spoken):
            assert option in known | {"--help", "--version"}, f"{path.name} names {option}"
        for command in re.findall(r"\bqconv ([a-z][\w-]+)", spoken):
            assert command in cli.load_all(), f"{path.name} names qconv {command}"


def test_no_table_is_missing() -> None:
    for text in PAGES.values():
        assert re.findall(r"^[A-Z]+_TABLE$", text, re.MULTILINE) == []


def test_every_module_has_a_line_in_the_architecture() -> None:
    section = PAGES[MANUAL / "architecture.md"].partition("## What lives where")[2].partition("\n## ")[0]
    named = set()
    for part in section.split("\n### ")[1:]:
        package = part.splitlines()[0].strip("`")
        folder = "qconv" if package == "qconv" else f"qconv/{package}"
        for names in re.findall(r"^- ([^:]*):", part, re.MULTILINE):
            named |= {f"{folder}/{name}.py" for name in re.findall(r"`(\w+)`", names)}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qconv").rglob("*.py")}
    assert named == {name for name in there if not name.endswith(("__init__.py", "__main__.py"))}


def test_modules_that_the_architecture_names_exist() -> None:
    text = PAGES[MANUAL / "architecture.md"]
    packages = {path.parent.name for path in (ROOT / "qconv").glob("*/__init__.py")}
    for package, module in re.findall(r"`(?!qconv/)(\w+)/(\w+)`", text):
        if package == "tests":
            assert module in packages
        else:
            assert (ROOT / "qconv" / package / f"{module}.py").exists(), f"{package}/{module}"


# -- pages hang together -----------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        assert name not in found, f"two headings are called {heading}"
        found.add(name)
    return found


def links() -> Iterator[tuple[Path, str]]:
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            if "://" not in target:
                yield path, target


def test_links_lead_somewhere() -> None:
    for path, target in links():
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if there.parent == MANUAL and there.stem in PROMISED and not there.exists():
            continue
        assert there in PAGES, f"{path.name} links to {target}"
        assert there != README, f"{path.name} links to a file that is not installed"
        assert not anchor or anchor in anchors(PAGES[there]), f"{path.name} links to {target}"


def test_the_readme_is_short() -> None:
    assert len(PAGES[README].splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", [README, INDEX], ids=["README", "index"])
def test_every_page_is_linked(path: Path) -> None:
    named = set(re.findall(r"\]\((?:qconv/manual/)?([\w-]+)\.md", PAGES[path]))
    assert named - {"README"} == set(TOPICS) | PROMISED


def test_the_index_says_what_the_pages_say() -> None:
    listed = dict(re.findall(r"^- \[([\w-]+)\]\(\1\.md\): (.+)$", PAGES[INDEX], re.MULTILINE))
    for topic in TOPICS:
        assert listed[topic] == command_module.summary_line(PAGES[MANUAL / f"{topic}.md"])


@pytest.mark.parametrize("path", [README, INDEX], ids=["README", "index"])
def test_every_command_has_a_page(path: Path) -> None:
    table = PAGES[path].partition("## Commands")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|.*\.md", table, re.MULTILINE)) == set(cli.load_all())


def test_make_demo_and_make_test_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in PAGES[README]
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)


def test_topics_that_the_code_names_exist() -> None:
    named = {
        (path.name, topic)
        for path in (ROOT / "qconv").rglob("*.py")
        for topic in re.findall(r"`qconv manual ([a-z][\w-]+)`", path.read_text("utf-8"))
    }
    assert {topic for name, topic in named if name in ("options.py", "quantize_options.py")} >= {
        "effort",
        "targets",
        "preprocessing",
    }
    assert {topic for _, topic in named} <= set(TOPICS)


@pytest.mark.parametrize("name", cli.load_all())
def test_help_sends_nobody_to_a_file_that_is_not_installed(name: str) -> None:
    command = cli.load_all()[name]
    with click.Context(command, info_name=name) as context:
        assert "README" not in command.get_help(context)


# -- qconv manual ------------------------------------------------------------------------------------------------------


def printed(*words: str) -> str:
    done = runner().invoke(cli, ["manual", *words], standalone_mode=False)
    assert done.exception is None
    return done.output


def test_manual_lists_every_topic_in_a_line() -> None:
    lines = printed().splitlines()
    rows = lines[: lines.index("")]
    assert sorted(row.split()[0] for row in rows) == TOPICS
    assert all(row.endswith(".") and len(row) <= COLUMNS for row in rows)


@pytest.mark.parametrize("topic", TOPICS)
def test_manual_prints_a_page_as_it_is_where_it_is_piped(topic: str) -> None:
    assert printed(topic) == PAGES[MANUAL / f"{topic}.md"]


def test_manual_takes_commands_for_topics() -> None:
    assert printed("finetune") == PAGES[MANUAL / "training.md"]
    assert printed("manual") == PAGES[INDEX]
    for command in cli.load_all():
        assert command_module.find(command) in {*TOPICS, "README"}


def test_manual_prints_all_pages() -> None:
    text = printed("--all")
    assert all(PAGES[MANUAL / f"{topic}.md"] in text for topic in TOPICS)


@pytest.mark.parametrize(
    ("topic", "near"),
    [
        ("calibraton", "`qconv manual calibration`"),
        ("quantise", "try `qconv manual quantize`; `qconv manual` lists"),  # the page and the command, once
        ("\x1b[31m", "lists all topics"),
        ("??", "lists all topics"),
    ],
)
def test_manual_names_what_is_near(place: Path, topic: str, near: str) -> None:
    done = shell(place, f"qconv manual '{topic}'")
    error, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    shown = topic.replace("\x1b", "\\x1b")
    assert error == f"Error: {shown} is no topic of the manual."
    assert hint.startswith("Hint:  ")
    assert near in hint


def test_manual_takes_a_topic_or_all_of_them(place: Path) -> None:
    assert shell(place, "qconv manual effort --all").returncode == 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("topic", TOPICS)
def test_a_terminal_gets_pages_rendered(topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No markup is left, links name topics, and no cell is cut off."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    render([PAGES[MANUAL / f"{topic}.md"]], command_module.INDEX, stream)
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert "](" not in text
    assert "|--" not in text
    assert "…" not in text
    assert all(len(line) <= COLUMNS for line in text.splitlines())


def test_links_become_topics() -> None:
    page = "<!-- a note -->\nSee [speed](speed.md#x), [below](#y), [all](README.md)."
    assert name_topics(page, "README") == "See speed (`qconv manual speed`), below, all (`qconv manual`)."


def test_the_shell_completes_topics(place: Path) -> None:
    done = shell(place, "COMP_WORDS='qconv manual cal' COMP_CWORD=2 _QCONV_COMPLETE=bash_complete qconv")
    assert done.stdout.split() == ["plain,calibration"]


def test_manual_needs_no_library() -> None:
    """Nor does it wait for one, where nothing is rendered."""
    code = (
        "import sys\nsys.argv = ['qconv', 'manual', 'effort']\nfrom qconv.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*[name for name in ('numpy', 'onnx', 'onnxruntime', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.strip() == ""
    assert done.stdout == PAGES[MANUAL / "effort.md"]
