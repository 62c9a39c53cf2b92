"""Lists the images and samples of a dataset as a seeded draw, and finds the class labels of images.

The draw does not depend on the order in which the file system lists files.

    label = rank of the class folder + offset

The rank is the folder's place in a list of classes (`--classes`, or classes.txt beside the folders); without a list
it is the folder's name where all names are whole numbers, and else its place in alphabetical order, which is right
only if every class has a folder.
"""

from __future__ import annotations

import codecs
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qconv.config.choices import PICTURE_SUFFIXES, SAMPLE_SUFFIXES
from qconv.config.data_options import DataOptions
from qconv.errors import QconvError, format_count
from qconv.storage import ArrayStore, StoredArray

KEPT_ARRAY_BYTES = 2**28
"""Of given arrays in memory."""

ARRAYS_HINT = "pass an iterable of mappings, as [{'input': array}]: names of inputs to arrays of numbers."


@dataclass(frozen=True, slots=True)
class Listing:
    """The files to read: `paths` in reading order, already shuffled and cut to the wanted number of samples.

    found: how many candidates there were. ignored: files without a picture's or a sample's suffix, not looked at.
    whole: how many were drawn, where these are a part of them.
    """

    paths: tuple[Path, ...]
    found: int
    ignored: int
    whole: int = 0
    read: Callable[[Path], dict[str, NDArray[Any]]] | None = None
    """Gives the arrays of a path, which may be no file, by the names of inputs."""

    def in_words(self, path: Path) -> str:
        """What an error calls one of them."""
        inside = self.read is not None and not path.is_file()
        return f"sample {int(path.stem)} of {path.parent}" if inside else str(path)


def find_files(sources: Sequence[str], *, pattern: str | None, samples: int | None, seed: int) -> Listing:
    """Choose the files to read: a seeded draw of `samples` that does not depend on the file system's order.

    A source is a folder (read recursively, hidden files skipped), a text file with one path a line (relative to the
    text file's folder, `#` starts a comment), or one picture. `pattern` is compared with a file's name and with its
    path inside the source. Of a picture and a sample in one folder whose names differ in the suffix alone, both chosen,
    the picture counts: they are the same, and how it is fed is known. samples: None for all. Raises
    QconvError for a source or a listed path that does not exist, and if none is left.
    """
    files = sorted((i, inside, path) for i, source in enumerate(sources) for inside, path in _iter_source_files(source))
    known = [(inside, path) for _, inside, path in files if suffix_of(path) in PICTURE_SUFFIXES | SAMPLE_SUFFIXES]
    matching = [path for inside, path in known if pattern is None or _matches_pattern(inside, pattern)]
    pictures = {os.path.splitext(path)[0] for path in matching if suffix_of(path) in PICTURE_SUFFIXES}
    chosen = [p for p in matching if suffix_of(p) not in SAMPLE_SUFFIXES or os.path.splitext(p)[0] not in pictures]
    if not chosen:
        raise _no_files_error(sources, len(files), len(known), pattern)
    order = np.random.default_rng(seed).permutation(len(chosen))[:samples]
    return Listing(tuple(Path(chosen[i]) for i in order), len(chosen), len(files) - len(known))


def list_samples(data: DataOptions) -> Listing:
    """Choose what `data` says, as `find_files` does."""
    if data.arrays is not None:
        return data.arrays.listing(data.samples, data.seed)
    return find_files(data.paths, pattern=data.glob, samples=data.samples, seed=data.seed)


class ArraySamples:
    """Samples that are given as arrays. They stay in memory up to a limit, and lie in temporary files beyond it.

    Args:
        batches: Mappings of names of inputs to arrays with the batch as axis 0, or without a batch; read once, here.
        ranks: How many axes each input of the network has, the batch included.
        limit: Bytes that stay in memory.

    Raises:
        QconvError: There are none, or they are no such mappings.
    """

    name = "the given arrays"
    """In words, where others have a path."""

    def __init__(
        self, batches: Iterable[Mapping[str, ArrayLike]], ranks: Mapping[str, int], limit: int = KEPT_ARRAY_BYTES
    ) -> None:
        self._store = ArrayStore(limit)
        self._samples: dict[Path, dict[str, StoredArray]] = {}
        try:
            for batch in batches:
                for sample in _split_batch(_as_arrays(batch), ranks):
                    stored = {name: self._store.put(array) for name, array in sample.items()}
                    self._samples[Path(self.name) / f"{len(self._samples):06}.npz"] = stored
            if not self._samples:
                raise QconvError("No samples were given.", ARRAYS_HINT)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop what lies in temporary files."""
        self._store.close()

    def listing(self, samples: int | None, seed: int) -> Listing:
        """A draw of them, as from a folder in which they lie in their order."""
        paths = list(self._samples)
        order = np.random.default_rng(seed).permutation(len(paths))[:samples]
        return Listing(tuple(paths[i] for i in order), len(paths), 0, read=self.read)

    def read(self, path: Path) -> dict[str, NDArray[Any]]:
        """The arrays of one sample."""
        return {name: array.get() for name, array in self._samples[path].items()}


def _split_batch(batch: dict[str, NDArray[Any]], ranks: Mapping[str, int]) -> Iterator[dict[str, NDArray[Any]]]:
    counts = {len(array) if array.ndim >= max(1, ranks.get(name, 1)) else None for name, array in batch.items()}
    if len(counts) > 1:
        fact = f"{', '.join(batch)} differ in how many samples they hold."
        raise QconvError(fact, "give each of them axis 0 for the batch, or none.")
    (count,) = counts
    if count is None:
        yield batch
    else:
        yield from ({name: array[row] for name, array in batch.items()} for row in range(count))


def _as_arrays(batch: object) -> dict[str, NDArray[Any]]:
    """Copies, since whoever gives arrays may fill them anew."""
    if not isinstance(batch, Mapping) or not batch:
        raise QconvError(f"{type(batch).__name__} is no sample.", ARRAYS_HINT)
    found = {str(name): _as_array(str(name), array) for name, array in batch.items()}
    odd = next((name for name, array in found.items() if array.dtype.kind not in "fiub"), None)
    if odd is not None:
        raise QconvError(f"{odd!r} holds {found[odd].dtype}, which is no number.", ARRAYS_HINT)
    return found


def _as_array(name: str, array: object) -> NDArray[Any]:
    try:
        return np.array(array)
    except Exception as error:  # of a stranger's class, such as a tensor of another device
        reason = str(error).partition("\n")[0].rstrip(".")
        raise QconvError(f"{name!r} holds {type(array).__name__}, which is no array: {reason}.", ARRAYS_HINT) from None


def suffix_of(path: str | Path) -> str:
    """The suffix of a file name in lower case: `.jpg` for `CAT.JPG`."""
    return os.path.splitext(path)[1].lower()


def _matches_pattern(inside: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(text, pattern) for text in (inside, inside.rpartition("/")[2]))


def _iter_source_files(source: str) -> Iterator[tuple[str, str]]:
    """Yield (posix path inside the source, path to open) of each file."""
    if os.path.isdir(source):
        yield from _walk_folder(source)
    elif not os.path.exists(source):
        raise QconvError(f"{source} does not exist.", "pass a folder of pictures, or a text file with one path a line.")
    elif suffix_of(source) in PICTURE_SUFFIXES | SAMPLE_SUFFIXES:
        yield os.path.basename(source), source
    else:
        yield from _iter_listed_files(Path(source))


def _walk_folder(folder: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable_folder):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder further up would go round for ever
            folders.clear()
            continue
        seen.add(real)
        # sorted, so that of two ways to a linked folder the same one counts everywhere
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(here, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        yield from ((prefix + name, os.path.join(here, name)) for name in names if not name.startswith("."))


def _iter_listed_files(text: Path) -> Iterator[tuple[str, str]]:
    try:
        data = text.read_bytes().removeprefix(codecs.BOM_UTF8)
        if b"\0" in data:
            raise ValueError
        lines = os.fsdecode(data).split("\n")  # names of files may be any bytes
    except ValueError:
        hint = "pass a folder of pictures, or a text file with one path a line."
        raise QconvError(f"{text} is neither a folder, nor a picture, nor a text file of paths.", hint) from None
    except OSError as error:
        _raise_unreadable_folder(error)
        raise
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        path = os.path.join(text.parent, entry)
        if not os.path.isfile(path):
            fact = "is a folder" if os.path.isdir(path) else "does not exist"
            hint = f"give the path of one file a line, relative to {text.parent}/ or absolute."
            raise QconvError(f"line {number} of {text}: {entry} {fact}.", hint)
        yield Path(entry).as_posix(), path


def _raise_unreadable_folder(error: OSError) -> None:
    raise QconvError(f"{error.filename} cannot be read ({error.strerror}).", "check its permissions.") from error


def _no_files_error(sources: Sequence[str], files: int, known: int, pattern: str | None) -> QconvError:
    where = " and ".join(sources)
    suffixes = f"put pictures there: {' '.join(sorted(PICTURE_SUFFIXES))}, or .npy and .npz samples."
    if known:
        hint = "the pattern is compared with the file's name and with its path inside the folder, capitals count."
        return QconvError(f"none of the {known} pictures in {where} matches --glob '{pattern}'.", hint)
    if files:
        verb = "holds" if len(sources) == 1 else "hold"
        return QconvError(f"{where} {verb} {format_count(files, 'file')} but none is a picture.", suffixes)
    if len(sources) == 1 and os.path.isdir(sources[0]):
        return QconvError(f"{where} is an empty folder.", f"{suffixes} Hidden files are not looked at.")
    if sources:
        return QconvError(f"no file was found in {where}.", suffixes)
    return QconvError("no pictures were given.", "pass a folder of pictures.")


CLASS_LIST_NAME = "classes.txt"


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a data set.

    Attributes:
        rank: By class folder.
        names: By rank.
        source: Where they come from, in words.
        complete: Whether there is one for every output, if the ranks are right.
        listed: Whether a file lists them.
    """

    rank: dict[str, int]
    names: dict[int, str]
    source: str
    complete: bool
    listed: bool = False

    def labels(self, folders: Sequence[str], *, offset: int, outputs: int) -> list[int]:
        """The label of each image. folders: its class folder. Raises QconvError where these are not the model's."""
        unknown = next((name for name in folders if name not in self.rank), None)
        if unknown is not None:
            raise QconvError(
                f"The class folder {unknown} is not in {self.source}.", "add it, or leave it out (--glob)."
            )
        self._require_fit(offset, outputs)
        found = [self.rank[name] + offset for name in folders]
        odd = next((label for label in found if not 0 <= label < outputs), None)
        if odd is not None:
            raise QconvError(
                f"A picture has the label {odd}, but the model has {outputs} outputs.",
                "check --classes and --label-offset.",
            )
        return found

    def _require_fit(self, offset: int, outputs: int) -> None:
        """Raise QconvError where there must be as many as outputs, and are not."""
        if self.listed:
            require_listed_classes(self.source, len(self.names), offset, outputs)
        elif self.complete and len(self.names) + offset != outputs:
            shifted = f", shifted by {offset}," if offset else ""
            fact = f"{format_count(len(self.names), 'class folder')}{shifted} do not fit {outputs} outputs"
            fix = "list all class folders in output order in a file: --classes FILE (--label-offset shifts them)."
            raise QconvError(f"{fact}, so that their order tells no class.", fix)


def require_listed_classes(file: str, count: int, offset: int, outputs: int) -> None:
    """Raise QconvError where a file lists another number of classes than the model has.

    Args:
        file: Its name.
        count: How many it lists.
        offset: Added to the place in the list.
        outputs: Classes of the model.
    """
    if count + offset != outputs:
        shifted = f", shifted by {offset}" if offset else ""
        fact = f"{file} lists {format_count(count, 'class')}{shifted}, but the model has {outputs}."
        raise QconvError(fact, "list every class of the model, one a line (`evaluate` shifts them: --label-offset).")


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """The user's options on labels. offset: added to the rank. asked: whether it is an error if there are none."""

    offset: int = 0
    asked: bool = False


def labels_of(
    paths: Sequence[Path], data: DataOptions, classes: Classes | None, labelling: LabelOptions, outputs: int
) -> NDArray[np.int64] | None:
    """The labels of images, (N,); None where they lie in no class folders.

    outputs: how many classes the model has, 0 where no output is one score a class. Raises QconvError where folders
    give no labels, or where labels that were asked for do not fit.
    """
    if not outputs:
        if labelling.asked:
            fact = "No output of the model is one score a class, so labels say nothing of it."
            raise QconvError(fact, "leave the options for labels out.")
        return None
    folders = class_folders_of(paths, data) if classes is not None else []
    if classes is None or not any(folders):
        if labelling.asked:
            fact = f"The pictures in {' and '.join(data.paths)} lie in no class folders."
            raise QconvError(fact, "put each into a folder of its class.")
        return None
    loose = next((path for path, name in zip(paths, folders, strict=True) if name is None), None)
    if loose is not None:
        raise QconvError(f"{loose} lies in no class folder, others do.", "move it into one, or leave it out (--glob).")
    known = classes.labels([name or "" for name in folders], offset=labelling.offset, outputs=outputs)
    return np.array(known, np.int64)


def class_folders_of(paths: Sequence[Path], data: DataOptions) -> list[str | None]:
    """The class folder's name of each image: the first folder below the given one that holds the image.

    Of an image that a list of paths or its own path named, the folder that holds it. None for images that lie in no
    folder. Raises QconvError where given folders lie in each other and name different classes. Arrays have no folder.
    """
    if data.arrays is not None:
        return [None for _ in paths]
    roots = class_roots_of(data)
    # of a batch in one file each row is listed below it
    files = [path.parent if suffix_of(path.parent) in SAMPLE_SUFFIXES else path for path in paths]
    return [_class_folder_of(path, roots) for path in files]


def _class_folder_of(path: Path, roots: Sequence[Path]) -> str | None:
    below = [path.relative_to(root).parts for root in roots if path.is_relative_to(root)]
    below = [parts for parts in below if parts and parts[0] != os.pardir]
    if not below:
        return path.parent.name
    names = list(dict.fromkeys(parts[0] for parts in below if len(parts) > 1))
    if len(names) > 1:
        fact = f"{path} lies in the class folders {' and '.join(names)}, as given paths lie in each other."
        raise QconvError(fact, "pass the outer path alone, or paths that lie beside each other.")
    return names[0] if names else None


def class_roots_of(data: DataOptions) -> list[Path]:
    """The given folders, in which class folders may lie."""
    return [root for root in map(Path, data.paths) if root.is_dir()] if data.arrays is None else []


def find_classes(data: DataOptions, listing: Path | None) -> Classes | None:
    """The classes of the folders below the given ones; folders with the same name are of one class.

    listing: the user's file, None for classes.txt beside the class folders. None where there are no class folders.
    Raises QconvError for a file that is no list of classes, and for lists that differ.
    """
    roots = class_roots_of(data)
    beside = [root / CLASS_LIST_NAME for root in roots if (root / CLASS_LIST_NAME).is_file()]
    if listing is not None or beside:
        return _read_class_lists(beside if listing is None else [listing])
    names = sorted({p.name for root in roots for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")})
    if not names:
        return None
    if all(name.isdecimal() for name in names) and len({int(name) for name in names}) == len(names):
        rank = {name: int(name) for name in names}
        return Classes(rank, {n: name for name, n in rank.items()}, "the folders' numbers", complete=False)
    rank = {name: index for index, name in enumerate(names)}
    return Classes(rank, dict(enumerate(names)), "the folders in alphabetical order", complete=True)


def _read_class_lists(files: Sequence[Path]) -> Classes:
    found = [read_class_list(file) for file in files]
    other = next((file for file, own in zip(files, found, strict=True) if own.names != found[0].names), None)
    if other is not None:
        fact = f"{files[0]} and {other} list different classes."
        raise QconvError(fact, "name the list that holds for all pictures with --classes FILE.")
    return found[0]


def read_class_list(file: Path) -> Classes:
    """Read a list of classes; the folder is a whole line or its first word (`n01440764 tench, Tinca tinca`)."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise QconvError(
            f"{file} cannot be read: {reason}.", "name a text file with one class folder a line."
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    if not names or not all(names):
        fact = "is empty" if not names else f"has an empty line {names.index('') + 1}"
        raise QconvError(f"{file} {fact}.", "write one class folder a line, in the order of the outputs.")
    words = [name.split()[0] for name in names]
    rank = {word: index for index, word in enumerate(words)} if len(set(words)) == len(words) else {}
    rank |= {name: index for index, name in enumerate(names)}
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise QconvError(f"{file} lists {twice} twice.", "write one class folder a line, in the order of the outputs.")
    return Classes(rank, dict(enumerate(names)), str(file), complete=True, listed=True)
