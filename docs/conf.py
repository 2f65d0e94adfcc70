"""Builds the documentation: `make docs`. Nothing is fetched from a network, and a warning is an error."""

import os
import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.ext.napoleon.docstring import NumpyDocstring

sys.path.insert(0, str(Path(__file__).parent))
import messages

# The notebook's kernel finds the command beside the Python that builds.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

project = "stpath-engine"
author = "The stpath-engine developers"
copyright = author
release = version = installed("stpath-engine")

extensions = [
    "myst_nb",  # Markdown and the notebook
    "sphinx.ext.autodoc",  # the API, from docstrings
    "sphinx.ext.napoleon",  # numpy's sections in them
    "sphinx.ext.viewcode",  # links to the source
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"stpath-engine {release}"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3  # links to headings, as on a code host
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300

default_role = "py:obj"  # `Engine.predict` in a docstring is a link where there is such an object, else code
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_type_aliases = {name: name for name in ("OnTile", "Floats", "Ints", "Arrays")}
napoleon_google_docstring = False
NumpyDocstring._parse_attribute_docstring = NumpyDocstring._consume_to_end  # else what stands before a colon is a type
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"stpath_runtime\.slides\.context\.ContextRows"),  # what a Context is made into; made by it alone
    ("py:obj", ".*"),  # code that is no object of this documentation
    ("py:(class|data)", r"(?!stpath_).*"),  # other libraries' types: their documentation is not fetched
]
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

ARRAY = re.compile(r"[~\w.]*ndarray\[[~\w.]*tuple\[.*?\], [~\w.]*dtype\[(.*?)\]\]")
ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")


def shorten_types(app: Sphinx, *_: object) -> None:
    """Write NDArray[float32] where Sphinx spells out what that stands for."""
    for types in app.env.current_document.autodoc_annotations.values():
        types.update({name: ALIAS.sub(r"\1", ARRAY.sub(r"NDArray[\1]", shown)) for name, shown in types.items()})


def add_messages(app: Sphinx, page: str, source: list[str]) -> None:
    """Add the list of messages, which is read from the code, to the page of errors."""
    if page == "errors":
        source[0] += "\n" + messages.listing()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_lexer("csv", TextLexer)  # Pygments has none
    app.connect("source-read", add_messages)
    app.connect("object-description-transform", shorten_types, priority=400)  # before types are written
