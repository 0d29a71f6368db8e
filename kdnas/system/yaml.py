"""Safe reading of YAML, which refuses duplicate keys, unbounded aliases and Python objects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from kdnas.system.errors import UserError

# A config has about 100 lines, but with a few aliases of aliases it could expand to gigabytes.
MOST_CHARACTERS = 1 << 18
MOST_NODES = 10_000
MOST_LEVELS = 50

# Errors of the YAML loader at values that it cannot convert: an impossible date, an integer of a million digits,
# `!!int ""`.
NO_VALUE = (ValueError, LookupError, AttributeError, TypeError)


def check_yaml(text: str) -> None:
    """Raise an error for YAML that is not valid, is too large, or gives a key twice.

    The text is parsed, but no objects are created from it.

    Raises:
        yaml.YAMLError: the text is not valid YAML; a key is given twice; a value contains itself or
            a NUL character; or the text has too many characters, levels or (with aliases expanded)
            values.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(
            f"the YAML has {len(text):,} characters, but at most {MOST_CHARACTERS:,} are allowed"
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError(
            f"the YAML is nested too deeply: at most {MOST_LEVELS} levels are allowed"
        ) from None
    if node is not None:
        _count(node, (), {})


def _count(node: yaml.Node, above: tuple[yaml.Node, ...], known: dict[yaml.Node, int]) -> int:
    """Return the number of nodes of a tree, with all aliases expanded.

    Args:
        node: root of the tree; it counts, too.
        above: ancestors of ``node``, the root of the document first.
        known: maps nodes that were visited before to their counts; new counts are added.
    """
    where = f"line {node.start_mark.line + 1}"
    if node in above:
        raise yaml.YAMLError(f"a value contains itself, {where}")
    if len(above) > MOST_LEVELS:
        raise yaml.YAMLError(
            f"the YAML is nested too deeply: at most {MOST_LEVELS} levels are allowed, {where}"
        )
    if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
        raise yaml.YAMLError(f"a value contains a NUL, {where}")
    if node not in known:
        known[node] = 1 + sum(_count(child, (*above, node), known) for child in _children(node))
        if known[node] > MOST_NODES:
            raise yaml.YAMLError(
                f"the YAML has more than {MOST_NODES:,} values after its aliases are expanded, "
                f"{where}"
            )
    return known[node]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.YAMLError(
                    f"the key {key.value!r} is given twice, line {key.start_mark.line + 1}"
                )
            seen.add((key.tag, str(key.value)))
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: the file cannot be read, fails ``check_yaml``, or holds no mapping.
    """
    refuse_special(path)
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        values = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, *NO_VALUE) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot read {str(path)!r}: {said.rstrip('.')}.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{str(path)!r} holds no mapping: write names with values, such as 'seed: 1'."
        )
    return values


def refuse_special(path: Path) -> None:
    """Raise an error for a folder, a pipe or a device, as reading it might never end.

    Raises:
        UserError: the path exists, but is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{str(path)!r} is a folder, a pipe or a device: give a file.")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings, so that ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``.

    Args:
        values: the settings.
        prefix: text before each name in the result.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found
