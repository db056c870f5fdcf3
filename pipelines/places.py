"""How paths and commands are named to a person, so that they can be pasted in this folder."""

import shutil
import sys
from pathlib import Path

DEFAULT_TRACKING = "sqlite:///mlflow.db"


def shown(path: Path | str) -> str:
    """Name a path from the current folder where it lies within it."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def installed(command: str) -> str:
    """Name a command of this environment so that a shell in this folder finds it."""
    path = Path(sys.executable).parent / command
    return command if shutil.which(command) == str(path) else shown(path)


def this_python() -> str:
    """Name the running interpreter in the same way."""
    return installed(Path(sys.executable).name)


def python_script(name: str) -> str:
    """Name the command that runs one of this folder's scripts."""
    return f"{this_python()} {shown(Path(__file__).resolve().with_name(name))}"


def tracking_option(uri: str) -> str:
    """Return the option that names an MLflow store to a command; nothing for the default one."""
    return "" if uri == DEFAULT_TRACKING else f" --tracking_uri {uri}"
