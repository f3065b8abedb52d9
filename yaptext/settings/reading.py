"""How the settings are read: from systemd's credentials, from old names and from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from yaptext import secrets
from yaptext.errors import SettingsError
from yaptext.settings import faults
from yaptext.settings.old_names import moved_names
from yaptext.settings.rules import Checked
from yaptext.settings.slips import unknown_names


class Settings(Checked):
    """The service's settings. `Settings.load()` reads the environment and raises `SettingsError`."""

    model_config = SettingsConfigDict(defer_build=False)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            init_settings,
            _Found(settings_cls, secrets.credentials()),
            _Found(settings_cls, moved_names().values),
            env_settings,
        )

    @classmethod
    def load(cls, *, serving: bool = False, **given: Any) -> Self:
        """Reads the environment; `given` (by variable name) wins over it. Raises `SettingsError`: one line for each
        fault, misspelt names included. `serving` also requires a state folder that can be written to.
        """
        lines: list[str] = []
        try:
            settings = cls(**given)
        except ValidationError as error:
            lines = faults.lines(error) + cls._broken_rules(
                given, {str(f["loc"][0]) for f in error.errors() if f["loc"]}
            )
        if serving:
            lines += faults.of_state_folder(given)
        if not lines:
            return settings
        slips = [note for note in unknown_names() if "do you mean" in note]
        raise SettingsError("\n".join(dict.fromkeys([*lines, *slips])))

    @classmethod
    def _broken_rules(cls, given: dict[str, Any], wrong: set[str]) -> list[str]:
        """The broken rules over several variables, except those that involve `wrong` ones: pydantic checks no such rule
        while any value is wrong."""
        defaults = {str(field.validation_alias): field.default for field in cls.model_fields.values()}
        try:
            cls(**given | {name: defaults[name] for name in wrong})
        except ValidationError as error:
            return [line for line in faults.lines(error) if not any(name in line for name in wrong)]
        return []


class _Found(PydanticBaseSettingsSource):
    """A source of values by variable name."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, str]) -> None:
        super().__init__(settings_cls)
        self._values = values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # the whole source is one dict, below

    def __call__(self) -> dict[str, Any]:
        return dict(self._values)
