"""The data that tests of experiments share."""

from tests.pipelines.bundles import shop_bundle, shop_data

# Fixtures that live in a file of their own; pytest finds them by these names.
__all__ = ["shop_bundle", "shop_data"]
