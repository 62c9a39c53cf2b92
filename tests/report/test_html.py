"""The page: whole, safe whatever things are called, silent, the same each time, and drawn right by a real browser."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from qconv.cli.main import cli
from qconv.config.data_options import (
    PRESETS,
    Color,
    DataOptions,
    Layout,
    Preprocessing,
    PreprocessingOptions,
    ResizeFilter,
)
from qconv.config.recipe import Recipe
from qconv.data.images import encode_thumbnail, load_pixels
from qconv.data.loader import DataLoader
from qconv.data.preprocessing import normalize_pixels
from qconv.errors import QconvError
from qconv.pipeline import quantize
from qconv.report import html, pages
from qconv.report.contact_sheet import NO_PICTURES, make_contact_sheet, undo_preprocessing
from qconv.report.html import Page, PagePicture, Tile
from qconv.report.study_chart import make_study_page
from qconv.report.tiles import AccuracyScores
from qconv.reporter import Reporter
from qconv.results.comparison import (
    Cause,
    Comparison,
    Diagnosis,
    HistogramBars,
    LayerComparison,
    Sweep,
    ValueStatistics,
)
from qconv.results.precision import PrecisionPoint, PrecisionReport
from qconv.results.quantize import Audit, FloatNode, LayerTime, OutputScore
from qconv.results.sample_curve import CurvePoint, SampleCurve
from qconv.results.scores import BOXES, Score
from qconv.results.trials import Trial
from qconv.runtime.session import Session
from tests.support.browser import Browser
from tests.support.libraries import runner
from tests.support.loud import loud, write_samples
from tests.support.scores import scores

ROOT = Path(__file__).parents[2]
CIFAR = ROOT / "tests" / "models" / "cifar_mobilenet.onnx"
PHOTOS = ROOT / "calib_samples"
HOSTILE = """</script><img src=x onerror=alert(1)>"'&{{ 7 * 7 }}<!--\u2028\u00fc\u732b""" + "/layer" * 12
VOID = {"meta", "img", "br", "input", "link", "hr"}


# -- pages made up -----------------------------------------------------------------------------------------------------


def values(low: float, high: float, end: float) -> ValueStatistics:
    edges = tuple(float(edge) for edge in np.linspace(low, end, 9))
    return ValueStatistics(8, low, high, 0.0123, 0.8, HistogramBars(edges, (1, 5, 90, 400, 90, 5, 0, 2)))


def rows(count: int, name: str) -> tuple[LayerComparison, ...]:
    """The third has no weights, the fourth no codes at all, and differs in nothing."""
    made = [
        LayerComparison(
            f"{name}{i}", "Conv", f"t{i}", 20.0 + i, 30.0 + i, 0.99, 1 / count, values(-1, 2, 3), values(-127, 127, 127)
        )
        for i in range(count)
    ]
    made[2] = replace(made[2], op="Add", weights=None)
    made[3] = replace(
        made[3], sqnr_db=None, added_sqnr_db=None, cosine=None, output_share=None, values=None, weights=None
    )
    return tuple(made)


CURVE = PrecisionReport(
    (
        PrecisionPoint(1.0, 9.04, 10.0, 10.0, 0),
        PrecisionPoint(1.04, 15.5, 16.2, 16.2, 2, chosen=True),
        PrecisionPoint(1.5, 40.0, 40.5, None, 9),
        PrecisionPoint(1.6, math.inf, math.inf, None, 10),
    ),
    1.7,
    16,
    apart=True,
)


def whole(name: str = "node", layers: int = 20) -> Page:
    """A page with all its parts, where everything is called `name`."""
    trials = tuple(
        Trial(
            f"{name} {size}",
            (f"--keep-float={name}",),
            (),
            scores(decibel, 0.9, (0.8, 0.95)),
            size,
            ms,
            (0.9, 1.0, 1.1),
        )
        for size, decibel, ms in ((100_000, 20.0, 1.0), (200_000, 30.0, 2.0), (300_000, 25.0, 3.0))
        for near in (scores(decibel, 0.9, (0.8, 0.95)),)
    )
    trials += (Trial(f"{name} failed", (), failed=name),)
    causes = (Cause("range-outlier", (name,) * 5, name, 0.3, name), Cause("never-heard-of", (name,), name))
    island = FloatNode(name, name, name, name, us=2.0)
    output = OutputScore(name, scores(20.0, 0.95))
    return Page(
        title=name,
        subtitle=name,
        tiles=(Tile(name, name, name, "good"), Tile("size", "4", tone="bad")),
        verdict=name,
        version="1.2.3",
        warnings=(name, name),
        compared=Comparison(name, name, 8, name, rows(layers, name), (name,) * 5, (output,), 20.0, 8),
        audit=Audit(3, 2, (island, island), (island,), (LayerTime(name, "Conv", "integer", 6.0),), 10.0),
        fed=name,
        contact=(PagePicture(name, encode_thumbnail(np.zeros((4, 4, 3), np.uint8))),),
        caption=name,
        command=f"qconv quantize {name}",
        recipe=json.dumps({"keep_float": [name]}),
        changes=(("fold", name, 3),),
        precision=CURVE,
        skipped=((name, name),),
        diagnosis=Diagnosis(name, 64, True, causes, trials, trials[1], name, name),
        sweep=Sweep(name, 400_000, 3.0, 64, False, trials, (name,) * 4),
    )


def spaced(text: str) -> str:
    """As a browser shows it: white space of any length is one space."""
    return " ".join(text.split())


class Tree(HTMLParser):
    """Fails where elements are not closed as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.opened[-1] if self.opened else "", data))

    @property
    def data(self) -> Any:
        """What the page hands to its script."""
        text = "".join(text for tag, text in self.texts if tag == "script" and text.startswith('{"layers"'))
        return json.loads(text, parse_constant=pytest.fail)

    @property
    def visible(self) -> str:
        return spaced(" ".join(text for tag, text in self.texts if tag not in ("script", "style")))


@pytest.fixture(scope="module")
def hostile() -> Tree:
    return Tree(html.render_page(whole(HOSTILE)).decode())


def test_a_name_stays_a_name(hostile: Tree) -> None:
    """It opens no element, closes none, and reaches the charts as it is."""
    assert not [attrs for _, attrs in hostile.tags if any(key.startswith("on") for key in attrs)]
    pictures = [attrs["src"] for tag, attrs in hostile.tags if tag == "img"]
    assert [src.partition(",")[0] for src in pictures if src] == ["data:image/png;base64"]
    assert [tag for tag, _ in hostile.tags].count("script") == 3
    assert hostile.data["layers"][5]["name"] == f"{HOSTILE}5"
    assert f"qconv quantize {spaced(HOSTILE)}" in hostile.visible


def test_a_name_that_is_not_utf8_can_be_shown() -> None:
    assert "caf\\udce9.onnx" in html.render_page(replace(whole(), title="caf\udce9.onnx", sweep=None)).decode()


def test_the_same_page_gives_the_same_bytes() -> None:
    assert html.render_page(whole(HOSTILE)) == html.render_page(whole(HOSTILE))


def test_nothing_is_fetched(hostile: Tree) -> None:
    """Nothing names another file, and if something did the browser would not ask for it."""
    for tag, attrs in hostile.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        assert all((attrs.get(key) or "data:").startswith("data:") for key in ("src", "href", "srcset", "action"))
    (policy,) = [a["content"] for tag, a in hostile.tags if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    for name in ("report.css", "report.js", "report.html.j2"):
        assert not re.search(r"https?:|//\w|@import|url\(", html._read_asset(name).replace("// ", ""))


def test_long_names_lose_their_middle(hostile: Tree) -> None:
    name = f"{HOSTILE}5"
    assert html.shorten_middle("short") == "short"
    cut = html.shorten_middle(name)
    assert len(cut) == 46
    front, back = cut.split("\u2026")
    assert name.startswith(front)
    assert name.endswith(back)
    assert cut in hostile.visible
    assert name in [attrs.get("title") for _, attrs in hostile.tags]


def test_a_page_has_only_the_parts_that_it_is_given() -> None:
    tree = Tree(html.render_page(Page("m.onnx", "", (), "Fine.", "1", without="There is nothing to compare.")).decode())
    ids = [attrs["id"] for tag, attrs in tree.tags if tag == "section"]
    assert ids == ["layers"]
    assert "There is nothing to compare." in tree.visible
    assert len(html.render_page(Page("m.onnx", "", (), "Fine.", "1"))) < 50_000  # it has no chart, and no plotly.js
    full = Tree(html.render_page(whole()).decode())
    assert [attrs["id"] for tag, attrs in full.tags if tag == "section"] == [
        *("warnings", "diagnosis", "sweep", "precision", "layers", "integers", "pictures", "changes", "again")
    ]


def test_the_curve_is_told_without_a_script() -> None:
    """The sentence and a row for each point; the chart gets what has a number."""
    page = Page("m.onnx", "", (), "Fine.", "1", precision=CURVE)
    tree = Tree(html.render_page(page).decode())
    assert [attrs["id"] for tag, attrs in tree.tags if tag == "section"] == ["precision"]
    assert CURVE.conclusion in tree.visible
    assert "measured on 16 pictures, which nothing else was chosen on" in tree.visible
    assert "by times alone 0 1.000 10.0 10.0 9.0" in tree.visible
    assert "1 taken 2 1.040 16.2 16.2 15.5" in tree.visible
    assert "2 9 1.500 40.5 40.0" in tree.visible
    assert [attrs.get("class") for tag, attrs in tree.tags if tag == "tr"].count("best") == 1
    assert tree.data["precision"]["float"] == 1.7
    points = tree.data["precision"]["points"]
    assert [point["db"] for point in points] == [10.0, 16.2, 40.5, None]
    assert [point["measured"] for point in points] == [True, True, False, False]


def test_numbers_that_json_lacks_leave_gaps() -> None:
    page = whole()
    assert page.compared is not None
    odd = (
        replace(page.compared.layers[0], sqnr_db=float("nan"), added_sqnr_db=float("-inf")),
        *page.compared.layers[1:],
    )
    tree = Tree(html.render_page(replace(page, compared=replace(page.compared, layers=odd))).decode())
    assert (tree.data["layers"][0]["runs"], tree.data["layers"][0]["own"]) == (None, None)


def test_the_worst_layer_is_shown_first() -> None:
    """The fifth of a tenth is more than the others' twentieth."""
    page = whole()
    assert page.compared is not None
    layers = list(page.compared.layers)
    layers[7] = replace(layers[7], output_share=0.1)
    tree = Tree(html.render_page(replace(page, compared=replace(page.compared, layers=tuple(layers)))).decode())
    assert tree.data["worst"] == 7


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_the_sentence_tells_what_a_detector_finds() -> None:
    found = (OutputScore("y", scores(8.8)), OutputScore("y", (Score(BOXES, 0.825, (0.7, 0.9), 40),)))
    measured = AccuracyScores(10, found)
    assert pages._describe_accuracy(measured) == "On 10 pictures: finds 82.5% of the float model's 40 boxes."


def test_the_sentence_names_who_is_to_blame() -> None:
    shares = (0.4, 0.35, 0.15, 0.1)
    layers = tuple(LayerComparison(f"n{i}", "Conv", "t", 20.0, 20.0, 1.0, share) for i, share in enumerate(shares))
    found = Comparison("f", "q", 8, "", layers, (), (), 20.0, 8)
    assert pages._describe_worst_layers(found) == [
        "2 of 4 layers make half of what error is left; most, 40%, comes from n0."
    ]
    assert pages._describe_worst_layers(None) == []


def trial(name: str, decibel: float, size: int, ms: float = 1.0) -> Trial:
    return Trial(name, (), (), scores(decibel, 0.9), size, ms)


def test_a_diagnosis_has_a_page() -> None:
    first, better = trial("as asked", 20.0, 1000), trial("rounding", 25.5, 1000)
    found = Diagnosis(
        "dir/m.onnx", 64, True, (Cause("gate", ("n",), "told"),), (first, better), better, "cmd", "Mended."
    )
    page = pages.make_diagnosis_page(found, None, "qconv diagnose m.onnx")
    assert [tile.value for tile in page.tiles] == ["20.0 dB", "25.5 dB", "1", "0"]
    tree = Tree(html.render_page(page).decode())
    assert [attrs["id"] for tag, attrs in tree.tags if tag == "section"] == ["diagnosis", "again"]
    assert tree.visible.count("Mended.") == 1
    assert "+5.5" in tree.visible
    assert "Gates that multiply" in tree.visible


def test_a_sweep_has_a_page() -> None:
    """The third is larger than the second and no better."""
    trials = (trial("small", 10.0, 500), trial("near", 30.0, 1000), trial("beaten", 29.0, 1200))
    found = Sweep("m.onnx", 4000, 2.0, 64, False, trials, ("a", "b", "c"))
    page = pages.make_sweep_page(found, "qconv quantize m.onnx", ())
    assert page.verdict == "2 of 3 recipes are beaten by no other: near is the most accurate, small the smallest."
    tree = Tree(html.render_page(page).decode())
    assert [row["best"] for row in tree.data["sweep"]["trials"]] == [True, True, False]
    assert tree.visible.count("unbeaten") == 2


def test_what_another_runtime_decides_is_not_told() -> None:
    audited = Audit(0, 3, ())
    assert pages._audit_for_target(audited, {"target": "tensorrt"}) is None
    assert pages._audit_for_target(audited, {"target": "ort-cpu"}) is audited
    assert pages._audit_for_target(audited, {}) is audited


# -- contact sheet -----------------------------------------------------------------------------------------------------


def prepared(preset: str, layout: Layout, **options: Any) -> Preprocessing:
    known = PRESETS[preset]
    parts: dict[str, Any] = {"color": known.color, "resize": "exact", "size": (24, 32), **options}
    return Preprocessing(
        preset, "", scale=known.scale, mean=known.mean, std=known.std, layout=layout, filter=ResizeFilter.BILINEAR,
        class_vector=True, **parts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_sheet_shows_the_pixels_that_were_fed(preset: str, layout: Layout, photo: Path) -> None:
    prep = prepared(preset, layout)
    original = np.asarray(Image.open(photo)).astype(int)
    assert np.abs(undo_preprocessing(normalize_pixels(load_pixels(photo, prep), prep), prep) - original).max() <= 1


def test_the_sheet_shows_grey_and_borders(photo: Path) -> None:
    grey = replace(prepared("unit", Layout.NCHW, color=Color.GREY), mean=(0.5,), std=(0.25,))
    shown = undo_preprocessing(normalize_pixels(load_pixels(photo, grey), grey), grey)
    assert np.abs(shown[:, :, 0] - np.asarray(Image.open(photo).convert("L")).astype(int)).max() <= 1
    boxed = prepared("imagenet", Layout.NCHW, resize="letterbox", size=(32, 32))
    shown = undo_preprocessing(normalize_pixels(load_pixels(photo, boxed), boxed), boxed)
    assert (shown[:4] == 114).all()
    assert (shown[-4:] == 114).all()


def feed_of(calib: Path, **options: Any) -> DataLoader:
    data = DataOptions((str(calib),), preprocessing=PreprocessingOptions(**options))
    session = Session(str(CIFAR), name="cifar", threads=1)
    return DataLoader.of(session, data, Reporter())


def test_the_sheet_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    for index in range(3):
        Image.fromarray(np.full((32, 32, 3), 50 * index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    pictures, caption = make_contact_sheet(feed_of(tmp_path, preset="raw"))
    assert sorted(picture.name for picture in pictures) == ["0.png", "2.png"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)
    assert "first 2 pictures" in caption
    assert "0 to 100, mean 50" in caption


def test_samples_have_no_sheet(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros((3, 32, 32), np.float32))
    assert make_contact_sheet(feed_of(tmp_path)) == ((), NO_PICTURES)


def test_thumbnails_are_small() -> None:
    with Image.open(io.BytesIO(encode_thumbnail(np.zeros((500, 250, 1), np.uint8)))) as picture:
        assert (picture.mode, picture.size) == ("L", (80, 160))


# -- the commands ------------------------------------------------------------------------------------------------------


def command(*words: object, stdin: bytes = b"") -> Any:
    return runner().invoke(cli, [str(word) for word in words], standalone_mode=False, input=stdin)


QUICK = ("--calib", PHOTOS, "--samples", 8, "--effort", "fast", "--preprocess", "imagenet", "--resize", "exact", "-q")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cifar") / "out.onnx"
    quantize.quantize(CIFAR, out, Recipe(effort="fast"), DataOptions((str(PHOTOS),), samples=8))
    return out


def test_quantize_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, out = tmp_path / "report.html", tmp_path / "out.onnx"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/qconv", "quantize", "a model.onnx"])
    done = command("quantize", CIFAR, *QUICK, "-o", out, "--report", page)
    assert done.exception is None
    tree = Tree(page.read_text("utf-8"))
    assert "cifar_mobilenet.onnx" in tree.visible
    assert "qconv quantize 'a model.onnx'" in tree.visible
    assert "agreement" in tree.visible
    assert "BatchNormalization folded into Conv" in tree.visible
    assert [tag for tag, _ in tree.tags].count("img") == 8
    assert any(layer["weights"] for layer in tree.data["layers"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "report.html"]


def test_a_page_has_a_curve_where_more_than_one_division_was_looked_at(tmp_path: Path) -> None:
    samples, page = write_samples(tmp_path / "samples"), tmp_path / "r.html"
    for common, sections in ((20.0, []), (120.0, ["precision"])):
        onnx.save(loud(common), tmp_path / "m.onnx")
        options = ("--effort", "fast", "--tune-ranges", "-q", "-o", tmp_path / "q.onnx")
        done = command("quantize", tmp_path / "m.onnx", "--calib", samples, *options, "--report", page)
        assert done.exception is None
        tree = Tree(page.read_text("utf-8"))
        assert [attrs["id"] for tag, attrs in tree.tags if attrs.get("id") == "precision"] == sections
        assert bool(re.search(r"dB for (no time|\d+% of the time)", tree.visible)) is bool(sections)


def test_a_gate_that_fell_short_comes_first(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = command("quantize", CIFAR, *QUICK, "-o", tmp_path / "a.onnx", "--min-sqnr", 99, "--report", page)
    assert done.return_value == 3
    verdict = re.search(r'class="verdict">(.*?)</p>', page.read_text("utf-8"))
    assert verdict is not None
    assert verdict[1].startswith("Gate fell short: --min-sqnr 99, got ")
    assert ". It takes " in verdict[1]


def test_the_page_changes_nothing_else(tmp_path: Path, cifar: Path) -> None:
    plain, out = tmp_path / "plain.onnx", tmp_path / "out.onnx"
    command("quantize", CIFAR, *QUICK, "-o", plain)
    done = command("quantize", CIFAR, *QUICK, "-o", out, "--report", tmp_path / "r.html", "--json")
    assert out.read_bytes() == plain.read_bytes()
    assert "report" not in json.loads(done.stdout)


def test_a_model_from_a_pipe_to_a_pipe_has_its_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = ("quantize", "-", *QUICK, "-o", "-", "--report", page, "--embed-preprocessing", "nhwc")
    done = command(*words, stdin=CIFAR.read_bytes())
    assert done.exception is None
    assert done.stdout_bytes
    tree = Tree(page.read_text("utf-8"))
    assert tree.data["layers"]
    assert "pixels as they are" in tree.visible


def test_statistics_alone_make_a_page_without_layers(tmp_path: Path) -> None:
    page, stats = tmp_path / "report.html", tmp_path / "seen.npz"
    command("quantize", CIFAR, *QUICK, "-o", tmp_path / "a.onnx", "--save-stats", stats)
    words = ("quantize", CIFAR, "--stats", stats, "-o", tmp_path / "b.onnx", "-q", "--report", page)
    assert command(*words).exception is None
    assert "--stats came alone" in Tree(page.read_text("utf-8")).visible


def test_layers_that_cannot_be_compared_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise QconvError("No layer of it is known.")

    monkeypatch.setattr(pages, "compare_on_images", refuse)
    page = tmp_path / "report.html"
    assert command("quantize", CIFAR, *QUICK, "-o", tmp_path / "a.onnx", "--report", page).exception is None
    assert "could not be compared: No layer of it is known." in Tree(page.read_text("utf-8")).visible


def test_compare_writes_a_page(tmp_path: Path, cifar: Path) -> None:
    page = tmp_path / "report.html"
    done = command("compare", CIFAR, cifar, "--images", PHOTOS, "--samples", 4, "--json", "--report", page)
    assert done.exception is None
    found, tree = json.loads(done.stdout), Tree(page.read_text("utf-8"))
    worst = tree.data["layers"][tree.data["worst"]]
    assert worst["name"] == found["layers"][0]["name"]
    assert worst["own"] == pytest.approx(found["layers"][0]["added_sqnr_db"], rel=1e-5)
    assert {layer["name"] for layer in found["layers"]} == {layer["name"] for layer in tree.data["layers"]}
    assert "on 4 pictures" in tree.visible
    assert "recipe" in [attrs.get("id") for _, attrs in tree.tags]


def test_without_the_extra_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(QconvError, match="--report needs jinja2 and plotly") as caught:
        html.render_page(whole())
    assert caught.value.hint == "pip install 'qconv[report]'"
    done = command("quantize", CIFAR, *QUICK, "-o", tmp_path / "a.onnx", "--report", tmp_path / "report.html")
    assert isinstance(done.exception, QconvError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["-", ""])
def test_a_page_needs_a_name(name: str, tmp_path: Path) -> None:
    done = command("quantize", CIFAR, *QUICK, "-o", tmp_path / "a.onnx", "--report", name)
    assert type(done.exception).__name__ == "UsageError"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["missing/report.html", "out.onnx", "seen.npz", "."])
def test_a_page_needs_a_place_of_its_own(place: str, tmp_path: Path) -> None:
    written = ("-o", tmp_path / "out.onnx", "--save-stats", tmp_path / "seen.npz")
    done = command("quantize", CIFAR, *QUICK, *written, "--report", tmp_path / place)
    assert isinstance(done.exception, QconvError)
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_not_written_over(tmp_path: Path, cifar: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(CIFAR.read_bytes())
    for words in (
        ("quantize", model, *QUICK, "-o", tmp_path / "a.onnx", "--report", model),
        ("compare", model, cifar, "--images", PHOTOS, "--report", model),
        ("compare", CIFAR, model, "--images", PHOTOS, "--report", model),
    ):
        assert isinstance(command(*words).exception, QconvError)
        assert model.read_bytes() == CIFAR.read_bytes()
    table = tmp_path / "table.csv"
    done = command("compare", CIFAR, cifar, "--images", PHOTOS, "--csv", table, "--report", table)
    assert isinstance(done.exception, QconvError)
    assert not table.exists()


# -- a real browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "page.html"
    path.write_bytes(html.render_page(whole(HOSTILE)))
    return path


def until(window: Browser, condition: str) -> None:
    """Charts are drawn when the browser finds the time."""
    for _ in range(200):
        if window.run(f"return Boolean({condition})"):
            return
        time.sleep(0.05)
    pytest.fail(condition)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_it_without_complaint(chromium: Browser, drawn: Path, width: int, dark: bool) -> None:
    chromium.open(drawn, width, dark=dark)
    until(chromium, "document.querySelectorAll('#layer-chart .scatterlayer .trace').length === 2")
    assert chromium.run("return document.documentElement.scrollWidth <= innerWidth")
    assert chromium.run("return [...document.querySelectorAll('.chart')].every(c => c.scrollWidth <= innerWidth)")
    paper = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper)[:3])) < 64) is dark
    assert chromium.complaints() == []
    # the name is text wherever it stands, and nothing was ever asked for
    assert chromium.run("return document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
    assert (
        chromium.run("return performance.getEntriesByType('resource').filter(e => e.name.startsWith('http')).length")
        == 0
    )


def test_layers_can_be_picked(chromium: Browser, drawn: Path) -> None:
    chromium.open(drawn, 1280)
    shown = "document.getElementById('layer-facts').textContent"
    until(chromium, f"{shown}.includes('dB')")
    choose = "const s = document.getElementById('layer-pick'); s.value = '%d'; s.dispatchEvent(new Event('change'))"
    chromium.run(choose % 5)
    assert chromium.run(f"return {shown}").startswith(f"{HOSTILE}5")
    assert "1.23% beyond the range" in chromium.run("return document.getElementById('values-caption').textContent")
    # bars on either side of the range, and a line at each of its ends
    until(chromium, "document.querySelectorAll('#values-chart .shapelayer path').length === 2")
    assert chromium.run("return document.querySelectorAll('#values-chart .barlayer .trace').length") == 2
    chromium.run(choose % 2)
    assert "no weights with codes" in chromium.run(f"return {shown}")
    assert chromium.run("return document.getElementById('weights-chart').offsetParent === null")
    chromium.run(choose % 3)
    assert "stay in float" in chromium.run(f"return {shown}")
    chromium.run("document.querySelector('button.layer[data-layer=\"6\"]').click()")
    assert chromium.run(f"return {shown}").startswith(f"{HOSTILE}6")
    assert chromium.run("return document.querySelectorAll('tr.picked').length") == 1
    assert chromium.complaints() == []


def test_recipes_can_be_looked_at_from_four_sides(chromium: Browser, drawn: Path) -> None:
    chromium.open(drawn, 390)
    until(chromium, "document.querySelectorAll('#sweep-chart .point').length === 3")
    for across, up, titles in (("ms", "sqnr_db", "time of a run, ms"), ("size", "agreement", "agreement %")):
        for axis, value in (("x", across), ("y", up)):
            chromium.run(
                f"const s = document.getElementById('sweep-{axis}'); s.value = '{value}'; "
                "s.dispatchEvent(new Event('change'))"
            )
        until(chromium, f"document.getElementById('sweep-chart').textContent.includes('{titles}')")
    assert chromium.complaints() == []


def test_every_division_with_a_number_is_a_mark(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "curve.html"
    page.write_bytes(html.render_page(Page("m.onnx", "", (), "Fine.", "1", precision=CURVE)))
    chromium.open(page, 390)
    until(chromium, "document.querySelectorAll('#precision-chart .points .point').length === 3")
    text = chromium.run("return document.getElementById('precision-chart').textContent")
    for name in ("predicted", "measured", "taken", "all in float"):
        assert name in text
    assert chromium.complaints() == []


def test_every_draw_of_a_study_is_a_dot(chromium: Browser, tmp_path: Path) -> None:
    points = [CurvePoint(count, seed, scores(20.0 + count, 0.5)) for count in (1, 2, 4) for seed in (0, 1)]
    curve = SampleCurve("1", "m.onnx", {"calibrator": "mse"}, None, points, 2, 4, (), {1: 0.1, 2: 0.2, 4: 0.3})
    page = tmp_path / "study.html"
    page.write_bytes(html.render_page(make_study_page(curve, "")))
    chromium.open(page, 390)
    for key in ("sqnr_db", "agreement"):
        until(chromium, f"document.querySelectorAll('#study-{key}-chart .points .point').length === {len(points)}")
        ticks = f"[...document.querySelectorAll('#study-{key}-chart .xtick')].map(t => t.textContent).join()"
        assert chromium.run(f"return {ticks}") == "1,2,4"
    assert chromium.complaints() == []
