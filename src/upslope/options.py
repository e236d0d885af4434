"""Settings from the command line, by tyro over the dataclasses that hold them: no second set of names or defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

if TYPE_CHECKING:
    from upslope.train import Run

_Settings = TypeVar("_Settings")


def configure(run: Run, settings: Sequence[str], *, program: str) -> Run:
    """A configuration with some settings changed, as `--algorithm.clip 0.1 --steps 1e6`.

    The options are the fields of the configuration and of the very classes in it, an algorithm of the user's own
    included; what is not given stays as it is in `run`.

    Raises:
        SystemExit: after `--help` (code 0) or a setting that cannot be read (code 2).
    """
    kind = dataclasses.make_dataclass(
        type(run).__name__,
        [("algorithm", type(run.algorithm), dataclasses.field(kw_only=True))],
        bases=(type(run),),
        frozen=True,
    )
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    changed = tyro.cli(
        kind,
        prog=program,
        description="Every setting of this recipe, what it is and what it is set to.",
        default=kind(**values),
        args=settings,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry(),
        use_underscores=True,
    )
    return type(run)(**{name: getattr(changed, name) for name in values})


def parse(kind: type[_Settings], arguments: Sequence[str], *, program: str) -> _Settings:
    """A dataclass from arguments; leaves as `configure` does."""
    return tyro.cli(kind, prog=program, args=arguments, registry=_registry(), use_underscores=True)


def _registry() -> ConstructorRegistry:
    """Whole numbers may be written as `1e6`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda words: whole_number(words[0]),
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def whole_number(text: str) -> int:
    """`128`, `1_000_000`, `1e6` or `2.5e5`.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise ValueError(f"{text!r} is not a whole number; write it as 250000 or 2.5e5")
    return int(value)
