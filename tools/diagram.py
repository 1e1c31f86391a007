"""Draws the decision diagram of *Which method?* as SVG: a column of questions, each with an answer.

The page holds it twice, wide and narrow; the style sheet shows the one that fits. Colors come from the theme.
"""

import html
import textwrap

# Question; the answer that leads out to the right, what to take there, and a link; the answer that leads on.
QUESTIONS = (
    (
        "Is your model written in NumPyro?",
        "yes",
        "RLOO_ELBO; relax, if that does not converge",
        "#6-is-it-a-numpyro-model",
        "no",
    ),
    (
        "Do you compress vectors to codes, as in a VQ-VAE?",
        "yes",
        "finite_scalar_quantize, vector_quantize",
        "#codes-or-categories",
        "no",
    ),
    (
        "Do you draw counts, k of n, permutations, sequences or trees?",
        "yes",
        "generalized_gumbel_softmax, simple_top_k, gumbel_sinkhorn, structured",
        "#5-what-is-drawn-bits-categories-counts-subsets-permutations",
        "no: bits or categories",
    ),
    (
        "Should gates close completely, at exactly 0?",
        "yes",
        "hard_concrete, gaussian_bernoulli",
        "../families/binary/",
        "no",
    ),
    (
        "Does the loss have a slope between the outcomes?",
        "no",
        "unbiased: disarm for bits, arms or rloo",
        "#1-does-f-have-values-between-the-outcomes-and-a-slope-there",
        "yes",
    ),
    (
        "Can you pay for hundreds of calls of the loss?",
        "yes",
        "unbiased: arms, rloo, rebar",
        "#2-how-many-calls-of-f-does-a-step-pay-for",
        "no",
    ),
    (
        "Does the loss make sense only at the outcomes?",
        "yes",
        "exact draws: hard=True, straight_through_bernoulli, reinmax",
        "#3-how-is-f-curved",
        "no",
    ),
)
LAST = ("relaxed_bernoulli or gumbel_softmax, tau from 0.5 to 1", "#4-which-temperature")

LINE = 19  # pixels from one line of text to the next
PAD = 11


class Drawing:
    def __init__(self, width):
        self.width, self.parts = width, []

    def box(self, x, y, width, text, link=None):
        """Draw a question, or an answer that links to its section; give its height."""
        lines = textwrap.wrap(text, int((width - 2 * PAD) / 7.6))
        height = len(lines) * LINE + 2 * PAD
        rows = "".join(
            f'<tspan x="{x + width / 2:g}" y="{y + PAD + 14 + i * LINE:g}">{html.escape(line)}</tspan>'
            for i, line in enumerate(lines)
        )
        kind = "answer" if link else "question"
        shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{16 if link else 3}"/>'
        inside = f'<g class="{kind}">{shape}<text>{rows}</text></g>'
        self.parts.append(f'<a href="{link}">{inside}</a>' if link else inside)
        return height

    def arrow(self, *points, label, at):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        (_, y0), (x, y) = points[-2:]
        tip = [(x - 7, y - 4), (x - 7, y + 4)] if y0 == y else [(x - 4, y - 7), (x + 4, y - 7)]
        head = " ".join(f"{a:g},{b:g}" for a, b in [(x, y), *tip])
        self.parts.append(f'<polyline points="{path}"/><polygon points="{head}"/>')
        self.parts.append(f'<text class="label" x="{at[0]:g}" y="{at[1]:g}">{label}</text>')

    def svg(self, height, name):
        title = "Decision diagram: questions about your problem, each with the method to take"
        view = f'viewBox="0 0 {self.width} {height:g}" role="img" aria-label="{title}"'
        return f'<svg class="decision {name}" {view}>{"".join(self.parts)}</svg>'


def wide():
    """Answers to the right of their questions."""
    drawing, y, question, gap = Drawing(740), 2, 300, 34
    for text, leave, take, link, on in QUESTIONS:
        height = drawing.box(2, y, question, text)
        middle = y + height / 2
        lines = len(textwrap.wrap(take, int((360 - 2 * PAD) / 7.6)))
        drawing.box(378, middle - (lines * LINE + 2 * PAD) / 2, 360, take, link)
        drawing.arrow((question + 2, middle), (378, middle), label=leave, at=(340, middle - 6))
        end = y + height + gap
        drawing.arrow((150, y + height), (150, end), label=on, at=(158 + 3.6 * len(on), end - 12))
        y = end
    height = drawing.box(2, y, question, *LAST)
    return drawing.svg(y + height + 2, "wide")


def narrow():
    """Answers below their questions, set in."""
    drawing, y = Drawing(330), 2
    for text, leave, take, link, on in QUESTIONS:
        height = drawing.box(2, y, 326, text)
        top = y + height + 14
        tall = drawing.box(92, top, 236, take, link)
        middle = top + tall / 2
        drawing.arrow((46, y + height), (46, middle), (92, middle), label=leave, at=(68, middle - 6))
        end = top + tall + 18
        drawing.arrow((18, y + height), (18, end), label=on, at=(26 + 3.6 * len(on), end - 6))
        y = end
    height = drawing.box(2, y, 326, *LAST)
    return drawing.svg(y + height + 2, "narrow")


def decision():
    return f"<div>{wide()}{narrow()}</div>"


def links():
    return [link for *_, link, _ in QUESTIONS] + [LAST[1]]
