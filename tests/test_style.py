"""Keep six habits out of all text, since they make sentences sound translated.

Sentences without a verb cannot be matched. The habits below can: each has a pattern, and the words to use
instead.
"""

import ast
import io
import json
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[1]
THIS = pathlib.Path(__file__).resolve()


class Habit(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    instead: str
    bad: tuple[str, ...]  # sentences that it notices
    good: tuple[str, ...] = ()  # sentences that it leaves alone


def words(pattern):
    return re.compile(pattern, re.IGNORECASE)


COUNT = r"(?:one|two|three|four|ten|some|\d+)"
VERB = (
    r"(?:gets?|has|have|is|was|took|takes?|gives?|makes?|needs?|sees?|of|in|to|for|per|with|as|by|on|at|from)"
)
UNIT = (
    "family|method|step|row|letter|draw|year|panel|turn|pixel|bit|gate|page|layer|patch|element|class|module|file"
    "|number|point|frame|image|call|run|key|site"
)

HABITS = (
    Habit(
        "'that of' for a noun",
        words(
            r"\b(?:is|are|be|to|by|of|with|from|than|as|at|and|or|in|against|between|least|most|not|but|default:"
            r"|gradient|density|law|mean|size|backward|,|;|:) (?:that|those) (?:of|on|in|for|from|at)\b"
            r"|\b(?:that|those) of[.;:)]|^(?:that|those) of\b"
        ),
        "repeat the noun: 'the gradient is the gradient of the relaxed sample'",
        (
            "The forward value is one-hot, the gradient that of its relaxation.",
            "The keys are those of Trace_ELBO.",
            "Backward that of the marginals.",
            "That of two Gaussians.",
        ),
        ("You know that of four draws two repeat.", "the methods that exist in NumPyro"),
    ),
    Habit(
        "'by hand' as a noun",
        words(
            r"\b(?:lines?|draws?|bits?|ones?|guides?|code|gradients?|samplers?|cures?) by hand\b"
            r"|\bby hand (?:does|has|is|it)\b"
        ),
        "'hand-written JAX', or 'computed separately'",
        (
            "Moving over from the line by hand.",
            "## Guides by hand",
            "A draw does not depend on it, where one by hand does.",
        ),
        ("It takes hours to do by hand.",),
    ),
    Habit(
        "'a X a Y'",
        words(
            rf"\b(?:an? |{COUNT} (?:\w+ )?)(?!{VERB}\b|and\b|\w+ly\b)\w+s? an? (?:{UNIT})\b"
            r"(?! took| takes| is| has)"
        ),
        "'one X per Y'",
        (
            "A page a family.",
            "A kernel a step.",
            "It spends 1.16 nats a letter.",
            "One uniform number a bit makes both.",
        ),
        (
            "This gives a model a prior.",
            "one page per family",
            "each one gets a gate",
            "convolutions and a layer",
        ),
    ),
    Habit(
        "'come to rest'",
        words(r"\b(?:come|comes|came|coming) to rest\b"),
        "'converge', or 'stay where they are'",
        ("Such logits come to rest where they are.",),
    ),
    Habit(
        "'goes to a vertex'",
        words(
            r"\b(?:goe?s?|went|rounds?|rounded|moves?|near|at|to) (?:to )?(?:an?|the|its) vert(?:ex|ices)\b"
        ),
        "'rounds to a one-hot vector', or 'rounds to a corner'",
        ("At a low temperature a draw goes to a vertex.", "Such a draw rounds to a vertex."),
    ),
    Habit(
        "a clause with 'what' as the subject",
        re.compile(
            r"(?:^|(?<=[.!?] ))What (?!is the\b|are the\b|if\b|about\b|happens if\b)(?:[\w`'-]+ ){1,12}?"
            r"(?:is|are|has|have|does|gets?|goes|stays?|reads?|shares?|counts?)\b[^?]{0,400}(?:\.(?: |$))"
        ),
        "name the thing: 'The tail mass left out is below eps'",
        ("What lies beyond it has a mass below `eps`.", "It fits. What is left is variance."),
        ("What is the mean length of a word?", "What changes with the temperature? Everything."),
    ),
    Habit(
        "a private word",
        words(
            r"\bthe house\b|\bin (?:the|its|a) shel(?:f|ves)\b|\b(?:a|the) room of\b"
            r"|\bfold(?:s|ed)? into the last\b|\bwithout a word\b"
            r"|\ba row of (?:the )?methods\b|\b(?:a|each|every) row (?:a|per) method\b"
        ),
        "'module', 'file', 'method', 'is added to the last value', 'silently'",
        (
            "It is a function of the house.",
            "All beyond is folded into the last value.",
            "It fails without a word.",
        ),
        ("a row of the table",),
    ),
    Habit(
        "'beside' for 'next to', 'compared with' or 'besides'",
        words(r"\bbeside (?:the|an?|each|it|them|this|that|its|their|one|draws?|NumPyro|hand-written)\b"),
        "'next to', 'compared with', or 'besides'",
        ("Its answer is shown beside the exact posterior.",),
        ("Besides the draws, memory holds a few arrays.",),
    ),
    Habit(
        "a British spelling",
        re.compile(
            r"\b(?:un)?(?:[Nn]ormal|[Oo]ptim|[Ii]nitial|[Mm]inim|[Mm]axim|[Ff]actor|[Qq]uant|[Rr]eal|[Rr]andom|[Bb]lackwell"
            r"|[Vv]ectori|[Gg]eneral|[Rr]egular)is(?:ed|es|ing|ation|ations|er|ers|e)\b"
            r"|\b(?:[Nn]eighbour|[Cc]olour|[Bb]ehaviour|[Ff]avour)\w*|\b[Gg]rey\w*|\b[Tt]owards\b"
        ),
        "American spelling: normalize, neighbor, color, gray, toward",
        ("the normalised estimate", "a colour for each weight", "it moves towards the mean"),
        ("the normal distribution", "a promise", "otherwise", "noise"),
    ),
)
HELP = Habit(
    "the help of an option",
    re.compile(r"^(?:Of|By|For|What|How|From|Whose|As)\b|^[a-z]|^.*[^.\])]$", re.DOTALL),
    "a sentence: 'Learning rate of Adam.'",
    ("Of Adam.", "By hand.", "learning rate of Adam.", "Learning rate of Adam"),
    ("Learning rate of Adam.", "Temperature at the start.  [default: the method's own, 1]"),
)


class Text(NamedTuple):
    line: int
    text: str


def paragraphs(lines, first):
    """Lines that belong together, joined, with the number of the first."""
    start, kept = first, []
    for number, line in enumerate([*lines, ""], first):
        line = line.strip()
        new = re.match(r"[-*] |\d+\. |\w+: |#|\|", line)
        if (not line or new) and kept:
            yield Text(start, " ".join(kept))
            kept = []
        if line:
            start, kept = (start if kept else number), [*kept, line]


def plain(text):
    """The text without code and formulas."""
    text = re.sub(r"``[^`]*``|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "x", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)|\]\[[^]]*\]|https?://\S+", "]", text)
    return re.sub(r"[*#|>_]+", " ", text).strip(" -!")


def page(source) -> Iterator[Text]:
    """The prose of a page in Markdown, without blocks of code and formulas."""
    kept, fence = [], None
    for line in source.splitlines():
        mark = re.match(r"\s*(```|~~~|\$\$)", line)
        if mark and not (mark[1] == "$$" and line.strip().endswith("$$") and len(line.strip()) > 2):
            fence = None if fence else mark[1]
            kept.append("")
        else:
            kept.append("" if fence or line.startswith((":::", "{{", "    ")) else line)
    for line, text in paragraphs(kept, 1):
        yield Text(line, plain(text))


def is_docstring(node):
    body = getattr(node, "body", None)
    return (
        isinstance(body, list) and body and isinstance(body[0], ast.Expr)
        and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)
    )  # fmt: skip


def texts_of(node):
    """The text of a string, with a word for each of its placeholders."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts_of(x) if isinstance(x, ast.Constant) else "x" for x in node.values)
    return None


def module(source, strings=True) -> Iterator[Text]:
    """Docstrings, comments and strings with a sentence in them."""
    tree = ast.parse(source)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if is_docstring(node)}
    parts = {id(x) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for x in node.values}
    for node in ast.walk(tree):
        if id(node) in parts or (text := texts_of(node)) is None:
            continue
        if id(node) in docstrings:
            text = re.sub(r"^ *>>> .*?(?=^ *$|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
        elif not strings or text.count(" ") < 3 or re.search(r"^(?:import|from) \w", text, re.MULTILINE):
            continue
        for line, part in paragraphs(text.splitlines(), node.lineno):
            yield Text(line, plain(part))
    start, kept = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if kept and token.start[0] != start + len(kept):
                yield Text(start, plain(" ".join(kept)))
                kept = []
            start, kept = (start if kept else token.start[0]), [*kept, token.string.lstrip("# ")]
    if kept:
        yield Text(start, plain(" ".join(kept)))


def helps(source) -> Iterator[Text]:
    """The help texts of options, of click and of argparse."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "help" and (text := texts_of(node.value)):
            yield Text(node.value.lineno, text)


# Words of recorded outputs and pictures, and of the title of a paper.
RECORDED = {
    "examples/beam_search.py": "normalised",
    "examples/uncertainty.py": "normalised",
    "examples/mixture.py": "neighbours",
    "relaxit_jax/samplers/_straight_through.py": "Optimisation",
}
NAMES = ROOT / "tools" / "mutations.py"  # its strings are names of defects in a recorded output


def read(path) -> Iterator[tuple[int, str, Habit]]:
    """The habits of a file, each with its line and the words in question."""
    source = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        texts = [Text(0, plain(x)) for c in cells if c["cell_type"] == "markdown" for x in c["source"]]
    else:
        texts = page(source) if path.suffix == ".md" else module(source, strings=path != NAMES)
    recorded = RECORDED.get(str(path.relative_to(ROOT))) if path.is_relative_to(ROOT) else None
    for line, text in texts:
        for habit in HABITS:
            if (found := habit.pattern.search(text)) and found[0] != recorded:
                yield line, found[0], habit
    if path.suffix == ".py":
        for line, text in helps(source):
            if HELP.pattern.match(text):
                yield line, text, HELP


def files():
    """All text of the project except recorded outputs, the changelog and this list of habits."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob("notebooks/*.ipynb")]
    found += [path for path in (ROOT / "docs").rglob("*.md") if "outputs" not in path.parts]
    for folder in ("relaxit_jax", "examples", "benchmarks", "tools", "notebooks", "tests"):
        found += (ROOT / folder).rglob("*.py")
    skipped = {THIS, ROOT / "CHANGELOG.md"}
    return sorted(path for path in found if path not in skipped)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_habit_is_back(path):
    found = [f"{path.relative_to(ROOT)}:{line}: {habit.name} ({words!r}); write {habit.instead}"
             for line, words, habit in read(path)]  # fmt: skip
    assert not found, "\n".join(["", *found])


BAD = [(habit, text) for habit in HABITS for text in habit.bad]
GOOD = [(habit, text) for habit in HABITS for text in habit.good]


@pytest.mark.parametrize(("habit", "text"), BAD, ids=lambda x: getattr(x, "name", x))
def test_each_habit_is_noticed(habit, text, tmp_path):
    """Each file type is tried: a page, a docstring, a comment and an error."""
    for name, source in (
        ("page.md", f"# Title\n\nIt is a page.\n\n{text}\n"),
        ("doc.py", f'"""First line.\n\n{text}\n"""\n'),
        ("comment.py", f"x = 1\n# {text}\n"),
        ("error.py", f"def f():\n    raise ValueError(\n        {text!r}\n    )\n"),
    ):
        path = tmp_path / name
        path.write_text(source)
        if name != "error.py" or text.count(" ") >= 3:
            assert habit in {found for _, _, found in read(path)}, (name, text)


@pytest.mark.parametrize(("habit", "text"), GOOD, ids=lambda x: getattr(x, "name", x))
def test_other_sentences_are_left_alone(habit, text):
    assert not habit.pattern.search(text)


def test_code_and_formulas_are_left_alone(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Take `that of`.\n\n```python\n# the normalised one, come to rest\n```\n\n$$\ngrey\n$$\n")
    assert not [*read(path)]


def test_help_texts_are_sentences(tmp_path):
    for text in HELP.bad:
        assert HELP.pattern.match(text), text
    for text in HELP.good:
        assert not HELP.pattern.match(text), text
    path = tmp_path / "options.py"
    path.write_text('x = option("--rate", help="Of Adam.")\n')
    assert [line for line, _, habit in read(path) if habit is HELP] == [1]


def test_a_failure_names_file_line_and_rewrite(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n\nFine.\n\nLogits come to rest.\n")
    ((line, found, habit),) = read(path)
    assert line == 5 and found == "come to rest" and "converge" in habit.instead
