"""The JSON schema of configs says what every key means, and takes every config that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_mlpl.methods.csl import CslSettings
from dist_mlpl.tools.schema import argument_entries, config_schema, descriptions, key_comments

pytestmark = pytest.mark.unit

DOCSTRING = """One line.

    Args:
        alpha, beta: two at once, over
            two lines: with a colon.
        name: one.

    Source: somewhere.
        faithful: no argument.
    """

SOURCE = '''
class Some(Settings):
    """Text."""

    # Above, over
    # two lines.
    first: int = 0
    second: str = "# no comment"  # beside
    third: int = 3
    # of nothing

    fourth: tuple[
        int, int
    ] = (1, 2)  # at the end  # fmt: skip
'''


def test_arguments_are_read_from_a_google_docstring() -> None:
    entry = "two at once, over two lines: with a colon."
    assert argument_entries(DOCSTRING) == {"alpha": entry, "beta": entry, "name": "one."}
    assert argument_entries("One line.") == {}


def test_comments_beside_and_above_a_key_are_read() -> None:
    assert key_comments(SOURCE.replace("  # fmt: skip", "")) == {
        "first": "Above, over two lines.", "second": "beside", "fourth": "at the end",
    }  # fmt: skip


def test_a_method_s_keys_are_its_own_and_those_of_all_methods() -> None:
    found = descriptions(CslSettings)
    assert found.keys() >= CslSettings.model_fields.keys()
    assert found["dropout"].startswith("probability of dropping a pooled feature")


def test_every_key_says_what_it_means_and_extends_is_one() -> None:
    schema = config_schema()
    assert schema["properties"]["extends"]["type"] == "string"
    tables = {"Config": schema} | schema["$defs"]
    mute = [
        f"{name}.{key}"
        for name, table in tables.items()
        for key, entry in table.get("properties", {}).items()
        if not entry.get("description")
    ]
    assert mute == []


def test_every_config_that_ships_is_valid_under_the_schema_and_a_wrong_one_is_not() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(config_schema())
    for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")):
        assert list(judge.iter_errors(yaml.safe_load(path.read_text()))) == [], path
    whole = {"num_epochs": 1, "global_batch": 8, "data": {"manifest": "x"}, "method": {"name": "csl"}}
    assert judge.is_valid(whole)
    for wrong in ({"num_epochs": 1}, whole | {"sed": 1}, whole | {"method": {"name": "csl", "graph": {}}}):
        assert not judge.is_valid(wrong)
