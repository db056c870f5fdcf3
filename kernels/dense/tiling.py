"""How the Triton kernels of exact attention are cut into tiles, chosen from what the host knows."""

from dataclasses import dataclass

_SHORTEST_SHARE = 512  # behaviours of an average user below which a walk is not shared


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut.

    Attributes:
        queries: rows of a tile of queries, a power of two from 16.
        behaviours: rows of a tile of behaviours, a power of two from 16.
        warps: of a program.
        stages: tiles in flight.
        splits: programs that share the walk over one user's behaviours.
    """

    queries: int
    behaviours: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Backward:
    """How the kernels of the backward pass are cut.

    Attributes:
        queries: the kernel of the gradient of queries.
        behaviours: the kernel of the gradients of keys and values.
        together: one kernel in place of both, for which a tile must hold all queries of any user.
    """

    queries: Tiles
    behaviours: Tiles
    together: Tiles | None = None


@dataclass(frozen=True)
class Shape:
    """What the host knows of a batch.

    Attributes:
        users: how many, at least 1.
        queries: of all users.
        behaviours: of all users.
        width: columns of the wider of keys and values as a tile has them.
        itemsize: bytes of a number.
        shared: whether keys are the values.
        uniform: whether all users have as many queries.
    """

    users: int
    queries: int
    behaviours: int
    width: int
    itemsize: int
    shared: bool
    uniform: bool

    @property
    def group(self) -> int:
        """Queries of a user on average, as a tile has them."""
        return width_of(-(-self.queries // self.users))

    @property
    def row(self) -> int:
        """Bytes of a behaviour as a tile has it."""
        return self.width * self.itemsize * (1 if self.shared else 2)


def width_of(size: int) -> int:
    """Return rows or columns of a tile, for matrix products take powers of two from 16 up."""
    return max(16, 1 << (size - 1).bit_length())


def forward(shape: Shape) -> Tiles:
    """Choose how the forward pass is cut."""
    if shape.group <= 32:
        rows = max(16, min(128, 16384 // shape.row))
        return Tiles(shape.group, rows, 4, 3, _splits(shape, shape.group, 512))
    queries = 64 if shape.row > 512 or shape.group == 64 else 128
    rows = max(16, min(64, 16384 // shape.row))
    return Tiles(queries, rows, queries // 16, 3, _splits(shape, queries, 256))


def backward(shape: Shape) -> Backward:
    """Choose how the backward pass is cut."""
    together = shape.uniform and shape.group <= 64
    return Backward(
        _of_queries(shape), _of_behaviours(shape), _of_both(shape) if together else None
    )


def _of_queries(shape: Shape) -> Tiles:
    queries = min(64, shape.group)
    rows = max(16, min(64 if queries == 64 else 128, 16384 // shape.row))
    return Tiles(queries, rows, 4, 2, _splits(shape, queries, 512))


def _of_behaviours(shape: Shape) -> Tiles:
    queries = min(64, shape.group)
    rows = 128 if shape.width <= 64 else 64
    return Tiles(queries, rows, rows // 16, 2)


def _of_both(shape: Shape) -> Tiles:
    rows = 128 if shape.width <= 64 else 64
    return Tiles(shape.group, rows, rows // 16, 2, _splits(shape, shape.group, 512))


def _splits(shape: Shape, tile: int, wanted: int) -> int:
    """Return how many programs share a walk so that about `wanted` run."""
    walks = max(shape.users, shape.queries // tile)
    share = shape.behaviours // shape.users // _SHORTEST_SHARE
    return max(1, min(wanted // walks, share, 64))
