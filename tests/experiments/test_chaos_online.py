"""Services and the Redis server are killed while events come: none is lost, none counted twice."""

from pathlib import Path

import pytest

from experiments.chaos_online import Chaos, run
from tests.pipelines.bundles import shop_bundle, shop_data

__all__ = ["shop_bundle", "shop_data"]


@pytest.mark.slow
@pytest.mark.parametrize(("store", "server_kills"), [("lmdb", 0), ("redis", 2)])
def test_tables_are_those_of_a_rebuild_whoever_is_killed(
    store: str, server_kills: int, shop_bundle: Path, tmp_path: Path
) -> None:
    found = run(
        Chaos(
            bundle=str(shop_bundle),
            store=store,
            users=20,
            events=1000,
            deliveries=2000,
            batch=50,
            kills=4,
            server_kills=server_kills,
            folder=tmp_path / "chaos",
        )
    )
    assert (found.kills, found.server_kills) == (4, server_kills)
    assert found.acknowledged == 2000
    assert (found.lost, found.twice, found.wrong_tables) == (0, 0, 0)
    assert found.users == 20
