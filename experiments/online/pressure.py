"""What happens under pressure: ten times the capacity for a minute, and 70% of it for long."""

import time

import numpy as np

from experiments.online.bench import NAIVE, SCORER, Bench, say, send
from experiments.online.client import Load, Measured, drive, in_own_process
from experiments.online.report import Cell, Figures
from experiments.online.servers import Server

TIMES, SHARE = 10, 0.7
_CONNECTIONS = 512  # of the clients that overload: a rejected one asks again on the same
_SAMPLE_S = 2.0
_WARM = 0.1  # of a soak, before memory is looked at


def overload(bench: Bench, seconds: float) -> Figures:
    """Send ten times what each server can do, and see what it still does, and how it is after."""
    bench.add_tables()
    rows: list[dict[str, Cell]] = []
    for name in (SCORER, NAIVE):
        with bench.server(name) as server:
            bench.capacity(server, name)  # warms up
            capacity = bench.capacity(server, name)
            alone = Load(
                address=server.address, requests=bench.requests(name), seconds=bench.seconds
            )
            before = send(alone)
            say(f"overload: {name}, {TIMES} x {capacity:.0f} requests/s for {seconds:g} s")
            load = Load(
                address=server.address,
                requests=bench.requests(name),
                connections=_CONNECTIONS,
                seconds=seconds,
                rate=TIMES * capacity,
                give_up=True,
            )
            during, after = send(load), send(alone)
        rows.append(_overload_row(name, capacity, before, during, after))
    return Figures(
        title=f"{TIMES} times the capacity for {seconds:g} s",
        notes=[
            "capacity: closed loop of four connections; asked: due, however fast answers come; "
            f"left out: due while all of the client's {_CONNECTIONS} connections waited for an "
            "answer",
            "good answers a second count over the whole time until the last answer",
            f"speed after: p50 of one connection in the {bench.seconds:g} s right after, over "
            "that before",
        ],
        rows=rows,
    )


def _overload_row(
    name: str, capacity: float, before: Measured, during: Measured, after: Measured
) -> dict[str, Cell]:
    rejected = np.isin(during.statuses, (429, 503))
    due = len(during.statuses) + during.left_out
    return {
        "server": name,
        "capacity/s": capacity,
        "asked/s": due / during.wall_s,
        "good/s": during.rate,
        "good / capacity": during.rate / capacity,
        "good p50 ms": during.milliseconds(50),
        "good p99 ms": during.milliseconds(99),
        "rejected": int(rejected.sum()),
        "rejected p50 ms": during.milliseconds(50, rejected),
        "rejected p99 ms": during.milliseconds(99, rejected),
        "broken or other": int((~during.good & ~rejected).sum()),
        "left out": during.left_out,
        "p50 after / before": after.milliseconds(50) / before.milliseconds(50),
    }


def soak(bench: Bench, minutes: float) -> Figures:
    """Hold 70% of the capacity and watch errors and memory."""
    bench.add_tables()
    rows: list[dict[str, Cell]] = []
    with bench.server(SCORER) as server:
        bench.capacity(server, SCORER)
        capacity = bench.capacity(server, SCORER)
        load = Load(
            address=server.address,
            requests=bench.requests(SCORER),
            connections=16,
            seconds=60 * minutes,
            rate=SHARE * capacity,
        )
        say(f"soak: {load.rate:.0f} requests/s for {minutes:g} minutes")
        measured, times, memory = _watch(server, load)
    settled = times >= _WARM * load.seconds
    slope = float(np.polyfit(times[settled], memory[settled], 1)[0]) if settled.sum() > 1 else 0.0
    rows.append(
        {
            "server": SCORER,
            "minutes": minutes,
            "requests/s": measured.rate,
            "requests": len(measured.statuses),
            "errors": int((~measured.good).sum()),
            "p50 ms": measured.milliseconds(50),
            "p99 ms": measured.milliseconds(99),
            "memory MB at the end": float(memory[-1]),
            "growth MB by linear fit": slope * load.seconds,
        }
    )
    return Figures(
        title=f"{SHARE:.0%} of the capacity for {minutes:g} minutes",
        notes=[
            "latency counts from when a request was due",
            f"resident memory every {_SAMPLE_S:g} s; the fit leaves out the first {_WARM:.0%} and "
            "is the slope times the whole time",
        ],
        rows=rows,
    )


def _watch(server: Server, load: Load) -> tuple[Measured, np.ndarray, np.ndarray]:
    """Send a load; return with it the seconds of each look at the memory, and its MB."""
    times: list[float] = []
    memory: list[float] = []
    with in_own_process() as process:
        coming, begin = process.submit(drive, load), time.monotonic()
        while not coming.done():
            times.append(time.monotonic() - begin)
            memory.append(server.memory_mb())
            if len(times) % 30 == 0:
                say(f"soak: {times[-1] / 60:.1f} of {load.seconds / 60:g} min, {memory[-1]:.1f} MB")
            time.sleep(_SAMPLE_S)
        return coming.result(), np.array(times), np.array(memory)
