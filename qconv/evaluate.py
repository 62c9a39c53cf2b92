"""How right a model is on labelled pictures, and how near to another one, each number with how far to trust it.

top-1, top-5      share of pictures whose label is the highest score, or among the five highest
agreement         share of argmax positions (axis 1) equal to the other model's
SQNR              10 log10(sum ref^2 / sum (ref - got)^2), cosine: sum ref got / sqrt(sum ref^2 sum got^2), per output
flips             pictures that only one of the two gets right, with McNemar's test on whether that is chance
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv import images, intervals, load
from qconv.detect import detect
from qconv.errors import QconvError
from qconv.evidence import fact_of, told_by, told_of_float
from qconv.feed import DECODERS, Feed
from qconv.gather import original
from qconv.intervals import Interval
from qconv.labels import Classes, classes_of, folder_of
from qconv.recipe import AUTO, PreprocessingOptions, Recipe
from qconv.runtime import Session
from qconv.source import Source, is_quantized, metadata, read
from qconv.verify import is_class_score, sqnr_db

TOP = 5
Outputs = list[NDArray[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is to be measured. recipe: names the pictures (its `calib`), and how they are fed.

    classes, label_offset: see `labels`. keep: remember all outputs, for `Predictions.as_npz`.
    """

    recipe: Recipe
    against: Source | None = None
    classes: Path | None = None
    label_offset: int = 0
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """hits of count pictures (or positions, in a map of classes), with its interval."""

    value: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Output:
    """How near one output is to the other model's. sqnr_db: None where nothing differs."""

    name: str
    sqnr_db: float | None
    cosine: float | None
    agreement: Share | None
    sqnr_interval: Interval | None


@dataclass(frozen=True, slots=True)
class Flips:
    """Pictures that only this model gets right (won), or only the other (lost)."""

    won: int
    lost: int
    count: int

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test."""
        return intervals.mcnemar(self.won, self.lost)

    @property
    def difference(self) -> float:
        """This model's top-1 less the other's."""
        return (self.won - self.lost) / self.count


@dataclass(slots=True)
class Evaluation:
    """What was measured. top1, top5: None without labels, top5 also where there are few classes."""

    model: str
    images: int
    words: str
    labels: str
    top1: Share | None = None
    top5: Share | None = None
    other: str | None = None
    other_top1: Share | None = None
    other_top5: Share | None = None
    flips: Flips | None = None
    outputs: tuple[Output, ...] = ()
    predictions: Predictions | None = None

    @property
    def agreement(self) -> Share | None:
        """The lowest output's."""
        return min((o.agreement for o in self.outputs if o.agreement), key=lambda share: share.value, default=None)

    @property
    def worst(self) -> Output | None:
        """The output with the lowest SQNR; None where nothing differs."""
        found = [output for output in self.outputs if output.sqnr_db is not None]
        return min(found, key=lambda output: output.sqnr_db or 0.0, default=None)

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        against = None
        if self.other is not None:
            flips = self.flips
            against = {
                "model": self.other,
                "top1": _value(self.other_top1),
                "top5": _value(self.other_top5),
                "agreement": _value(self.agreement),
                "sqnr_db": self.worst.sqnr_db if self.worst else None,
                "flips": flips and {"won": flips.won, "lost": flips.lost, "p_value": flips.p_value},
                "outputs": [
                    {"name": o.name, "sqnr_db": o.sqnr_db, "cosine": o.cosine, "agreement": _value(o.agreement)}
                    for o in self.outputs
                ],
            }
        spans = {
            "top1": _span(self.top1),
            "top5": _span(self.top5),
            "against_top1": _span(self.other_top1),
            "against_top5": _span(self.other_top5),
            "agreement": _span(self.agreement),
            "sqnr_db": _listed(self.worst.sqnr_interval if self.worst else None),
            "top1_difference": _listed(
                intervals.of_difference(self.flips.won, self.flips.lost, self.flips.count) if self.flips else None
            ),
        }
        return {
            "schema": 1,
            "model": self.model,
            "images": self.images,
            "top1": _value(self.top1),
            "top5": _value(self.top5),
            "against": against,
            "intervals": spans,
            "labels": self.labels or None,
            "preprocessing": self.words or None,
        }


def _value(share: Share | None) -> float | None:
    return None if share is None else share.value


def _span(share: Share | None) -> list[float] | None:
    return None if share is None else _listed(share.interval)


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


# -- the models and what they are fed ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fed:
    """A model and its pictures."""

    session: Session
    feed: Feed
    words: str

    def batches(self, warn: Callable[[str], None], lost: Callable[[Path], None]) -> Iterator[tuple[Any, int]]:
        """What the model takes, with the number of pictures in it: a last short batch is filled up where it must be."""
        feed = self.feed
        fixed = bool(feed.inputs[0].shape) and feed.inputs[0].shape[0] is not None
        found = images.batches(
            feed.listing, feed.inputs, feed.preprocessing, batch=feed.batch, workers=DECODERS, warn=warn, lost=lost
        )
        for feeds in found:
            count = len(next(iter(feeds.values())))
            if fixed and count < feed.batch:
                feeds = {name: np.resize(array, (feed.batch, *array.shape[1:])) for name, array in feeds.items()}
            yield feeds, count

    def outputs(self, batches: Iterator[tuple[Any, int]]) -> Iterator[Outputs]:
        """All outputs of one picture after the other."""
        for feeds, count in batches:
            found = self.session.run_all(feeds)
            size = len(next(iter(feeds.values())))
            if size == 1:
                yield found
                continue
            for name, array in zip(self.session.outputs, found, strict=True):
                if not array.shape or len(array) != size:
                    fact = f"output {name} of {self.session.name} has no part for each picture of a batch."
                    raise QconvError(fact, "pass --batch 1, or export the model with a batch of 1.")
            for index in range(count):
                yield [array[index : index + 1] for array in found]

    def takes_the_same_as(self, other: _Fed) -> bool:
        """Whether both can be given the same arrays."""
        mine, its = self.feed, other.feed
        plain = [
            None if f.preprocessing is None else replace(f.preprocessing, source="", preset="") for f in (mine, its)
        ]
        names = [[(spec.name, spec.dtype, spec.shape) for spec in f.inputs] for f in (mine, its)]
        return plain[0] == plain[1] and names[0] == names[1] and mine.batch == its.batch


def _opened(
    source: Source, recipe: Recipe, warn: Callable[[str], None], hint: PreprocessingOptions | None = None
) -> _Fed:
    """A model with its preprocessing: said by the user, told by the file, as `hint` has it, or found out.

    hint: how the other model is fed, where this one should be fed alike.
    """
    proto = read(source)
    session = original(source, recipe)
    told, why = told_by(metadata(proto)), "the file's metadata"
    if told is None:
        told, why = hint, "as the other model"
    if told is not None:
        feed = Feed.of(session, replace(recipe, preprocessing=_joined(recipe.preprocessing, told)), warn, _nothing)
        if feed.preprocessing is not None and recipe.preprocessing == PreprocessingOptions():
            feed.preprocessing = replace(feed.preprocessing, source=why)
        return _Fed(session, feed, _words(feed))
    feed = Feed.of(session, recipe, warn, _nothing)
    if feed.preprocessing is None or recipe.preprocessing.preset != AUTO:
        return _Fed(session, feed, _words(feed))
    if is_quantized(proto):
        if fact_of(load.as_it_is(proto, source), feed.inputs[0].dtype, feed.preprocessing.layout) is None:
            warn(
                f"how {source.name} was fed in training is not known, as a quantized file does not tell; it gets "
                f"{feed.preprocessing.preset}: --preprocess settles it, or --against with the float model."
            )
        return _Fed(session, feed, _words(feed))
    model, _ = load.load(proto, source)
    detected = detect(model, session, feed, recipe.preprocessing, threads=recipe.threads)
    feed.preprocessing = detected.preprocessing
    for doubt in detected.doubts():
        warn(doubt)
    return _Fed(session, feed, detected.in_words())


def _both(source: Source, wishes: Wishes, warn: Callable[[str], None]) -> tuple[_Fed, _Fed | None]:
    """The model and the other one. A quantized file is fed as the float model is, and either as its metadata says."""
    if wishes.against is None:
        return _opened(source, wishes.recipe, warn), None
    proto = read(source)
    carried = told_of_float(metadata(proto))
    other = _opened(wishes.against, wishes.recipe, warn, carried)
    hint = None
    if carried is None and is_quantized(proto) and other.feed.preprocessing is not None:
        fed = other.feed.preprocessing
        hint = PreprocessingOptions(
            fed.preset, fed.scale, fed.mean, fed.std, fed.color, None, fed.resize, fed.filter, fed.size
        )
    return _opened(source, wishes.recipe, warn, hint), other


def _joined(said: PreprocessingOptions, told: PreprocessingOptions) -> PreprocessingOptions:
    """What the user says wins; another preset also takes the place of the numbers that belong to the old one."""
    own = {part: getattr(said, part) for part in PreprocessingOptions.__dataclass_fields__}
    default = {part: getattr(PreprocessingOptions(), part) for part in own}
    changed = {part: wish for part, wish in own.items() if wish != default[part]}
    if "preset" in changed:
        told = replace(told, preset=None, scale=None, mean=None, std=None, color=None)
    return replace(told, **changed)


def _words(feed: Feed) -> str:
    return "" if feed.preprocessing is None else feed.preprocessing.in_words()


def _nothing(stage: str, done: int, total: int) -> None:
    pass


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What is remembered of the pictures, in their order.

    best: the classes with the highest scores, (pictures, 5), and their scores. rows: of each output a row a picture:
    sums of ref^2, noise, ref * got, got^2, equal positions, positions.
    """

    best: list[NDArray[np.int64]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    classes: int = 0

    def add(self, output: NDArray[Any]) -> None:
        scores = output.reshape(-1).astype(np.float64)
        order = np.argsort(-scores, kind="stable")[:TOP]
        self.classes = scores.size
        self.best.append(order)
        self.scores.append(scores[order])

    def hits(self, labels: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
        """Whether the label is among the `most` best, by picture."""
        found: NDArray[np.bool_] = (np.stack(self.best)[:, :most] == labels[:, None]).any(axis=1)
        return found


def _row(ref: NDArray[Any], got: NDArray[Any]) -> list[float]:
    wide, other = ref.astype(np.float64), got.astype(np.float64)
    equal = positions = 0
    if ref.dtype.kind != "f":
        equal, positions = int((ref == got).sum()), ref.size
    elif is_class_score(ref.shape):
        same = ref.argmax(axis=1) == got.argmax(axis=1)
        equal, positions = int(same.sum()), same.size
    sums = [
        float(np.sum(a * b)) for a, b in ((wide, wide), (wide - other, wide - other), (wide, other), (other, other))
    ]
    return [*sums, equal, positions]


def _compared(name: str, rows: list[list[float]]) -> Output:
    table = np.array(rows)
    signal, noise, dot, own, equal, positions = table.sum(axis=0)
    agreement = None
    if positions:
        whole = (table[:, 5] == 1).all()
        span = (
            intervals.of_share(int(equal), int(positions))
            if whole
            else intervals.by_bootstrap(table[:, 4:], lambda sums: sums[:, 0] / sums[:, 1])
        )
        agreement = Share(float(equal / positions), span)
    cosine = float(dot / np.sqrt(signal * own)) if signal * own > 0 else None
    decibel = sqnr_db(float(signal), float(noise))
    span = None
    if decibel is not None:
        span = intervals.by_bootstrap(table[:, :2], lambda sums: 10 * np.log10(sums[:, 0] / sums[:, 1]))
    return Output(name, decibel, cosine, agreement, span)


def class_vector(outputs: Outputs) -> int | None:
    """Which output is one score a class: the first of shape (1, C), or (1, C, 1, 1)."""
    for index, output in enumerate(outputs):
        if output.dtype.kind == "f" and output.ndim >= 2 and output.shape[1] > 1 and output[0].size == output.shape[1]:
            return index
    return None


def evaluate(
    source: Source, wishes: Wishes, *, warn: Callable[[str], None] = lambda text: None, progress: Progress = _nothing
) -> Evaluation:
    """Run the model, and the other one, on every picture. Raises QconvError where there is nothing to measure."""
    recipe = wishes.recipe
    root = Path(recipe.calib[0])
    classes = classes_of(root, wishes.classes)
    own, other = _both(source, wishes, warn)
    if other is not None:
        missing = next((name for name in own.session.outputs if name not in other.session.outputs), None)
        if missing is not None:
            names = ", ".join(other.session.outputs)
            raise QconvError(f"{other.session.name} has no output {missing!r}, but {names}.", "compare like with like.")
    paths = own.feed.listing.paths
    lost: set[Path] = set()
    seen, its = _Seen(), _Seen()
    rows: list[list[list[float]]] = [[] for _ in own.session.outputs]
    kept: list[Outputs] = []
    vector: int | None = None
    for done, (mine, theirs) in enumerate(_side_by_side(own, other, warn, lost), 1):
        vector = class_vector(mine) if done == 1 else vector
        if vector is not None:
            seen.add(mine[vector])
        if other is not None:
            chosen = [theirs[other.session.outputs.index(name)] for name in own.session.outputs]
            if vector is not None:
                its.add(chosen[vector])
            _add(rows, own.session.outputs, chosen, mine)
        if wishes.keep:
            kept.append(mine)
        progress("evaluate", done + len(lost), len(paths))
    left = [path for path in paths if path not in lost]
    result = Evaluation(source.name, len(left), own.words, "")
    labels = _labels(left, root, classes, wishes, seen.classes if vector is not None else 0)
    if labels is None and other is None:
        raise QconvError(
            "There is nothing to measure: "
            + ("no output is a class score" if vector is None else f"the pictures in {root} lie in no class folders")
            + ", and there is no other model.",
            "pass --against FLOAT, or a folder with one folder of pictures a class.",
        )
    if labels is not None:
        assert classes is not None
        result.labels = classes.source + (f", {wishes.label_offset:+d}" if wishes.label_offset else "")
        result.top1, result.top5 = _accuracy(seen, labels)
    if other is not None:
        result.other = other.session.name
        result.outputs = tuple(map(_compared, own.session.outputs, rows))
        if labels is not None:
            result.other_top1, result.other_top5 = _accuracy(its, labels)
            right, wrong = seen.hits(labels, 1), its.hits(labels, 1)
            result.flips = Flips(int((right & ~wrong).sum()), int((wrong & ~right).sum()), len(labels))
    result.predictions = Predictions(
        left, labels, classes, wishes.label_offset, seen if vector is not None else None, its, own.session.outputs, kept
    )
    return result


def _side_by_side(
    own: _Fed, other: _Fed | None, warn: Callable[[str], None], lost: set[Path]
) -> Iterator[tuple[Outputs, Outputs]]:
    """Outputs of both models for one picture after the other; of the first alone where there is no other."""
    batches = own.batches(warn, lost.add)
    if other is None:
        yield from ((found, []) for found in own.outputs(batches))
        return
    if own.takes_the_same_as(other):
        mine, its = itertools.tee(batches)
    else:
        mine, its = batches, other.batches(_silent, lambda path: None)
    yield from zip(own.outputs(mine), other.outputs(its), strict=True)


def _silent(text: str) -> None:
    pass


def _add(rows: list[list[list[float]]], names: Sequence[str], refs: Outputs, gots: Outputs) -> None:
    for table, name, ref, got in zip(rows, names, refs, gots, strict=True):
        if not isinstance(ref, np.ndarray) or ref.dtype.kind not in "fiub":
            raise QconvError(f"Output {name} is no tensor of numbers.", "compare models that give tensors.")
        if ref.shape != got.shape:
            raise QconvError(
                f"Output {name} has another shape in the two models: {ref.shape} and {got.shape}.",
                "compare models before their outputs are selected by the data.",
            )
        table.append(_row(ref, got))


def _labels(
    paths: Sequence[Path], root: Path, classes: Classes | None, wishes: Wishes, outputs: int
) -> NDArray[np.int64] | None:
    asked = wishes.classes is not None or wishes.label_offset != 0
    if not outputs:
        if asked:
            fact = "No output of the model is one score a class, so labels say nothing of it."
            raise QconvError(fact, "leave --classes and --label-offset out.")
        return None
    folders = [folder_of(path, root) for path in paths]
    if classes is None or not any(folders) or (not root.is_dir() and wishes.classes is None):
        if asked:
            raise QconvError(f"The pictures in {root} lie in no class folders.", "put each into a folder of its class.")
        return None
    loose = next((path for path, name in zip(paths, folders, strict=True) if name is None), None)
    if loose is not None:
        raise QconvError(f"{loose} lies in no class folder, others do.", "move it into one, or leave it out (--glob).")
    known = classes.labels([name or "" for name in folders], offset=wishes.label_offset, outputs=outputs)
    return np.array(known, np.int64)


def _accuracy(seen: _Seen, labels: NDArray[np.int64]) -> tuple[Share, Share | None]:
    shares = []
    for most in (1, TOP):
        hits = int(seen.hits(labels, most).sum())
        shares.append(Share(hits / len(labels), intervals.of_share(hits, len(labels))))
    return shares[0], shares[1] if seen.classes > TOP else None


# -- predictions -------------------------------------------------------------------------------------------------------

FORMATS = (".csv", ".npz")


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the model said of every picture."""

    paths: Sequence[Path]
    labels: NDArray[np.int64] | None
    classes: Classes | None
    offset: int
    seen: _Seen | None
    other: _Seen
    names: Sequence[str]
    outputs: Sequence[Outputs]

    def as_csv(self) -> bytes:
        """A line a picture: path, label, the best five classes with their scores, the other model's best class.

        Raises QconvError where no output is one score a class.
        """
        if self.seen is None:
            raise QconvError("No output of the model is one score a class.", "save all outputs in a .npz file.")
        count = min(TOP, self.seen.classes)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ["path", "label", "label_name", "correct", "top1_name"]
        head += [f"{what}{n}" for n in range(1, count + 1) for what in ("top", "score")]
        writer.writerow([*head, *(["against_top1"] if self.other.best else [])])
        for index in sorted(range(len(self.paths)), key=lambda i: self.paths[i].as_posix()):
            best, scores = self.seen.best[index], self.seen.scores[index]
            label = None if self.labels is None else int(self.labels[index])
            row: list[Any] = [self.paths[index].as_posix(), "" if label is None else label, self._name(label)]
            row += ["" if label is None else int(best[0] == label), self._name(int(best[0]))]
            for number, score in zip(best, scores, strict=True):
                row += [int(number), repr(float(np.float32(score)))]
            row += [int(self.other.best[index][0])] if self.other.best else []
            writer.writerow(row)
        return text.getvalue().encode("utf-8", "surrogateescape")

    def _name(self, label: int | None) -> str:
        if label is None or self.classes is None:
            return ""
        return self.classes.names.get(label - self.offset, "")

    def as_npz(self) -> bytes:
        """All outputs, (pictures, ...) each under its name, with `paths`, and `labels` where they are known.

        Raises QconvError for outputs whose shapes differ from picture to picture.
        """
        order = sorted(range(len(self.paths)), key=lambda i: self.paths[i].as_posix())
        arrays: dict[str, NDArray[Any]] = {"paths": np.array([self.paths[i].as_posix() for i in order])}
        if self.labels is not None:
            arrays["labels"] = self.labels[order]
        for index, name in enumerate(self.names):
            found = [self.outputs[i][index] for i in order]
            if len({array.shape for array in found}) > 1:
                raise QconvError(f"Output {name} differs in shape from picture to picture.", "save a .csv instead.")
            arrays[f"{name}_output" if name in ("paths", "labels") else name] = np.concatenate(found)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        return stream.getvalue()
