"""Makes the service of a process."""

import importlib
from collections.abc import Callable
from typing import cast

from hashtab.serving.http.errors import SettingsError
from hashtab.serving.http.service import Service

Create = str | Callable[[], Service]


def service_of(create: Create) -> Service:
    """Make a service.

    Args:
        create: a function, or its name as `"package.module:function"`.

    Raises:
        SettingsError: if there is no such function.
    """
    if not isinstance(create, str):
        return create()
    module, _, name = create.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"{create!r} must name a function as package.module:function: {error}"
        ) from error
    return cast(Service, function())
