"""Settings: precedence, names, errors in one sentence, presets that load."""

from __future__ import annotations

from pathlib import Path

import pytest

import configs
from configs.command_line import SettingsError, load_settings
from configs.settings import Settings

PRESETS = sorted(Path(configs.__file__).parent.glob("*.yaml"))


def test_precedence(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("port: 1\nmax-num-seqs: 2\nmax_model_len: 300\n")
    environment = {"TYMPAN_PORT": "3", "TYMPAN_MAX_NUM_SEQS": "4"}
    settings = load_settings(["--config", str(config), "--port", "5"], environment)
    assert (settings.port, settings.max_num_seqs, settings.max_model_len) == (5, 4, 300)
    assert load_settings([], {"TYMPAN_CONFIG": str(config)}).port == 1
    assert load_settings([], {}) == Settings()


def test_switches() -> None:
    assert load_settings([], {}).async_scheduling is None
    assert load_settings(["--async-scheduling"], {"TYMPAN_ASYNC_SCHEDULING": "false"}).async_scheduling is True
    assert load_settings(["--no-async-scheduling"], {}).async_scheduling is False
    assert load_settings([], {"TYMPAN_ASYNC_SCHEDULING": "false"}).async_scheduling is False


def test_a_switch_by_flag_variable_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("enable-prefix-caching: false\n")
    off = {"TYMPAN_ENABLE_PREFIX_CACHING": "false"}
    assert load_settings([], {}).enable_prefix_caching
    assert not load_settings([], off).enable_prefix_caching
    assert not load_settings(["--config", str(config)], {}).enable_prefix_caching
    assert load_settings(["--config", str(config), "--enable-prefix-caching"], off).enable_prefix_caching
    assert not load_settings(["--no-enable-prefix-caching"], {}).enable_prefix_caching
    with pytest.raises(SettingsError, match="enable-prefix-caching"):
        load_settings([], {"TYMPAN_ENABLE_PREFIX_CACHING": "perhaps"})
    with pytest.raises(SystemExit):
        load_settings(["--help"], {})
    assert "--no-enable-prefix-caching" in capsys.readouterr().out


def test_lists_and_limits() -> None:
    settings = load_settings(
        ["--api-key", "a", "--api-key", "b", "--served-model-name", "x", "y", "--limit-mm-per-prompt", "audio=3"], {}
    )
    assert settings.api_key == ("a", "b")
    assert settings.served_model_name == ("x", "y")
    assert settings.max_audio_clips == 3
    from_environment = load_settings([], {"TYMPAN_API_KEY": "a, b", "TYMPAN_LIMIT_MM_PER_PROMPT": '{"audio": 2}'})
    assert from_environment.api_key == ("a", "b")
    assert from_environment.max_audio_clips == 2


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_a_variable_for_keys_that_holds_none_is_an_error(value: str) -> None:
    with pytest.raises(SettingsError, match=r"api-key: .*holds no key"):
        load_settings([], {"TYMPAN_API_KEY": value})
    with pytest.raises(SettingsError, match="api-key-file"):
        load_settings([], {"TYMPAN_API_KEY_FILE": ""})


@pytest.mark.parametrize(("arguments", "named"), [
    (["--port", "99999"], "port"),
    (["--port", "http"], "port"),
    (["--max-num-seqs", "0"], "max-num-seqs"),
    (["--gpu-memory-utilization", "1.5"], "gpu-memory-utilization"),
    (["--limit-mm-per-prompt", "image=3"], "limit-mm-per-prompt"),
    (["--limit-mm-per-prompt", "many"], "limit-mm-per-prompt"),
    (["--limit-mm-per-prompt", "{"], "limit-mm-per-prompt"),
    (["--config", "missing.yaml"], "missing.yaml"),
    (["--allowed-origins", "https://a.example/"], "allowed-origins"),
    (["--allowed-origins", "a.example"], "allowed-origins"),
])  # fmt: skip
def test_wrong_values_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        load_settings(arguments, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["prot: 1", "a: [", "- a", "\x00"])
def test_wrong_files(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=r"config\.yaml"):
        load_settings(["--config", str(config)], {})


def test_unknown_flags_and_keys_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--prot", "1"], {})
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"], {})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


def test_keys_are_not_shown_in_errors() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(["--port", "s3cr3t"], {})
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_presets_load(preset: Path) -> None:
    assert load_settings(["--config", str(preset)], {}).served_model_name


def test_there_are_presets() -> None:
    assert len(PRESETS) >= 3
