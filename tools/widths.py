"""Makes what the site includes fit its columns: code and recorded output that are wider elsewhere."""

import ast
import io
import itertools
import re
import subprocess
import textwrap
import tokenize

from ruff.__main__ import find_ruff_bin

PHONE = 40  # characters of a row of a table on a phone
WIDTH = 80  # characters of a code block that a page of 1,280 pixels shows without scrolling


def code(text, width=WIDTH):
    """Python formatted to the width, with its long comments and docstrings wrapped."""
    lines = text.splitlines()
    for first, last in sorted(paragraphs(text), reverse=True):
        if max(map(len, lines[first - 1 : last])) > width:
            lines[first - 1 : last] = filled(lines[first - 1 : last], width)
    command = (find_ruff_bin(), "format", "--isolated", "--line-length", str(width), "-")
    source = "\n".join(lines)
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"cannot format:\n{source}\n{done.stderr}")
    return done.stdout.rstrip()


def paragraphs(text):
    """The first and the last line of each comment, and of each paragraph of a docstring."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.start[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            first, end = node.body[0].lineno, node.body[0].end_lineno
            for number in range(first, end + 1):
                if number == end or not lines[number].strip():
                    yield first, number
                    first = number + 2


def filled(lines, width):
    """A paragraph as lines that fit; a comment after code goes above it."""
    indent = re.match(" *", lines[0])[0]
    before, mark, comment = lines[0].partition("  # ")
    if mark and before.strip():
        return [*filled([f"{indent}# {comment}"], width), before]
    end = [lines.pop()] if lines[-1].strip() == '"""' else []
    start = indent + "# " * lines[0].lstrip().startswith("# ")
    text = " ".join(line.strip() for line in lines)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=start) + end


def output(text):
    """What a program printed: wide gaps between columns closed, long lines continued with an indent."""
    return "\n".join(piece for line in squeezed(text.splitlines()) for piece in pieces(line))


def squeezed(lines):
    """Lines of a table that is too wide, with one blank column between columns of text."""
    for wide, group in itertools.groupby(lines, lambda line: len(line) > WIDTH):
        group = list(group)
        if wide and len(group) > 2:
            length = max(map(len, group))
            blank = [all(line[i : i + 1] in ("", " ") for line in group) for i in range(length)]
            kept = [i for i in range(length) if not all(blank[max(i - 1, 0) : i + 1])]
            group = ["".join(line[i : i + 1] for i in kept).rstrip() for line in group]
        yield from group


def pieces(line):
    """A long line as several, cut after a semicolon, a comma or a column."""
    indent = ""
    while len(indent + line) > WIDTH:
        end = WIDTH - len(indent)
        cut = max(line.rfind(mark, 20, end) + len(mark) for mark in ("; ", ", ", "   "))
        cut = cut if cut > 20 else line.rfind(" ", 0, end) + 1
        if not line[:cut].strip():
            break  # one long word
        yield indent + line[:cut].rstrip()
        indent, line = "    ", line[cut:].lstrip()
    yield indent + line


def table(html):
    """A table whose code breaks between words, and whose rows are lists on a phone where it is too wide.

    The style sheet makes lists of the rows of a table with `data-list`, and shows `data-label` before a cell.
    """
    html = re.sub(r"<code>(.*?)</code>", lambda code: breakable(code[0]), html)
    head = [plain(cell) for cell in re.findall(r"<th[^>]*>(.*?)</th>", html, re.DOTALL)]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in html.split("<tr>")]
    rows = [[plain(cell) for cell in row] for row in rows if row]
    longest = [
        max(len(word) for cell in column for word in cell.split(" "))
        for column in zip(head, *rows, strict=True)
    ]
    if sum(longest) + 2.5 * len(head) <= PHONE and max(len("".join(row)) for row in rows) < 90:
        return html

    def labeled(row):
        cells = iter(head)
        return re.sub("<td", lambda _: f'<td data-label="{next(cells)}"', row[0])

    return re.sub(r"<tr>.*?</tr>", labeled, html, flags=re.DOTALL).replace("<table>", "<table data-list>")


def breakable(code):
    """Code that may break after an underscore, a dot or a bracket, and nowhere within a word."""
    return re.sub(r"([_.(,](?![^<]*>))", r"\1<wbr>", code)


def plain(cell):
    """The text of a cell, with a space where it may break; without tags or quotes."""
    text = re.sub(r"<math.*?</math>", "x" * 12, cell.replace("<wbr>", " "), flags=re.DOTALL)
    return re.sub(r"[ \n]+", " ", re.sub(r"<[^>]*>", "", text)).replace('"', "").strip()
