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
    pieces = []
    for piece in doctest.DocTestParser().parse(text):
        if isinstance(piece, str):
            pieces.append(piece.strip("\n"))
            continue
        wide = any(len(line) > widths.WIDTH - 4 for line in piece.source.splitlines())
        lines = (widths.code(piece.source, widths.WIDTH - 4) if wide else piece.source.rstrip()).split("\n")
        prompts = [">>> ", *["... "] * (len(lines) - 1)]
        source = "\n".join((prompt + line).rstrip() for prompt, line in zip(prompts, lines, strict=True))
        pieces.append(source + ("\n" + piece.want.rstrip("\n") if piece.want else ""))
    return "\n".join(filter(None, pieces))
