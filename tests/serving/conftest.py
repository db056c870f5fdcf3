"""The exported bundles that tests of serving share."""

from tests.pipelines.bundles import shop_bundle, shop_data
from tests.pipelines.tables import churn_bundle, customers_file, spent_bundle

# Fixtures that live in a file of their own; pytest finds them by these names.
__all__ = ["churn_bundle", "customers_file", "shop_bundle", "shop_data", "spent_bundle"]
