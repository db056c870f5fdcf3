"""Native sparse attention (arXiv 2502.11089), the public functions.

A query attends three times, and gates add the results: to compressed blocks of all positions, to
the positions of a few blocks that it selects by its attention to the compressed ones, and to a
window around itself. Query heads of a group share one head of keys and values and one selection.

- Compression: blocks of `block` positions every `stride`; the last may be partial (see `blocks`).
  A causal query sees whole blocks that end at or before it (eq. 7); a bidirectional one sees all,
  the partial one too.
- Selection: a block of `select_block` positions is as important as the weights, summed over the
  group, of the compressed blocks that share positions with it (eq. 9, 10). A query selects its own
  block first and then the most important, up to `n_select`; equal ones by position. Importance is
  compared in half precision, so that what ties but for rounding ties everywhere. Causal queries see
  nothing after themselves, also within a block. The choice is constant for autograd.
- Window: positions less than `window` away, as in `dense.window_attention`.

Where a query sees nothing, a branch gives zeros with zero gradient. Padding is never seen, padded
queries give zeros, and results do not depend on how far a batch is padded.

`native_sparse_attention` and `selected_blocks` take `impl`: `"native"` (C on CPUs; time and memory
of selection and window grow with T), `"reference"` (the definition over all pairs, on any device)
or `"auto"`, which is native code on CPUs where it builds, and otherwise, and in `torch.export`, the
definition. A choice that cannot run raises RuntimeError with the reason. Tensors may be float16,
bfloat16, float32 or float64; scores and sums are float32 (float64 for float64 values), also under
autocast.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hashtab.kernels.core import checks
from hashtab.kernels.core.dispatch import Impl, check_impl, native_builds, use_native
from hashtab.kernels.core.library import apply
from hashtab.kernels.core.precision import sums_dtype
from hashtab.kernels.nsa import ops as _ops  # noqa: F401  registers torch.ops.hashtab.nsa_*
from hashtab.kernels.nsa import reference
from hashtab.kernels.nsa.blocks import Layout, check_blocks, compress_mean
from hashtab.kernels.nsa.native import SOURCE
from hashtab.kernels.nsa.reference import Keys

_hashtab = torch.ops.hashtab
_native_builds = native_builds(SOURCE)

Pair = Tensor | tuple[Tensor, Tensor]


def native_sparse_attention(
    q: Tensor,
    k: Pair,
    v: Pair,
    *,
    gates: Tensor,
    block: int,
    stride: int,
    select_block: int,
    n_select: int,
    window: int,
    causal: bool = True,
    lengths: Tensor | None = None,
    k_compressed: Tensor | None = None,
    v_compressed: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the gated sum of attention to compressed blocks, selected blocks and a window.

    Args:
        q: `[B, T, H, D]`, queries; H a multiple of Hkv: heads i H / Hkv up to (i + 1) H / Hkv
            share head i of keys and values.
        k: `[B, T, Hkv, D]`, keys of selection and window; or a pair, one for each.
        v: `[B, T, Hkv, Dv]`, values of selection and window; or a pair.
        gates: `[B, T, H, 3]`, factors of compression, selection and window, already activated.
        block: positions of a compression block, l in the paper.
        stride: distance between beginnings of compression blocks, 1 .. block; d in the paper.
        select_block: positions of a selection block, l' in the paper.
        n_select: selection blocks of a query, its own included; n in the paper.
        window: positions that a query sees at most on each side, its own included.
        causal: whether later positions are hidden.
        lengths: `[B]` int64, positions of each sequence that are no padding; None for all.
        k_compressed: `[B, N, Hkv, D]`, compressed keys, N = len(blocks(T, block, stride)); those of
            padding alone are never seen. The means of the (selection) keys when None.
        v_compressed: `[B, N, Hkv, Dv]`, compressed values; means as well when None.
        scale: factor of the scores; 1 / sqrt(D) when None.
        impl: which implementation; see the module.

    Returns:
        `[B, T, H, Dv]` in the dtype of `v`.

    Raises:
        RuntimeError: `impl` cannot run.
        TypeError: a dtype is wrong.
        ValueError: shapes, sizes or lengths are wrong.
    """
    check_impl(impl)
    (k, k_window), (v, v_window) = _pair("k", k), _pair("v", v)
    layout = Layout(q.shape[1], block, stride, select_block, n_select, window, causal)
    _check(q, k, layout, lengths, k_compressed)
    _check_values(k, v)
    _check_alike("k", k, k_window)
    _check_alike("v", v, v_window)
    _check_compressed("v_compressed", v_compressed, v, layout)
    _check_gates(gates, q)
    compressed = Keys(
        _compressed(k, k_compressed, layout, lengths), _compressed(v, v_compressed, layout, lengths)
    )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    keys = [*compressed, k, v, k_window, v_window]
    if _use_native(impl, q.device):
        return _by_native(q, keys, gates, lengths, scale, layout).to(v.dtype)
    return _by_definition(q, keys, gates, lengths, scale, layout).to(v.dtype)


def selected_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    n_select: int,
    causal: bool = True,
    lengths: Tensor | None = None,
    k_compressed: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Return the blocks that `native_sparse_attention` selects from the same arguments.

    Args:
        q: `[B, T, H, D]`, queries.
        k: `[B, T, Hkv, D]`, keys of selection.
        block: positions of a compression block.
        stride: distance between beginnings of compression blocks, 1 .. block.
        select_block: positions of a selection block.
        n_select: selection blocks of a query, its own included.
        causal: whether later positions are hidden.
        lengths: `[B]` int64, positions of each sequence that are no padding; None for all.
        k_compressed: `[B, N, Hkv, D]`, compressed keys; the means of the keys when None.
        scale: factor of the scores; 1 / sqrt(D) when None.
        impl: which implementation; see the module.

    Returns:
        `[B, T, Hkv, n_select]` int64: the query's own block, then others by falling importance,
        then -1 where there are no more; all -1 for padding. Block j holds the positions from
        j select_block up to the next block.

    Raises:
        RuntimeError: `impl` cannot run.
        TypeError: a dtype is wrong.
        ValueError: shapes, sizes or lengths are wrong.
    """
    check_impl(impl)
    layout = Layout(q.shape[1], block, stride, select_block, n_select, 1, causal)
    _check(q, k, layout, lengths, k_compressed)
    q, k = q.detach(), k.detach()
    compressed = _compressed(k, k_compressed, layout, lengths).detach()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if _use_native(impl, q.device):
        # Values do not matter here, so there is as little of them as there can be.
        keys = [compressed, compressed[..., :1], k, k[..., :1], k, k[..., :1]]
        gates = q.new_zeros(*q.shape[:3], 3)
        chosen: Tensor = _hashtab.nsa_attend(q, keys, gates, lengths, scale, *layout[1:])[3]
        return chosen
    ranks = _importance(q, compressed, layout, lengths, scale)
    chosen = reference.choose(ranks, layout, lengths).transpose(1, 2)
    return torch.nn.functional.pad(chosen, (0, n_select - chosen.shape[3]), value=-1)


def importance(
    q: Tensor,
    k: Tensor,
    *,
    block: int,
    stride: int,
    select_block: int,
    causal: bool = True,
    lengths: Tensor | None = None,
    k_compressed: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return how important each selection block is to each query, by the definition.

    Args:
        q: `[B, T, H, D]`, queries.
        k: `[B, T, Hkv, D]`, keys of selection.
        block: positions of a compression block.
        stride: distance between beginnings of compression blocks, 1 .. block.
        select_block: positions of a selection block.
        causal: whether later positions are hidden.
        lengths: `[B]` int64, positions of each sequence that are no padding; None for all.
        k_compressed: `[B, N, Hkv, D]`, compressed keys; the means of the keys when None.
        scale: factor of the scores; 1 / sqrt(D) when None.

    Returns:
        `[B, T, Hkv, J]` float32 (float64 for float64 keys), J = ceil(T / select_block): eq. 9
        summed over the group, before a query's own block is put first. No gradient.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: shapes, sizes or lengths are wrong.
    """
    layout = Layout(q.shape[1], block, stride, select_block, 1, 1, causal)
    _check(q, k, layout, lengths, k_compressed)
    q, k = q.detach(), k.detach()
    compressed = _compressed(k, k_compressed, layout, lengths).detach()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _importance(q, compressed, layout, lengths, scale).transpose(1, 2).contiguous()


def _importance(
    q: Tensor, compressed: Tensor, layout: Layout, lengths: Tensor | None, scale: float
) -> Tensor:
    real = sums_dtype(compressed.dtype)
    with torch.autocast(q.device.type, enabled=False):
        grouped = scale * q.to(real).unflatten(2, (compressed.shape[2], -1))
        weights = reference.compressed_weights(grouped, compressed.to(real), layout, lengths)
        return reference.importance(weights, layout)


def _pair(name: str, given: Pair) -> tuple[Tensor, Tensor]:
    if isinstance(given, Tensor):
        return given, given
    if len(given) != 2:
        raise ValueError(f"{name} must be a tensor or two, got {len(given)}")
    return given[0], given[1]


def _compressed(x: Tensor, given: Tensor | None, layout: Layout, lengths: Tensor | None) -> Tensor:
    if given is not None:
        return given
    with torch.autocast(x.device.type, enabled=False):
        return compress_mean(x.to(sums_dtype(x.dtype)), layout.block, layout.stride, lengths)


def _check(
    q: Tensor, k: Tensor, layout: Layout, lengths: Tensor | None, k_compressed: Tensor | None
) -> None:
    checks.check_rows("q", q, "[B, T, H, D]")
    checks.check_rows("k", k, "[B, T, Hkv, D]", q.shape[3])
    check_blocks(layout.tokens, layout.block, layout.stride)
    for name in ("select_block", "n_select", "window"):
        if getattr(layout, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={getattr(layout, name)}")
    if k.shape[:2] != q.shape[:2]:
        raise ValueError(f"q and k must agree in B and T, got {tuple(q.shape)}, {tuple(k.shape)}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"H must be a multiple of Hkv, got H = {q.shape[2]}, Hkv = {k.shape[2]}")
    checks.check_same_device(q=q, k=k)
    _check_lengths(lengths, q)
    _check_compressed("k_compressed", k_compressed, k, layout)


def _check_lengths(lengths: Tensor | None, q: Tensor) -> None:
    if lengths is None:
        return
    checks.check_index("lengths", lengths)
    checks.check_same_device(q=q, lengths=lengths)
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths must be [B] for B = {q.shape[0]}, got {tuple(lengths.shape)}")
    if not torch.compiler.is_compiling():  # a graph cannot hold a check of values
        checks.check_lengths(lengths, q.shape[1])


def _check_compressed(name: str, given: Tensor | None, like: Tensor, layout: Layout) -> None:
    if given is None:
        return
    checks.check_rows(name, given, "[B, N, Hkv, D]")
    checks.check_same_device(q=like, **{name: given})
    shape = (like.shape[0], layout.n_blocks, *like.shape[2:])
    if given.shape != shape:
        raise ValueError(
            f"{name} must be {shape}, one row for each of the {layout.n_blocks} blocks of "
            f"block={layout.block}, stride={layout.stride}, got {tuple(given.shape)}"
        )


def _check_values(k: Tensor, v: Tensor) -> None:
    checks.check_rows("v", v, "[B, T, Hkv, Dv]")
    checks.check_same_device(k=k, v=v)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k and v must agree in B, T and Hkv, got {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _check_alike(name: str, selection: Tensor, window: Tensor) -> None:
    checks.check_same_device(**{f"{name} of selection": selection, f"{name} of window": window})
    if window.shape != selection.shape or window.dtype != selection.dtype:
        raise ValueError(
            f"{name} of selection and of the window must be alike, got {tuple(selection.shape)} "
            f"{selection.dtype} and {tuple(window.shape)} {window.dtype}"
        )


def _check_gates(gates: Tensor, q: Tensor) -> None:
    checks.check_rows("gates", gates, "[B, T, H, 3]", 3)
    checks.check_same_device(q=q, gates=gates)
    if gates.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"gates must be [B, T, H, 3] for the q of {tuple(q.shape)}, got {tuple(gates.shape)}"
        )


def _use_native(impl: str, device: torch.device) -> bool:
    if impl == "auto" and (device.type != "cpu" or torch.compiler.is_exporting()):
        return False
    if impl != "reference" and device.type == "cpu" and _native_builds():
        return True
    return use_native(impl, device, SOURCE)


def _by_definition(
    q: Tensor,
    keys: list[Tensor],
    gates: Tensor,
    lengths: Tensor | None,
    scale: float,
    layout: Layout,
) -> Tensor:
    real = sums_dtype(keys[3].dtype)
    wide = [x.to(real) for x in keys]
    compressed, selection, window = (Keys(wide[i], wide[i + 1]) for i in (0, 2, 4))
    with torch.autocast(q.device.type, enabled=False):
        return reference.attend(
            q.to(real), compressed, selection, window, gates.to(real), layout, lengths, scale
        )


def _by_native(
    q: Tensor,
    keys: list[Tensor],
    gates: Tensor,
    lengths: Tensor | None,
    scale: float,
    layout: Layout,
) -> Tensor:
    return apply(_Attend, q, *keys, gates, lengths, scale, *layout[1:])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        (q, *keys, gates), settings = arguments[:8], arguments[8:]
        out, branches, log_sums, chosen = _hashtab.nsa_attend(q, keys, gates, *settings)
        ctx.save_for_backward(branches, log_sums, chosen, q, *keys, gates, settings[0])
        ctx.settings = settings[1:]
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        branches, log_sums, chosen, q, *keys, gates, lengths = ctx.saved_tensors
        found = _hashtab.nsa_attend_backward(
            grads[0], branches, log_sums, chosen, q, keys, gates, lengths, *ctx.settings
        )
        given = (q, *keys, gates)
        result = [grad.to(x.dtype) for grad, x in zip(found, given, strict=True)]
        return *result, *[None] * 8
