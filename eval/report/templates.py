"""The templates of the pages: text from files is escaped, and a name that is not given is an error."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def fill(template: str, **values: Any) -> str:
    """Return the text of a template of this room with these values in it."""
    environment = Environment(
        loader=PackageLoader("eval.report", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
