"""Makes small mistakes in a Python file by rules: what `tools/mutants.py --sample` draws from.

The same seed draws the same mistakes from the same text. Annotations, decorators and f-strings are left alone: a change
there is no mistake, or only one of wording.

Not by cosmic-ray: three in five of its mistakes swap one binary operator for each of the eleven others, and none drops
a statement, an argument or a returned value. Not by mutmut: it leaves tables of constants, defaults of fields and
decorated functions alone.
"""

from __future__ import annotations

import ast
import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

SWAPS: dict[type[ast.AST], type[Any]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip

AROUND, LONGEST = 40, 100  # characters of the code before a difference, and of all that is shown


@dataclass(frozen=True)
class Mistake:
    """`text`: the whole file with it."""

    kind: str
    line: int
    old: str
    new: str
    text: str


def draw(text: str, count: int, seed: str) -> list[Mistake]:
    """At most so many, in the file's order. The kind is drawn first, so that a frequent one does not crowd out the
    others."""
    kinds: dict[str, list[Mistake]] = defaultdict(list)
    for mistake in mistakes(text):
        kinds[mistake.kind].append(mistake)
    chance, chosen = random.Random(seed), list[Mistake]()
    while kinds and len(chosen) < count:
        kind = chance.choice(sorted(kinds))
        chosen.append(kinds[kind].pop(chance.randrange(len(kinds[kind]))))
        if not kinds[kind]:
            del kinds[kind]
    return sorted(chosen, key=lambda mistake: (mistake.line, mistake.kind, mistake.new))


def mistakes(text: str) -> Iterator[Mistake]:
    """All that the rules make of a file."""
    for kind, old, new in _changes(ast.parse(text)):
        before, after = ast.unparse(old), ast.unparse(new)
        changed = _replaced(text, old, f"({after})" if isinstance(old, ast.expr) else after)
        try:
            ast.parse(changed)
        except SyntaxError:  # no expression with brackets may stand there: a slice
            continue
        if before != after:
            yield Mistake(kind, old.lineno, *_apart(before, after), changed)


def _changes(tree: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, ast.AST]]:
    """(kind, node, what stands in its place)."""
    defaults, counted = {id(node) for node in _defaults(tree)}, {id(node) for node in _counted(tree)}
    for node in _walk(tree):
        if id(node) in counted:
            continue
        for kind, new in _of_statement(node) if isinstance(node, ast.stmt) else _of_expression(node):
            yield "default" if id(node) in defaults else kind, node, new


def _walk(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, (ast.expr, ast.stmt)):
        yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list", "bases"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _walk(child)


def _defaults(tree: ast.AST) -> Iterator[ast.AST]:
    """Of parameters, and of the fields of classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            yield from node.defaults
            yield from filter(None, node.kw_defaults)
        elif isinstance(node, ast.ClassDef):
            yield from (part.value for part in node.body if isinstance(part, ast.AnnAssign) and part.value)


def _counted(tree: ast.AST) -> Iterator[ast.AST]:
    """Tuples that cannot be shorter without an error: those that are unpacked, and those in an index."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign([ast.Tuple()], value) | ast.Subscript(_, value):
                yield value
            case ast.For(ast.Tuple(), ast.Tuple(parts) | ast.List(parts)):
                yield from parts


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Expr(ast.Constant()):  # a docstring
            return
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.If() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield "statement", ast.Pass()
        case ast.Return(value) if value and not (isinstance(value, ast.Constant) and value.value is None):
            yield "return", ast.Return(ast.Constant(None))


def _of_expression(node: ast.expr) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Constant(bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(int(value)):
            yield "constant", ast.Constant(value + 1)
            if value > 0:
                yield "constant", ast.Constant(value - 1)
        case ast.Constant(float(value)):
            yield "constant", ast.Constant(value * 2 or 1.0)
        case ast.Compare(_, ops, _):
            for at, op in enumerate(ops):
                yield "comparison", _with(node, "ops", at, SWAPS[type(op)]())
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield "operator", ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, parts):
            yield "operator", ast.BoolOp(SWAPS[type(op)](), parts)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield "operator", operand
        case ast.IfExp(test, body, other):
            yield "branch", ast.IfExp(test, other, body)
        case ast.Call(_, args, keywords):
            for at in range(len(keywords)):
                yield "argument", _with(node, "keywords", at)
            for at, (one, other) in enumerate(pairwise(args)):
                if not isinstance(one, ast.Starred) and not isinstance(other, ast.Starred):
                    yield "argument", ast.Call(node.func, [*args[:at], other, one, *args[at + 2 :]], keywords)
        case ast.Tuple(parts, ast.Load()) | ast.List(parts, ast.Load()) | ast.Set(parts) if len(parts) > 1:
            for at in range(len(parts)):
                yield "element", _with(node, "elts", at)


def _with(node: ast.expr, name: str, at: int, *new: ast.AST) -> ast.AST:
    """The node with other parts, or none, in one's place."""
    changed, parts = copy.copy(node), getattr(node, name)
    setattr(changed, name, [*parts[:at], *new, *parts[at + 1 :]])
    return changed


def _replaced(text: str, node: ast.expr | ast.stmt, written: str) -> str:
    lines = [line.encode() for line in text.splitlines(keepends=True)]  # ast counts bytes
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    stop = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = b"".join(lines)
    return (whole[:start] + written.encode() + whole[stop:]).decode()


def _apart(before: str, after: str) -> tuple[str, str]:
    """Where they differ, and a little of what stands around."""
    before, after = " ".join(before.split()), " ".join(after.split())
    same = next((at for at, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), 0)
    return _cut(before, same), _cut(after, same)


def _cut(code: str, at: int) -> str:
    start = max(0, at - AROUND)
    return f"{'...' * (start > 0)}{code[start : start + LONGEST]}{'...' * (len(code) > start + LONGEST)}"
