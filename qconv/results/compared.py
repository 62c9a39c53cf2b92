"""What a comparison layer by layer found, as data: the object behind `compare --json` and the charts of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qconv.results.report import OutputScore


@dataclass(frozen=True, slots=True)
class Bars:
    """A histogram for the eye. edges: ascending, one more than counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Values:
    """Numbers beside the codes that hold them. bars: of the numbers themselves, unrounded.

    low, high: the range that codes reach. clipped: share of the numbers beyond it. range_use: share of the codes that
    occur. Of weights with several scales all is in units of each one's own step, so that codes are whole numbers.
    """

    bits: int
    low: float
    high: float
    clipped: float
    range_use: float
    bars: Bars


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A node of the quantized file, beside the tensor of the float model that it stands for.

    sqnr_db: as the layer is in the quantized network, with the error that it receives; added_sqnr_db: with the float
    model's tensors as its input, so that the error is its own; None where nothing differs. cosine: of the former.
    output_share: its own error's part in the error at the outputs, all layers' being 1; None where it was not measured.
    values: of the tensor and its codes; None where it stays float. weights: None for nodes without codes for weights.
    input: whether it is the model's input and no node.
    """

    name: str
    op: str
    tensor: str
    sqnr_db: float | None
    added_sqnr_db: float | None
    cosine: float | None
    output_share: float | None
    values: Values | None = None
    weights: Values | None = None
    input: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        values, weights = self.values, self.weights
        return {
            "name": self.name,
            "op": self.op,
            "tensor": self.tensor,
            "sqnr_db": self.sqnr_db,
            "added_sqnr_db": self.added_sqnr_db,
            "cosine": self.cosine,
            "output_share": self.output_share,
            "range_use": None if values is None else values.range_use,
            "clipped": None if values is None else values.clipped,
            "bits": None if values is None else values.bits,
            "weight_bits": None if weights is None else weights.bits,
            "weight_range_use": None if weights is None else weights.range_use,
            "weight_clipped": None if weights is None else weights.clipped,
        }


@dataclass(frozen=True, slots=True)
class Compared:
    """Two models on the same pictures. layers: in the order in which they run.

    unmatched: nodes for which the float model has no tensor. words: how pictures are fed. predicted_db: SQNR of the
    outputs, were the layers' own errors there independent and the network as straight as it is near the float values;
    from `predicted_on` pictures. outputs: as measured.
    """

    float_model: str
    model: str
    images: int
    words: str
    layers: tuple[LayerRow, ...]
    unmatched: tuple[str, ...]
    outputs: tuple[OutputScore, ...]
    predicted_db: float | None
    predicted_on: int

    @property
    def sqnr_db(self) -> float | None:
        """The lowest output's, in dB; None where all outputs are equal."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=None)

    @property
    def worst_first(self) -> tuple[LayerRow, ...]:
        """The layers by their part in the error at the outputs and, where that was not measured, by their own error."""

        def badness(row: LayerRow) -> tuple[float, float]:
            own = float("-inf") if row.added_sqnr_db is None else -row.added_sqnr_db
            return row.output_share or 0.0, own

        return tuple(sorted(self.layers, key=badness, reverse=True))

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "schema": 1,
            "float": self.float_model,
            "model": self.model,
            "images": self.images,
            "preprocessing": self.words or None,
            "layers": [row.as_dict() for row in self.worst_first],
            "unmatched": list(self.unmatched),
            "outputs": [{"name": o.name, "sqnr_db": o.sqnr_db, "agreement": o.agreement} for o in self.outputs],
            "sqnr_db": self.sqnr_db,
            "predicted_sqnr_db": self.predicted_db,
            "predicted_on": self.predicted_on,
        }
