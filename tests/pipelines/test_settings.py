"""Settings as people give them: options, YAML, and mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hashtab.pipelines import demo, train_sdim
from hashtab.pipelines.command_line import SettingsError, flatten, parse
from hashtab.pipelines.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modle.tau", "3"], "did you mean --model.tau?"),
        (["--optimiser.epoch=3"], "did you mean --optimiser.epochs?"),
        (["--model.encoder", "sdmi"], "did you mean 'sdim'?"),
        (["--model.tau", "17"], "tau must be between 1 and 16"),
        (["--model.tau", "7"], "tau must divide planes"),
        (["--model.tau", "many"], "model.tau"),
        (["--optimiser.epochs", "0"], "epochs must be positive, got 0"),
        (["--optimiser.schedule", "step"], "linear"),
        (["--model.history_limit", "0"], "history_limit must be positive, got 0"),
        (["--optimiser.weight_decay", "-1"], "weight_decay must not be negative, got -1.0"),
        (["--workers", "-1"], "workers must not be negative, got -1"),
        (["--workers", "3"], "workers must divide optimiser.samples_per_batch"),
        (["--run_name", "a/b"], "run_name must be the name of a folder, got 'a/b'"),
        (["--run_name", ""], "run_name must be the name of a folder, got ''"),
        (["--run_name", "."], "run_name must be the name of a folder, got '.'"),
        (["--run_name", ".."], "run_name must be the name of a folder, got '..'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data", "nowhere"], "nowhere holds no finished data set"),
        (["train"], "train"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train_sdim.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_yaml_file_holds_settings_and_options_overrule_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "seed": 7,
                "resume": True,
                "model": {"encoder": "mean", "hidden": [8, 4], "history_limit": None},
            }
        )
    )
    settings = parse(TrainSettings, ["--config", str(path), "--model.encoder", "din"], None)
    assert (settings.seed, settings.resume) == (7, True)
    assert (settings.model.encoder, settings.model.hidden) == ("din", (8, 4))
    assert settings.model.history_limit is None
    assert settings.optimiser.epochs == TrainSettings().optimiser.epochs


def test_a_misspelt_key_in_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  tua: 3\n")
    with pytest.raises(SettingsError, match="tua"):
        parse(TrainSettings, ["--config", str(path)], None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: 3", "model must hold settings by name, got 3"),
        ("optimiser: null", "optimiser must not be null"),
        ("seed: null", "seed must not be null"),
        ("storage: null", "storage must not be null"),
        ("model: {planes: null}", "planes must not be null"),
    ],
)
def test_a_wrong_kind_of_value_in_yaml_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert train_sdim.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_a_model_that_the_data_cannot_serve_is_refused_before_any_work(
    feed_without_counters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "runs"
    arguments = ["--data", str(feed_without_counters), "--storage", str(storage)]
    assert train_sdim.main([*arguments, "--model.counters", "true"]) == 2
    assert "declares no counters" in capsys.readouterr().err
    assert train_sdim.main([*arguments, "--workers", "1024"]) == 2
    assert "users for world_size=1024" in capsys.readouterr().err
    assert not storage.exists()


def test_the_demo_refuses_data_without_counters(
    feed_without_counters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "runs"
    assert demo.main(["--data", str(feed_without_counters), "--storage", str(storage)]) == 2
    said, error = capsys.readouterr().err.splitlines()
    assert "is prepared already" in said
    assert error.startswith("error: ")
    assert "declares no counters" in error
    assert not storage.exists()


@pytest.mark.parametrize("script", ["train_sdim.py", "demo.py"])
def test_scripts_run_from_anywhere_and_help_names_every_setting(
    script: str, tmp_path: Path
) -> None:
    path = ROOT / "pipelines" / script
    done = subprocess.run(
        [str(path), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    kind = TrainSettings if script == "train_sdim.py" else demo.DemoSettings
    for name in flatten(kind()):
        assert f"--{name}" in done.stdout
