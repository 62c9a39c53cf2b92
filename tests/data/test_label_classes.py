"""Which class of the model a label is, by the rules that `evaluate --schema` states."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.data.label_classes import LabelKeys, number_classes
from qconv.data.label_files import LabelRequest, ModelClasses
from qconv.errors import QconvError

COCO = LabelKeys({1: 3, 90: 2}, {1: "person", 44: "bottle", 90: "toothbrush"}, (1, 44, 90))
YOLO = LabelKeys({0: 3, 2: 2}, {0: "person", 1: "bottle", 2: "toothbrush"}, numbered=True)
VOC = LabelKeys({"person": 3, "tv": 2}, {"person": "person", "tv": "tv"})
NAMED = ModelClasses({0: "toothbrush", 1: "person", 2: "bottle"}, 3)


def numbers(
    labels: LabelKeys, model: ModelClasses, folder: Path, *, names: str = "", mapped: str = "", offset: int = 0
) -> tuple[dict[int | str, int], list[str]]:
    """The classes, and what was warned of."""
    listed, map_file = folder / "names.txt", folder / "map.toml"
    listed.write_text(names)
    map_file.write_text(mapped)
    request = LabelRequest(folder, map_file if mapped else None, listed if names else None, offset)
    told: list[str] = []
    return number_classes(labels, request, model, told.append), told


def test_the_order_of_ids_with_gaps(tmp_path: Path) -> None:
    """COCO: 1, 44, 90 are 0, 1, 2."""
    assert numbers(COCO, ModelClasses({}, 3), tmp_path) == ({1: 0, 44: 1, 90: 2}, [])
    assert numbers(COCO, ModelClasses({}), tmp_path, offset=1)[0] == {1: 1, 44: 2, 90: 3}


def test_names_win_over_the_order(tmp_path: Path) -> None:
    assert numbers(COCO, NAMED, tmp_path) == ({1: 1, 44: 2, 90: 0}, [])
    assert numbers(YOLO, NAMED, tmp_path) == ({0: 1, 1: 2, 2: 0}, [])
    got = numbers(COCO, NAMED, tmp_path, names="bottle\ntoothbrush\nperson\n", offset=0)
    assert got == ({1: 2, 44: 0, 90: 1}, [])


def test_a_list_of_names_with_a_background_in_front(tmp_path: Path) -> None:
    got = numbers(VOC, ModelClasses({}), tmp_path, names="tv\nperson\n", offset=1)
    assert got == ({"person": 2, "tv": 1}, [])


def test_classes_that_the_model_lacks_are_left_out(tmp_path: Path) -> None:
    got, told = numbers(VOC, NAMED, tmp_path)
    assert got == {"person": 1}
    assert told == ["2 boxes of classes that the model does not have are left out: 'tv'."]


def test_yolo_goes_by_numbers_where_names_differ(tmp_path: Path) -> None:
    got, told = numbers(YOLO, ModelClasses({0: "a", 1: "b", 2: "c"}, 3), tmp_path)
    assert got == {0: 0, 2: 2}
    assert told == ["classes of the labels go by their numbers: the model names no class 'person'."]
    assert numbers(YOLO, ModelClasses({}), tmp_path) == ({0: 0, 2: 2}, [])


def test_a_map_wins_over_all(tmp_path: Path) -> None:
    """By name or by id; what is not in it does not count, which its author wants."""
    got = numbers(COCO, NAMED, tmp_path, mapped='"person" = 2\n90 = "ignore"\n')
    assert got == ({1: 2}, [])
    assert numbers(COCO, NAMED, tmp_path, mapped='1 = "bottle"\n')[0] == {1: 2}


@pytest.mark.parametrize(
    ("labels", "model", "how", "fact"),
    [
        (COCO, ModelClasses({}, 80), {}, "has 3 categories and the model 80 classes, so that their order tells"),
        (COCO, ModelClasses({}, 3), {"offset": 1}, "has 3 categories, shifted by 1, and the model 3 classes"),
        (YOLO, ModelClasses({}, 2), {}, "boxes of 'toothbrush', class 2, but the model has 2"),
        (YOLO, ModelClasses({}, 9), {"offset": -1}, "boxes of 'person', class -1"),
        (VOC, ModelClasses({}), {}, "names its classes, but the names of the model's are not known"),
        (VOC, ModelClasses({0: "cat"}, 1), {}, "No label in .* is a class of the model's: 'person', 'tv'"),
        (VOC, NAMED, {"offset": 1}, "--label-offset is not used: labels and model name their classes"),
        (VOC, NAMED, {"mapped": "tv = 0", "offset": 1}, "--label-offset is not used: --label-map says"),
        (VOC, NAMED, {"mapped": "tv = 7"}, "boxes of 'tv', class 7, but the model has 3"),
        (VOC, NAMED, {"mapped": "radio = 1"}, "No label in .* is a class"),
    ],
)
def test_what_is_not_known(
    tmp_path: Path, labels: LabelKeys, model: ModelClasses, how: dict[str, str | int], fact: str
) -> None:
    with pytest.raises(QconvError, match=fact):
        numbers(labels, model, tmp_path, **how)  # type: ignore[arg-type]
