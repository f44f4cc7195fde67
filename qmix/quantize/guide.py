"""The forward pass beside the stream of work: it follows the stream and gives each matrix its inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor

from torch import Tensor

from qmix.config import ExpertKey
from qmix.quantize.calibration import Calibration
from qmix.quantize.forward_pass import ForwardPass, LayerPieces
from qmix.quantize.inputs import Inputs
from qmix.quantize.layer_weights import Source
from qmix.spec import Model
from qmix.spec.model import layer_of

BEFORE, EXPERTS, AFTER = range(3)  # parts of a layer


class Guide:
    """The forward pass beside the stream of work, whose regions must come in the order of `stages`.

    measured: layers of which the inputs of dense matrices will be asked for.
    """

    def __init__(self, source: Source, calibration: Calibration, measured: Collection[int], pool: Executor):
        self._forward = ForwardPass(source, calibration, pool)
        self._measured = measured

    def inputs(self, key: ExpertKey | str, weights: Mapping[str, Tensor], measure: bool) -> Mapping[str, Inputs]:
        """What the matrices of an expert, {"w13", "w2"}, or of a dense tensor, {""}, were given. Empty where the text
        was sent elsewhere, and with `measure` off, where it only passes through."""
        forward = self._forward
        if isinstance(key, ExpertKey):
            self._enter(key.layer)
            forward.dense_inputs.clear()  # all that were asked for before the experts have been
            return forward.expert(key, weights["w13"], weights["w2"], measure)
        layer = layer_of(key)
        if layer is None:
            assert key == "head", key
            self._enter(len(forward.model.layers) - 1)
            return {"": forward.head(weights[""])}
        self._enter(layer)
        if key not in forward.dense_inputs:
            forward.leave()
        return {"": forward.dense_inputs[key]}

    def _enter(self, layer: int) -> None:
        """Up to this layer, those between that have no region of their own included."""
        while layer > self._forward.layer:
            following = self._forward.layer + 1
            self._forward.enter(following, following in self._measured)


def stages(model: Model) -> Callable[[ExpertKey | str], tuple[int, int]]:
    """When the forward pass needs a region, as (layer, part of it): the embedding before all layers, final norm and
    head after them."""
    after = {tensor.name for i in range(len(model.layers)) for op in LayerPieces.of(model, i).after
             for tensor in op.weights}

    def stage(key: ExpertKey | str) -> tuple[int, int]:
        if isinstance(key, ExpertKey):
            return key.layer, EXPERTS
        layer = layer_of(key)
        if layer is None:
            return (-1 if key == "embedding" else len(model.layers)), BEFORE
        return layer, AFTER if key in after else BEFORE

    return stage
