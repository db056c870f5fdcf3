"""Train-step speed of SDIM and of exact attention over whole users, and of SDIM per sample.

One step is forward and backward over a batch, from embedded behaviours to their gradient, codes
included; exact attention gives the gradient of its queries too. The usual form repeats the
history for each sample, padded to the longest of the batch, and masks `[S, L, G]` collisions; its
repeated embeddings are taken as given and not timed. All sides run in turn in one process and on
as many threads; the best of several rounds counts, and ratios are of one run. Memory is the peak
resident growth over one step in a fresh process (Linux).

    python experiments/bench_sdim_training.py [--length 2000] [--threads 1]
"""

import argparse
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hashtab.kernels import dense, sdim

SIZE, PLANES, TAU = 32, 80, 5
REQUESTS, CANDIDATES = (
    64,
    5,
)  # a household of Complete Journey: 63 requests, 1 positive, 4 negatives
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
ROUNDS = 9


@dataclass(frozen=True)
class Users:
    """Embedded whole users of one length, their queries at random cuts."""

    values: Tensor
    offsets: Tensor
    queries: Tensor
    query_offsets: Tensor
    cuts: Tensor
    planes: Tensor

    @classmethod
    def draw(cls, users: int, length: int, requests: int = REQUESTS) -> Self:
        """Draw `users` histories of `length`, each asked `requests` x CANDIDATES times."""
        torch.manual_seed(0)
        queries = requests * CANDIDATES
        cuts = torch.randint(1, length + 1, (users, requests)).sort().values
        return cls(
            values=torch.randn(users * length, SIZE, requires_grad=True),
            offsets=torch.arange(users + 1) * length,
            queries=torch.randn(users * queries, SIZE, requires_grad=True),
            query_offsets=torch.arange(users + 1) * queries,
            cuts=cuts.repeat_interleave(CANDIDATES, dim=1).flatten(),
            planes=torch.randn(SIZE, PLANES),
        )


def hash_sampled(u: Users) -> Tensor:
    """Walk each history once for all queries."""
    return sdim.attend_at(u.values, u.offsets, u.queries, u.query_offsets, u.cuts, u.planes, TAU)


def exact(u: Users) -> Tensor:
    """Softmax attention of the same queries over the same histories."""
    return dense.target_attention_at(u.queries, u.query_offsets, u.cuts, u.values, u.offsets)


def per_sample(history: Tensor, mask: Tensor, candidates: Tensor, planes: Tensor) -> Tensor:
    """SDIM as it is usually computed, from `[S, L, D]`, `[S, L]` and `[S, D]`."""
    powers = 2 ** torch.arange(TAU)
    codes, wanted = (
        ((x.detach() @ planes > 0).unflatten(-1, (-1, TAU)) * powers).sum(-1)
        for x in (history, candidates)
    )
    shared = (codes == wanted[:, None]) & mask[..., None]
    sums = torch.einsum("slg,sld->sgd", shared.to(history.dtype), history)
    return normalize(sums, dim=-1).mean(1)


def padded_samples(u: Users, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Repeat the first user's history for `n` samples spread over its cuts."""
    length = int(u.offsets[1])
    rows = torch.linspace(0, REQUESTS * CANDIDATES - 1, n).long()
    longest = int(u.cuts[rows].max())
    mask = torch.arange(longest) < u.cuts[rows, None]
    history = u.values[:length].detach()[:longest].expand(n, -1, -1) * mask[..., None]
    return history.contiguous().requires_grad_(), mask, u.queries[rows].detach()


def step_seconds(steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Return each side's best forward and backward of several rounds, in turn."""
    best = dict.fromkeys(steps, math.inf)
    for _ in range(ROUNDS):
        for name, forward in steps.items():
            start = time.perf_counter()
            forward().sum().backward()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def compare_at(length: int) -> None:
    """Print samples a second of all three at one length."""
    users, samples = 4, 32
    u = Users.draw(users, length)
    history, mask, candidates = padded_samples(u, samples)
    seconds = step_seconds(
        {
            "attend_at, whole users": lambda: hash_sampled(u),
            "exact attention, whole users": lambda: exact(u),
            "SDIM per sample, padded": lambda: per_sample(history, mask, candidates, u.planes),
        }
    )
    batches = (len(u.queries), len(u.queries), samples)
    rates = {name: n / seconds[name] for n, name in zip(batches, seconds, strict=True)}
    mine = next(iter(rates.values()))
    print(f"T = {length:,}: {users} users x {REQUESTS} requests x {CANDIDATES} candidates")
    for name, rate in rates.items():
        print(f"  {name:<30}{rate:>12,.0f} samples/s   attend_at is {mine / rate:>8,.1f} x")
    own = next(iter(seconds.values())) / users
    print(
        f"  attend_at takes {own * 1e3:.2f} ms a user; floor {floor_seconds(length) * 1e3:.2f} ms: "
        "the two hash products by BLAS, and each\n"
        "  addition of a row at this core's speed of adding doubles in its second-level cache"
    )


def floor_seconds(length: int) -> float:
    """Estimate one user's step from the machine's own speed of products and additions."""
    queries, groups = REQUESTS * CANDIDATES, PLANES // TAU
    x, planes = torch.randn(length + queries, SIZE), torch.randn(SIZE, PLANES)
    a, b = torch.zeros(2, 65_536, dtype=torch.float64)
    product, addition = math.inf, math.inf
    for _ in range(50):
        start = time.perf_counter()
        x @ planes
        middle = time.perf_counter()
        a += b
        product = min(product, middle - start)
        addition = min(addition, time.perf_counter() - middle)
    # A behaviour is added, taken out, and its gradient collected; a query reads, and adds once.
    rows = (3 * length + 3 * queries) * groups
    return product + rows * SIZE * addition / len(a)


def sweep(title: str, batches: dict[int, Users]) -> None:
    """Print both sides for each batch, and where SDIM overtakes exact attention."""
    print(f"\n{title:>20}{'attend_at':>12}{'exact':>12}  samples/s    ratio")
    ratios: dict[int, float] = {}
    for x, u in batches.items():
        seconds = step_seconds({"sdim": partial(hash_sampled, u), "exact": partial(exact, u)})
        ratios[x] = seconds["exact"] / seconds["sdim"]
        rates = [len(u.queries) / s for s in seconds.values()]
        print(f"{x:>20,}{rates[0]:>12,.0f}{rates[1]:>12,.0f}{ratios[x]:>20.2f}")
    if min(ratios.values()) > 1:
        print("attend_at is the faster everywhere")
    for (x0, low), (x1, high) in pairwise(ratios.items()):
        if low <= 1 < high:
            print(f"they cross near {x0 + (1 - low) / (high - low) * (x1 - x0):,.0f}")


def peak_growth(side: str, length: int, requests: int) -> float:
    """Return the MB by which the peak resident set grows over one step."""
    torch.set_num_threads(1)
    forward = hash_sampled if side == "sdim" else exact
    forward(Users.draw(1, 16, 1)).sum().backward()
    u = Users.draw(1, length, requests)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status_kb("VmRSS")
    forward(u).sum().backward()
    return (_status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def memory() -> None:
    """Print peak growth against history and against requests, each measure in a fresh process."""
    cases = [(n, 64) for n in (50_000, 100_000, 200_000)]
    cases += [(100_000, n) for n in (640, 6_400)]
    context = multiprocessing.get_context("spawn")
    print(
        "\none user, peak growth of a step in MB\n"
        f"{'behaviours':>11}{'queries':>9}{'attend_at':>11}"
    )
    with context.Pool(1, maxtasksperchild=1) as pool:
        for length, requests in cases:
            grown = pool.apply(peak_growth, ("sdim", length, requests))
            print(f"{length:>11,}{requests * CANDIDATES:>9,}{grown:>11.1f}")
    queries, groups = CANDIDATES, PLANES // TAU
    result = queries * (2 * SIZE * 4 + groups * 4)
    print(
        f"of which results, their gradients and codes take {result / 1e3:.1f} kB a request;\n"
        f"scores of all pairs would take {queries * 100_000 * 4 / 1e6:.0f} MB a request at 100,000"
    )


def _machine(threads: int) -> str:
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    name = models[0].split(":")[1].strip() if models else platform.processor()
    return (
        f"{name}, {threads} thread(s), torch {torch.__version__}, python {sys.version.split()[0]}"
    )


def main() -> None:
    """Measure all and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2000, help="behaviours of a user")
    parser.add_argument("--threads", type=int, default=1, help="threads of every side")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    print(_machine(settings.threads))
    print(f"D {SIZE}, M {PLANES}, tau {TAU}, float32\n")
    compare_at(settings.length)
    histories = {length: Users.draw(max(1, 4096 // length), length) for length in LENGTHS}
    sweep(f"T ({REQUESTS} requests)", histories)
    asked = {n: Users.draw(4, settings.length, n) for n in (1, 2, 4, 8, 16, 64, 256)}
    sweep(f"requests (T = {settings.length:,})", asked)
    memory()


if __name__ == "__main__":
    main()
