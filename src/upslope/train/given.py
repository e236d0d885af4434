"""Environments that a user passes, and those that a run directory names."""

from __future__ import annotations

from dataclasses import replace

from upslope.collect import EnvironmentConfig, Source
from upslope.errors import UsageError

_GIVEN = "given:"


def split_source(source: Source | None, config: EnvironmentConfig) -> tuple[EnvironmentConfig, Source | None]:
    """Where environments come from: a config with nothing beside it, or an object to be used in place of its id.

    Args:
        source: as given; a config stands for itself, and text for the id of an environment.
        config: all other settings.
    """
    if isinstance(source, EnvironmentConfig):
        return source, None
    if isinstance(source, str):
        return replace(config, id=source), None
    return config, source


def given_id(source: Source) -> str:
    """What stands in place of an id where an object was given."""
    return f"{_GIVEN}{getattr(source, '__name__', type(source).__name__)}"


def was_given(config: EnvironmentConfig) -> bool:
    """Whether a recorded environment was an object, which no file can hold."""
    return config.id.startswith(_GIVEN)


def environment_again(config: EnvironmentConfig) -> list[str]:
    """The command line's option that names an environment which a run directory alone may not (`check_recorded`)."""
    return ["--environment", config.id] if ":" in config.id and not was_given(config) else []


def check_recorded(config: EnvironmentConfig, source: Source | None) -> None:
    """Refuse to make an environment that a run directory alone names, where none can or none should be made.

    An id `module:Name-v0` has `module` imported. A run directory may come from anybody, so that the user has to name
    such an environment anew.

    Args:
        config: as recorded.
        source: as given now, if it is.

    Raises:
        UsageError: it was an object, or its id names a module.
    """
    if source is not None:
        return
    if was_given(config):
        raise UsageError(
            "this run was trained in an environment that was passed as an object or a function: pass it again, "
            "environments=... in Python, or --environment ID on the command line if it has an id"
        )
    if ":" in config.id:
        raise UsageError(
            f"the environment of this run, {config.id!r}, is made by importing {config.id.split(':')[0]!r}, and a run "
            f"directory from somebody else could name any module. If you trust it, name it: environments={config.id!r} "
            f"in Python, --environment {config.id} on the command line"
        )
