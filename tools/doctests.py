"""For the reference: the doctest at the end of a docstring is a section of examples."""

import textwrap

import griffe


class Doctests(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring and ">>>" in obj.docstring.value and "Examples:" not in obj.docstring.value:
            obj.docstring.value = with_section(obj.docstring.value)


def with_section(text):
    """The lines from the first `>>>` on, indented under their own heading."""
    before, after = text.split(">>>", 1)
    return before + "Examples:\n" + textwrap.indent(">>>" + after, "    ")
