"""What the BatchNormalizations of a network remember of training: all that synthesized pictures are made from."""

from __future__ import annotations

from dataclasses import dataclass

from qconv.data.evidence import ReferenceStatistics, batchnorm_statistics, is_measured
from qconv.errors import QconvError, format_count
from qconv.ir.layers import INPUTS_FIRST
from qconv.ir.model import Model, Node, input_of

HALF = 0.5


@dataclass(frozen=True, slots=True)
class Remembered:
    """nodes: BatchNormalizations that have seen training, in running order, one a tensor. wanted: what each read.

    doubt: why these tell less than they should, in a sentence, or nothing.
    """

    nodes: tuple[Node, ...]
    wanted: tuple[ReferenceStatistics, ...]
    doubt: str

    @classmethod
    def of(cls, model: Model, name: str) -> Remembered:
        """Of a float model as it is loaded. name: of the user's file. Raises QconvError where nothing is left."""
        nodes: dict[str, Node] = {}
        wanted = []
        for node in model.nodes():
            read = input_of(node, 0)
            if node.op_type != "BatchNormalization" or read is None or not read.name or read.name in nodes:
                continue
            statistics = batchnorm_statistics(node)
            if statistics is not None and is_measured(*statistics) and statistics[1].any():
                nodes[read.name] = node
                wanted.append(ReferenceStatistics(read.name, *statistics, stored=True))
        if not wanted:
            raise QconvError(
                f"{name} has no BatchNormalization that remembers what training showed it: there is nothing to match.",
                "export the model before they are folded (torch.onnx.export with training=TrainingMode.PRESERVE), "
                "or calibrate with pictures.",
            )
        layers = sum(node.op_type in INPUTS_FIRST for node in model.nodes())
        told = f"{format_count(len(wanted), 'BatchNormalization')} for {format_count(layers, 'layer')}"
        few = len(wanted) < HALF * layers
        doubt = f"the network has but {told}: pictures are like those of training only as far as these tell."
        return cls(tuple(nodes.values()), tuple(wanted), doubt if few else "")
