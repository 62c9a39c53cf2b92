"""Which form labels have, and which files are of which pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.config.data_options import DataOptions
from qconv.data.label_files import (
    SCHEMA,
    LabelForm,
    LabelledPictures,
    LabelRequest,
    ModelClasses,
    find_label_form,
    read_label_map,
)
from qconv.errors import QconvError


def pictures_in(root: Path, *names: str) -> LabelledPictures:
    paths = [root / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return LabelledPictures.of(paths, DataOptions((str(root),)))


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (("a.txt", "b.txt", "classes.txt"), LabelForm.YOLO),
        (("a.xml", "b.xml", "notes.txt"), LabelForm.VOC),
        (("a.png", "b.png", "classes.txt", "c.xml"), LabelForm.MASKS),
    ],
)
def test_a_folder_tells_by_files_called_like_pictures(tmp_path: Path, names: tuple[str, ...], form: LabelForm) -> None:
    pictures = pictures_in(tmp_path / "imgs", "a.jpg", "b.jpg")
    assert find_label_form(files(tmp_path / "labels", *names), pictures, "Look elsewhere.") is form


def test_pictures_beside_their_labels_are_no_masks(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path, "a.png", "b.png")
    assert find_label_form(files(tmp_path, "a.xml"), pictures, "Look elsewhere.") is LabelForm.VOC


@pytest.mark.parametrize(("name", "form"), [("a.json", LabelForm.COCO), ("a.yaml", LabelForm.YOLO)])
def test_a_file_tells_by_its_suffix(tmp_path: Path, name: str, form: LabelForm) -> None:
    (tmp_path / name).write_text("")
    assert find_label_form(tmp_path / name, pictures_in(tmp_path, "x.jpg"), "Look elsewhere.") is form


def test_what_is_no_labels(tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path / "imgs", "a.jpg")
    with pytest.raises(QconvError, match=r"holds no labels of these pictures: 2 files .txt") as caught:
        find_label_form(files(tmp_path / "labels", "x.txt", "y.txt"), pictures, "Look elsewhere.")
    assert caught.value.hint.startswith("Look elsewhere. `qconv evaluate --schema`")
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(QconvError, match=r"labels.csv is no file of labels"):
        find_label_form(tmp_path / "labels.csv", pictures, "Look elsewhere.")
    with pytest.raises(QconvError, match="does not exist"):
        LabelRequest(tmp_path / "nothing")


def test_files_lie_as_pictures_do_or_side_by_side(tmp_path: Path) -> None:
    """Pictures of one name in two folders have labels in two folders; a flat folder serves those of other names."""
    pictures = pictures_in(tmp_path / "imgs", "one/a.jpg", "two/a.jpg", "two/b.jpg")
    labels = files(tmp_path / "labels", "one/a.txt", "two/a.txt", "b.txt")
    found = pictures.files_in(labels, ".txt")
    assert list(found.values()) == [labels / "one/a.txt", labels / "two/a.txt", labels / "b.txt"]


def test_a_map_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "map.toml"
    path.write_text('"aeroplane" = 4\n7 = "road"\n0 = "ignore"\n')
    assert read_label_map(path, ModelClasses({2: "road"})) == {"aeroplane": 4, "7": 2, "0": None}
    for line, why in (('7 = "rode"', "no class of the model's"), ("7 = 1.5", "neither a number nor a name")):
        path.write_text(line)
        with pytest.raises(QconvError, match=why):
            read_label_map(path, ModelClasses({2: "road"}))
    path.write_text("7: road")
    with pytest.raises(QconvError, match="is no TOML"):
        read_label_map(path, ModelClasses({}))


def test_the_schema_names_every_form() -> None:
    assert all(word in SCHEMA for word in ("FILE.json", "FILE.yaml", "DIR of .txt", "DIR of .xml", "DIR of .png"))
    assert max(map(len, SCHEMA.splitlines())) <= 120
