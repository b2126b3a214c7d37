"""Claims about errors: four parts in every message, whole after a pickle, one exit code a branch."""

from __future__ import annotations

import pickle

import pytest

from dist_mlpl import errors
from dist_mlpl.errors import ConfigError, DataError, MlplError, RunError, nearest_names

pytestmark = pytest.mark.unit

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MlplError)
]  # every class of the tree


def made(kind: type[MlplError]) -> MlplError:
    return kind("two cats", expected="one cat", where="basket 7", next_step="count again")


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_says_what_was_found_what_was_expected_where_and_what_to_do(kind: type[MlplError]) -> None:
    lines = str(made(kind)).splitlines()
    assert lines[0] == "two cats"
    assert [line.split() for line in lines[1:]] == [
        ["expected:", "one", "cat"],
        ["where:", "basket", "7"],
        ["do:", "count", "again"],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_a_pickle_with_its_type_and_parts(kind: type[MlplError]) -> None:
    error = pickle.loads(pickle.dumps(made(kind)))
    assert type(error) is kind
    assert (error.found, error.expected, error.where, error.next_step) == (
        "two cats", "one cat", "basket 7", "count again",
    )  # fmt: skip
    assert str(error) == str(made(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_exit_code_tells_config_data_and_run_apart(kind: type[MlplError]) -> None:
    codes = {ConfigError: 2, DataError: 3, RunError: 4}
    branch = next((branch for branch in codes if issubclass(kind, branch)), RunError)
    assert kind.exit_code == codes[branch]


def test_no_part_may_be_left_out() -> None:
    with pytest.raises(TypeError):
        MlplError("found", expected="x", where="y")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        MlplError("found", "x", "y", "z")  # type: ignore[misc]


def test_a_short_list_of_names_is_shown_whole_and_a_long_one_by_its_nearest() -> None:
    assert nearest_names("bb", ["b", "a"]) == "one of 'a', 'b'"
    assert nearest_names("x", []) == "no name is valid here"
    many = [f"class_{i}" for i in range(601)]
    assert nearest_names("clas_37", many).startswith("nearest: 'class_37', ")
    assert nearest_names("clas_37", many).endswith("(of 601)")
    assert nearest_names("@@@@", many).startswith("nearest: 'class_0', ")
