"""Where a task's templates run: a task folder may come from a stranger, so a template is data.

jinja's own sandbox hides what begins with `_`. Beyond it a template here may call only what text,
numbers, lists and jinja itself offer, and the functions that it was given (`Offered`): an object
that is passed in is looked at and never made to act. What would run or write without end raises,
mostly before it is made; a template may still take some hundred MB.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from types import BuiltinMethodType

from jinja2 import (
    FileSystemLoader,
    StrictUndefined,
    Undefined,
    nodes,
    pass_context,
    pass_eval_context,
)
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import SandboxedEnvironment, SecurityError
from jinja2.utils import Cycler, Joiner
from jinja2.visitor import NodeTransformer
from markupsafe import Markup, escape

from common.text import without_folder

SECONDS = 5.0  # that a template may take; ours take a thousandth of one, a large card a tenth
LONGEST = 20_000_000  # characters that a template may write
LARGEST = 1_000_000  # number that a filter or a method may be given
PLAIN = (str, int, float, list, tuple, dict, type({}.keys()), type({}.items()), type({}.values()))
OF_JINJA = (Macro, LoopContext, BlockReference, Cycler, Joiner, Undefined)
# What makes a text as long as a number says: filters, methods, and `range`.
STRETCHING = {"center", "indent", "batch", "slice", "ljust", "rjust", "zfill", "expandtabs"}
STRETCHING |= {"to_bytes", "range", "safe_range"}
# A format that does: "%9999999d", "{:>9999999}", "%*d", "%.*f", "{:{width}}".
WIDE = re.compile(r"%(?:\([^()]*\))?[-+ #0]*\d*\.?(?:\d{6,}|\*)|\{[^{}]*:[^{}]*(?:\d{6,}|\{)")
_deadline: ContextVar[float] = ContextVar("deadline", default=0.0)
_written: ContextVar[list[int]] = ContextVar("written")


class Offered:
    """A function that templates may call."""

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return self._function.__name__


@contextmanager
def limits() -> Iterator[None]:
    """Within it templates have SECONDS from now and LONGEST characters, all together."""
    if _deadline.get():  # one block inside another gives no more
        yield
        return
    _deadline.set(time.monotonic() + SECONDS)
    _written.set([0])
    try:
        yield
    finally:
        _deadline.set(0.0)


def _tick() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"it takes more than {SECONDS:g} s; is there a loop without an end?")


def _check_size(size: float) -> None:
    if size > LONGEST:
        raise SecurityError(f"it writes more than {LONGEST:,} characters")


def _check_stretching(name: str, values: list[object]) -> None:
    """`values`: the text first, if there is one, whose lines and tabs may each be stretched."""
    if name not in STRETCHING:
        return
    numbers = [abs(value) for value in values if isinstance(value, int | float)]
    if max(numbers, default=0) > LARGEST:
        raise SecurityError(f"{name} is given a number over {LARGEST:,}")
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        widths = [*numbers, *map(len, texts[1:])]  # an indent may be given as a text
        pieces = 1 + texts[0].count("\n") + texts[0].count("\t")
        _check_size(len(texts[0]) + pieces * max(widths, default=0))


def _check_format(pattern: object, values: Iterable[object]) -> None:
    pattern = str(pattern)
    if WIDE.search(pattern):
        raise SecurityError("the width of a format is over 99,999 or not written out")
    longest = max((len(str(value)) for value in values), default=0)
    _check_size(len(pattern) + (pattern.count("%") + pattern.count("{")) * longest)


def _count_written(value: object) -> object:
    """jinja's `finalize`: sees each value that is written."""
    if isinstance(value, str) and (written := _written.get(None)):
        written[0] += len(value)
        _check_size(written[0])
    return value


@pass_context
def _counted(_context, items: object) -> Iterator:
    """The items of a loop. With the context it is never computed while a template is compiled."""
    for item in items:
        _tick()
        yield item


def _joined(parts: list) -> str:
    """`a ~ b`, within limits."""
    words = [str(part) for part in parts]
    _check_size(sum(map(len, words)))
    return "".join(words)


def _check_replaced(text: object, old: object, new: object, count: int | None = None) -> None:
    text, old = str(text), str(old)
    n_replaced = text.count(old)
    if count is not None and count >= 0:
        n_replaced = min(n_replaced, count)
    _check_size(len(text) + n_replaced * (len(str(new)) - len(old)))


def _measured(items: Iterable[object], between: object) -> Iterator:
    """Items to be joined, one by one while they and what is between them are within limits."""
    size = 0
    for item in items:
        _tick()
        size += len(str(item)) + len(str(between))
        _check_size(size)
        yield item


@pass_eval_context
def _replace(context, s: object, old: object, new: object, count: int | None = None) -> str:
    """jinja's `replace`, within limits."""
    for text in (s, escape(s)):  # {% autoescape %} makes the second of some
        _check_replaced(text, old, new, count)
    return FILTERS["replace"](context, s, old, new, count)


@pass_eval_context
def _join(context, value: Iterable, d: str = "", attribute: str | int | None = None) -> str:
    """jinja's `join`, within limits."""
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return FILTERS["join"](context, _measured(value, d), d)


def _bounded(name: str, function: Callable) -> Callable:
    """A filter that refuses what makes it write without end, as in `center(10 ** 9)`."""

    @wraps(function)
    def checked(*args, **kwargs):
        _check_stretching(name, [*args, *kwargs.values()])
        if name == "format":
            _check_format(args[0], [*args[1:], *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def quoted(text: str) -> str:
    """Someone's text as a Markdown quotation, in which no markup of HTML and no picture acts."""
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text).replace("![", "!\\[")
    return "\n".join(f"> {line}".rstrip() for line in plain.splitlines())


def in_line(text: str) -> str:
    """Someone's words within a line of Markdown, also between backticks; of a path of a machine,
    as a model behind an endpoint may be called, the last part."""
    return without_folder(" ".join(str(text).replace("`", "'").split()))


def fence(text: str, least: int = 3) -> str:
    """The fence for a code block that holds `text`: longer than any in it."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`{3,}", text))])


class _Limited(NodeTransformer):
    """Rewrites a parsed template so that its loops and its `~` pass through the functions above."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


class TaskLoader(FileSystemLoader):
    """Templates of some folders; a link that leads out of the folders beside them is refused."""

    def get_source(self, environment, template: str) -> tuple:
        source = super().get_source(environment, template)
        real = Path(source[1]).resolve()
        if not any(real.is_relative_to(Path(one).resolve().parent) for one in self.searchpath):
            raise SecurityError(f"{template} is a link that leads out of the prompts' folder")
        return source


class TemplateEnvironment(SandboxedEnvironment):
    """jinja for the templates in `folders`. Rendering wants a `limits()` block around it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *folders: Path):
        super().__init__(
            loader=TaskLoader(folders), undefined=StrictUndefined, finalize=_count_written
        )
        del self.filters["random"], self.globals["lipsum"]  # a prompt is the same at every run
        self.filters = {name: _bounded(name, one) for name, one in self.filters.items()}
        self.filters |= {"_counted": _counted, "_joined": _joined}
        self.filters |= {"replace": _replace, "join": _join}
        self.filters |= {"quoted": quoted, "in_line": in_line, "fence": fence}

    def _parse(self, source, name, filename) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Limited().visit(tree)
        return tree.set_environment(self)

    def is_safe_callable(self, obj: object) -> bool:
        if isinstance(obj, (Offered, *OF_JINJA)) or any(obj is g for g in self.globals.values()):
            return True
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        of_plain = isinstance(method, BuiltinMethodType) and isinstance(owner, PLAIN)
        return of_plain or isinstance(owner, Markup)

    def wrap_str_format(self, value: object) -> Callable | None:
        wrapped = super().wrap_str_format(value)
        if not wrapped:
            return None

        @wraps(value)
        def checked(*args, **kwargs) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context, operator: str, left: object, right: object) -> object:
        if operator == "**":
            if not (abs(left) <= LARGEST and abs(right) <= 64):
                raise SecurityError("a power is too large")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else [right])
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _check_size(len(one) * other)
                elif isinstance(one, int) and one.bit_length() > 10_000:
                    raise SecurityError("a product is too large")
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __obj, *args, **kwargs):
        _tick()
        name = getattr(__obj, "__name__", type(__obj).__name__)
        if not __self.is_safe_callable(__obj):
            raise SecurityError(f"a template may not call {name}")
        owner = getattr(__obj, "__self__", None)
        _check_stretching(name, [owner, *args, *kwargs.values()])
        if name == "translate":
            raise SecurityError("a template may not call translate")
        if isinstance(owner, list) and name == "extend":
            _check_size(len(owner) + len(*args))
        elif isinstance(owner, str) and name == "replace":
            _check_replaced(owner, *args)
        elif isinstance(owner, str) and name == "join":
            args = [_measured(items, owner) for items in args]
        return super().call(__context, __obj, *args, **kwargs)
