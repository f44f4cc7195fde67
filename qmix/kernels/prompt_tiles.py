"""How the tokens of a prompt fall into tiles, each of one expert: sizes in integers, without torch.

A launch computes tiles of many experts. An expert's last tile is padded. The size of a tile depends on the number of
tokens of the pass, on the model and on the kernel's configuration, never on where records are: bits depend on it.

Rule. To multiply a tile, a program decodes its weights once, whatever number of tokens the tile has. So a tile should
hold the average expert's tokens, as far as registers allow: smaller tiles decode the same weights more often, larger
ones are mostly padding. P pairs and E experts make P / TILE + E / 2 tiles, about, and no more than
(P + E * (TILE - 1)) / TILE.

P pairs of a token and one of its experts, E experts, F expert inner.
"""

from __future__ import annotations

from qmix.sizes import MIB

SIZES = (16, 64, 128)  # tokens of a tile; 16 is the least that a product of Triton's has
INNER_BYTES = 64 * MIB  # what gate and up make of the tiles of one launch, at most; else there are several launches


def tile_of(pairs: int, experts: int, most: int = SIZES[-1]) -> int:
    """Tokens of a tile: the average expert's, rounded up to 16, 64 or 128, at most `most`.

    512 tokens of Qwen3-30B-A3B: 4096 pairs, 128 experts -> 64. 512 tokens of Mixtral: 1024 pairs, 8 experts -> 128.
    """
    average = -(-pairs // experts)
    return min(most, next((size for size in SIZES if average <= size), SIZES[-1]))


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """The most tiles that so many pairs make, however they fall on the experts."""
    return min(pairs, (pairs + min(pairs, experts) * (tile - 1)) // tile)


def tiles_of_launch(inner: int, itemsize: int, tile: int) -> int:
    """As many as make at most INNER_BYTES of [., F] between the two products, at least one."""
    return max(1, INNER_BYTES // (tile * inner * itemsize))


def workspace(pairs: int, experts: int, inner: int, itemsize: int) -> int:
    """Bytes that the experts of a pass take beside their results: what lies between the products of a launch, the order
    of pairs and the expert of each tile; of the size of tile that takes most."""
    def of(tile: int) -> int:
        tiles = most_tiles(pairs, experts, tile)
        return min(tiles, tiles_of_launch(inner, itemsize, tile)) * tile * inner * itemsize + tiles * (tile + 1) * 4

    return max(map(of, SIZES))
