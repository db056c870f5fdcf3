"""Registered bundles: versions and aliases in MLflow's registry, and the way back to a folder.

Of the versions of a registered model `champion` is in use, `challenger` is to be compared with it,
and `previous` was the champion before.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hashtab.pipelines.command_line import SettingsError
from hashtab.pipelines.mlflow_model import BUNDLE, write_model
from hashtab.pipelines.tracking import connect, said_in_one_line
from hashtab.serving.errors import BundleError, BundleFormatError
from hashtab.serving.manifest import Manifest
from hashtab.serving.opening import AnyBundle, open_any, read_any

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_DIGEST, _MODEL = "bundle_digest", "model_id"  # tags of a version
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


def register(bundle_folder: Path, name: str, tracking_uri: str, run_id: str | None) -> int:
    """Register a bundle as the challenger, unless it is the champion; returns its version.

    A bundle that is registered under this name already keeps its version.

    Args:
        bundle_folder: folder of the bundle.
        name: of the registered model; made if it is not there.
        tracking_uri: of MLflow.
        run_id: MLflow run of the training; None where there is none.

    Raises:
        BundleError: if the bundle cannot be used; nothing was registered.
        SettingsError: if MLflow cannot be used.
    """
    bundle = open_any(bundle_folder)
    registry = Registry(tracking_uri, name)
    version = registry.find(bundle) or registry.add(bundle, run_id)
    if registry.aliases().get(CHAMPION) != version:
        registry.set_alias(CHALLENGER, version)
    return version


def find_bundle(bundle: str, tracking_uri: str) -> Path:
    """Return the folder of a bundle: itself, or that of `models:/name@alias` or `models:/name/3`.

    A registered bundle is downloaded once into `hashtab/bundles` of the user's cache
    (XDG_CACHE_HOME, by default `~/.cache`).

    Raises:
        SettingsError: if MLflow cannot be used, there is no such model, alias or version, or it
            holds no whole bundle.
    """
    if not bundle.startswith("models:"):
        return Path(bundle)
    wanted = _MODEL_URI.fullmatch(bundle)
    if wanted is None:
        raise SettingsError(
            f"a registered bundle is named as models:/name@alias or models:/name/3, got {bundle!r}"
        )
    registry = Registry(tracking_uri, wanted["name"])
    version = registry.version_of(wanted["alias"]) if wanted["alias"] else int(wanted["version"])
    return registry.download(version)


class Registry:
    """A connection to one registered model, which need not exist yet.

    Args:
        uri: of the tracking store or server.
        name: of the registered model.

    Raises:
        SettingsError: in every method, if the store cannot be used.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        self.name = name
        with said_in_one_line(uri):
            self._client = connect(uri)

    def aliases(self) -> dict[str, int]:
        """Return the version of each alias; none where there is no such registered model."""
        from mlflow.exceptions import MlflowException

        with said_in_one_line(self.uri):
            try:
                found = self._client.get_registered_model(self.name).aliases
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                found = {}
        return {alias: int(version) for alias, version in found.items()}

    def version_of(self, alias: str) -> int:
        """Return the version that has an alias.

        Raises:
            SettingsError: if none has; it names those that there are.
        """
        aliases = self.aliases()
        if alias not in aliases:
            raise SettingsError(
                f"no version of the registered model {self.name!r} has the alias {alias!r} in "
                f"{self.uri}; {self._what_there_is(aliases)}"
            )
        return aliases[alias]

    def set_alias(self, alias: str, version: int) -> None:
        """Give an alias to a version, which takes it from the one that has it."""
        with said_in_one_line(self.uri):
            self._client.set_registered_model_alias(self.name, alias, str(version))

    def remove_alias(self, alias: str) -> None:
        """Take an alias away; does nothing where no version has it."""
        with said_in_one_line(self.uri):
            self._client.delete_registered_model_alias(self.name, alias)

    def find(self, bundle: AnyBundle) -> int | None:
        """Return the version that holds a bundle, if there is one."""
        query = f"name = '{self.name}' and tags.{_DIGEST} = '{bundle.manifest.digest}'"
        with said_in_one_line(self.uri):
            found = self._client.search_model_versions(query)
        return max((int(version.version) for version in found), default=None)

    def add(self, bundle: AnyBundle, run_id: str | None) -> int:
        """Add a bundle as a new version without alias; returns its number.

        The version appears when all its files are in the store.
        """
        with said_in_one_line(self.uri):
            self._make()
            run_id = run_id or self._run_of(bundle)
            model = self._log(bundle, run_id)
            version = self._client.create_model_version(
                self.name,
                # Not models:/<id>, which a database looks up in the process's default store.
                model.artifact_location,
                run_id=run_id,
                tags=_tags(bundle.manifest) | {_MODEL: model.model_id},
                model_id=model.model_id,
            )
            registered = [{"name": self.name, "version": version.version}]
            # By this tag MLflow's UI leads from the logged model to the version.
            self._client.set_logged_model_tags(
                model.model_id, {"mlflow.modelVersions": json.dumps(registered)}
            )
        return int(version.version)

    def _run_of(self, bundle: AnyBundle) -> str:
        """Return a new run, for a bundle whose training is not known here, to belong to."""
        found = self._client.get_experiment_by_name(self.name)
        experiment = found.experiment_id if found else self._client.create_experiment(self.name)
        run_id: str = self._client.create_run(experiment, run_name=bundle.manifest.run).info.run_id
        self._client.set_terminated(run_id)
        return run_id

    def _log(self, bundle: AnyBundle, run_id: str) -> "LoggedModel":
        """Log the MLflow model of a bundle."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        experiment = self._client.get_run(run_id).info.experiment_id
        logged = self._client.create_logged_model(
            experiment, self.name, run_id, _tags(bundle.manifest)
        )
        model = Model(
            artifact_path=logged.artifact_location,
            run_id=run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        with tempfile.TemporaryDirectory() as building:
            write_model(bundle, Path(building) / "model", model)
            self._client.log_model_artifacts(logged.model_id, f"{building}/model")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return self._client.finalize_logged_model(logged.model_id, "READY")

    def _make(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        """Add tags to a version."""
        with said_in_one_line(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, str(version), key, value)

    def add_files(self, version: int, folder: Path, place: str) -> None:
        """Add the files of a folder to those of a version, under the name `place`."""
        with said_in_one_line(self.uri):
            model_id = self._client.get_model_version(self.name, str(version)).tags[_MODEL]
            self._client.log_model_artifacts(model_id, str(folder), place)

    def download(self, version: int) -> Path:
        """Return a local folder with the whole bundle of a version.

        Raises:
            SettingsError: if there is no such version, or it holds no whole bundle.
        """
        found = self._version(version)
        digest: str | None = found.tags.get(_DIGEST)
        if digest is None:
            raise SettingsError(
                f"version {version} of the registered model {self.name!r} holds no bundle: it was "
                "not registered by hashtab"
            )
        kept: Path = _cache() / digest
        if not _holds(kept, digest):
            self._download(found, digest, kept)
        return kept

    def _download(self, version: "ModelVersion", digest: str, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as building:
            fetched = self._fetch(version, building)
            if not _holds(fetched, digest):
                raise SettingsError(
                    f"version {version.version} of the registered model {self.name!r} has lost a "
                    f"part of its bundle in {self.uri}: delete the version in MLflow and register "
                    "the bundle again"
                )
            shutil.rmtree(kept, ignore_errors=True)
            with suppress(OSError):  # another process may have brought the same bundle meanwhile
                fetched.rename(kept)

    def _fetch(self, version: "ModelVersion", folder: str) -> Path:
        """Download the bundle's files as far as they are there."""
        import mlflow

        with said_in_one_line(self.uri):
            root = self._client.get_model_version_download_uri(self.name, version.version)
            listed = self._client.list_logged_model_artifacts(version.tags[_MODEL])
            if BUNDLE in (item.path for item in listed):
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{root}/{BUNDLE}", dst_path=folder, tracking_uri=self.uri
                )
        return Path(folder) / BUNDLE

    def _version(self, version: int) -> "ModelVersion":
        from mlflow.exceptions import MlflowException

        with said_in_one_line(self.uri):
            try:
                return self._client.get_model_version(self.name, str(version))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        raise SettingsError(
            f"the registered model {self.name!r} has no version {version} in {self.uri}; "
            f"{self._what_there_is(self.aliases())}"
        )

    def _what_there_is(self, aliases: Mapping[str, int]) -> str:
        with said_in_one_line(self.uri):
            versions = self._client.search_model_versions(f"name = '{self.name}'")
            models = [model.name for model in self._client.search_registered_models()]
        if self.name not in models:
            return f"registered models: {', '.join(models) or 'none'}"
        numbers = ", ".join(map(str, sorted(int(found.version) for found in versions))) or "none"
        named = ", ".join(f"{alias} (version {version})" for alias, version in aliases.items())
        return f"it has versions {numbers}, aliases {named or 'none'}"


def _tags(manifest: Manifest) -> dict[str, Any]:
    return {_DIGEST: manifest.digest, **manifest.tags}


def _cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "hashtab" / "bundles"


def _holds(folder: Path, digest: str) -> bool:
    """Whether a folder holds the whole bundle of a digest.

    Raises:
        BundleFormatError: if another version of hashtab wrote it: it is lost to this one alone.
    """
    try:
        manifest = read_any(folder)
        manifest.check_files(folder)
    except BundleFormatError:
        raise
    except BundleError:
        return False
    return manifest.digest == digest
