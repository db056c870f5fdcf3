"""How hash-sampled and exact attention are computed without our kernels, on padded histories.

Hashing is float32, as the definition asks, but for the form of one product in the rows' dtype.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import normalize, scaled_dot_product_attention

from experiments.sdim_benchmark import definitions
from experiments.sdim_benchmark.batch import Batch, Side

DIN_HIDDEN = 36


def codes(x: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Return `[..., G]` int32; the product is of the dtype of the planes."""
    bits: Tensor = (x.detach().to(planes.dtype) @ planes > 0).unflatten(-1, (-1, tau))
    powers = 2 ** torch.arange(tau, dtype=torch.int32, device=x.device)
    return (bits * powers).sum(-1, dtype=torch.int32)


def scatter(values: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Add each behaviour to its G rows of the table `[B, G, K, D]`: the usual form."""
    users, size = values.shape[0], values.shape[2]
    keys = codes(values, planes, tau)
    groups = keys.shape[2]
    rows = _table_rows(keys, tau).flatten()
    repeated = values.float()[:, :, None].expand(-1, -1, groups, -1).reshape(-1, size)
    table = repeated.new_zeros(users * groups * (1 << tau), size).index_add(0, rows, repeated)
    return table.view(users, groups, 1 << tau, size)


def one_hot_product(values: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Sum by bucket as the product of one-hot codes `[B, G K, L]` and behaviours."""
    keys = codes(values, planes, tau)
    hot: Tensor = (keys[..., None] == torch.arange(1 << tau, device=keys.device)).flatten(2)
    table = (hot.to(values.dtype).mT @ values).float()
    return table.view(len(values), keys.shape[2], 1 << tau, values.shape[2])


def gather(table: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Gather each candidate's G rows, normalise and average them."""
    rows = _table_rows(codes(queries, planes, tau), tau)
    found = table.view(-1, table.shape[3])[rows]
    return normalize(found, dim=-1).mean(2)


def gather_units(table: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Normalise each row once, then gather and average."""
    rows = _table_rows(codes(queries, planes, tau), tau)
    return normalize(table, dim=-1).view(-1, table.shape[3])[rows].mean(2)


def scatter_and_gather(values: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Build the whole table, then read it: the usual form of SDIM."""
    return gather(scatter(values, planes, tau), queries, planes, tau).to(values.dtype)


def masked_einsum(
    values: Tensor, queries: Tensor, planes: Tensor, tau: int, mask: Tensor | None = None
) -> Tensor:
    """Sum by the mask of collisions `[B, L, Q, G]`; behaviours outside `mask` `[B, L]` are none."""
    keys, wanted = codes(values, planes, tau), codes(queries, planes, tau)
    shared = keys[:, :, None] == wanted[:, None]
    if mask is not None:
        shared = shared & mask[..., None, None]
    sums = torch.einsum("blr,bld->brd", shared.flatten(2).to(values.dtype), values)
    found = sums.unflatten(1, shared.shape[2:])
    return normalize(found.float(), dim=-1).mean(2).to(values.dtype)


def one_product_einsum(values: Tensor, queries: Tensor, planes: Tensor, tau: int) -> Tensor:
    """Hash by one product in the dtype of the behaviours, whose digits the planes have."""
    return masked_einsum(values, queries, planes.to(values.dtype), tau)


def one_group(values: Tensor, keys: Tensor, wanted: Tensor, cuts: Tensor) -> Tensor:
    """Return unit sums `[B, Q, D]` of one group by its mask `[B, Q, L]`."""
    seen = torch.arange(values.shape[1], device=values.device) < cuts[..., None]
    shared = seen & (keys[:, None] == wanted[..., None])
    return normalize((shared.to(values.dtype) @ values).float(), dim=-1)


def masked_groups(
    values: Tensor,
    queries: Tensor,
    cuts: Tensor,
    planes: Tensor,
    tau: int,
    group: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = one_group,
) -> Tensor:
    """Add up the groups, one mask `[B, Q, L]` at a time."""
    # Contiguous by group, for compiled code wants aligned tensors.
    keys, wanted = (codes(x, planes, tau).permute(2, 0, 1).contiguous() for x in (values, queries))
    total = torch.zeros(queries.shape, device=queries.device)
    for key, want in zip(keys, wanted, strict=True):
        total = total + group(values, key, want, cuts)
    return (total / len(keys)).to(values.dtype)


def sdpa(values: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
    """Exact attention by torch, one head."""
    keys = values[:, None]
    return scaled_dot_product_attention(queries[:, None], keys, keys, attn_mask=mask)[:, 0]


def flex(values: Tensor, queries: Tensor, mask: BlockMask) -> Tensor:
    """Exact attention by flex_attention, `[B, 1, L, D]` and `[B, 1, Q, D]`."""
    result = flex_attention(queries, values, values, block_mask=mask)
    assert isinstance(result, Tensor)
    return result[:, 0]


def activation_unit(values: Tensor, query: Tensor, *weights: Tensor) -> Tensor:
    """Weigh each behaviour by DIN's network of both, their difference and product, and sum."""
    into, bias, out = weights
    q = query.expand_as(values)
    hidden = torch.sigmoid(torch.cat([q, values, q - values, q * values], -1) @ into + bias)
    return (hidden @ out).mT @ values


SCATTER = Side(
    name="scatter",
    function=scatter_and_gather,
    arguments=lambda b: (b.values, b.queries, b.planes, b.shape.tau),
    define=definitions.attend_at,
)
EINSUM = Side(
    name="einsum",
    function=masked_einsum,
    arguments=lambda b: (b.values, b.queries, b.planes, b.shape.tau),
    define=definitions.attend_at,
)
ONE_PRODUCT = Side(
    name="one-product einsum",
    function=one_product_einsum,
    arguments=lambda b: (b.values, b.queries, b.planes, b.shape.tau),
    define=definitions.attend_at,
)
SCATTER_TABLE = Side(
    name="scatter",
    function=scatter,
    arguments=lambda b: (b.values, b.planes, b.shape.tau),
    define=definitions.encode,
)
ONE_HOT = Side(
    name="one-hot",
    function=one_hot_product,
    arguments=lambda b: (b.values, b.planes, b.shape.tau),
    define=definitions.encode,
)
GATHER = Side(
    name="gather",
    function=gather,
    arguments=lambda b: (b.table, b.queries, b.planes, b.shape.tau),
    define=definitions.read,
    leaves=("table",),
)
GATHER_UNITS = Side(
    name="gather units",
    function=gather_units,
    arguments=lambda b: (b.table, b.queries, b.planes, b.shape.tau),
    define=definitions.read,
    leaves=("table",),
)
GROUPS = Side(
    name="masks",
    function=masked_groups,
    arguments=lambda b: (b.values, b.queries, b.cuts, b.planes, b.shape.tau),
    define=definitions.attend_at,
)
SDPA = Side(
    name="SDPA",
    function=sdpa,
    arguments=lambda b: (b.values, b.queries, None),
    define=definitions.exact_attention_at,
    leaves=("values", "queries"),
)


def _boolean_mask(b: Batch) -> Tensor:
    return (torch.arange(b.shape.length, device=b.cuts.device) < b.cuts[..., None])[:, None]


SDPA_MASKED = Side(
    name="SDPA of a mask",
    function=sdpa,
    arguments=lambda b: (b.values, b.queries, _boolean_mask(b)),
    define=definitions.exact_attention_at,
    leaves=("values", "queries"),
)


def _block_mask(b: Batch) -> BlockMask:
    cuts = b.cuts

    def before_cut(user: Tensor, _: Tensor, query: Tensor, behaviour: Tensor) -> Tensor:
        return behaviour < cuts[user, query]

    shape = b.shape
    return create_block_mask(
        before_cut, shape.users, None, shape.queries, shape.length, device=str(cuts.device)
    )


FLEX = Side(
    name="flex",
    function=flex,
    # With their head already, for the compiler refuses views of what it was given.
    arguments=lambda b: (b.values[:, None], b.queries[:, None], _block_mask(b)),
    define=definitions.exact_attention_at,
    leaves=("values", "queries"),
)


def _unit_weights(b: Batch) -> tuple[nn.Parameter, ...]:
    random = torch.Generator().manual_seed(1)
    size = b.shape.size
    shapes = (4 * size, DIN_HIDDEN), (DIN_HIDDEN,), (DIN_HIDDEN, 1)
    drawn = (torch.randn(shape, generator=random) * shape[0] ** -0.5 for shape in shapes)
    # As stored in the dtype that is timed, also where a definition reads them in float64.
    return tuple(nn.Parameter(w.to(b.dtype).to(b.values)) for w in drawn)


DIN = Side(
    name="DIN unit",
    function=activation_unit,
    arguments=lambda b: (b.values, b.queries, *_unit_weights(b)),
    define=lambda b: activation_unit(b.values, b.queries, *_unit_weights(b)),
    leaves=("values", "queries"),
    same=False,
)


def groups_compiled() -> Side:
    """Return the masks by group with the work of one group compiled."""
    function = partial(masked_groups, group=torch.compile(one_group, dynamic=False))
    return Side(
        name=f"{GROUPS.name}, compiled",
        function=function,
        arguments=GROUPS.arguments,
        define=GROUPS.define,
        compiled=True,
    )


def _table_rows(keys: Tensor, tau: int) -> Tensor:
    """Return rows of the flattened table, `[B, ..., G]` int64."""
    users, groups = keys.shape[0], keys.shape[-1]
    first = torch.arange(users * groups, device=keys.device).view(users, 1, groups)
    return first * (1 << tau) + keys
