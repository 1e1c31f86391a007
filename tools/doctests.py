"""For the reference: the doctest at the end of a docstring is a section of examples that fits a page."""

import doctest
import textwrap

import griffe

import widths


class Doctests(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring and ">>>" in obj.docstring.value and "Examples:" not in obj.docstring.value:
            obj.docstring.value = with_section(obj.docstring.value)


def with_section(text):
    """The lines from the first `>>>` on, indented under their own heading."""
    before, after = text.split(">>>", 1)
    return before + "Examples:\n" + textwrap.indent(fitted(">>>" + after), "    ")


def fitted(text):
    """A doctest with its inputs formatted to the width."""
    pieces = doctest.DocTestParser().parse(text)
    return "".join(piece if isinstance(piece, str) else written(piece) for piece in pieces)


def written(example):
    """The lines of an input with their prompts, and of its result."""
    source, width = example.source, widths.WIDTH - 4
    if max(map(len, source.splitlines())) > width:
        source = widths.code(source, width)
    first, *rest = source.splitlines()
    return "\n".join([f">>> {first}", *(f"... {line}".rstrip() for line in rest), example.want])
