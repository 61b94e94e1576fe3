"""What pydantic says about a manifest, in our words: the value and what is allowed."""

from __future__ import annotations

from typing import Final

from pydantic_core import ErrorDetails


def explain(details: ErrorDetails) -> str:
    """One pydantic error in our words: the value and what is allowed."""
    kind, context, value = details["type"], details.get("ctx", {}), repr(details["input"])
    value = value if len(value) <= 80 else value[:77] + "…"
    match kind:
        case "extra_forbidden":
            return "unknown key"
        case "greater_than_equal" | "greater_than":
            return f"{value} is too small; allowed: {context.get('ge', context.get('gt'))} or more"
        case "less_than_equal" | "less_than":
            return f"{value} is too large; allowed: {context.get('le', context.get('lt'))} or less"
        case "literal_error":
            return f"{value} is not allowed; allowed: {context['expected']}"
        case "value_error":
            return str(context["error"])
        case "finite_number":
            return f"{value} is not a finite number"
        case "too_long":
            return f"has more than {context['max_length']} entries"
        case "string_too_long":
            return f"is longer than {context['max_length']} characters"
        case "missing":
            return "is missing"
    wanted = _TYPES.get(kind)
    return f"{value} is not {wanted}" if wanted else f"{value}: {details['msg']}"


_TYPES: Final = {
    "int_type": "a whole number",
    "int_parsing_size": "a number in range",
    "float_type": "a number",
    "string_type": "a string",
    "tuple_type": "a list",
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
    "string_too_short": "a name",
}
