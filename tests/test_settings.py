"""settings/: names, defaults and bounds, what is said of a bad value, and what became of old names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from yaptext.dialogue.tools import ToolSet
from yaptext.errors import SettingsError
from yaptext.settings import LOOPBACK, Settings
from yaptext.settings.changes import Changes, changes
from yaptext.settings.hidden import hidden_paths
from yaptext.settings.old_names import moved_names
from yaptext.settings.table import variables

TABLE = Path(__file__).resolve().parents[1] / "yaptext" / "SETTINGS.md"

# What the guide says is the default of each of its variables; None where it depends on the deployment or is unset.
GUIDE: dict[str, Any] = {
    "YAP_TEXT_API_KEY": "yap_token",
    "MAX_CONCURRENT_CONNECTIONS": None,
    "DEPLOY_MODELS": "both",
    "CHAT_MODEL": None,
    "TOOL_MODEL": None,
    "AWQ_CHAT_MODEL": None,
    "AWQ_TOOL_MODEL": None,
    "CHAT_GPU_FRAC": None,
    "TOOL_GPU_FRAC": None,
    "QUANTIZATION": "auto",
    "KV_DTYPE": "auto",
    "VLLM_ATTENTION_BACKEND": "auto",
    "STREAM_FLUSH_MS": 0,
    "CONCURRENT_MODEL_CALL": 0,
    "CHAT_MAX_OUT": 200,
    "HISTORY_MAX_TOKENS": 3000,
    "USER_UTT_MAX_TOKENS": 350,
    "EXACT_TOKEN_TRIM": 1,
    "HF_TOKEN": None,
    "HF_HOME": None,
    "HF_AWQ_PUSH": 0,
    "HF_AWQ_CHAT_REPO": None,
    "HF_AWQ_TOOL_REPO": None,
    "HF_AWQ_BRANCH": "main",
    "HF_AWQ_PRIVATE": 1,
    "HF_AWQ_ALLOW_CREATE": 1,
    "HF_AWQ_COMMIT_MSG_CHAT": None,
    "HF_AWQ_COMMIT_MSG_TOOL": None,
}
# The guide's names that live on as other names.
RENAMED = {"HUGGINGFACE_HUB_TOKEN": "HF_TOKEN", "HF_HUB_ENABLE_HF_TRANSFER": "HF_XET_HIGH_PERFORMANCE"}
SECRET = "hunter2-hunter2"


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment; conftest took out of it what the machine says to Yap Text."""
    return monkeypatch


def load(env: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in values.items():
        env.setenv(name, value)
    return Settings.load()


def refusal(env: pytest.MonkeyPatch, **values: str) -> str:
    """The one line that a bad environment ends in."""
    with pytest.raises(SettingsError) as caught:
        load(env, **values)
    line = str(caught.value)
    assert "\n" not in line
    return line


def value_of(settings: Settings, name: str) -> Any:
    """The value of a variable, secrets shown."""
    field = next(f for f, info in Settings.model_fields.items() if info.validation_alias == name)
    value = getattr(settings, field)
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


# Names and defaults


@pytest.mark.parametrize(("name", "default"), GUIDE.items())
def test_defaults_are_those_of_the_guide(env: pytest.MonkeyPatch, name: str, default: Any) -> None:
    """An empty environment gives what the guide says."""
    assert value_of(load(env), name) == default


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_variable_of_the_guide_is_listed_under_its_new_name(old: str, new: str) -> None:
    """Who looks the old name up finds the new one: it stands in its meaning."""
    (variable,) = [v for v in variables() if v.name == new]
    assert f"`{old}`" in variable.meaning


def test_the_table_lists_every_field_once_with_its_default() -> None:
    """`variables` has one row a field, named as the environment names it, and no row without a meaning."""
    rows = variables()
    assert [row.name for row in rows] == [info.validation_alias for info in Settings.model_fields.values()]
    assert len({row.name for row in rows}) == len(rows)
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]+", row.name) and row.meaning.endswith(".") for row in rows)


def test_defaults_are_shown_as_they_would_be_written() -> None:
    """Switches are 0 or 1, whole numbers have no point, what has no default shows none."""
    shown = {row.name: row.default for row in variables()}
    assert shown["CONCURRENT_MODEL_CALL"] == "0"
    assert shown["EXACT_TOKEN_TRIM"] == "1"
    assert shown["STREAM_FLUSH_MS"] == "0"
    assert shown["IDLE_TIMEOUT_S"] == "600"
    assert shown["CHAT_TOP_P"] == "0.95"
    assert shown["YAP_TEXT_API_KEY"] == "yap_token"
    assert shown["CHAT_MODEL"] == ""


@pytest.mark.parametrize("row", variables(), ids=lambda row: row.name)
def test_every_shown_default_can_be_set(env: pytest.MonkeyPatch, row: Any) -> None:
    """A default written into the environment changes nothing."""
    before = load(env)
    assert load(env, **{row.name: row.default}) == before


def test_settings_md_lists_every_variable() -> None:
    """Its rows are those of the class: names in order, defaults, meanings. `make tables` writes them."""
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| *(?:`([^`]*)`)? *\| (.*?) \|$", TABLE.read_text(encoding="utf-8"), re.M)
    assert rows == [tuple(row) for row in variables()]


# Reading the environment


def test_variables_become_typed_values(env: pytest.MonkeyPatch) -> None:
    """Numbers, switches, paths and choices are read from their text."""
    settings = load(env, PORT="9", CONCURRENT_MODEL_CALL="1", TOOLS_FILE="/t.json", DEPLOY_MODELS="tool")
    assert (settings.port, settings.concurrent_model_call) == (9, True)
    assert (settings.tools_file, settings.deploy_models) == (Path("/t.json"), "tool")


@pytest.mark.parametrize("row", variables(), ids=lambda row: row.name)
def test_empty_variables_count_as_unset(env: pytest.MonkeyPatch, row: Any) -> None:
    """A unit file that sets NAME= means the default."""
    before = load(env)
    assert load(env, **{row.name: ""}) == before


def test_empty_old_names_count_as_unset(env: pytest.MonkeyPatch) -> None:
    """Also an old name that is set to nothing gives no value and no note."""
    load(env, **dict.fromkeys(RENAMED, ""))
    assert moved_names() == ({}, [])


def test_given_values_win_over_the_environment(env: pytest.MonkeyPatch) -> None:
    """A caller's value by variable name is taken first, also over a mapped one."""
    env.setenv("PORT", "9")
    env.setenv("KV_DTYPE", "int8")
    settings = Settings.load(PORT=10, KV_DTYPE="fp8")
    assert (settings.port, settings.kv_dtype) == (10, "fp8")


def test_settings_do_not_change(env: pytest.MonkeyPatch) -> None:
    """A running service has one set of settings."""
    with pytest.raises(ValueError, match="frozen"):
        load(env).port = 1  # type: ignore[misc]


# Bad values

BAD = [
    ("PORT", "http", "integer"),
    ("PORT", "65536", "65535"),
    ("PORT", "-1", "0"),
    ("MAX_CONCURRENT_CONNECTIONS", "0", "1"),
    ("MAX_FRAME_BYTES", "10", "1024"),
    ("IDLE_TIMEOUT_S", "-1", "0"),
    ("IDLE_TIMEOUT_S", "nan", "0"),
    ("SESSION_TTL_S", "0", "greater than 0"),
    ("SESSION_STORE", "redis://host", "memory"),
    ("SESSION_STORE", "sqlite:", "sqlite"),
    ("DEPLOY_MODELS", "all", "'both', 'chat' or 'tool'"),
    ("QUANTIZATION", "int3", "'auto', 'none', 'fp8', 'awq' or 'gptq'"),
    ("SHARE_ENGINE", "perhaps", "boolean"),
    ("CHAT_GPU_FRAC", "1.5", "0.98"),
    ("TOOL_GPU_FRAC", "0", "greater than 0"),
    ("KV_DTYPE", "int4", "'auto', 'fp8' or 'int8_per_token_head'"),
    ("VLLM_ATTENTION_BACKEND", "TORCH_SDPA", "'auto', 'FLASHINFER' or 'FLASH_ATTN'"),
    ("STREAM_FLUSH_MS", "1001", "1000"),
    ("CONCURRENT_MODEL_CALL", "2", "boolean"),
    ("CHAT_MAX_OUT", "0", "1"),
    ("HISTORY_MAX_TOKENS", "-1", "0"),
    ("USER_UTT_MAX_TOKENS", "x", "integer"),
    ("CHAT_PROMPT_FORMAT", "xml", "'segments', 'turns' or 'bare'"),
    ("CHAT_TEMPERATURE", "nan", "finite"),
    ("CHAT_TOP_P", "0", "greater than 0"),
    ("TOOL_HARD_TIMEOUT_MS", "0", "1"),
    ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
    ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_bad_value_is_one_line_that_names_it(env: pytest.MonkeyPatch, name: str, value: str, allowed: str) -> None:
    """The line names the variable, its value and what is allowed."""
    line = refusal(env, **{name: value})
    assert line.startswith(f"{name}={value!r} is not allowed: ")
    assert allowed in line.removeprefix(f"{name}={value!r}")


NUMBERS = [name for name, field in Settings.model_fields.items() if re.search("int|float", str(field.annotation))]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "Infinity", "1e999", "1e308", "9" * 30])
def test_no_number_is_endless(env: pytest.MonkeyPatch, field: str, value: str) -> None:
    """One that starts and then fails every request, or ends the thread that writes sessions. Also of old names."""
    name = str(Settings.model_fields[field].validation_alias)
    if name == "CHAT_LOGIT_BIAS":
        bias = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(value, "1e999")
        value = f'{{"a": {bias}}}'
    assert refusal(env, **{name: value}).startswith(f"{name}=")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e308"])
def test_no_number_of_an_old_name_is_endless(env: pytest.MonkeyPatch, value: str) -> None:
    assert refusal(env, TOOL_TIMEOUT_S=value).startswith(f"TOOL_HARD_TIMEOUT_MS='{value}' is not allowed: ")
    assert "CHAT_TIMEOUT_S" in refusal(env, GEN_TIMEOUT_S=value.removeprefix("-"), TOOL_TIMEOUT_S="1")


# What does not go together


def refusals(env: pytest.MonkeyPatch, *, serving: bool = False, **values: str) -> list[str]:
    for name, value in values.items():
        env.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load(serving=serving)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"CHAT_GPU_FRAC": "0.9", "TOOL_GPU_FRAC": "0.9"}, "CHAT_GPU_FRAC=0.9 and TOOL_GPU_FRAC=0.9"),
        ({"CHAT_GPU_FRAC": "0.9"}, "CHAT_GPU_FRAC=0.9 and TOOL_GPU_FRAC=0.2"),
        ({"CHAT_MAX_MODEL_LEN": "512"}, "CHAT_MAX_MODEL_LEN=512 is not allowed: USER_UTT_MAX_TOKENS=350"),
        (
            {"CHAT_MAX_OUT": "4096", "USER_UTT_MAX_TOKENS": "4000", "DEPLOY_MODELS": "chat"},
            "CHAT_MAX_MODEL_LEN=8192 is not allowed",
        ),
        ({"TOOL_MAX_MODEL_LEN": "256"}, "TOOL_MAX_MODEL_LEN=256 is not allowed: USER_UTT_MAX_TOKENS=350"),
        ({"TOOL_HISTORY_TOKENS": "4000"}, "TOOL_MAX_MODEL_LEN=4096 is not allowed"),
    ],
)
def test_what_contradicts_itself_is_one_line(env: pytest.MonkeyPatch, values: dict[str, str], told: str) -> None:
    """The start would fail with it, minutes later, or every request would."""
    (line,) = refusals(env, **values)
    assert line.startswith(told)


@pytest.mark.parametrize(
    "values",
    [
        {"CHAT_GPU_FRAC": "0.78", "TOOL_GPU_FRAC": "0.2"},
        {"CHAT_GPU_FRAC": "0.9", "TOOL_GPU_FRAC": "0.9", "DEPLOY_MODELS": "chat"},
        {"CHAT_GPU_FRAC": "0.9", "CHAT_MODEL": "a/b", "TOOL_MODEL": "a/b"},
        {"CHAT_MAX_MODEL_LEN": "256", "DEPLOY_MODELS": "tool"},
        {"TOOL_MAX_MODEL_LEN": "256", "DEPLOY_MODELS": "chat"},
        {"CHAT_MAX_MODEL_LEN": "710", "TOOL_MAX_MODEL_LEN": "646"},
    ],
)
def test_what_goes_together_is_let_be(env: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    """One engine has the GPU alone; what is not deployed has no context."""
    load(env, **values)


def test_all_that_is_wrong_is_told_at_once(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A line each, so that a file of settings is mended in one go: wrong values, contradictions, slips in names and a
    state folder that cannot be written to."""
    (tmp_path / "file").touch()
    lines = refusals(
        env,
        serving=True,
        PORT="http",
        LOG_LEVEL="loud",
        HOST="0.0.0.0",
        CHAT_GPU_FRAC="0.9",
        TOOL_GPU_FRAC="0.9",
        CHAT_MAX_MODEL_LEN="256",
        CHAT_TEMPRATURE="1",
        YAP_TEXT_STATE_DIR=str(tmp_path / "file" / "state"),
    )
    told = ["PORT=", "LOG_LEVEL=", "HOST=", "CHAT_GPU_FRAC=", "CHAT_MAX_MODEL_LEN=", "YAP_TEXT_STATE_DIR=", "CHAT_TEMP"]
    assert [line[: len(start)] for line, start in zip(lines, told, strict=True)] == told


def test_a_wrong_value_is_not_told_of_again(env: pytest.MonkeyPatch) -> None:
    """Its default, which nobody set, contradicts nothing."""
    assert refusals(env, CHAT_GPU_FRAC="1.5", TOOL_GPU_FRAC="0.5")[0].startswith("CHAT_GPU_FRAC='1.5'")


@pytest.mark.parametrize("variable", ["YAP_TEXT_STATE_DIR", "STATE_DIRECTORY"])
@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300])
def test_a_state_folder_that_cannot_be_written_is_one_line(
    env: pytest.MonkeyPatch, tmp_path: Path, variable: str, place: str
) -> None:
    """To who serves; clients of the service share its environment and not its folder."""
    (tmp_path / "file").touch()
    folder = str(tmp_path / place)
    (line,) = refusals(env, serving=True, **{variable: folder})
    assert line.startswith(f"{variable}={folder!r} is not allowed: it cannot be written to: ")
    Settings.load()


def test_a_state_folder_that_is_not_there_yet_is_not_made(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who needs it makes it, with the mode that it needs."""
    env.setenv("YAP_TEXT_STATE_DIR", str(tmp_path / "a" / "b"))
    Settings.load(serving=True)
    assert list(tmp_path.iterdir()) == []


# Files that settings name


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large"])
def test_a_tools_file_that_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """A FIFO would never open, a device would never end."""
    path = tmp_path / "tools.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b" " * 2**21)
    with pytest.raises(SettingsError) as caught:
        ToolSet.from_file(path)
    line = str(caught.value)
    assert line.startswith(f"TOOLS_FILE='{path}' is not a list of tools: ") and "\n" not in line


@pytest.mark.parametrize(("content", "told"), [(b"\xff", "is not UTF-8"), (b"x" * 100_000, "over 65536 bytes")])
def test_a_credential_that_cannot_be_read_is_one_line(
    env: pytest.MonkeyPatch, tmp_path: Path, content: bytes, told: str
) -> None:
    """It names the file that the operator knows, and shows nothing of it."""
    (tmp_path / "HF_TOKEN").write_bytes(content)
    line = refusal(env, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert line.startswith("the credential HF_TOKEN (by default the file /etc/yap-text/hf-token) ") and told in line


def test_a_bad_value_of_an_old_name_is_named(env: pytest.MonkeyPatch) -> None:
    """Who set the old name reads it in the line."""
    line = refusal(env, HF_HUB_ENABLE_HF_TRANSFER="maybe")
    assert "HF_HUB_ENABLE_HF_TRANSFER" in line
    assert "'maybe'" in line


@pytest.mark.parametrize("value", ["delve", "{", "[]", "5", '{"a": "b"}'])
def test_a_bias_that_is_no_json_object_is_one_line(env: pytest.MonkeyPatch, value: str) -> None:
    """Like any other wrong value, and with the others."""
    lines = refusals(env, CHAT_LOGIT_BIAS=value, PORT="http")
    assert [line.partition("=")[0] for line in lines] == ["PORT", "CHAT_LOGIT_BIAS"], lines


def test_a_value_of_many_lines_is_one_line(env: pytest.MonkeyPatch) -> None:
    """A line break in a value does not break the line."""
    assert r"'8\n0'" in refusal(env, PORT="8\n0")


# Secrets


def test_secrets_are_not_in_the_repr(env: pytest.MonkeyPatch) -> None:
    """Settings can be logged."""
    settings = load(env, YAP_TEXT_API_KEY=SECRET, HF_TOKEN=SECRET)
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump())):
        assert SECRET not in shown
    assert settings.api_key.get_secret_value() == SECRET


@pytest.mark.parametrize("other", [{"PORT": "http"}, {"LOG_LEVEL": "loud"}])
def test_secrets_are_in_no_error(env: pytest.MonkeyPatch, other: dict[str, str]) -> None:
    """The line about one variable tells nothing of another."""
    assert SECRET not in refusal(env, YAP_TEXT_API_KEY=SECRET, HF_TOKEN=SECRET, **other)


@pytest.mark.parametrize("name", ["YAP_TEXT_API_KEY", "HF_TOKEN", "SESSION_STORE_KEY"])
def test_a_bad_secret_is_named_but_not_shown(env: pytest.MonkeyPatch, name: str) -> None:
    """The line hides the value of a secret, whatever is wrong with it."""
    with pytest.raises(SettingsError) as caught:
        Settings.load(**{name: [SECRET]})
    assert str(caught.value).startswith(f"{name}=(hidden) is not allowed: ")
    assert SECRET not in str(caught.value)


def test_the_key_is_not_empty(env: pytest.MonkeyPatch) -> None:
    """No caller gets in with an empty key."""
    with pytest.raises(SettingsError, match="at least 1"):
        Settings.load(YAP_TEXT_API_KEY="")


@pytest.mark.parametrize("written", [f"{SECRET}\n", f"  {SECRET} \r\n", f"\ufeff{SECRET}", f"\ufeff {SECRET}\n"])
def test_what_an_editor_leaves_around_a_key_does_not_count(
    env: pytest.MonkeyPatch, tmp_path: Path, written: str
) -> None:
    """Line ends, white space and a byte order mark: in the environment and in a credential."""
    assert load(env, YAP_TEXT_API_KEY=written).api_key.get_secret_value() == SECRET
    (tmp_path / "YAP_TEXT_API_KEY").write_text(written, encoding="utf-8")
    (tmp_path / "HF_TOKEN").write_text(written, encoding="utf-8")
    settings = load(env, YAP_TEXT_API_KEY="another", CREDENTIALS_DIRECTORY=str(tmp_path))
    assert settings.api_key.get_secret_value() == SECRET
    assert value_of(settings, "HF_TOKEN") == SECRET


@pytest.mark.parametrize("blank", [" ", "\n", "\ufeff", "\ufeff\n"])
def test_a_blank_key_is_none(env: pytest.MonkeyPatch, tmp_path: Path, blank: str) -> None:
    """A credential of that kind counts as empty; no caller gets in with an empty key."""
    (tmp_path / "YAP_TEXT_API_KEY").write_text(blank, encoding="utf-8")
    assert load(env, YAP_TEXT_API_KEY=SECRET, CREDENTIALS_DIRECTORY=str(tmp_path)).own_key == SECRET
    env.delenv("CREDENTIALS_DIRECTORY")
    assert "YAP_TEXT_API_KEY=(hidden) is not allowed: it is blank" in refusal(env, YAP_TEXT_API_KEY=blank)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (f'"{SECRET}"', "begins with a quote"),
        (f"'{SECRET}'\n", "begins with a quote"),
        (f"YAP_TEXT_API_KEY={SECRET}", "begins with the variable's name"),
        (f"{SECRET} {SECRET}", "white space"),
        (f"{SECRET}\n{SECRET}\n", "white space"),
    ],
)
@pytest.mark.parametrize("by", ["environment", "credential"])
def test_more_than_a_key_is_refused_and_not_shown(
    env: pytest.MonkeyPatch, tmp_path: Path, by: str, written: str, told: str
) -> None:
    """No client would send it: all would be refused, and nobody would know why."""
    if by == "credential":
        (tmp_path / "YAP_TEXT_API_KEY").write_text(written)
        line = refusal(env, CREDENTIALS_DIRECTORY=str(tmp_path))
    else:
        line = refusal(env, YAP_TEXT_API_KEY=written)
    named = "YAP_TEXT_API_KEY=(hidden)"
    if by == "credential":
        named = "the credential YAP_TEXT_API_KEY (by default the file /etc/yap-text/api-key)"
    assert line.startswith(f"{named} is not allowed: ") and told in line
    assert SECRET not in line


def test_a_path_that_the_unit_hides_is_named(env: pytest.MonkeyPatch) -> None:
    """To a process of systemd an error about a path in a home folder says which setting it is, and why it is missing
    there; without systemd, or about another path, it says nothing more."""
    env.setenv("TOOLS_FILE", "/home/ada/tools.json")
    env.setenv("CHAT_MODEL", "/root/model")
    env.setenv("SESSION_STORE", "sqlite:/run/user/1000/sessions.db")
    env.setenv("PERSONAS_DIR", "/srv/personas")
    told = "/root/model is not a folder; /srv/personas, /run/user/1000/sessions.db"
    env.delenv("INVOCATION_ID", raising=False)
    assert hidden_paths(told) == []
    env.setenv("INVOCATION_ID", "5f0c1e2ab9d4")
    notes = hidden_paths(told)
    assert [(note.partition(":")[0], "ProtectHome" in note) for note in notes] == [
        ("SESSION_STORE", True),
        ("CHAT_MODEL", True),
    ]
    assert "/root " in notes[1]


# The default key


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org"])
def test_the_default_key_listens_on_loopback_only(env: pytest.MonkeyPatch, host: str) -> None:
    """A key that everyone knows is refused on an address that everyone reaches; the line says what to set."""
    line = refusal(env, HOST=host)
    assert f"HOST={host!r}" in line
    assert "YAP_TEXT_API_KEY" in line
    assert all(address in line for address in LOOPBACK)


def test_setting_the_default_key_is_no_key_of_ones_own(env: pytest.MonkeyPatch) -> None:
    """It is the key's value that counts, not that it was set."""
    assert "HOST='0.0.0.0'" in refusal(env, HOST="0.0.0.0", YAP_TEXT_API_KEY="yap_token")


@pytest.mark.parametrize("host", LOOPBACK)
def test_the_default_key_serves_on_loopback(env: pytest.MonkeyPatch, host: str) -> None:
    """On this host alone the default key is fine."""
    assert load(env, HOST=host).host == host


def test_a_key_of_ones_own_may_listen_anywhere(env: pytest.MonkeyPatch) -> None:
    """With a real key the address is free."""
    assert load(env, HOST="0.0.0.0", YAP_TEXT_API_KEY=SECRET).host == "0.0.0.0"


def test_with_a_key_file_the_default_key_is_off(env: pytest.MonkeyPatch) -> None:
    """So the address is free; an own key stays."""
    settings = load(env, HOST="0.0.0.0", YAP_TEXT_KEY_FILE="/keys")
    assert (settings.own_key, settings.host) == (None, "0.0.0.0")
    assert load(env, YAP_TEXT_KEY_FILE="/keys", YAP_TEXT_API_KEY=SECRET).own_key == SECRET
    env.delenv("YAP_TEXT_KEY_FILE")
    assert load(env, HOST="127.0.0.1", YAP_TEXT_API_KEY="").own_key == "yap_token"


def test_origins_are_compared_as_browsers_write_them(env: pytest.MonkeyPatch) -> None:
    """Without the slash that people add; none means any."""
    assert load(env).origins is None
    assert load(env, ALLOWED_ORIGINS=" https://A.example/,http://b:3000 ").origins == {
        "https://a.example",
        "http://b:3000",
    }


def test_secrets_can_be_forgotten() -> None:
    """No process that is started or forked afterwards has one, under any of its names; what else there was stays."""
    names = ("YAP_TEXT_API_KEY", "HF_TOKEN", "SESSION_STORE_KEY", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
    code = """if True:
        import os, subprocess, sys
        from yaptext.secrets import forget_secrets
        forget_secrets()
        if os.fork() == 0:
            sys.stdout.buffer.write(open("/proc/self/environ", "rb").read())
            sys.exit()
        os.wait()
        sys.stdout.buffer.write(open("/proc/self/environ", "rb").read())
        sys.stdout.flush()
        subprocess.run(["cat", "/proc/self/environ"])
    """
    environment = os.environ | dict.fromkeys(names, SECRET) | {"PORT": "8765"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert SECRET.encode() not in shown and shown.count(b"PORT=8765") == 3


# What moved

MOVED = [
    ({"HUGGING_FACE_HUB_TOKEN": "t"}, {"HF_TOKEN": "t"}),
    ({"HUGGINGFACE_HUB_TOKEN": "t"}, {"HF_TOKEN": "t"}),
    ({"HF_HUB_ENABLE_HF_TRANSFER": "1"}, {"HF_XET_HIGH_PERFORMANCE": True}),
    ({"VLLM_ATTENTION_BACKEND": "XFORMERS"}, {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}),
    ({"VLLM_ATTENTION_BACKEND": "xformers"}, {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}),
    ({"VLLM_ATTENTION_BACKEND": "FLASHINFER"}, {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}),
    ({"VLLM_ATTENTION_BACKEND": "flash_attn"}, {"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}),
    ({"KV_DTYPE": "int8"}, {"KV_DTYPE": "int8_per_token_head"}),
    ({"KV_DTYPE": "INT8"}, {"KV_DTYPE": "int8_per_token_head"}),
]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_old_names_and_values_work_with_one_note_each(
    env: pytest.MonkeyPatch, old: dict[str, str], new: dict[str, Any]
) -> None:
    """What an earlier stack was told still counts, and the operator is told once what it is called now."""
    settings = load(env, **old)
    assert {name: value_of(settings, name) for name in new} == new
    (note,) = moved_names().notes
    assert next(iter(old)) in note


def test_every_old_name_has_its_own_note(env: pytest.MonkeyPatch) -> None:
    """All of them together: one note each, and no note holds a token."""
    load(
        env,
        HUGGINGFACE_HUB_TOKEN=SECRET,
        HF_HUB_ENABLE_HF_TRANSFER="1",
        VLLM_ATTENTION_BACKEND="XFORMERS",
        KV_DTYPE="int8",
    )
    notes = moved_names().notes
    assert len(notes) == len(set(notes)) == 4
    assert SECRET not in " ".join(notes)


@pytest.mark.parametrize(
    "fine",
    [
        {},
        {"VLLM_ATTENTION_BACKEND": "auto"},
        {"VLLM_ATTENTION_BACKEND": "AUTO"},
        {"KV_DTYPE": "fp8"},
        {"KV_DTYPE": "int8_per_token_head"},
        {"HF_TOKEN": "t"},
        {"HF_XET_HIGH_PERFORMANCE": "1"},
    ],
)
def test_todays_names_and_values_get_no_note(env: pytest.MonkeyPatch, fine: dict[str, str]) -> None:
    """A warning means that there is something to change."""
    load(env, **fine)
    assert moved_names().notes == []


def test_todays_name_wins_over_the_old_one(env: pytest.MonkeyPatch) -> None:
    """Where both are set, the old one is not read."""
    settings = load(env, HF_TOKEN="new", HUGGINGFACE_HUB_TOKEN="old")
    assert value_of(settings, "HF_TOKEN") == "new"
    assert moved_names().notes == []


def test_two_old_names_of_one_variable_are_one_note(env: pytest.MonkeyPatch) -> None:
    """The hub client's older name wins over the one that only the guide knew."""
    settings = load(env, HUGGING_FACE_HUB_TOKEN="hub", HUGGINGFACE_HUB_TOKEN="guide")
    assert value_of(settings, "HF_TOKEN") == "hub"
    assert len(moved_names().notes) == 1


def test_moved_names_reads_what_it_is_given() -> None:
    """An environment that is not the process's own can be asked about."""
    assert moved_names({"KV_DTYPE": "int8"}).values == {"KV_DTYPE": "int8_per_token_head"}


# What the log says of them


def test_only_what_differs_from_the_defaults_is_told(env: pytest.MonkeyPatch) -> None:
    """As it is set: a default that is written down is none, and what systemd sets at each start neither."""
    nothing = Changes({}, {})
    assert changes(load(env)) == nothing
    assert changes(load(env, PORT="8000", LISTEN_FDS="1", JOURNAL_STREAM="8:1")) == nothing
    env.setenv("CHAT_LOGIT_BIAS", '{"a": 1}')
    told = changes(load(env, PORT="80", CACHE_PER_KEY="1", CHAT_TOP_P="0.5", TOOLS_FILE="/t"))
    others = {"PORT": 80, "CACHE_PER_KEY": 1, "CHAT_TOP_P": 0.5, "TOOLS_FILE": "/t"}
    assert told.settings == others | {"CHAT_LOGIT_BIAS": '{"a": 1.0}'}
    assert told.sources == dict.fromkeys(told.settings, "environment")


def test_an_old_name_is_told_as_todays(env: pytest.MonkeyPatch) -> None:
    """Its value comes from the environment, too."""
    assert changes(load(env, GEN_TIMEOUT_S="5")) == ({"CHAT_TIMEOUT_S": 5.0}, {"CHAT_TIMEOUT_S": "environment"})


def test_credentials_are_told_as_such(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two values the one that counts; an empty file is none."""
    (tmp_path / "YAP_TEXT_API_KEY").write_text("from-a-file")
    (tmp_path / "HF_TOKEN").touch()
    (tmp_path / "YAP_TEXT_KEY_FILE").touch()
    told = changes(load(env, CREDENTIALS_DIRECTORY=str(tmp_path), YAP_TEXT_API_KEY=SECRET, HF_TOKEN=SECRET))
    assert told == Changes(
        {"YAP_TEXT_API_KEY": "set", "YAP_TEXT_KEY_FILE": f"{tmp_path}/YAP_TEXT_KEY_FILE", "HF_TOKEN": "set"},
        {"YAP_TEXT_API_KEY": "credential", "YAP_TEXT_KEY_FILE": "credential", "HF_TOKEN": "environment"},
    )


def test_no_secret_is_told(env: pytest.MonkeyPatch) -> None:
    """Whatever holds one by its type, under any of its names, and a URL in any variable."""
    secrets = ("YAP_TEXT_API_KEY", "HUGGINGFACE_HUB_TOKEN", "SESSION_STORE_KEY")
    url = f"https://user:{SECRET}@hub.example/model"
    told = changes(load(env, **dict.fromkeys(secrets, SECRET * 2), CHAT_MODEL=url, HF_AWQ_CHAT_REPO=url))
    names = {"YAP_TEXT_API_KEY", "HF_TOKEN", "SESSION_STORE_KEY", "CHAT_MODEL", "HF_AWQ_CHAT_REPO"}
    assert told.settings == dict.fromkeys(names, "set") and SECRET not in str(told)


def test_a_very_long_value_is_told_by_its_beginning(env: pytest.MonkeyPatch) -> None:
    """The line stays one in the journal."""
    (value,) = changes(load(env, INTERRUPTED_MARK="x" * 60_000)).settings.values()
    assert value == "x" * 500 + "..."


# What the deployment decides


@pytest.mark.parametrize(
    ("deploy", "awq", "limit"),
    [
        ("tool", False, 32),
        ("chat", False, 24),
        ("both", False, 16),
        ("tool", True, 64),
        ("chat", True, 40),
        ("both", True, 26),
    ],
)
def test_connection_limits_follow_deployment_and_weights(
    env: pytest.MonkeyPatch, deploy: str, awq: bool, limit: int
) -> None:
    """Smaller models leave room for more conversations; a limit that is set counts as it is."""
    assert load(env, DEPLOY_MODELS=deploy).max_connections(awq=awq) == limit
    assert load(env, MAX_CONCURRENT_CONNECTIONS="50").max_connections(awq=awq) == 50


@pytest.mark.parametrize(
    ("deploy", "roles"), [("both", (True, True)), ("chat", (True, False)), ("tool", (False, True))]
)
def test_a_deployment_has_its_roles(env: pytest.MonkeyPatch, deploy: str, roles: tuple[bool, bool]) -> None:
    """both, or one of the two."""
    settings = load(env, DEPLOY_MODELS=deploy)
    assert (settings.chat_deployed, settings.tool_deployed) == roles


def test_gpu_fractions(env: pytest.MonkeyPatch) -> None:
    """0.70 and 0.20 side by side, 0.90 alone, and what is set wins."""
    settings = load(env)
    assert settings.gpu_fraction("chat", alone=False) == 0.70
    assert settings.gpu_fraction("tool", alone=False) == 0.20
    assert settings.gpu_fraction("chat", alone=True) == settings.gpu_fraction("tool", alone=True) == 0.90
    settings = load(env, CHAT_GPU_FRAC="0.80", TOOL_GPU_FRAC="0.15")
    assert settings.gpu_fraction("chat", alone=True) == settings.gpu_fraction("chat", alone=False) == 0.80
    assert settings.gpu_fraction("tool", alone=False) == 0.15


@pytest.mark.parametrize(("device", "seconds"), [("cuda", 0.3), ("cpu", 20.0)])
def test_a_decision_has_as_long_as_the_device_needs(env: pytest.MonkeyPatch, device: str, seconds: float) -> None:
    """300 ms on a GPU; on CPU a real decision may finish; what is set counts on both."""
    settings = load(env, YAP_TEXT_DEVICE=device)
    assert settings.on_cuda == (device == "cuda")
    assert settings.tool_timeout_s == seconds
    assert load(env, TOOL_HARD_TIMEOUT_MS="450").tool_timeout_s == 0.45


def test_auto_takes_cuda_where_a_driver_is_loaded(env: pytest.MonkeyPatch) -> None:
    """The kernel says whether there is an NVIDIA driver; no CUDA library is asked."""
    assert load(env, YAP_TEXT_DEVICE="auto").on_cuda == Path("/proc/driver/nvidia/version").exists()


def test_the_state_folder(env: pytest.MonkeyPatch) -> None:
    """One's own wins over systemd's, and without either it is in the home folder."""
    env.setenv("HOME", "/home/yap")
    assert load(env).state == Path("/home/yap/.local/state/yap-text")
    assert load(env, STATE_DIRECTORY="/var/lib/yap-text").state == Path("/var/lib/yap-text")
    assert load(env, YAP_TEXT_STATE_DIR="/own").state == Path("/own")


def test_the_session_file(env: pytest.MonkeyPatch) -> None:
    """None by default; a relative path is under the state folder."""
    assert load(env).session_file is None
    env.setenv("YAP_TEXT_STATE_DIR", "/own")
    assert load(env, SESSION_STORE="sqlite:sessions.db").session_file == Path("/own/sessions.db")
    assert load(env, SESSION_STORE="sqlite:/data/sessions.db").session_file == Path("/data/sessions.db")


def test_credentials_win_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's files hold the key and the token; white space around them does not count, an empty file neither."""
    (tmp_path / "YAP_TEXT_API_KEY").write_text("from-a-file\n")
    (tmp_path / "HF_TOKEN").write_text("\n")
    (tmp_path / "SESSION_STORE_KEY").write_text("also-from-a-file\n")
    (tmp_path / "YAP_TEXT_KEY_FILE").write_text("")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("YAP_TEXT_API_KEY", "from-the-environment")
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    settings = Settings.load()
    assert settings.api_key.get_secret_value() == "from-a-file"
    assert settings.hf_token is not None and settings.hf_token.get_secret_value() == "hf_environment"
    assert settings.session_store_key is not None
    assert settings.session_store_key.get_secret_value() == "also-from-a-file"
    assert settings.key_file == tmp_path / "YAP_TEXT_KEY_FILE"
