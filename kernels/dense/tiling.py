"""How the Triton kernels of exact attention are cut into tiles, chosen from what the host knows."""

from dataclasses import dataclass

_ENOUGH = 512  # programs that keep a GPU of 132 processors busy
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
        chunk: columns of two tiles that are multiplied at once.
    """

    queries: int
    behaviours: int
    warps: int
    stages: int
    splits: int = 1
    chunk: int = 256


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
        older: whether the GPU is from before Hopper: its blocks have 99 KB of memory.
    """

    users: int
    queries: int
    behaviours: int
    width: int
    itemsize: int
    shared: bool
    uniform: bool
    older: bool

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
    if shape.itemsize > 2:
        return _forward_of_float32(shape)
    queries = min(shape.group, 128 if shape.width == 128 else 64)
    rows, warps, stages = {
        16: (128 if shape.width <= 64 else 64, 4, 3 if shape.row <= 128 else 2),
        32: (64, 4, 3),
        64: (64, 8 if shape.width > 128 else 4, 3),
        128: (64, 8, 3),
    }[queries]
    if queries == 32 and shape.width == 128:
        rows, warps, stages = (64, 8, 3) if shape.shared else (128, 8, 2)
    elif queries > 16 and shape.row > 512:
        rows = 32
    if shape.older and shape.width > 128:
        stages = 2
    return Tiles(queries, rows, warps, stages, _splits(shape, queries))


def backward(shape: Shape) -> Backward:
    """Choose how the backward pass is cut."""
    if shape.itemsize > 2:
        return _backward_of_float32(shape)
    limit = 64 if shape.row <= 128 else 16 if shape.row <= 512 else 0
    both = _of_both(shape) if _holds_all(shape, limit) else None
    return Backward(_of_queries(shape), _of_behaviours(shape), both)


def _holds_all(shape: Shape, queries: int) -> bool:
    """Tell whether a tile of at most so many queries holds all of any user."""
    return shape.uniform and shape.group <= queries


def _of_queries(shape: Shape) -> Tiles:
    queries = min(shape.group, 32 if shape.width > 128 else 64)
    rows = 128 if queries == 16 and shape.row <= 128 else 64
    warps = 8 if shape.width == 128 and queries > 16 else 4
    stages = 3 if shape.width <= 64 and queries == 64 else 2
    if shape.older and shape.width > 128:
        stages = 1
    return Tiles(queries, rows, warps, stages, _splits(shape, queries))


def _of_behaviours(shape: Shape) -> Tiles:
    if shape.width > 128:
        return Tiles(32 if shape.shared else 16, 32, 4, 2)
    queries = min(shape.group, 64)
    if shape.width > 64:
        return Tiles(queries, 64, 8 if queries == 64 or not shape.shared else 4, 2)
    return Tiles(queries, 64, 4, 2) if queries == 64 else Tiles(queries, 128, 8, 2)


def _of_both(shape: Shape) -> Tiles:
    rows = 128 if shape.width <= 64 and shape.group < 64 else 32 if shape.width > 128 else 64
    return Tiles(shape.group, rows, 8 if rows == 128 else 4, 2, _splits(shape, shape.group))


# Three TF32 products in place of one need many registers.


def _forward_of_float32(shape: Shape) -> Tiles:
    queries = min(shape.group, 32)
    splits = _splits(shape, queries)
    if shape.width <= 64:
        return Tiles(queries, 64, 4, 2, splits)
    return Tiles(queries, 32, 4 if shape.width <= 128 else 8, 2, splits, chunk=32)


def _backward_of_float32(shape: Shape) -> Backward:
    queries = min(shape.group, 32)
    of_queries = Tiles(queries, 32, 8, 2, _splits(shape, queries), chunk=32)
    narrow = shape.width <= 64
    of_behaviours = Tiles(queries if narrow else 16, 32, 8, 2, chunk=32)
    return Backward(
        of_queries, of_behaviours, of_queries if narrow and _holds_all(shape, 16) else None
    )


def _splits(shape: Shape, tile: int) -> int:
    """Return how many programs share a walk so that they are about enough for a GPU."""
    walks = max(shape.users, shape.queries // tile)
    share = shape.behaviours // shape.users // _SHORTEST_SHARE
    return max(1, min(_ENOUGH // walks, share, 64))
