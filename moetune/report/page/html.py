"""Writes profiles as one HTML page that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Final

from moetune._version import __version__
from moetune.errors import UsageError
from moetune.quoting import printable
from moetune.report.lines import layer_line, recording_line, regime_line
from moetune.report.page.figure import Figure, NumberTable, Style
from moetune.report.page.numbers import Shown
from moetune.report.page.single import figures_of
from moetune.report.page.summary import summary_rows, titles
from moetune.report.page.together import figures_together
from moetune.report.tune_command import can_ask, whole_command

INSTALL: Final = 'pip install "plotly>=6.0"'


def page(profiles: Sequence[Shown], command: str, written_at: str) -> str:
    """Returns the page: what all profiles have, then each profile's figures, environment and origin.

    The Content-Security-Policy of the page forbids every request, and every script but the two of the page, which it
    knows by their digests. So text of a profile could start nothing, even if it were not escaped.

    Args:
        profiles: the profiles; at least one.
        command: the command that writes the page, as the user can run it again.
        written_at: the day on which it is written, ISO 8601.

    Raises:
        UsageError: plotly is not installed.
    """
    plotly, script = plotly_js(), _file("page.js")
    drawn: list[tuple[str, Figure]] = []
    parts = [_together(profiles, drawn), *(_single(each, at, drawn) for at, each in enumerate(profiles))]
    names = list(dict.fromkeys(each.profile.layer.name for each in profiles))
    about = f"Written {written_at} by moetune {__version__} with <code>{_text(command)}</code>"
    return _filled(
        _file("page.html"),
        {
            "policy": (
                f"default-src 'none'; script-src '{_digest(plotly)}' '{_digest(script)}'; "
                "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
            ),
            "version": __version__,
            "title": _text(f"moetune: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"),
            "style": _file("page.css"),
            "about": about,
            "content": "\n".join(parts),
            "profiles": _json([json.loads(each.profile.model_dump_json()) for each in profiles]),
            "figures": _json(
                [
                    {"id": name, "data": figure.traces, "layout": figure.layout, "height": figure.height}
                    for name, figure in drawn
                ]
            ),
            "plotly": plotly,
            "script": script,
        },
    )


def plotly_js() -> str:
    """Returns plotly's script.

    Raises:
        UsageError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(
            "The page's figures are drawn by plotly, which is not installed.",
            f"Install it: {INSTALL}. Without it, leave -o out: --csv and the table need no plotly.",
        ) from None
    return str(get_plotlyjs()).replace("\r", "")


def _together(profiles: Sequence[Shown], drawn: list[tuple[str, Figure]]) -> str:
    overview = _table(NumberTable(titles(), summary_rows(profiles)), "All profiles", words=True)
    figures = [_figure(figure, drawn) for figure in figures_together(profiles)]
    return f'<section>\n{overview}\n<div class="figures">\n{"".join(figures)}</div>\n</section>'


def _single(shown: Shown, at: int, drawn: list[tuple[str, Figure]]) -> str:
    profile = shown.profile
    figures = [_figure(figure, drawn) for figure in figures_of(shown, Style(at))] if profile.choices else []
    lines = [layer_line(profile.layer), regime_line(profile.regime)]
    lines += [recording_line(profile.recording)] if profile.recording else []
    lines += [f"backend {profile.backend} on {profile.environment.device}"]
    lines += [] if figures else ["No bucket is tuned yet."]
    about = "\n".join(f"<p>{_text(line)}</p>" for line in lines)
    return (
        f"<section>\n<h2>{_text(shown.label)}</h2>\n{about}\n"
        f'<div class="figures">\n{"".join(figures)}</div>\n{_origin(shown)}\n</section>'
    )


def _origin(shown: Shown) -> str:
    """Returns the file, the command that tunes it, the environment, the days and the digests, as a table."""
    profile = shown.profile
    days = sorted(choice.measured_at for choice in profile.choices)
    sources = sorted({choice.default_source for choice in profile.choices if choice.default_source})
    again = [("command", whole_command(profile))] if can_ask(profile) else []
    entries = [("file", shown.path), *again, ("device", profile.environment.device)]
    entries += [(name, str(value)) for name, value in profile.environment.strict.items()]
    entries += [(name, str(value)) for name, value in profile.environment.informative.items()]
    entries += [("measured", days[0] if days[0] == days[-1] else f"{days[0]} … {days[-1]}")] if days else []
    entries += [("default from", source) for source in sources]
    entries += [("digest of the regime", profile.regime.digest), ("of the environment", profile.environment.digest)]
    table = NumberTable(("field", "value"), [(name, value) for name, value in entries])
    return f"<details><summary>Environment and origin</summary>{_table(table, 'Environment', words=True)}</details>"


def _figure(figure: Figure, drawn: list[tuple[str, Figure]]) -> str:
    name = f"figure-{len(drawn) + 1}"
    drawn.append((name, figure))
    return (
        f"<figure>\n<figcaption><h3>{_text(figure.title)}</h3>"
        f'<p id="{name}-text">{_text(figure.text)}</p></figcaption>\n'
        f'<div class="plot" id="{name}" role="img" aria-label="{_text(figure.title)}" aria-describedby="{name}-text" '
        f'style="height:{figure.height}px"></div>\n'
        f"<details><summary>Numbers</summary>{_table(figure.table, figure.title)}</details>\n</figure>\n"
    )


def _table(table: NumberTable, caption: str, *, words: bool = False) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in table.titles)
    body = "\n".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    kind = ' class="text"' if words else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table{kind}>'
        f"<caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _text(text: str) -> str:
    """Returns text for HTML, also inside an attribute's quotes."""
    return escape(printable(text))


def _json(value: object) -> str:
    """Returns JSON for a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _filled(template: str, values: dict[str, str]) -> str:
    """Returns the template with its `{{names}}` replaced, once: what is put in is not read again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template)
