"""Who may import whom. A new module needs a line here; an import that is not in the table needs a reason."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qconv

PACKAGE = Path(qconv.__file__).parent

# The house, from the ground up. A module imports what lies below its own floor, and what its own line names.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "errors",
            "extras",
            "quant",
            "recipe",
            "spoken",
            "pixels",
            "together",
            "checks",
            "choices",
            "targets",
            "rules",
            "findings",
            "deferred",
            "layer_bits",
            "tomlfile",
            "listing",
            "preprocess",
            "ahead",
            "cost_table",
            "cpu",
            "mincut",
        }
    ),  # the vocabulary
    frozenset({"graph", "load", "save", "folders", "parts", "runtime", "images", "source"}),  # the doors
    frozenset(  # the work
        {
            "absorb",
            "affine",
            "compared",
            "moved",
            "ladder",
            "pairs",
            "shifted",
            "tables",
            "weighed",
            "compare",
            "causes",
            "remedies",
            "beside",
            "allocation",
            "apart",
            "assign",
            "audit",
            "balance",
            "behind",
            "benchmark",
            "bias",
            "calibrate",
            "calibrators",
            "candidates",
            "channel_bits",
            "channels",
            "chart",
            "clipping",
            "curve",
            "detect",
            "edits",
            "embed",
            "emit",
            "entropy",
            "equalize",
            "evaluate",
            "evidence",
            "fed",
            "explain",
            "exact",
            "expected",
            "feed",
            "fileformat",
            "fit",
            "fold",
            "foretold",
            "gather",
            "gates",
            "groups",
            "held",
            "imagined",
            "html",
            "inspect_float",
            "intervals",
            "labels",
            "layers",
            "madeup",
            "moments",
            "noise",
            "normal",
            "oddities",
            "page",
            "params",
            "patches",
            "predictions",
            "placement",
            "plan",
            "planner",
            "plot",
            "portray",
            "race",
            "reach",
            "readers",
            "refusals",
            "report",
            "rounder",
            "rounding",
            "rows",
            "saturation",
            "scored",
            "sensitivity",
            "sheet",
            "shelf",
            "shortcut",
            "shown",
            "shrink",
            "sight",
            "simplify",
            "sketch",
            "solve",
            "stats",
            "stored",
            "streams",
            "told",
            "unseen",
            "verify",
            "album",
            "distance",
            "finetuned",
            "synthesized",
            "dream",
            "torchrun",
            "blocks",
            "reconstruct",
            "remembered",
            "learnable",
            "lesson",
            "resuming",
            "sites",
            "teacher",
            "torchfake",
            "torchgraph",
            "torchmath",
            "training",
            "torchop",
            "torchplaces",
            "walk",
            "weight_ranges",
            "weight_specs",
            "weights",
            "worker",
            "worth",
        }
    ),
    frozenset(
        {
            "diagnose",
            "examine",
            "finetune",
            "portfolio",
            "synthesize",
            "inspect_quantized",
            "judge",
            "wishes",
            "mixed",
            "pages",
            "pipeline",
            "proof",
            "ranges",
            "refine",
            "study",
            "sweep",
            "trial",
            "tune",
        }
    ),
    frozenset(
        {
            "cli",
            "finetuning",
            "synthesizing",
            "inspected",
            "given",
            "laddered",
            "layerwise",
            "sweeping",
            "putting_out",
            "leaving",
            "looking",
            "options",
            "printing",
            "summary",
            "values",
        }
    ),  # the face
    frozenset({"__init__", "__main__"}),
)
# Imports within a floor.
NEIGHBOURS: dict[str, set[str]] = {
    "apart": {"plan"},
    "beside": {"compare", "compared", "fed"},
    "causes": {"compared", "edits", "ladder", "moved", "plan", "report", "sketch", "weights"},
    "remedies": {"causes", "ladder"},
    "diagnose": {"pipeline", "proof"},
    "proof": {"pipeline"},
    "sweep": {"pipeline", "proof"},
    "given": {"options"},
    "sweeping": {"given", "laddered", "leaving", "putting_out", "summary"},
    "laddered": {"printing"},
    "compare": {"compared", "feed", "fold", "moved", "pairs", "shifted", "verify", "weighed"},
    "compared": {"report"},
    "pairs": {"edits"},
    "shifted": {"pairs"},
    "weighed": {"compared", "edits", "layers", "moved"},
    "behind": {"walk"},
    "parts": {"graph"},
    "absorb": {"affine", "edits", "fold", "layers", "moved", "reach"},
    "balance": {
        "absorb",
        "calibrate",
        "edits",
        "feed",
        "layers",
        "moved",
        "noise",
        "plan",
        "reach",
        "sketch",
        "streams",
        "verify",
        "worth",
    },
    "reach": {"sketch"},
    "worth": {"layers", "noise", "plan", "reach", "streams"},
    "streams": {"channels", "edits", "layers"},
    "channels": {"edits"},
    "expected": {"affine", "channels", "edits", "layers", "normal"},
    "quant": {"errors"},
    "recipe": {"checks", "choices", "pixels", "targets", "together"},
    "together": {"checks", "choices", "pixels", "targets"},
    "targets": {"cost_table"},
    "checks": {"errors"},
    "pixels": {"checks", "errors"},
    "spoken": {"checks", "choices", "errors", "pixels", "recipe"},
    "layer_bits": {"choices", "errors", "tomlfile"},
    "tomlfile": {"errors"},
    "listing": {"errors"},
    "preprocess": {"errors", "pixels"},
    "source": {"graph"},
    "load": {"graph", "runtime", "source"},  # the runtime computes constant subgraphs
    "save": {"graph", "source"},
    "audit": {"explain", "plan", "report", "saturation"},
    "explain": {"plan"},
    "rows": {"params", "plan", "report"},
    "worker": {"madeup"},
    "evaluate": {"fed", "intervals", "labels", "predictions", "verify"},
    "fed": {"detect", "evidence", "feed", "gather"},
    "predictions": {"labels"},
    "embed": {"affine", "edits", "fold", "layers"},
    "candidates": {"evidence", "fit"},
    "detect": {"candidates", "evidence", "feed", "race"},
    "race": {"candidates", "evidence", "fit"},
    "emit": {"params", "plan", "weights"},
    "affine": {"edits", "layers"},
    "equalize": {"affine", "edits", "layers"},
    "fit": {"evidence"},
    "fold": {"affine", "edits", "equalize", "expected", "layers", "simplify", "told"},
    "foretold": {"edits", "layers"},
    "inspect_float": {"edits", "fold", "foretold", "placement", "plan", "planner"},
    "inspect_quantized": {"examine"},
    "layers": {"edits", "normal"},
    "channel_bits": {"allocation", "clipping", "sketch", "weight_ranges"},
    "params": {"calibrators", "channel_bits", "clipping", "layers", "plan", "sketch", "weights"},
    "calibrate": {"sketch"},
    "calibrators": {"clipping", "entropy", "layers", "readers", "sketch"},
    "clipping": {"sketch"},
    "entropy": {"sketch"},
    "gather": {"calibrate", "calibrators", "detect", "feed", "imagined", "plan", "sketch", "stats", "unseen"},
    "imagined": {"feed", "normal"},
    "portray": {"exact", "normal", "reach", "sketch", "told"},
    "told": {"affine", "channels", "edits", "expected", "layers", "normal"},
    "unseen": {
        "calibrate",
        "dream",
        "edits",
        "feed",
        "imagined",
        "layers",
        "normal",
        "portray",
        "reach",
        "sketch",
        "told",
    },
    "oddities": {"sketch"},
    "readers": {"clipping", "layers", "sketch"},
    "sketch": {"exact"},
    "stats": {"exact", "sketch"},
    "weight_ranges": {"clipping", "sketch"},
    "simplify": {"edits"},
    "verify": {"intervals", "report"},
    "torchgraph": {"torchfake", "torchmath", "torchop", "torchplaces"},
    "torchfake": {"torchmath", "torchop"},
    "album": {"fed"},
    "distance": {"verify"},
    "finetuned": {"report"},
    "learnable": {"saturation", "sites", "stored", "torchmath", "weights"},
    "lesson": {"album", "distance", "finetuned", "learnable", "torchgraph"},
    "resuming": {"training"},
    "sites": {"stored"},
    "teacher": {"fileformat", "stats"},
    "extras": {"errors"},
    "folders": {"save"},
    "reconstruct": {"blocks", "learnable", "sites", "torchfake", "torchgraph", "torchrun"},
    "wishes": {"trial"},
    "blocks": {"pairs"},
    "dream": {"evidence", "imagined", "remembered", "torchgraph", "torchrun"},
    "remembered": {"evidence", "layers"},
    "portfolio": {"synthesize"},
    "training": {"finetuned", "lesson"},
    "finetune": {"examine"},
    "synthesizing": {"given", "leaving", "options", "printing", "putting_out", "summary"},
    "finetuning": {"given", "leaving", "looking", "options", "printing", "putting_out", "summary"},
    "torchmath": {"torchop"},
    "torchplaces": {"torchop"},
    "walk": {"held"},
    "chart": {"curve"},
    "page": {"chart", "curve"},
    "plot": {"chart"},
    "scored": {"feed", "report", "verify"},
    "shown": {"compared", "ladder", "report", "synthesized"},
    "sheet": {"feed", "plot", "shown"},
    "html": {"compared", "ladder", "report", "shown", "synthesized"},
    "pages": {"examine"},
    "sensitivity": {
        "assign",
        "behind",
        "held",
        "moments",
        "params",
        "plan",
        "rounder",
        "sight",
        "sketch",
        "solve",
        "walk",
        "weights",
    },
    "rounder": {"layers", "moments", "plan", "rounding", "saturation"},
    "sight": {"moments"},
    "solve": {
        "channel_bits",
        "held",
        "layers",
        "moments",
        "patches",
        "plan",
        "rounder",
        "rounding",
        "sight",
        "weight_ranges",
        "weights",
    },
    "shelf": {"sketch", "stats"},
    "study": {"pipeline", "proof", "trial", "wishes"},
    "judge": {"trial"},
    "mixed": {"judge", "refine", "trial"},
    "pipeline": {"judge", "mixed", "ranges", "refine", "trial", "tune", "wishes"},
    "trial": {"refine"},
    "tune": {"trial"},
    "plan": {"calibrate", "gates", "sketch"},
    "placement": {"plan", "planner"},
    "planner": {"gates", "groups", "plan", "refusals", "shortcut", "weight_specs"},
    "refusals": {"plan"},
    "weights": {"bias", "channel_bits", "layers", "plan", "saturation", "sketch", "weight_ranges"},
    "cli": {
        "finetuning",
        "given",
        "layerwise",
        "leaving",
        "looking",
        "options",
        "putting_out",
        "summary",
        "sweeping",
        "synthesizing",
    },
    "inspected": {"printing"},
    "looking": {"given", "inspected", "leaving", "options", "printing", "putting_out", "summary", "values"},
    "layerwise": {"given", "laddered", "leaving", "options", "printing", "putting_out", "summary"},
    "options": {"values"},
    "putting_out": {"options"},
}
# Libraries that have one door each, and the modules that hold it.
FENCES: dict[str, frozenset[str]] = {
    "onnx_ir": frozenset({"graph"}),
    # pipeline runs its checker on the written file, audit reads the file that the runtime made of it
    "onnx": frozenset({"graph", "load", "save", "parts", "source", "audit"}),
    "google": frozenset({"source"}),
    "PIL": frozenset({"images", "plot"}),  # one reads pictures, the other draws charts
    "onnxruntime": frozenset({"runtime"}),
    "click": frozenset(
        {
            "cli",
            "finetuning",
            "given",
            "looking",
            "options",
            "values",
            "layerwise",
            "putting_out",
            "sweeping",
            "synthesizing",
        }
    ),
    "rich": frozenset({"summary"}),
    "jinja2": frozenset({"html"}),
    "markupsafe": frozenset({"html"}),
    "plotly": frozenset({"html"}),
    "torch": frozenset(
        {"torchfake", "torchgraph", "torchmath", "torchop", "torchplaces"}
        | {"distance", "finetune", "learnable", "lesson", "training"}
        | {"dream", "reconstruct", "synthesize", "torchrun"}
    ),
}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported(module: str) -> Iterator[str]:
    """Full names of all that a module imports at run time, inside functions, too; not what type checkers alone see."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def own(module: str) -> frozenset[str]:
    """The modules of this package that `module` imports."""
    parts = (name.split(".") for name in imported(module) if name.startswith("qconv."))
    return frozenset(part[1] if part[1] in MODULES else "__init__" for part in parts)


def floor_of(module: str) -> int:
    return next(index for index, floor in enumerate(FLOORS) if module in floor)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_floor(module: str) -> None:
    assert sum(module in floor for floor in FLOORS) == 1, f"give {module} a place in FLOORS"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    here, below = FLOORS[floor_of(module)], {name for floor in FLOORS[: floor_of(module)] for name in floor}
    # the version and the public names lie at the top, for everyone
    assert own(module) <= below | here | {"__init__"}
    assert own(module) & here == NEIGHBOURS.get(module, set())


def test_only_the_face_and_the_story_read_the_public_names() -> None:
    assert {module for module in MODULES if "qconv" in set(imported(module))} <= {
        "cli",
        "finetuned",
        "pages",
        "pipeline",
        "portfolio",
        "synthesized",
        "trial",
        "study",
    }


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_reached_through_their_door(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imported(module)}
    assert {library for library in libraries if module not in FENCES.get(library, {module})} == set()
    assert libraries <= sys.stdlib_module_names | set(FENCES) | {"qconv", "numpy"}


def test_there_are_no_circles() -> None:
    def reach(module: str) -> set[str]:
        found: set[str] = set()
        queue = [module]
        while queue:
            new = own(queue.pop()) - found - {"__init__"}
            found |= new
            queue += new
        return found

    assert {module for module in MODULES if module in reach(module)} == set()


def heavy_after(statement: str) -> str:
    code = (
        f"import sys\n{statement}\n"
        "heavy = ('numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'rich', 'PIL', 'sympy', 'jinja2', 'plotly', 'torch')\n"
        "print(*[name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stderr.strip()


def test_help_and_version_import_nothing_heavy() -> None:
    """They answer in the time that Python takes to start."""
    for option in ("--help", "--version"):
        run = f"sys.argv = ['qconv', '{option}']\nfrom qconv import cli\ntry: cli.main()\nexcept SystemExit: pass"
        assert heavy_after(run) == ""


@pytest.mark.parametrize("names", ["errors", "recipe", "findings", "targets", "rules", "report"])
def test_words_need_no_numbers(names: str) -> None:
    assert heavy_after(f"import qconv.{names}") == ""


def test_the_check_for_heavy_imports_can_fail() -> None:
    assert heavy_after("import numpy") == "numpy"
