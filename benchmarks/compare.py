"""Find ratios that became slower by more than a fifth between two results of one benchmark.

    python benchmarks/compare.py OLD.json NEW.json

Times of two runs are not comparable, since machines differ and are shared; ratios within a run are. Every
ratio of a result is the time of this library over another time, so a larger ratio is slower. Ends with
status 1 if something is slower, for use in scripts.
"""

import json
import pathlib
import sys

import click

json_file = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)


def ratios(tree, path=()):
    """{path: (ratio, quartiles or None)} for all ratios below."""
    if not isinstance(tree, dict):
        return {}
    found = {}
    if isinstance(tree.get("ratio"), int | float):
        found[path] = tree["ratio"], tree.get("quartiles")
    for name, below in tree.items():
        found |= ratios(below, (*path, name))
    return found


def slower(old, new, by):
    """[(path, old ratio, new ratio, whether their quartiles overlap)], the worst first."""
    before, after = ratios(old), ratios(new)
    found = [
        (path, before[path][0], ratio, overlap(before[path][1], quartiles))
        for path, (ratio, quartiles) in after.items()
        if path in before and ratio > before[path][0] * (1 + by)
    ]
    return sorted(found, key=lambda row: row[1] / row[2])


def overlap(one, other):
    return bool(one and other and one[0] <= other[1] and other[0] <= one[1])


def read(path):
    try:
        return json.loads(path.read_text())
    except ValueError as reason:
        message = f"{path} is no JSON ({reason}); give two files of benchmarks/results"
        raise click.ClickException(message) from None


@click.command(help=__doc__.replace("    python", "\b\n    python"), context_settings={"show_default": True})
@click.argument("old", type=json_file)
@click.argument("new", type=json_file)
@click.option(
    "--by",
    type=click.FloatRange(min=0),
    default=0.2,
    help="Fraction by which a ratio must grow to be reported.",
)
def main(old, new, by):
    contents = read(old), read(new)
    before, after = map(ratios, contents)
    shared = before.keys() & after.keys()
    if not shared:
        raise click.ClickException(f"{old} and {new} have no ratio in common; are they of one benchmark?")
    for name, value in contents[0].get("versions", {}).items():
        other = contents[1].get("versions", {}).get(name)
        if value != other and name != "date":
            click.echo(f"note: {name} was {value} and is {other}")
    for missing, where in ((before.keys() - shared, new), (after.keys() - shared, old)):
        if missing:
            click.echo(f"note: {len(missing)} ratios are not in {where}, {' / '.join(min(missing))} for one")
    rows = slower(*contents, by)
    for path, was, now, both in rows:
        noise = "  (their quartiles overlap: may be noise)" if both else ""
        click.echo(f"{now / was - 1:+6.0%}  {was:.3g} -> {now:.3g}  {' / '.join(path)}{noise}")
    click.echo(f"{len(rows)} of {len(shared)} ratios grew by more than {by:.0%}")
    sys.exit(bool(rows))


if __name__ == "__main__":
    main()
