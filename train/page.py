"""Pages in one file: Jinja templates whose values are escaped, with embedded images."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"


def page_template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """A template of train/templates, with filters of its own. A value that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def data_uri(png: bytes) -> str:
    """A PNG as a URI that an <img> can show."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
