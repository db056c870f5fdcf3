"""Whatever way events arrive, log and tables come to the bits of a rebuild from all of them."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hashtab.serving.bse.applying import Outcome, apply, expire, from_log
from hashtab.serving.bse.model import Model
from hashtab.serving.store import (
    Change,
    CorruptRecordError,
    Event,
    KeptModel,
    Plan,
    StoreError,
    TableStore,
    User,
    unpack,
)
from hashtab.serving.store.delta import DELTA_LIMIT
from hashtab.serving.store.keys import delta_key, user_key
from hashtab.serving.store.record import open_record, unpack_record
from tests.serving.bse.conftest import events_of, written_whole
from tests.serving.bse.made_up import EVERY_KIND

NOW = 1_000
users = itertools.count()
ways = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def plan_of(model: Model, count: int | None = None, window_us: int | None = None) -> Plan:
    kept = KeptModel(bundle="", digest="", state="live", since=0)
    return Plan(count=count, window_us=window_us, models={model.fingerprint.hex(): kept})


def deliver(
    store: TableStore, model: Model, plan: Plan, events: list[Event], now: int = NOW
) -> list[Outcome]:
    models = {model.fingerprint: model}
    return store.change(
        sorted({event.user for event in events}, key=str),
        lambda change: apply(change, events, models, plan, now),
    )


def retained(events: list[Event], plan: Plan) -> list[Event]:
    kept = sorted(events, key=lambda event: event.order)
    if plan.window_us is not None:
        kept = [event for event in kept if event.time >= NOW - plan.window_us]
    return kept if plan.count is None else kept[-plan.count :]


def check_rebuilt(store: TableStore, model: Model, plan: Plan, events: list[Event]) -> None:
    """Log and record of the events' one user are those of a rebuild from what is retained."""
    user, expected = events[0].user, retained(events, plan)
    assert store.events(user) == expected
    with store.reading() as log:
        (head,) = log.heads([user])
        (stored,) = log.records(model.fingerprint, [user])
    if head is None:
        assert stored is None
        return
    assert head.events == len(expected)
    assert head.earliest == min((event.time for event in expected), default=0)
    assert written_whole(stored, model) == from_log(model, user, expected, head)


@pytest.mark.parametrize("limits", [{}, {"count": 9}, {"window_us": 12}, {"count": 20}])
@given(data=st.data())
@ways
def test_any_order_any_cut_and_any_duplicates_give_the_bits_of_a_rebuild(
    limits: dict[str, int], data: st.DataObject, store: TableStore, model: Model
) -> None:
    events = events_of(next(users), data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99)))
    chance = random.Random(data.draw(st.integers(0, 99)))
    deliveries = [*events, *chance.choices(events, k=len(events) // 2)]
    chance.shuffle(deliveries)
    plan = plan_of(model, **limits)
    accepted = 0
    while deliveries:
        cut = chance.randint(1, 30)
        some, deliveries = deliveries[:cut], deliveries[cut:]
        accepted += deliver(store, model, plan, some).count(Outcome.ACCEPTED)
        if chance.random() < 0.2:  # delivered, and the answer lost
            deliver(store, model, plan, some)
    check_rebuilt(store, model, plan, events)
    if not limits:
        assert accepted == len(events)


@given(count=st.integers(1, 40), seed=st.integers(0, 99), window=st.integers(1, 25))
@ways
def test_what_expires_leaves_log_and_table_as_if_it_had_never_been(
    count: int, seed: int, window: int, store: TableStore, model: Model
) -> None:
    events = events_of(next(users), count, seed)
    deliver(store, model, plan_of(model), events)
    plan = plan_of(model, window_us=window)
    models = {model.fingerprint: model}
    user = events[0].user
    gone = store.change([user], lambda change: expire(change, [user], models, plan, NOW))
    assert gone == count - len(retained(events, plan))
    check_rebuilt(store, model, plan, events)
    late = [event for event in events if event.time < NOW - window]
    assert set(deliver(store, model, plan, late)) <= {Outcome.LATE}
    check_rebuilt(store, model, plan, events)


@pytest.mark.parametrize(
    "plans",
    [
        [Plan(window_us=25)],
        [Plan(count=9)],
        [Plan(count=9, window_us=15)],
        [Plan()],
        [Plan(window_us=25), Plan(window_us=15), Plan(count=5), Plan()],
    ],
)
@given(seed=st.integers(0, 2**32))
@ways
def test_clocks_that_go_back_and_plans_that_change_give_the_bits_of_a_rebuild(
    plans: list[Plan], seed: int, store: TableStore
) -> None:
    chance, user, now = random.Random(seed), next(users), NOW
    models = {model.fingerprint: model for model in EVERY_KIND}
    kept = {f.hex(): KeptModel(bundle="", digest="", state="live", since=0) for f in models}
    for _ in range(30):
        plan = replace(chance.choice(plans), models=kept)
        now += chance.randint(0, 6)
        at = now - chance.randint(0, 5)  # another writer's clock
        if chance.random() < 0.25:
            store.change([user], partial(expire, users=[user], models=models, plan=plan, now=at))
            continue
        events = [
            # Several of one moment; some ids come again after their event has gone.
            Event(
                user=user,
                id=str(chance.randint(0, 60)),
                time=(now - chance.randint(-2, 30)) // 4 * 4,
                item=chance.randint(0, 25),
            )
            for _ in range(chance.choice([1, 1, 2, 3, 20]))
        ]
        store.change([user], partial(apply, events=events, models=models, plan=plan, now=at))
        check_log(store, models.values(), user)


def check_log(store: TableStore, models: Iterable[Model], user: User) -> None:
    """The records of a user are those of a rebuild from the log."""
    with store.reading() as log:
        (head,), events = log.heads([user]), log.events(user)
        assert head is not None
        assert head.events == len(events)
        for model in models:
            (stored,) = log.records(model.fingerprint, [user])
            assert written_whole(stored, model) == from_log(model, user, events, head)


def test_an_event_is_written_beside_the_record_and_the_record_seldom(store: TableStore) -> None:
    (model, *_), user = [m for m in EVERY_KIND if m.limit is None and m.layout.recent], next(users)
    plan, bases = plan_of(model), []
    for event in events_of(user, 8 * DELTA_LIMIT, 0):
        deliver(store, model, plan, [event])
        (stored,) = store.get(model.fingerprint, [user])
        assert stored is not None
        bases.append(stored[: open_record(stored, model.fingerprint).size])
    assert len(set(bases)) <= 9
    assert len({len(base) for base in bases}) > 1


def test_of_users_whose_events_come_together_few_are_written_whole_at_once(
    store: TableStore,
) -> None:
    (model, *_), some = [m for m in EVERY_KIND if m.limit is None and m.layout.recent], range(64)
    group = [next(users) for _ in some]
    plan, before = plan_of(model), [b""] * len(group)
    for number in range(2 * DELTA_LIMIT):
        deliver(store, model, plan, [Event(user=u, id=str(number), time=9, item=1) for u in group])
        found = [data or b"" for data in store.get(model.fingerprint, group)]
        now = [data[: open_record(data, model.fingerprint).size] for data in found]
        rewritten = sum(base != was for base, was in zip(now, before, strict=True))
        assert number == 0 or rewritten <= len(group) / 4
        before = now


@pytest.mark.parametrize("lost", ["delta", "record"])
def test_what_a_store_has_lost_of_a_user_is_built_again_at_the_next_event(
    lost: str, store: TableStore
) -> None:
    model, user = EVERY_KIND[0], next(users)
    plan, events = plan_of(model), events_of(user, 40, 0)
    while True:  # until there is a delta that the next event would be added to
        deliver(store, model, plan, [events.pop()])
        with store.reading() as log:
            (delta,) = log.deltas(model.fingerprint, [user])
        if delta is not None and len(delta) > 100:
            break
    key = user_key(model.fingerprint, user)
    store._delete([delta_key(key) if lost == "delta" else key])
    for event in events[:DELTA_LIMIT]:
        deliver(store, model, plan, [event])
        if lost == "delta":
            check_log(store, [model], user)
    check_log(store, [model], user)


def test_a_duplicate_is_one_by_its_id_whatever_else_it_says(
    store: TableStore, model: Model
) -> None:
    (event,) = events_of(next(users), 1, 0)
    again = replace(event, time=event.time + 5, side={})
    found = deliver(store, model, plan_of(model), [event, again])
    assert found == [Outcome.ACCEPTED, Outcome.DUPLICATE]
    assert deliver(store, model, plan_of(model), [again]) == [Outcome.DUPLICATE]
    assert store.events(event.user) == [event]


def test_a_damaged_record_is_never_read_and_built_again_from_the_log_when_written_whole(
    store: TableStore, model: Model
) -> None:
    events = events_of(next(users), 20 + DELTA_LIMIT, 1)
    plan, user = plan_of(model), events[0].user
    deliver(store, model, plan, events[:20])
    (record,) = store.get(model.fingerprint, [user])
    assert record is not None
    end = unpack_record(record, model.layout)[1]
    store.put(model.fingerprint, {user: record[: end - 1] + bytes([record[end - 1] ^ 1])})
    with pytest.raises(CorruptRecordError):
        unpack(store.get(model.fingerprint, [user])[0] or b"", model.layout)
    for event in events[20:]:
        deliver(store, model, plan, [event])
    check_rebuilt(store, model, plan, events)


def test_a_damaged_delta_is_built_again_from_the_log_at_the_next_event(
    store: TableStore, model: Model
) -> None:
    events = events_of(next(users), 22, 1)
    plan, user = plan_of(model), events[0].user
    deliver(store, model, plan, events[:20])
    deliver(store, model, plan, events[20:21])

    def damage(change: Change) -> None:
        (delta,) = change.deltas(model.fingerprint, [user])
        assert delta is not None
        change.put_deltas(model.fingerprint, {user: delta[:-1] + bytes([delta[-1] ^ 1])})

    store.change([user], damage)
    (damaged,) = store.get(model.fingerprint, [user])
    assert damaged is not None
    with pytest.raises(CorruptRecordError, match="not its delta"):
        unpack(damaged, model.layout)
    deliver(store, model, plan, events[21:])
    check_rebuilt(store, model, plan, events)


def test_nothing_of_a_change_that_fails_is_written(store: TableStore, model: Model) -> None:
    events = events_of(next(users), 5, 2)
    models = {model.fingerprint: model}

    def fail(change: object) -> None:
        apply(change, events, models, plan_of(model), NOW)  # type: ignore[arg-type]
        raise StoreError("on the way")

    with pytest.raises(StoreError, match="on the way"):
        store.change([events[0].user], fail)
    assert store.events(events[0].user) == []
    assert store.get(model.fingerprint, [events[0].user]) == [None]


def test_recent_behaviours_of_one_moment_are_ordered_by_their_ids(
    store: TableStore, model: Model
) -> None:
    user = next(users)
    events = [replace(e, time=7) for e in events_of(user, 30, 3)]
    for event in events:
        deliver(store, model, plan_of(model), [event])
    (data,) = store.get(model.fingerprint, [user])
    assert data is not None
    record = unpack(data, model.layout)
    assert len(record.recent_times) == model.layout.recent > 0
    check_rebuilt(store, model, plan_of(model), events)


def test_shop_bundle_tries_what_a_record_can_hold(model: Model, shop_bundle: Path) -> None:
    assert model.limit is not None
    assert model.layout.groups
    assert model.layout.recent
    assert model.layout.counters
    assert model.bundle.manifest.side
