"""YAML whose values are what they look like: YAML 1.2's numbers and booleans, and no key twice.

YAML 1.1, PyYAML's, takes 010 for 8, 1:30 for 90, yes for true, 2024-01-01 for a date and 1e-6 for text, and of two
equal keys the last one.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

MAX_DEPTH, MAX_VALUES = 50, 100_000
VALUES = (  # tag, form, first characters
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("tag:yaml.org,2002:float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
)


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the values of YAML 1.2; a key that is given twice is an error."""

    depth = 0
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML declares it so

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping. ConstructorError names a key that is given twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"the key {key.value} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, ScalarNode) else key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Read one value with all that is in it. ComposerError where that is too deep."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ComposerError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: ScalarNode | MappingNode) -> Any:
        """Return a scalar's text. ConstructorError for one that no file name and no JSON can hold."""
        text = super().construct_scalar(node)
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text):
            raise ConstructorError(None, None, "a value has a NUL or half of a character", node.start_mark)
        return text


for tag, form, first in VALUES:
    StrictLoader.add_implicit_resolver(tag, re.compile(f"^(?:{form})$"), list(first))


def load_yaml(text: str) -> Any:
    """Return the values of a YAML document. ValueError says in one line what is wrong, and where."""
    try:
        value = yaml.load(text, StrictLoader)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{error.problem}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    # A number of more digits than Python reads, a date that does not exist, `!!bool maybe`.
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"a value cannot be read: {error}") from None
    check_size(value)
    return value


def check_size(value: Any) -> None:
    """Raise ValueError for too many values, as those are that hold themselves by `*name`."""
    inside, count = [value], 0
    while inside:
        one, count = inside.pop(), count + 1
        inside += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if count > MAX_VALUES:
            raise ValueError("it has too many values, or repeats itself by `*name`")
