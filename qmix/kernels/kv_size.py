"""Bytes of a session's cache, to the last one, and of convolutions, from the model alone: what a plan counts. No torch
here."""

from __future__ import annotations

from qmix.kernels.op import FEW, WIDE
from qmix.sizes import KV_FORMATS, KV_SCALE_BYTES
from qmix.spec import Attention, DeltaNet, Model

SNAPSHOTS = 4  # of a session with recurrent states, to which it can go back
SLACK = FEW - 1  # positions that a ring keeps beside its window: as many drafts as may be taken back


def kv_bytes(model: Model, capacity: int, item_bytes: int = 2, kv: str = "bf16", rings: bool = False) -> int:
    """forward.kv_cache.SessionCache.nbytes, with that of a multi-token-prediction head. item_bytes: of the compute
    dtype, which `kv` "bf16" stands for; with "int8" a number takes a byte, and each head's key and value of a position
    an fp32 scale."""
    assert kv in KV_FORMATS, kv
    total = 0
    if model.mtp_head is not None:
        mixer = model.mtp_head.layer.mixer
        assert isinstance(mixer, Attention) and not rings
        total += capacity * position_bytes(mixer, item_bytes, kv)
    for i, layer in enumerate(model.layers):
        mixer = layer.mixer
        if isinstance(mixer, DeltaNet):
            total += reserved_bytes(mixer)
        elif mixer.kv_source is None:
            total += positions(model, i, capacity, rings) * position_bytes(mixer, item_bytes, kv)
    return total


def position_bytes(a: Attention, item_bytes: int = 2, kv: str = "bf16") -> int:
    """Of the keys and values of one position in one layer; arguments as of kv_bytes. A layer of Mixtral 8x7B: 4096, and
    2112 in "int8"."""
    return 2 * a.kv_heads * (a.head_dim + KV_SCALE_BYTES if kv == "int8" else a.head_dim * item_bytes)


def positions(model: Model, i: int, capacity: int, rings: bool) -> int:
    """That attention of layer i keeps: all, or with `rings` of a window no more than that and SLACK, unless another
    layer reads them."""
    mixer = model.layers[i].mixer
    assert isinstance(mixer, Attention)
    read = any(isinstance(layer.mixer, Attention) and layer.mixer.kv_source == i for layer in model.layers)
    if not rings or mixer.window is None or read:
        return capacity
    return min(capacity, mixer.window + SLACK)


def channels(delta: DeltaNet) -> int:
    """Of its convolution: q, k and v side by side."""
    return 2 * delta.key_heads * delta.key_dim + delta.value_heads * delta.value_dim


def recurrent_bytes(delta: DeltaNet) -> int:
    """A state, and the last inputs of the convolution, fp32."""
    return (delta.value_heads * delta.key_dim * delta.value_dim + (delta.conv - 1) * channels(delta)) * WIDE


def taps_bytes(model: Model) -> int:
    """Of the convolutions of all delta nets, fp32."""
    nets = [layer.mixer for layer in model.layers if isinstance(layer.mixer, DeltaNet)]
    return sum(net.conv * channels(net) for net in nets) * WIDE


def reserved_bytes(delta: DeltaNet, placed: bool = False) -> int:
    """What one such layer of a session takes at most: its state, that before the last pass with the inputs of up to FEW
    tokens, and SNAPSHOTS earlier ones. placed: on a device, which has two places for it besides, and for the inputs."""
    inputs = FEW * (2 * channels(delta) + 2 * delta.value_heads) * WIDE  # of the convolution and of the delta rule
    return (2 + SNAPSHOTS + 2 * placed) * recurrent_bytes(delta) + (1 + placed) * inputs


def placed_bytes(model: Model) -> int:
    """What a session takes on a device beside kv_bytes."""
    nets = [layer.mixer for layer in model.layers if isinstance(layer.mixer, DeltaNet)]
    return sum(reserved_bytes(net, placed=True) - reserved_bytes(net) for net in nets)
