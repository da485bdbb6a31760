"""Conditions as a person writes them: an expression of Python's, read and never executed, into one of pyarrow's."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from indexes.conditions import Condition, all_of, any_of, literal, one_line, period, within
from indexes.derived import DATES, DERIVED, FLAG, NUMBERS, TEXT, TEXTS, kind_of, known_columns, listed, no_column
from indexes.errors import FilterError

_SHOWN = 200  # characters of a condition in a message
_TESTS = 1000  # Arrow walks through an expression recursively, and tens of thousands overflow its stack
Compare: TypeAlias = Callable[[Any, Any], Any]
EXAMPLE = "width > 1000 and type == 'png'"
_COMPARISONS: dict[type[ast.cmpop], Compare] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MIRRORED: dict[Compare, Compare] = {
    operator.lt: operator.gt,
    operator.le: operator.ge,
    operator.gt: operator.lt,
    operator.ge: operator.le,
}


def parse(text: str, schema: pa.Schema) -> Condition:
    """Read a condition as Python writes it: ``width > 1000 and country == 'FR'``. Nothing is executed.

    Names are columns, ``column('my name')`` one whose name is no word of Python's. There are comparisons, also chained
    ones, ``and``, ``or``, ``not``, parentheses, ``in (…)``, ``'part' in text``, ``'one' in list``, ``is None``. Dates
    are compared with texts like ``'2021-05'``, which stand for the whole month: ``<=`` takes it in, ``>`` begins after
    it. As in SQL, a row without a value qualifies by ``is None`` alone.

    Args:
        text: the condition.
        schema: of the rows.

    Raises:
        FilterError: it cannot be read, names a column that is not there, or compares one with a value of another kind.

    """
    reader = _Reader(text, schema)
    try:
        return reader.condition(reader.tree())
    except (RecursionError, MemoryError):
        reader.refuse("it is nested too deeply")
    except UnicodeEncodeError:
        reader.refuse("it is not in UTF-8")
    except OverflowError:
        reader.refuse("a number in it is too large")


class _Reader:
    """Turns the syntax tree of a written condition into an expression."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.tests = 0
        self.text, self.stored, self.known = text, schema.names, known_columns(schema)

    def refuse(self, reason: str) -> NoReturn:
        raise FilterError(
            f"{one_line(self.text)[:_SHOWN]!r} is no condition ({reason}): write it as {EXAMPLE}; {listed(self.known)}"
        )

    def tree(self) -> ast.expr:
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except UnicodeEncodeError:
            raise
        except (SyntaxError, ValueError) as error:  # the latter of null bytes, and of thousands of digits
            self.refuse(error.msg if isinstance(error, SyntaxError) else str(error))

    def condition(self, node: ast.expr) -> Condition:
        if isinstance(node, ast.BoolOp):
            parts = [self.condition(value) for value in node.values]
            return all_of(parts) if isinstance(node.op, ast.And) else any_of(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            return all_of(self.comparison(*one) for one in zip(sides[:-1], node.ops, sides[1:], strict=True))
        name = self.column(node)
        if name is None:
            self.refuse(f"{ast.unparse(node)} is no comparison")
        if self.kind(name) != FLAG:
            self.refuse(f"{name} holds {self.kind(name)}: compare it with something")
        return pc.field(name)

    def comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Condition:
        one, other = self.column(left), self.column(right)
        if one is None and other is None:
            self.refuse(f"there is no column in {ast.unparse(ast.Compare(left, [op], [right]))}")
        if isinstance(op, ast.NotIn):
            return ~self.comparison(left, ast.In(), right)
        if isinstance(op, ast.In):
            return self.contained(left, right)
        compare: Compare = _COMPARISONS.get(type(op), operator.eq if isinstance(op, ast.Is) else operator.ne)
        if one is not None and other is not None:
            return compare(pc.field(one), pc.field(other))
        if one is not None:
            return self.test(one, compare, self.value(right))
        assert other is not None
        return self.test(other, _MIRRORED.get(compare, compare), self.value(left))

    def contained(self, left: ast.expr, right: ast.expr) -> Condition:
        name = self.column(right)
        if name is None:
            column, values = self.column(left), self.value(right)
            assert column is not None
            if not isinstance(values, tuple | list | set):
                self.refuse(f"in takes several values, as in {column} in ({values!r}, …)")
            found = any_of(self.test(column, operator.eq, value) for value in values)
            return pc.scalar(False) if found is None else found
        part = None if self.column(left) else self.value(left)
        if not isinstance(part, str) or self.kind(name) not in (TEXT, TEXTS):
            self.refuse(f"{name} holds {self.kind(name)}: only a text can be in a column, and only in one of texts")
        if self.kind(name) == TEXT:
            return pc.match_substring(pc.field(name), part)
        return pc.match_substring_regex(pc.binary_join(pc.field(name), "\0"), rf"(?:^|\x00){literal(part)}(?:\x00|\z)")

    def test(self, name: str, compare: Compare, value: Any) -> Condition:
        """Compare a column with a value."""
        self.tests += 1
        if self.tests > _TESTS:
            self.refuse(f"it has more than {_TESTS:,} comparisons")
        field, kind = pc.field(name), self.kind(name)
        if value is None and compare in (operator.eq, operator.ne):
            return field.is_null() if compare is operator.eq else field.is_valid()
        if kind == DATES and isinstance(value, str):
            return self.dated(name, compare, value)
        types: dict[str, tuple[type, ...]] = {TEXT: (str,), NUMBERS: (int, float), FLAG: (bool,)}
        if not isinstance(value, types.get(kind, ())) or (kind == NUMBERS and isinstance(value, bool)):
            self.refuse(f"{name} holds {kind} and cannot be compared with {value!r}")
        if kind == TEXT and name in DERIVED and name not in self.stored:
            value = DERIVED[name].spell(str(value))
        return compare(field, value)

    def dated(self, name: str, compare: Compare, text: str) -> Condition:
        type_ = self.known.field(name).type
        start, end = (moment and pa.scalar(moment, type_) for moment in period(text))
        if compare in (operator.eq, operator.ne):
            inside = within(name, start, end)
            return inside if compare is operator.eq else ~inside
        edge = end if compare in (operator.le, operator.gt) else start
        if edge is None:  # the end of time
            return compare(pc.field(name), pa.scalar(datetime.max, type_))
        return pc.field(name) < edge if compare in (operator.lt, operator.le) else pc.field(name) >= edge

    def column(self, node: ast.expr) -> str | None:
        """The column that a node names; None if it is a value."""
        if isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "column":
            given = [self.value(argument) for argument in node.args]
            if len(given) != 1 or not isinstance(given[0], str) or node.keywords:
                self.refuse("column() takes the name of one column, in quotes")
            name = given[0]
        else:
            return None
        if name not in self.known.names:
            raise no_column(name, self.known)
        return name

    def value(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            self.refuse(f"{ast.unparse(node)} is neither a column nor a value")

    def kind(self, name: str) -> str:
        return kind_of(self.known.field(name).type)
