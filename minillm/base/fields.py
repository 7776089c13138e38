"""Fields of a configuration held against their annotations: what a wrong setting is told."""

import math
from dataclasses import fields
from typing import Literal, get_args, get_origin


def check_fields(config: object) -> None:
    """Hold each field of a dataclass against its annotation: positive sizes, finite positive numbers, known choices.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """
    for field in fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), field.name
        choices = get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if field.type is float and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
